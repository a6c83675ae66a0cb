"""``row_layer_norm`` and ``row_rms_norm``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import _divide, _load_block, _row_total, _sqrt
from .reference import accumulator_dtype
from .tiles import accumulator, ceil_div, on_device, row_tile


@triton.jit
def _affine(y, cols, n_cols, weight_ptr, bias_ptr, weight_stride, bias_stride, HAS_WEIGHT, HAS_BIAS, ACC: tl.constexpr):
    """y * weight + bias over the columns, each step rounded on its own."""
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols.to(tl.int64) * weight_stride, mask=cols < n_cols, other=0.0)
        y = y * weight.to(ACC)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols.to(tl.int64) * bias_stride, mask=cols < n_cols, other=0.0)
        y = y + bias.to(ACC)[None, :]
    return y


@triton.jit(
    do_not_specialize=["n_rows", "n_cols", "x_row_stride", "x_col_stride", "weight_stride", "bias_stride"],
    do_not_specialize_on_alignment=["x_ptr", "weight_ptr", "bias_ptr", "y_ptr", "mean_ptr", "rstd_ptr"],
)
def _row_layer_norm_kernel(
    x_ptr,
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
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(sum((x - mean) ** 2) / n_cols + eps), of each row.

    Three passes over the row: the mean and the squares (sums in the order of ``reduce.py``), the results. Every step is
    rounded on its own in ACC, and the result cast once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = _row_total(x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, 0.0, "plain", ACC, ROWS, BLOCK)
    mean = _divide(total, n_cols.to(ACC), ACC)
    squares = _row_total(
        x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, mean, "centred_square", ACC, ROWS, BLOCK
    )
    rstd = _divide(1.0, _sqrt(_divide(squares, n_cols.to(ACC), ACC) + tl.full([], eps, ACC), ACC), ACC)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_block(x_ptr, rows, cols, n_rows, n_cols, x_row_stride, x_col_stride, 0.0, ACC)
        y = (x - mean[:, None]) * rstd[:, None]
        y = _affine(y, cols, n_cols, weight_ptr, bias_ptr, weight_stride, bias_stride, HAS_WEIGHT, HAS_BIAS, ACC)
        y_ptrs = y_ptr + rows[:, None] * n_cols + cols.to(tl.int64)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :])


def row_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.row_layer_norm`` on the GPU. weight and bias may have any of the dtypes, x's or not."""
    n_rows, n_cols = x.shape
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    mean = torch.empty(n_rows, dtype=accumulator_dtype(x.dtype), device=x.device)
    rstd = torch.empty_like(mean)
    if n_rows == 0:
        return y, mean, rstd
    tile = row_tile(n_cols)
    with on_device(x):
        _row_layer_norm_kernel[(ceil_div(n_rows, tile.block_m),)](
            x,
            y if weight is None else weight,
            y if bias is None else bias,
            y,
            mean,
            rstd,
            n_rows,
            n_cols,
            *x.stride(),
            0 if weight is None else weight.stride(0),
            0 if bias is None else bias.stride(0),
            float(eps),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            ACC=accumulator(x.dtype),
            ROWS=tile.block_m,
            BLOCK=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return y, mean, rstd


@triton.jit(
    do_not_specialize=["n_rows", "n_cols", "x_row_stride", "x_col_stride", "weight_stride"],
    do_not_specialize_on_alignment=["x_ptr", "weight_ptr", "y_ptr", "rstd_ptr"],
)
def _row_rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    weight_stride,
    eps: tl.float64,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x * rstd * weight, rstd = 1 / sqrt(sum(x ** 2) / n_cols + eps), of each row.

    Two passes over the row: the squares (a sum in the order of ``reduce.py``), the results. Every step is rounded on
    its own in ACC, and the result cast once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = _row_total(x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, 0.0, "square", ACC, ROWS, BLOCK)
    rstd = _divide(1.0, _sqrt(_divide(squares, n_cols.to(ACC), ACC) + tl.full([], eps, ACC), ACC), ACC)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_block(x_ptr, rows, cols, n_rows, n_cols, x_row_stride, x_col_stride, 0.0, ACC)
        y = x * rstd[:, None]
        y = _affine(y, cols, n_cols, weight_ptr, weight_ptr, weight_stride, weight_stride, HAS_WEIGHT, False, ACC)
        y_ptrs = y_ptr + rows[:, None] * n_cols + cols.to(tl.int64)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :])


def row_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``reference.row_rms_norm`` on the GPU. weight may have any of the dtypes, x's or not."""
    n_rows, n_cols = x.shape
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    rstd = torch.empty(n_rows, dtype=accumulator_dtype(x.dtype), device=x.device)
    if n_rows == 0:
        return y, rstd
    tile = row_tile(n_cols)
    with on_device(x):
        _row_rms_norm_kernel[(ceil_div(n_rows, tile.block_m),)](
            x,
            y if weight is None else weight,
            y,
            rstd,
            n_rows,
            n_cols,
            *x.stride(),
            0 if weight is None else weight.stride(0),
            float(eps),
            HAS_WEIGHT=weight is not None,
            ACC=accumulator(x.dtype),
            ROWS=tile.block_m,
            BLOCK=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return y, rstd
