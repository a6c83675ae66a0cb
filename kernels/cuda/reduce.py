"""One number a row: sums, means, norms, variances, logsumexp; and ``row_cumsum``."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plans import Description, describe, on_device, plan
from ..tiles import accumulator, ceil_div
from .rows import (
    ColumnSums,
    RowKernel,
    chunk_columns,
    count_chunks,
    covering_tile,
    divide,
    lie_in_columns,
    load_block,
    program_rows,
    row_statistics,
    square_root,
    store_block,
    unfused,
)

_CUMSUM_BLOCK = 4096
"""Part of the order of running sums."""


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["partials_ptr", "out_ptr", "mean_ptr"],
)
def _row_reduce_kernel(
    x_ptr,
    partials_ptr,
    out_ptr,
    mean_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    correction: tl.float64,
    RESULT: tl.constexpr,
    STATISTICS: tl.constexpr,
    STRATEGY: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One number of each row, from its statistics. Sums in the order of ``rows.py``.

    ``sum``: the sum itself. ``mean``: sum / n_cols. ``root``: sqrt(sum). ``logsumexp``: max + log(sum(exp(x - max))), or
    the maximum itself where it is infinite. ``var``: sum((x - mean) ** 2) / max(n_cols - correction, 0); ``var_mean``
    writes the mean too.
    """
    rows, is_row = program_rows(n_rows, ROWS)
    row_ptrs = x_ptr + rows * x_row_stride
    a, b = row_statistics(row_ptrs, rows, is_row, partials_ptr, n_cols, x_col_stride, STATISTICS, STRATEGY, ACC, BLOCK)
    count = tl.full([], n_cols, ACC)
    if RESULT == "mean":
        out = divide(a, count, ACC)
    elif RESULT == "root":
        out = square_root(a, ACC)
    elif RESULT == "logsumexp":
        # Where the maximum is infinite, the sum is 0 or inf, and its logarithm is the same infinity.
        out = a + tl.log(b)
    elif RESULT == "var" or RESULT == "var_mean":
        if RESULT == "var_mean":
            tl.store(mean_ptr + rows, divide(a, count, ACC).to(mean_ptr.dtype.element_ty), mask=is_row)
        out = divide(b, tl.maximum(count - tl.full([], correction, ACC), 0.0), ACC)
    else:
        out = a
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=is_row)


_reduce_rows = RowKernel(_row_reduce_kernel)
_Planned = Callable[[Tensor], Tensor]
_Shape = tuple[int, ...]


def row_sum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_sum`` on the GPU."""
    return plan_row_sum(describe(x), out_dtype)(x)


def row_mean(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_mean`` on the GPU."""
    return plan_row_mean(describe(x), out_dtype)(x)


