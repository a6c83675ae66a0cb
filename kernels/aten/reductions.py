"""Sums, means, variances, norms of vectors, products, cumulated sums, softmax and topk: all over the rows of a matrix."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import (
    after,
    as_floats,
    factor,
    hashable,
    kernel_set,
    merged,
    planned,
    shape_of,
    wrap_dim,
)
from pytest_batchinv.kernels.complex_parts import magnitude
from pytest_batchinv.kernels.plans import Description, describe, plan
from pytest_batchinv.kernels.reference import accumulator_dtype

Dims = int | tuple[int, ...] | None


def sum_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return sum_dim(self, None, dtype=dtype)


def sum_dim(self: Tensor, dim, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _plan_sum(describe(self), hashable(dim), keepdim, dtype, "row_sum")(self)


def mean_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return mean_dim(self, None, dtype=dtype)


def mean_dim(self: Tensor, dim, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _plan_sum(describe(self), hashable(dim), keepdim, dtype, "row_mean")(self)


@plan
def _plan_sum(x: Description, dim: Dims, keepdim: bool, dtype: torch.dtype | None, kernel: str) -> Callable[[Tensor], Tensor]:
    if dtype not in (None, x.dtype):

        def converted(x: Tensor) -> Tensor:
            x = x.to(dtype)
            return _plan_sum(describe(x), dim, keepdim, None, kernel)(x)

        return converted
    return _over_rows(x, dim, keepdim, kernel, x.dtype)


MEAN_OF_SQUARES_SCHEMA = "mean_of_squares(Tensor self, int[1]? dim, bool keepdim) -> Tensor"


def mean_of_squares(self: Tensor, dim, keepdim: bool) -> Tensor:
    """``mean_dim`` of ``x * x`` for x = self in the accumulator's dtype, bit for bit, but the squares stay in registers."""
    return _plan_mean_of_squares(describe(self), hashable(dim), keepdim)(self)


@plan
def _plan_mean_of_squares(x: Description, dim: Dims, keepdim: bool) -> Callable[[Tensor], Tensor]:
    return _over_rows(x, dim, keepdim, "row_mean_of_squares", accumulator_dtype(x.dtype))


def mean_of_squares_fake(self: Tensor, dim, keepdim: bool) -> Tensor:
    shape = torch.mean(self, dim, keepdim).shape
    return self.new_empty(shape, dtype=accumulator_dtype(self.dtype))


