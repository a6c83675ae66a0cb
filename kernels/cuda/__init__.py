"""The kernel set for CUDA: the launchers of the Triton kernels, by the names of ``reference.py``."""

from ..matmul import gemm, grouped_gemm
from ..norm import row_layer_norm, row_rms_norm
from ..reduce import row_cumsum, row_logsumexp, row_mean, row_mean_of_squares, row_norm, row_sum, row_var_mean
from ..scatter import index_add
from ..softmax import row_logprobs, row_softmax
from .attention import attention, packed_attention

__all__ = [
    "attention",
    "gemm",
    "grouped_gemm",
    "index_add",
    "packed_attention",
    "row_cumsum",
    "row_layer_norm",
    "row_logprobs",
    "row_logsumexp",
    "row_mean",
    "row_mean_of_squares",
    "row_norm",
    "row_rms_norm",
    "row_softmax",
    "row_sum",
    "row_var_mean",
]
