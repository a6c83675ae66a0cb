"""``row_layer_norm`` and ``row_rms_norm``, and ``row_norm_backward``, their gradient."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from ..plans import Description, describe, on_device, plan
from ..reference import accumulator_dtype
from ..tiles import accumulator, ceil_div
from .rows import (
    CHUNK,
    LOOPED_WARPS,
    ColumnSums,
    RowKernel,
    chunk_columns,
    chunk_statistics,
    chunk_sum,
    count_chunks,
    divide,
    load_block,
    program_rows,
    program_rows_and_chunks,
    row_statistics,
    square_root,
    store_block,
    two_inputs_tile,
    unfused,
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


GROUP = tl.constexpr(8)
"""Rows whose share of the weight's gradient is one chain. It is part of the order of sums: another group, other bits."""

_WHOLE_UP_TO = 8192
_PART = 4096
"""Columns up to which a program of ``_norm_backward_kernel`` holds whole rows, and those that it holds of longer ones."""


@triton.jit
def _load_statistics(mean_ptr, rstd_ptr, rows, is_row, IS_LAYER_NORM: tl.constexpr, ACC: tl.constexpr):
    rstd = tl.load(rstd_ptr + rows, mask=is_row, other=0.0).to(ACC)
    mean = tl.zeros(rows.shape, ACC)
    if IS_LAYER_NORM:
        mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0).to(ACC)
    return mean, rstd


@triton.jit
def _norm_terms(grad, x, weight, mean, rstd, HAS_WEIGHT: tl.constexpr, IS_LAYER_NORM: tl.constexpr):
    """z = (x - mean) * rstd, and g = grad * weight."""
    if IS_LAYER_NORM:
        x = x - mean[:, None]
    z = x * rstd[:, None]
    g = grad
    if HAS_WEIGHT:
        g = grad * weight
    return z, g


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["mean_ptr", "rstd_ptr", "sums_ptr"])
def _norm_backward_sums_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    n_rows,
    n_cols,
    grad_row_stride,
    grad_col_stride,
    x_row_stride,
    x_col_stride,
    weight_stride,
    HAS_WEIGHT: tl.constexpr,
    IS_LAYER_NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[row] = [sum(g), sum(g * z)] of one long row: the sums of its chunks, added ascending."""
    rows, is_row = program_rows(n_rows, 1)
    mean, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, is_row, IS_LAYER_NORM, ACC)
    sum_g = tl.zeros([1], ACC)
    sum_gz = tl.zeros([1], ACC)
    for chunk in range(0, count_chunks(n_cols, BLOCK)):
        cols = chunk_columns(chunk, BLOCK)
        x = load_block(x_ptr + rows * x_row_stride, is_row, cols, n_cols, x_col_stride, 0.0, "evict_last").to(ACC)
        grad = load_block(grad_ptr + rows * grad_row_stride, is_row, cols, n_cols, grad_col_stride, 0.0, "evict_last").to(ACC)
        weight = _load_parameter(weight_ptr, cols, n_cols, weight_stride, ACC) if HAS_WEIGHT else grad
        z, g = _norm_terms(grad, x, weight, mean, rstd, HAS_WEIGHT, IS_LAYER_NORM)
        if IS_LAYER_NORM:
            sum_g = sum_g + chunk_sum(g)
        sum_gz = sum_gz + chunk_sum(g * z)
    tl.store(sums_ptr + rows * 2, sum_g, mask=is_row)
    tl.store(sums_ptr + (rows * 2 + 1), sum_gz, mask=is_row)


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["mean_ptr", "rstd_ptr", "sums_ptr", "of_weight_ptr", "of_bias_ptr"],
)
def _norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    out_ptr,
    of_weight_ptr,
    of_bias_ptr,
    n_rows,
    n_cols,
    grad_row_stride,
    grad_col_stride,
    x_row_stride,
    x_col_stride,
    weight_stride,
    HAS_WEIGHT: tl.constexpr,
    IS_LAYER_NORM: tl.constexpr,
    WANTS_X: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (g - sum(g) / n_cols - z * (sum(g * z) / n_cols)) * rstd for g = grad * weight and z = (x - mean) * rstd.

    For rms_norm without mean and sum(g). Sums over a row in the order of ``rows.py``; those of longer rows come as
    ``sums``, and the second axis of the grid has their parts. GROUP rows are a group: of_weight[group] = sum(grad * z) and
    of_bias[group] = sum(grad), the rows ascending, for ``_column_sums_kernel`` to add the groups. A program has GROUPS groups.
    Every step is rounded on its own in ACC, and the result cast once.
    """
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    cols = chunk_columns(tl.program_id(1), BLOCK)
    count = tl.full([], n_cols, ACC)
    of_weight = tl.zeros([GROUPS, BLOCK], ACC)
    of_bias = tl.zeros([GROUPS, BLOCK], ACC)
    if HAS_WEIGHT:
        weight = _load_parameter(weight_ptr, cols, n_cols, weight_stride, ACC)
    else:
        weight = tl.zeros([1, BLOCK], ACC)
    rows = groups * GROUP
    is_row = rows < n_rows
    x = load_block(x_ptr + rows * x_row_stride, is_row, cols, n_cols, x_col_stride, 0.0, "")
    grad = load_block(grad_ptr + rows * grad_row_stride, is_row, cols, n_cols, grad_col_stride, 0.0, "")
    for i in range(0, GROUP):
        # In flight while this row is summed; nothing is read after the group's last row.
        later = rows + 1
        is_later = (later < n_rows) & (i + 1 < GROUP)
        next_x = load_block(x_ptr + later * x_row_stride, is_later, cols, n_cols, x_col_stride, 0.0, "")
        next_grad = load_block(grad_ptr + later * grad_row_stride, is_later, cols, n_cols, grad_col_stride, 0.0, "")
        mean, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, is_row, IS_LAYER_NORM, ACC)
        wide = grad.to(ACC)
        z, g = _norm_terms(wide, x.to(ACC), weight, mean, rstd, HAS_WEIGHT, IS_LAYER_NORM)
        if WANTS_X:
            if HAS_SUMS:
                sum_gz = tl.load(sums_ptr + (rows * 2 + 1), mask=is_row, other=0.0)
            else:
                sum_gz = chunk_sum(g * z)
            out = g
            if IS_LAYER_NORM:
                if HAS_SUMS:
                    sum_g = tl.load(sums_ptr + rows * 2, mask=is_row, other=0.0)
                else:
                    sum_g = chunk_sum(g)
                out = out - divide(sum_g, count, ACC)[:, None]
            out = (out - z * divide(sum_gz, count, ACC)[:, None]) * rstd[:, None]
            store_block(out_ptr, rows, is_row, cols, n_cols, out, "persistent")
        if WANTS_WEIGHT:
            of_weight = of_weight + wide * z
        if WANTS_BIAS:
            of_bias = of_bias + wide
        x = next_x
        grad = next_grad
        rows = later
        is_row = is_later
    is_group = groups * GROUP < n_rows
    if WANTS_WEIGHT:
        store_block(of_weight_ptr, groups, is_group, cols, n_cols, of_weight, "persistent")
    if WANTS_BIAS:
        store_block(of_bias_ptr, groups, is_group, cols, n_cols, of_bias, "persistent")


