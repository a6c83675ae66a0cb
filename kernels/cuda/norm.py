"""``row_layer_norm`` and ``row_rms_norm``."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ..plans import Description, describe, on_device, plan
from ..reference import accumulator_dtype
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
    STRATEGY: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(sum((x - mean) ** 2) / n_cols + eps), of each row.

    Or, for rms_norm (the statistics are ``square``): y = x * rstd * weight, rstd = 1 / sqrt(sum(x ** 2) / n_cols + eps),
    and no mean. Sums in the order of ``rows.py``; squares about the mean are summed about each chunk's own mean, then
    merged. Every step is rounded on its own in ACC, and the result cast once.
    """
    rows, is_row, first, last = program_rows_and_chunks(n_rows, n_cols, STRATEGY, ROWS, BLOCK)
    row_ptrs = x_ptr + rows * x_row_stride
    if STRATEGY == "persistent":
        x = load_block(row_ptrs, is_row, chunk_columns(0, BLOCK), n_cols, x_col_stride, 0.0, "").to(ACC)
        total, squares = chunk_statistics(x, 0, n_cols, STATISTICS, ACC)
    else:
        total, squares = row_statistics(
            row_ptrs, rows, is_row, partials_ptr, n_cols, x_col_stride, STATISTICS, STRATEGY, ACC, BLOCK
        )
    rstd = _reciprocal_root(squares, n_cols, eps, ACC)
    if HAS_RSTD:
        tl.store(rstd_ptr + rows, rstd, mask=is_row)  # split, each chunk's program writes the same
    if STATISTICS == "moments":
        mean = divide(total, tl.full([], n_cols, ACC), ACC)
        if HAS_RSTD:
            tl.store(mean_ptr + rows, mean, mask=is_row)
    for done in range(0, last - first):
        cols = chunk_columns(last - 1 - done, BLOCK)  # descending: what was read last is still in the L2 cache
        if STRATEGY != "persistent":
            x = load_block(row_ptrs, is_row, cols, n_cols, x_col_stride, 0.0, "evict_first").to(ACC)
        y = x
        if STATISTICS == "moments":
            y = y - mean[:, None]
        y = y * rstd[:, None]
        if HAS_WEIGHT:
            y = y * _load_parameter(weight_ptr, cols, n_cols, weight_stride, ACC)
        if HAS_BIAS:
            y = y + _load_parameter(bias_ptr, cols, n_cols, bias_stride, ACC)
        store_block(y_ptr, rows, is_row, cols, n_cols, y, STRATEGY)


_norm_rows = RowKernel(_row_norm_kernel, writes_rows=True)


def row_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.row_layer_norm`` on the GPU. weight and bias may have any of the dtypes, x's or not."""
    return plan_row_layer_norm(describe(x), describe(weight), describe(bias), eps)(x, weight, bias)


def row_rms_norm(x: Tensor, weight: Tensor | None, eps: float, with_rstd: bool = True) -> tuple[Tensor, Tensor | None]:
    """``reference.row_rms_norm`` on the GPU. weight may have any of the dtypes, x's or not."""
    return plan_row_rms_norm(describe(x), describe(weight), eps, with_rstd)(x, weight)


Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape]
"""Of y, and of mean and rstd."""


@plan
def plan_row_layer_norm(
    x: Description,
    weight: Description | None,
    bias: Description | None,
    eps: float,
    with_statistics: bool = True,
    shape: Shapes | None = None,
) -> Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None, Tensor | None]]:
    """``row_layer_norm`` of tensors at the addresses of rows like x and of such parameters; mean and rstd if asked for."""
    shape_y, shape_rstd = (x.shape, x.shape[:1]) if shape is None else shape
    launch, wide = _launch_norm(x, weight, bias, eps, with_statistics, "moments"), accumulator_dtype(x.dtype)

    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y = x.new_empty(shape_y)
        mean = x.new_empty(shape_rstd, dtype=wide) if with_statistics else None
        rstd = x.new_empty(shape_rstd, dtype=wide) if with_statistics else None
        with on_device(x):
            launch(x, weight, bias, y, mean, rstd)
        return y, mean, rstd

    return call


@plan
def plan_row_rms_norm(
    x: Description, weight: Description | None, eps: float, with_rstd: bool = True, shape: Shapes | None = None
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """``row_rms_norm`` of tensors at the addresses of rows like x and of such a weight."""
    shape_y, shape_rstd = (x.shape, x.shape[:1]) if shape is None else shape
    launch, wide = _launch_norm(x, weight, None, eps, with_rstd, "square"), accumulator_dtype(x.dtype)

    def call(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = x.new_empty(shape_y)
        rstd = x.new_empty(shape_rstd, dtype=wide) if with_rstd else None
        with on_device(x):
            launch(x, weight, None, y, None, rstd)
        return y, rstd

    return call


def _launch_norm(
    x: Description, weight: Description | None, bias: Description | None, eps: float, with_rstd: bool, statistics: str
) -> Callable[..., None]:
    """(x, weight, bias, y, mean, rstd); nothing where there is no row."""
    if not x.shape[0]:
        return lambda *tensors: None
    strides = [0 if parameter is None else parameter.strides[0] for parameter in (weight, bias)]
    flags = weight is not None, bias is not None, with_rstd
    return _norm_rows.launch(x, (*strides, float(eps)), flags, statistics, x.dtype)
