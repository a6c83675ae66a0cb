"""``row_layer_norm`` and ``row_rms_norm``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import accumulator_dtype
from .rows import (
    RowKernel,
    chunk_columns,
    chunk_statistics,
    divide,
    load_block,
    program_rows_and_chunks,
    row_statistics,
    square_root,
    store_block,
)


@triton.jit
def _reciprocal_root(total, n_cols, eps, ACC: tl.constexpr):
    """1 / sqrt(total / n_cols + eps)"""
    mean = divide(total, tl.full([], n_cols, ACC), ACC)
    return divide(1.0, square_root(mean + tl.full([], eps, ACC), ACC), ACC)


@triton.jit
def _load_parameter(ptr, cols, n_cols, stride, ACC: tl.constexpr):
    """weight or bias at these columns, as [1, BLOCK]."""
    return tl.load(ptr + cols * stride, mask=cols < n_cols, other=0.0).to(ACC)[None, :]


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["partials_ptr", "mean_ptr", "rstd_ptr"])
def _row_norm_kernel(
    x_ptr,
    partials_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    weight_stride,
    bias_stride,
    eps: tl.float64,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    STATISTICS: tl.constexpr,
    WAY: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(sum((x - mean) ** 2) / n_cols + eps), of each row.

    Or, for rms_norm (the statistics are ``square``): y = x * rstd * weight, rstd = 1 / sqrt(sum(x ** 2) / n_cols + eps),
    and no mean. Sums in the order of ``rows.py``; squares about the mean are summed about each chunk's own mean, then
    merged. Every step is rounded on its own in ACC, and the result cast once.
    """
    rows, is_row, first, last = program_rows_and_chunks(n_rows, n_cols, WAY, ROWS, BLOCK)
    row_ptrs = x_ptr + rows * x_row_stride
    if WAY == "resident":
        x = load_block(row_ptrs, is_row, chunk_columns(0, BLOCK), n_cols, x_col_stride, 0.0, "").to(ACC)
        total, squares = chunk_statistics(x, 0, n_cols, STATISTICS, ACC)
    else:
        total, squares = row_statistics(row_ptrs, rows, is_row, partials_ptr, n_cols, x_col_stride, STATISTICS, WAY, ACC, BLOCK)
    rstd = _reciprocal_root(squares, n_cols, eps, ACC)
    if HAS_RSTD:
        tl.store(rstd_ptr + rows, rstd, mask=is_row)  # split, each chunk's program writes the same
    if STATISTICS == "moments":
        mean = divide(total, tl.full([], n_cols, ACC), ACC)
        if HAS_RSTD:
            tl.store(mean_ptr + rows, mean, mask=is_row)
    for done in range(0, last - first):
        cols = chunk_columns(last - 1 - done, BLOCK)  # descending: what was read last is still in the L2 cache
        if WAY != "resident":
            x = load_block(row_ptrs, is_row, cols, n_cols, x_col_stride, 0.0, "evict_first").to(ACC)
        y = x
        if STATISTICS == "moments":
            y = y - mean[:, None]
        y = y * rstd[:, None]
        if HAS_WEIGHT:
            y = y * _load_parameter(weight_ptr, cols, n_cols, weight_stride, ACC)
        if HAS_BIAS:
            y = y + _load_parameter(bias_ptr, cols, n_cols, bias_stride, ACC)
        store_block(y_ptr, rows, is_row, cols, n_cols, y, WAY)


norm_rows = RowKernel(_row_norm_kernel, writes_rows=True, n_specialised=3)


def row_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.row_layer_norm`` on the GPU. weight and bias may have any of the dtypes, x's or not."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[0], dtype=accumulator_dtype(x.dtype))
    mean = torch.empty_like(rstd)
    _launch_norm(x, weight, bias, y, mean, rstd, eps, "moments")
    return y, mean, rstd


def row_rms_norm(x: Tensor, weight: Tensor | None, eps: float, with_rstd: bool = True) -> tuple[Tensor, Tensor | None]:
    """``reference.row_rms_norm`` on the GPU. weight may have any of the dtypes, x's or not."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[0], dtype=accumulator_dtype(x.dtype)) if with_rstd else None
    _launch_norm(x, weight, None, y, None, rstd, eps, "square")
    return y, rstd


def _launch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    statistics: str,
) -> None:
    has_weight, has_bias, has_rstd = weight is not None, bias is not None, rstd is not None
    numbers = (weight.stride(0) if has_weight else 0, bias.stride(0) if has_bias else 0, float(eps))
    norm_rows(x, (weight, bias, y, mean, rstd), numbers, (has_weight, has_bias, has_rstd), statistics, x.dtype)
