"""Which operators outside the table are safe: those that compute each row from that row alone, without a sum on floats."""

import torch
from torch._ops import OpOverload

ROW_LOCAL = {
    # copies, creation and indexing: values move, none is computed
    "_to_copy", "clone", "copy", "copy_", "contiguous", "cat", "stack", "index", "index_select", "gather", "embedding",
    "scatter", "scatter_", "masked_fill", "masked_fill_", "masked_scatter", "where", "constant_pad_nd", "repeat", "roll",
    "flip", "tril", "triu", "arange", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full", "scalar_tensor",
    "lift_fresh", "lift_fresh_copy", "detach", "fill", "fill_", "zero_", "eye", "repeat_interleave", "unfold_copy",
    "select_scatter", "slice_scatter", "as_strided", "resize_", "set_", "alias", "one_hot",
    "_local_scalar_dense", "item", "linspace", "meshgrid", "slice", "diagonal", "nonzero",
    "index_copy", "index_copy_",
    "_assert_async", "_assert_tensor_metadata", "_unsafe_view", "unbind", "split", "is_same_size", "equal",
    # gradients: copies of one, or one product for each value
    "slice_backward", "select_backward", "diagonal_backward", "value_selecting_reduction_backward", "nll_loss_backward",
    "nll_loss2d_backward", "threshold_backward", "hardtanh_backward", "leaky_relu_backward",
    # exact whatever the order: maxima, comparisons, sorting, counting, integers
    "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "sort", "argsort", "histc", "bincount", "isin",
    "searchsorted", "bucketize", "unique_consecutive", "cummax", "cummin", "aminmax", "_unique2", "count_nonzero",
    # pointwise operators that lack torch's tag for it
    "silu", "silu_", "gelu", "gelu_", "relu", "relu_", "hardtanh", "mish", "softplus", "elu", "leaky_relu", "log_sigmoid",
    "log_sigmoid_forward", "glu", "pow", "rsub", "clamp", "clamp_", "isfinite", "isnan", "isinf", "nan_to_num", "complex",
    "polar", "floor_divide", "view_as_real", "view_as_complex", "real", "imag", "rms_norm", "remainder",
}  # fmt: skip
"""Base names of aten operators, without overload."""


def is_row_local(overload: OpOverload) -> bool:
    """Pointwise operators and views by torch's own tags and schemas; the others by the lists above."""
    return torch.Tag.pointwise in overload.tags or overload.is_view or _base_name(overload) in ROW_LOCAL


def _base_name(overload: OpOverload) -> str:
    return overload._schema.name.split("::", 1)[1]
