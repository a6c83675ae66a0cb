"""The kernel set for CUDA: the launchers of the Triton kernels, by the names of ``reference.py``, and their plans.

``plan_<name>`` takes the descriptions of the tensors and the other arguments. What it returns takes tensors at such addresses.
"""

from .attention import attention, attention_backward, packed_attention, plan_attention
from .implicit_gemm import convolution
from .matmul import gemm, grouped_gemm, grouped_gemm_over_k, plan_gemm
from .norm import (
    plan_row_layer_norm,
    plan_row_norm_backward,
    plan_row_rms_norm,
    row_layer_norm,
    row_norm_backward,
    row_rms_norm,
)
from .ranks import tree_sum
from .reduce import (
    plan_row_cumsum,
    plan_row_logsumexp,
    plan_row_mean,
    plan_row_mean_of_squares,
    plan_row_norm,
    plan_row_sum,
    plan_row_var_mean,
    row_cumsum,
    row_logsumexp,
    row_mean,
    row_mean_of_squares,
    row_norm,
    row_sum,
    row_var_mean,
)
from .scaled import scaled_gemm, scaled_grouped_gemm, scaled_grouped_gemm_over_k
from .scatter import index_add
from .softmax import (
    plan_row_logprobs,
    plan_row_softmax,
    plan_row_softmax_backward,
    row_logprobs,
    row_softmax,
    row_softmax_backward,
)

__all__ = [
    "attention",
    "attention_backward",
    "convolution",
    "gemm",
    "grouped_gemm",
    "grouped_gemm_over_k",
    "index_add",
    "packed_attention",
    "plan_attention",
    "plan_gemm",
    "plan_row_cumsum",
    "plan_row_layer_norm",
    "plan_row_logprobs",
    "plan_row_logsumexp",
    "plan_row_mean",
    "plan_row_mean_of_squares",
    "plan_row_norm",
    "plan_row_norm_backward",
    "plan_row_rms_norm",
    "plan_row_softmax",
    "plan_row_softmax_backward",
    "plan_row_sum",
    "plan_row_var_mean",
    "row_cumsum",
    "row_layer_norm",
    "row_logprobs",
    "row_logsumexp",
    "row_mean",
    "row_mean_of_squares",
    "row_norm",
    "row_norm_backward",
    "row_rms_norm",
    "row_softmax",
    "row_softmax_backward",
    "row_sum",
    "row_var_mean",
    "scaled_gemm",
    "scaled_grouped_gemm",
    "scaled_grouped_gemm_over_k",
    "tree_sum",
]