def row_mean_of_squares(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_mean_of_squares`` on the GPU."""
    return plan_row_mean_of_squares(describe(x), out_dtype)(x)


def row_norm(x: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_norm`` on the GPU. Raises ValueError for p other than 1 and 2."""
    return plan_row_norm(describe(x), p, out_dtype)(x)


def row_logsumexp(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_logsumexp`` on the GPU."""
    return plan_row_logsumexp(describe(x), out_dtype)(x)


def row_var_mean(x: Tensor, correction: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``reference.row_var_mean`` on the GPU: about each chunk's mean, then about the row's (Chan, Golub, LeVeque 1979)."""
    return plan_row_var_mean(describe(x), correction, out_dtype)(x)


# Plans: each takes the description of the rows, and gives a function of a tensor at such rows' address. shape: of the result,
# if it is not [n_rows].


def plan_row_sum(x: Description, out_dtype: torch.dtype, shape: _Shape | None = None) -> _Planned:
    return _plan_reduction(x, out_dtype, "sum", "sum", 0.0, shape)


def plan_row_mean(x: Description, out_dtype: torch.dtype, shape: _Shape | None = None) -> _Planned:
    return _plan_reduction(x, out_dtype, "sum", "mean", 0.0, shape)


def plan_row_mean_of_squares(x: Description, out_dtype: torch.dtype, shape: _Shape | None = None) -> _Planned:
    return _plan_reduction(x, out_dtype, "square", "mean", 0.0, shape)


def plan_row_norm(x: Description, p: float, out_dtype: torch.dtype, shape: _Shape | None = None) -> _Planned:
    if p not in (1, 2):
        raise ValueError(f"row_norm is there for p = 1 and p = 2, not for p = {p}.")
    statistics, result = ("abs", "sum") if p == 1 else ("square", "root")
    return _plan_reduction(x, out_dtype, statistics, result, 0.0, shape)


def plan_row_logsumexp(x: Description, out_dtype: torch.dtype, shape: _Shape | None = None) -> _Planned:
    return _plan_reduction(x, out_dtype, "exp", "logsumexp", 0.0, shape)


def plan_row_var_mean(
    x: Description, correction: float, out_dtype: torch.dtype, shape: _Shape | None = None, with_mean: bool = True
) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    return _plan_reduction(x, out_dtype, "moments", "var_mean" if with_mean else "var", correction, shape)


@plan
def _plan_reduction(
    x: Description, out_dtype: torch.dtype, statistics: str, result: str, correction: float, shape: _Shape | None
) -> Callable[[Tensor], Any]:
    shape = x.shape[:1] if shape is None else shape
    is_pair, with_mean = statistics == "moments", result == "var_mean"
    if statistics == "sum" and lie_in_columns(x) and x.shape[1]:
        sums = ColumnSums(x.t(), out_dtype, result == "mean")

        def call_by_columns(x: Tensor) -> Tensor:
            out = x.new_empty(shape, dtype=out_dtype)
            with on_device(x):
                sums(x, out)
            return out

        return call_by_columns
    launch = _reduce_rows.launch(x, (float(correction),), (result,), statistics, out_dtype) if x.shape[0] else None

    def call(x: Tensor) -> Any:
        out = x.new_empty(shape, dtype=out_dtype)
        mean = x.new_empty(shape, dtype=out_dtype) if with_mean else None
        if launch is not None:
            with on_device(x):
                launch(x, out, mean)
        return (out, mean) if is_pair else out

    return call


@triton.jit
def _running_sum(x):
    """Running sums of each row of x [ROWS, BLOCK], and the sum of each row.

    Level by level, groups of 2, 4, 8, ... neighbours: the sum of a group's lower half is added to each column of its
    upper half (Sklansky 1960). So column j takes one addition for each 1 in j's binary digits, lowest digit first, and
    a sum of a group is the sum of its halves' sums. A sum over an axis of size 2 has one order only.
    """
    ROWS: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    half = tl.arange(0, 2)
    totals = x
    for level in tl.static_range(12):
        if (BLOCK >> level) > 1:
            pairs = tl.reshape(totals, [ROWS, BLOCK >> (level + 1), 2])
            lower = tl.sum(tl.where((half == 0)[None, None, :], pairs, 0.0), 2)
            totals = tl.sum(pairs, 2)
            groups = tl.reshape(x, [ROWS, BLOCK >> (level + 1), 2, 1 << level])
            groups += tl.where((half == 1)[None, None, :, None], lower[:, :, None, None], 0.0)
            x = tl.reshape(groups, [ROWS, BLOCK])
    return x, tl.reshape(totals, [ROWS])


@triton.jit(do_not_specialize=["n_rows"])
def _row_cumsum_kernel(
    x_ptr,
    out_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[j] = sum(x[: j + 1]) of each row: blocks of 4096 columns ascending, each ``_running_sum`` plus the blocks before.

    Rows of fewer columns take a smaller block, and get the same bits: a column's additions follow its index alone.
    """
    rows, is_row = program_rows(n_rows, ROWS)
    before = tl.zeros([ROWS], ACC)
    for block in range(0, count_chunks(n_cols, BLOCK)):
        cols = chunk_columns(block, BLOCK)
        x = load_block(x_ptr + rows * x_row_stride, is_row, cols, n_cols, x_col_stride, 0.0, "").to(ACC)
        sums, total = _running_sum(x)
        store_block(out_ptr, rows, is_row, cols, n_cols, before[:, None] + sums, "")
        before += total


def row_cumsum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_cumsum`` on the GPU."""
    return plan_row_cumsum(describe(x), out_dtype)(x)


@plan
def plan_row_cumsum(x: Description, out_dtype: torch.dtype, shape: _Shape | None = None) -> _Planned:
    """``row_cumsum`` of tensors at the address of rows like x. shape: of the result, if it is not x's."""
    shape = x.shape if shape is None else shape
    if 0 in x.shape:
        return lambda x: x.new_empty(shape, dtype=out_dtype)
    n_rows, n_cols = x.shape
    acc = accumulator(torch.promote_types(x.dtype, out_dtype))
    tile = covering_tile(n_rows, min(n_cols, _CUMSUM_BLOCK), acc)
    # Every column keeps its own sum: more registers than one sum a row takes, so twice the warps.
    arguments = (*x.shape, *x.strides, acc, tile.rows, min(tile.block, _CUMSUM_BLOCK))
    launch = unfused(_row_cumsum_kernel, ceil_div(n_rows, tile.rows), arguments, 2 * tile.num_warps)

    def call(x: Tensor) -> Tensor:
        out = x.new_empty(shape, dtype=out_dtype)
        with on_device(x):
            launch(x, out)
        return out

    return call
