"""Sums, means, variances, norms of vectors, cumsum, softmax and topk: all over the rows of a matrix."""

import math
from collections.abc import Sequence

import torch
from pytest_batchinv.kernels.aten.common import as_floats, factor, kernel_set, shape_of, usual, wrap_dim
from pytest_batchinv.kernels.complex_parts import magnitude
from pytest_batchinv.kernels.reference import accumulator_dtype
from torch import Tensor


def sum_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return sum_dim(self, None, dtype=dtype)


def sum_dim(self: Tensor, dim, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _reduce(self, dim, keepdim, dtype, "sum")


def mean_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return mean_dim(self, None, dtype=dtype)


def mean_dim(self: Tensor, dim, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _reduce(self, dim, keepdim, dtype, "mean")


def _reduce(x: Tensor, dim, keepdim: bool, dtype: torch.dtype | None, result: str) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    out = usual("reduce", x, dim, keepdim, result)
    if out is not None:
        return out
    rows, kernels = _Rows(x, dim, keepdim), kernel_set(x)
    kernel = kernels.row_sum if result == "sum" else kernels.row_mean
    return rows.restore(kernel(rows.matrix, x.dtype))


MEAN_OF_SQUARES_SCHEMA = "mean_of_squares(Tensor self, int[1]? dim, bool keepdim) -> Tensor"


def mean_of_squares(self: Tensor, dim, keepdim: bool) -> Tensor:
    """``mean_dim`` of ``x * x`` for x = self in the accumulator's dtype, bit for bit, but the squares stay in registers."""
    rows = _Rows(self, dim, keepdim)
    return rows.restore(kernel_set(self).row_mean_of_squares(rows.matrix, accumulator_dtype(self.dtype)))


def mean_of_squares_fake(self: Tensor, dim, keepdim: bool) -> Tensor:
    shape = torch.mean(self, dim, keepdim).shape
    return self.new_empty(shape, dtype=accumulator_dtype(self.dtype))


def var(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    out = usual("reduce", self, dim, keepdim, "var", _correction(correction))
    return var_mean(self, dim, correction=correction, keepdim=keepdim)[0] if out is None else out


def std(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return std_mean(self, dim, correction=correction, keepdim=keepdim)[0]


def var_mean(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    rows = _Rows(self, dim, keepdim)
    var, mean = kernel_set(self).row_var_mean(rows.matrix, _correction(correction), self.dtype)
    return rows.restore(var), rows.restore(mean)


def std_mean(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    rows, real_dtype = _Rows(self, dim, keepdim), self.dtype.to_real()
    var, mean = kernel_set(self).row_var_mean(rows.matrix, _correction(correction), accumulator_dtype(real_dtype))
    return rows.restore(var.sqrt().to(real_dtype)), rows.restore(mean.to(self.dtype))


def logsumexp(self: Tensor, dim, keepdim: bool = False) -> Tensor:
    self = as_floats(self)
    rows = _Rows(self, dim, keepdim)
    return rows.restore(kernel_set(self).row_logsumexp(rows.matrix, self.dtype))


def vector_norm(self: Tensor, ord: float = 2, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    """p = 1 and p = 2 in one kernel; other p as a sum of powers; 0 counts; infinite p is a maximum, free of any order."""
    dtype = dtype or self.dtype
    if not self.is_floating_point() and not self.is_complex():  # the errors are of torch's types
        error = RuntimeError if torch.__version__ < "2.14" else NotImplementedError
        raise error(f"linalg.vector_norm is for floats, not for {self.dtype}: convert it to the dtype {dtype} first")
    if dtype.is_complex != self.is_complex() or torch.promote_types(self.dtype, dtype) != dtype:
        raise RuntimeError(f"linalg.vector_norm: {self.dtype} cannot be converted without narrowing to the dtype {dtype}")
    x = magnitude(self.to(dtype)) if dtype.is_complex else self.to(dtype)
    rows = _Rows(x, dim, keepdim)
    kernels, p = kernel_set(x), factor(ord, x)
    if not rows.matrix.shape[1] and (p < 0 or math.isinf(p)):
        raise RuntimeError(f"linalg.vector_norm cannot compute the norm of order {p} of no values: it has no identity")
    if p in (1.0, 2.0):
        return rows.restore(kernels.row_norm(rows.matrix, p, x.dtype))
    magnitudes = rows.matrix.abs()
    if math.isinf(p):
        return rows.restore(magnitudes.amax(1) if p > 0 else magnitudes.amin(1))
    wide = accumulator_dtype(x.dtype)
    if p == 0.0:
        return rows.restore(kernels.row_sum((magnitudes != 0).to(wide), wide).to(x.dtype))
    total = kernels.row_sum(magnitudes.to(wide).pow(p), wide)
    return rows.restore(total.pow(1.0 / p).to(x.dtype))


def norm_all(self: Tensor, p: float = 2) -> Tensor:
    return vector_norm(self, p)


def norm_all_dtype(self: Tensor, p: float | None, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dtype=dtype)


def norm_dim(self: Tensor, p: float | None, dim, keepdim: bool = False) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim)


def norm_dim_dtype(self: Tensor, p: float | None, dim, keepdim: bool, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


def cumsum(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    x = self.to(dtype or self.dtype)
    return _along(x, dim, lambda matrix: kernel_set(x).row_cumsum(matrix, x.dtype))


def softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _softmax(self, dim, half_to_float, False)


def log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _softmax(self, dim, half_to_float, True)


CHOSEN_LOGPROBS_SCHEMA = "chosen_logprobs(Tensor self, Tensor index, ScalarType dtype) -> Tensor"


def chosen_logprobs(self: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``log_softmax(self.to(dtype), -1).gather(-1, index)``, bit for bit, but on a GPU only what is chosen is ever written.

    self: [..., vocab]; index: int64 [..., k] with the same leading dims -> [..., k].
    """
    rows, columns = (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (self, index))
    return kernel_set(self).row_logprobs(rows, columns, dtype).view(index.shape)


def chosen_logprobs_fake(self: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return self.new_empty(index.shape, dtype=dtype)


def _softmax(x: Tensor, dim: int, half_to_float: bool, log: bool) -> Tensor:
    out_dtype = _softmax_dtype(x, half_to_float)
    out = usual("softmax", x, dim, log, out_dtype)
    return _along(x, dim, lambda matrix: kernel_set(x).row_softmax(matrix, log, out_dtype)) if out is None else out


def _softmax_dtype(x: Tensor, half_to_float: bool) -> torch.dtype:
    if not half_to_float:
        return x.dtype
    if x.device.type == "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"softmax: half_to_float is for float16 and bfloat16 on a GPU, not {x.dtype} on {x.device}")
    return torch.float32


def topk(self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """Ties go to the lower index for any number of rows, NaN counts as the largest, 0.0 and -0.0 are equal."""
    dim = wrap_dim(self, dim)
    n = self.shape[dim] if self.dim() else 1
    if not 0 <= k <= n:
        raise RuntimeError(f"topk: k must be from 0 to the size of dimension {dim} of {shape_of(self)}, but is {k}")
    if self.dim() and self.dtype != torch.float64 and (n > _SORTED_UP_TO or self.device.type == "cpu"):
        indices = _topk_of_keys(self, k, dim, largest)
        return self.gather(dim, indices), indices
    x = self
    if x.is_cuda:  # its sort puts a NaN with the sign bit set in front of -inf: all of them become one without
        x = x.nan_to_num(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    if self.dim():
        values, indices = values.narrow(dim, 0, k), indices.narrow(dim, 0, k)
    return values.contiguous(), indices.contiguous()


_SORTED_UP_TO = 1024
"""Columns up to which a GPU sorts all values, in fewer launches than selecting takes. Both give the same result."""


def _topk_of_keys(x: Tensor, k: int, dim: int, largest: bool) -> Tensor:
    """The indices of the first k, by torch's own topk of 64-bit keys without ties: the value's rank, then its column.

    A float's bits ascend with its value where the sign bit is 0, and descend where it is 1.
    """
    bits = (x.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    rank = torch.where(x.isnan(), 2**31 - 1, bits ^ ((bits >> 31) & (2**31 - 1)))
    column = torch.arange(x.shape[dim], device=x.device)
    column = (x.shape[dim] - 1 - column if largest else column).view([-1 if d == dim else 1 for d in range(x.dim())])
    keys = torch.topk((rank.long() << 32) | column, k, dim, largest, sorted=True).values
    column = keys & (2**32 - 1)
    return (x.shape[dim] - 1 - column if largest else column).contiguous()


class _Rows:
    """A tensor as [rows, n_cols] over the dims that are reduced, and the way back for one value a row."""

    def __init__(self, x: Tensor, dim: int | Sequence[int] | None, keepdim: bool) -> None:
        dims = _dims(x, dim)
        kept = [d for d in range(x.dim()) if d not in dims]
        n_cols = math.prod([x.shape[d] for d in dims])
        n_rows = math.prod([x.shape[d] for d in kept])
        order = kept + dims
        x_last = x if order == sorted(order) else x.permute(order)
        self.matrix = x_last if x.dim() == 2 and len(dims) == 1 else x_last.reshape(n_rows, n_cols)
        self._shape = [1 if d in dims else x.shape[d] for d in range(x.dim()) if keepdim or d not in dims]

    def restore(self, values: Tensor) -> Tensor:
        return values.view(self._shape)


def _dims(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    """The reduced dims in ascending order; none given, or an empty list, means all of them."""
    if not isinstance(dim, int) and not dim:
        return list(range(x.dim()))
    wrapped = sorted([wrap_dim(x, d) for d in ([dim] if isinstance(dim, int) else dim)])
    if len(set(wrapped)) != len(wrapped):
        raise RuntimeError(f"a dim appears multiple times in the list of dims {dim}")
    return wrapped if x.dim() else []


def _along(x: Tensor, dim: int, function) -> Tensor:
    """``function`` of [rows, n_cols] -> [rows, n_cols], applied along any dim."""
    dim = wrap_dim(x, dim)
    if x.dim() == 0:
        return function(x.view(1, 1)).view(())
    if dim == x.dim() - 1:
        return function(x) if x.dim() == 2 else function(x.reshape(math.prod(x.shape[:-1]), x.shape[-1])).view(x.shape)
    moved = x.movedim(dim, -1)
    n_cols = moved.shape[-1]
    out = function(moved.reshape(math.prod(moved.shape[:-1]), n_cols))
    return out.view(moved.shape).movedim(-1, dim).contiguous()


def _correction(correction: float | None) -> float:
    return 1.0 if correction is None else float(correction)