def row_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    wants_x: bool = True,
    wants_weight: bool = True,
    wants_bias: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``reference.row_norm_backward`` on the GPU: what is read of a row is read once, for all three."""
    described = [describe(t) for t in (grad, x, mean, rstd, weight)]
    return plan_row_norm_backward(*described, wants_x, wants_weight, wants_bias)(grad, x, mean, rstd, weight)


@plan
def plan_row_norm_backward(
    grad: Description,
    x: Description,
    mean: Description | None,
    rstd: Description,
    weight: Description | None,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
    shape: tuple[Shape, Shape] | None = None,
) -> Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """``row_norm_backward`` of tensors like these. shape: of the gradient of x, and of those of weight and bias."""
    (n_rows, n_cols), dtype = x.shape, x.dtype if weight is None else weight.dtype
    shape_x, shape_weight = ((n_rows, n_cols), (n_cols,)) if shape is None else shape
    if mean is not None and mean.strides[0] != 1 or rstd.strides[0] != 1:
        raise ValueError("row_norm_backward takes contiguous statistics")
    if not n_rows or not n_cols or not (wants_x or wants_weight or wants_bias):

        def nothing(grad: Tensor, x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            of_parameters = (
                x.new_zeros(shape_weight, dtype=dtype) if wanted else None for wanted in (wants_weight, wants_bias)
            )
            return x.new_empty(shape_x) if wants_x else None, *of_parameters

        return nothing
    acc = accumulator(x.dtype)
    wide = torch.float64 if acc == tl.float64 else torch.float32
    n_groups = ceil_div(n_rows, GROUP.value)
    is_whole = n_cols <= _WHOLE_UP_TO
    tile = two_inputs_tile(n_groups, n_cols if is_whole else _PART, acc)[0]
    groups = tile.rows if is_whole else 1
    numbers = (n_rows, n_cols, *grad.strides, *x.strides, 0 if weight is None else weight.strides[0])
    kind = weight is not None, mean is not None
    has_sums = wants_x and not is_whole
    arguments = (*numbers, *kind, wants_x, wants_weight, wants_bias, has_sums, acc, groups, tile.block)
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    grid = ceil_div(n_groups, groups), ceil_div(n_cols, tile.block), 1
    launch = Launch(_norm_backward_kernel, grid, arguments, **options)
    sum_rows = unfused(_norm_backward_sums_kernel, n_rows, (*numbers, *kind, acc, CHUNK[acc]), LOOPED_WARPS)
    of_group = Description((n_groups, n_cols), (n_cols, 1), wide, x.device, True)
    add_groups = ColumnSums(of_group, dtype)

    def call(grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None) -> Any:
        out = x.new_empty(shape_x) if wants_x else None
        parts = [x.new_empty((n_groups, n_cols), dtype=wide) if w else None for w in (wants_weight, wants_bias)]
        sums = x.new_empty((n_rows, 2), dtype=wide) if has_sums else None
        results = [None if part is None else x.new_empty(shape_weight, dtype=dtype) for part in parts]
        with on_device(x):
            if sums is not None:
                sum_rows(grad, x, weight, mean, rstd, sums)
            launch(grad, x, weight, mean, rstd, sums, out, *parts)
            for part, result in zip(parts, results, strict=True):
                if part is not None and result is not None:
                    add_groups(part, result)
        return out, *results

    return call