def var(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _plan_var(describe(self), hashable(dim), keepdim, _correction(correction))(self)


def std(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return std_mean(self, dim, correction=correction, keepdim=keepdim)[0]


def var_mean(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _plan_var_mean(describe(self), hashable(dim), keepdim, _correction(correction))(self)


def std_mean(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _plan_std_mean(describe(self), hashable(dim), keepdim, _correction(correction))(self)


def _correction(correction: float | None) -> float:
    return 1.0 if correction is None else float(correction)


@plan
def _plan_var(x: Description, dim: Dims, keepdim: bool, correction: float) -> Callable[[Tensor], Tensor]:
    var_mean = _over_rows(x, dim, keepdim, "row_var_mean", correction, x.dtype, with_mean=False)
    return lambda x: var_mean(x)[0]


@plan
def _plan_var_mean(x: Description, dim: Dims, keepdim: bool, correction: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return _over_rows(x, dim, keepdim, "row_var_mean", correction, x.dtype)


@plan
def _plan_std_mean(x: Description, dim: Dims, keepdim: bool, correction: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """In the accumulator's dtype, and rounded once after the root."""
    dtype, real_dtype = x.dtype, x.dtype.to_real()
    var_mean = _over_rows(x, dim, keepdim, "row_var_mean", correction, accumulator_dtype(real_dtype))

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = var_mean(x)
        return var.sqrt().to(real_dtype), mean.to(dtype)

    return call


def logsumexp(self: Tensor, dim, keepdim: bool = False) -> Tensor:
    self = as_floats(self)
    return _plan_logsumexp(describe(self), hashable(dim), keepdim)(self)


@plan
def _plan_logsumexp(x: Description, dim: Dims, keepdim: bool) -> Callable[[Tensor], Tensor]:
    return _over_rows(x, dim, keepdim, "row_logsumexp", x.dtype)


def vector_norm(self: Tensor, ord: float = 2, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    """p = 1 and p = 2 in one kernel; other p as a sum of powers; 0 counts; infinite p is a maximum, free of any order."""
    return _plan_vector_norm(describe(self), ord, hashable(dim), keepdim, dtype)(self)


@plan
def _plan_vector_norm(
    x: Description, ord: float, dim: Dims, keepdim: bool, dtype: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    dtype = dtype or x.dtype
    if not x.is_floating_point() and not x.is_complex():  # the errors are of torch's types
        error = RuntimeError if torch.__version__ < "2.14" else NotImplementedError
        raise error(f"linalg.vector_norm is for floats, not for {x.dtype}: convert it to the dtype {dtype} first")
    if dtype.is_complex != x.is_complex() or torch.promote_types(x.dtype, dtype) != dtype:
        raise RuntimeError(f"linalg.vector_norm: {x.dtype} cannot be converted without narrowing to the dtype {dtype}")
    if dtype.is_complex:
        return lambda x: vector_norm(magnitude(x.to(dtype)), ord, dim, keepdim)
    if dtype != x.dtype:
        return lambda x: vector_norm(x.to(dtype), ord, dim, keepdim)
    rows, p = _Rows(x, dim, keepdim), factor(ord, x)
    if not rows.n_cols and (p < 0 or math.isinf(p)):
        raise RuntimeError(f"linalg.vector_norm cannot compute the norm of order {p} of no values: it has no identity")
    if p in (1.0, 2.0):
        return _over_rows(x, dim, keepdim, "row_norm", p, dtype)
    row_sum, wide = kernel_set(x).row_sum, accumulator_dtype(dtype)

    def call(x: Tensor) -> Tensor:
        magnitudes = rows.of(x).abs()
        if math.isinf(p):
            return (magnitudes.amax(1) if p > 0 else magnitudes.amin(1)).view(rows.shape)
        if p == 0.0:
            return row_sum((magnitudes != 0).to(wide), wide).to(dtype).view(rows.shape)
        return row_sum(magnitudes.to(wide).pow(p), wide).pow(1.0 / p).to(dtype).view(rows.shape)

    return call


def norm_all(self: Tensor, p: float = 2) -> Tensor:
    return vector_norm(self, p)


def norm_all_dtype(self: Tensor, p: float | None, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dtype=dtype)


def norm_dim(self: Tensor, p: float | None, dim, keepdim: bool = False) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim)


def norm_dim_dtype(self: Tensor, p: float | None, dim, keepdim: bool, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


def cumsum(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    x = self if dtype is None else self.to(dtype)
    return _plan_cumsum(describe(x), dim)(x)


@plan
def _plan_cumsum(x: Description, dim: int) -> Callable[[Tensor], Tensor]:
    return _along(x, dim, "row_cumsum", x.dtype)


def nansum(self: Tensor, dim=None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """``sum_dim`` with zeros in place of NaN."""
    x = self if dtype is None else self.to(dtype)
    return sum_dim(x.masked_fill(x.isnan(), 0), dim, keepdim)


def prod_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return prod_dim(self.reshape(-1), 0, dtype=dtype)


def prod_dim(self: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """In the accumulator's dtype: column j times column j + half, for half the columns, until one is left; rounded once."""
    x = self if dtype is None else self.to(dtype)
    dim = wrap_dim(x, dim)
    columns, out_dtype = (x if x.dim() else x[None]).movedim(dim, -1), x.dtype
    columns = columns.to(_wide(out_dtype))
    while (n := columns.shape[-1]) > 1:
        half = (n + 1) // 2
        first, second = columns[..., :half], columns[..., half:]
        columns = torch.cat([_times(first[..., : n - half], second), first[..., n - half :]], -1)
    out = columns[..., 0] if columns.shape[-1] else columns.new_ones(columns.shape[:-1])
    out = out.to(out_dtype)
    return (out.unsqueeze(dim) if keepdim and x.dim() else out).contiguous()


def cumprod(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """In the accumulator's dtype, each value of the result rounded on its own. The order is :func:`_prefixes`'."""
    return _prefixes(self if dtype is None else self.to(dtype), dim, _times)


def logcumsumexp(self: Tensor, dim: int) -> Tensor:
    """``logaddexp`` in the accumulator's dtype, each value rounded on its own. The order is :func:`_prefixes`'."""
    return _prefixes(self, dim, torch.logaddexp)


def _prefixes(x: Tensor, dim: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of each column and those before it: column j takes in column j - 1, then j - 2, j - 4, j - 8, ... as they are by then."""
    dim = wrap_dim(x, dim)
    columns = (x if x.dim() else x[None]).movedim(dim, -1).to(_wide(x.dtype))
    step = 1
    while step < columns.shape[-1]:
        columns = torch.cat([columns[..., :step], combine(columns[..., step:], columns[..., :-step])], -1)
        step *= 2
    out = columns.movedim(-1, dim).to(x.dtype).contiguous()
    return out if x.dim() else out[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What products of many are computed in."""
    return torch.complex128 if dtype.is_complex else torch.float64


def _times(x: Tensor, y: Tensor) -> Tensor:
    """Each step rounded once. torch's own complex products have other bits at other places of a vector."""
    if not x.is_complex():
        return x * y
    re, im = x.real * y.real - x.imag * y.imag, x.real * y.imag + x.imag * y.real
    return torch.complex(re, im)


def softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _plan_softmax(describe(self), dim, half_to_float, False)(self)


def log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _plan_softmax(describe(self), dim, half_to_float, True)(self)


@plan
def _plan_softmax(x: Description, dim: int, half_to_float: bool, log: bool) -> Callable[[Tensor], Tensor]:
    out_dtype = x.dtype
    if half_to_float:
        if x.device.type == "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"softmax: half_to_float is for float16 and bfloat16 on a GPU, not {x.dtype} on {x.device}")
        out_dtype = torch.float32
    return _along(x, dim, "row_softmax", log, out_dtype)


def softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return _plan_softmax_backward(describe(grad_output), describe(output), dim, input_dtype, False)(grad_output, output)


def log_softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return _plan_softmax_backward(describe(grad_output), describe(output), dim, input_dtype, True)(grad_output, output)


@plan
def _plan_softmax_backward(
    grad: Description, y: Description, dim: int, dtype: torch.dtype, log: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    if grad.shape != y.shape or grad.dtype != y.dtype or grad.device != y.device:
        raise RuntimeError(
            f"softmax: expected a gradient like the result, {y.dtype} {shape_of(y)}, but got {grad.dtype} {shape_of(grad)}"
        )
    dim = wrap_dim(y, dim)
    others = [d for d in range(y.dim()) if d != dim]
    (grad_rows, step_grad), (rows, step) = (merged(x, others, [dim] if x.dim() else []) for x in (grad, y))
    moved = tuple([y.shape[d] for d in others] + ([y.shape[dim]] if y.dim() else []))
    call = after((step_grad, step), planned("row_softmax_backward", (grad_rows, rows), log, dtype, shape=moved))
    if dim == y.dim() - 1 or not y.dim():
        return call
    return lambda grad, y: call(grad, y).movedim(-1, dim).contiguous()


CHOSEN_LOGPROBS_SCHEMA = "chosen_logprobs(Tensor self, Tensor index, ScalarType dtype) -> Tensor"


def chosen_logprobs(self: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``log_softmax(self.to(dtype), -1).gather(-1, index)``, bit for bit, but on a GPU only what is chosen is ever written.

    self: [..., vocab]; index: int64 [..., k] with the same leading dims -> [..., k].
    """
    return _plan_chosen_logprobs(describe(self), describe(index), dtype)(self, index)


@plan
def _plan_chosen_logprobs(x: Description, index: Description, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    (rows, rows_of), (columns, columns_of) = (merged(y, range(y.dim() - 1), [y.dim() - 1]) for y in (x, index))
    return after((rows_of, columns_of), planned("row_logprobs", (rows, columns), dtype, shape=index.shape))


def chosen_logprobs_fake(self: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return self.new_empty(index.shape, dtype=dtype)


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
    if x.is_cuda:  # its sort puts a NaN with the sign bit set before -inf: all of them become one without
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
    """A tensor as [rows, n_cols] over the dims that are reduced, and the shape of one value for each row."""

    def __init__(self, x: Description, dim: int | Sequence[int] | None, keepdim: bool) -> None:
        self.dims = _dims(x, dim)
        self.kept = [d for d in range(x.dim()) if d not in self.dims]
        self.n_cols = math.prod([x.shape[d] for d in self.dims])
        self.shape = tuple([1 if d in self.dims else x.shape[d] for d in range(x.dim()) if keepdim or d not in self.dims])

    def of(self, x: Tensor) -> Tensor:
        return x.permute(self.kept + self.dims).reshape(math.prod([x.shape[d] for d in self.kept]), self.n_cols)


def _over_rows(
    x: Description, dim: int | Sequence[int] | None, keepdim: bool, kernel: str, *options: Any, **spared: bool
) -> Callable[[Tensor], Any]:
    """``kernel`` of [rows, n_cols] -> [rows], over the dims that are reduced."""
    rows = _Rows(x, dim, keepdim)
    matrix, step = merged(x, rows.kept, rows.dims)
    return after((step,), planned(kernel, (matrix,), *options, shape=rows.shape, **spared))


def _dims(x: Description, dim: int | Sequence[int] | None) -> list[int]:
    """The reduced dims in ascending order; none given, or an empty list, means all of them."""
    if not isinstance(dim, int) and not dim:
        return list(range(x.dim()))
    wrapped = sorted([wrap_dim(x, d) for d in ([dim] if isinstance(dim, int) else dim)])
    if len(set(wrapped)) != len(wrapped):
        raise RuntimeError(f"a dim appears multiple times in the list of dims {list(dim)}")
    return wrapped if x.dim() else []


def _along(x: Description, dim: int, kernel: str, *options: Any) -> Callable[[Tensor], Tensor]:
    """``kernel`` of [rows, n_cols] -> [rows, n_cols], applied along any dim."""
    dim = wrap_dim(x, dim)
    others = [d for d in range(x.dim()) if d != dim]
    matrix, step = merged(x, others, [dim] if x.dim() else [])
    moved = tuple([x.shape[d] for d in others] + ([x.shape[dim]] if x.dim() else []))
    call = after((step,), planned(kernel, (matrix,), *options, shape=moved))
    if dim == x.dim() - 1 or not x.dim():
        return call
    return lambda x: call(x).movedim(-1, dim).contiguous()
