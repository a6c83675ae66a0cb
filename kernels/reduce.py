"""Sums over rows: ``row_sum``, ``row_mean``, ``row_norm``, ``row_var_mean``, ``row_logsumexp``, ``row_cumsum``.

One order for every row sum, whatever the tile: 4096 slots; slot s adds columns s, s + 4096, s + 8192, ... ascending;
then the upper half of the slots is added to the lower half, until one is left. Slots behind the row's end hold zeros
and change nothing, so rows of up to 128 (1024) columns use 128 (1024) slots and get the same bits.

The tree is written out instead of left to ``tl.sum``, whose order follows the layout that Triton picks. And no integer
and no pointer is specialised, so that no layout and no width of loads can follow the number of rows or columns either.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import accumulator, ceil_div, on_device, row_tile

_CUMSUM_BLOCK = 1024


@triton.jit
def _tree_sum(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of each row of x [ROWS, BLOCK]: the upper half of the columns on the lower half, until one column is left."""
    for level in tl.static_range(16):
        if (BLOCK >> level) > 1:
            halves = tl.reshape(x, [ROWS, 2, BLOCK >> (level + 1)])
            lower, upper = tl.split(tl.trans(halves, [0, 2, 1]))
            x = lower + upper
    return tl.reshape(x, [ROWS])


@triton.jit
def _load_block(x_ptr, rows, cols, n_rows, n_cols, row_stride, col_stride, other, ACC: tl.constexpr):
    """x[rows, cols] in the accumulator's dtype, ``other`` behind the edges. Offsets have 64 bits."""
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    ptrs = x_ptr + rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(ptrs, mask=inside, other=other).to(ACC)


@triton.jit
def _divide(a, b, ACC: tl.constexpr):
    """a / b, rounded to nearest. Triton's ``/`` is an approximation in fp32, and its ``div_rn`` takes fp32 alone."""
    if ACC == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _sqrt(a, ACC: tl.constexpr):
    """The square root, rounded to nearest, for the same reason as ``_divide``."""
    if ACC == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def _row_total(
    x_ptr,
    rows,
    n_rows,
    n_cols,
    row_stride,
    col_stride,
    centre,
    TERM: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over a row of x, abs(x), x ** 2, (x - centre) ** 2 or exp(x - centre), in the order of this file."""
    total = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        if TERM == "exp":
            x = _load_block(x_ptr, rows, cols, n_rows, n_cols, row_stride, col_stride, -float("inf"), ACC)
            total += tl.exp(x - centre[:, None])
        elif TERM == "centred_square":
            x = _load_block(x_ptr, rows, cols, n_rows, n_cols, row_stride, col_stride, 0.0, ACC) - centre[:, None]
            total += tl.where((cols < n_cols)[None, :], x * x, 0.0)
        else:
            x = _load_block(x_ptr, rows, cols, n_rows, n_cols, row_stride, col_stride, 0.0, ACC)
            if TERM == "square":
                x = x * x
            elif TERM == "abs":
                x = tl.abs(x)
            total += x
    return _tree_sum(total, ROWS, BLOCK)


@triton.jit
def _row_max(
    x_ptr,
    rows,
    n_rows,
    n_cols,
    row_stride,
    col_stride,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum of a row, NaN aside; -inf for no columns. A maximum is exact in any order."""
    largest = tl.full([ROWS, BLOCK], -float("inf"), ACC)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_block(x_ptr, rows, cols, n_rows, n_cols, row_stride, col_stride, -float("inf"), ACC)
        largest = tl.maximum(largest, x)
    return tl.max(largest, 1)


@triton.jit(
    do_not_specialize=["n_rows", "n_cols", "x_row_stride", "x_col_stride"],
    do_not_specialize_on_alignment=["x_ptr", "out_ptr"],
)
def _row_sum_kernel(
    x_ptr,
    out_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    ACC: tl.constexpr,
    TERM: tl.constexpr,
    FINISH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = sum(x), sum(x) / n_cols, sum(abs(x)) or sqrt(sum(x ** 2)) of each row: sums in the order of this file."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = _row_total(x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, 0.0, TERM, ACC, ROWS, BLOCK)
    if FINISH == "mean":
        total = _divide(total, n_cols.to(ACC), ACC)
    elif FINISH == "sqrt":
        total = _sqrt(total, ACC)
    tl.store(out_ptr + rows, total.to(out_ptr.dtype.element_ty), mask=rows < n_rows)


def row_sum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_sum`` on the GPU."""
    return _launch_row_sum(x, out_dtype, "plain", "plain")


def row_mean(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_mean`` on the GPU."""
    return _launch_row_sum(x, out_dtype, "plain", "mean")


def row_norm(x: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_norm`` on the GPU. Raises ValueError for p other than 1 and 2."""
    if p not in (1, 2):
        raise ValueError(f"row_norm is there for p = 1 and p = 2, not for p = {p}.")
    return _launch_row_sum(x, out_dtype, *(("abs", "plain") if p == 1 else ("square", "sqrt")))


def _launch_row_sum(x: Tensor, out_dtype: torch.dtype, term: str, finish: str) -> Tensor:
    n_rows, n_cols = x.shape
    out = torch.empty(n_rows, dtype=out_dtype, device=x.device)
    if n_rows == 0:
        return out
    tile = row_tile(n_cols)
    with on_device(x):
        _row_sum_kernel[(ceil_div(n_rows, tile.block_m),)](
            x,
            out,
            n_rows,
            n_cols,
            *x.stride(),
            ACC=_wider(x.dtype, out_dtype),
            TERM=term,
            FINISH=finish,
            ROWS=tile.block_m,
            BLOCK=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return out


@triton.jit(
    do_not_specialize=["n_rows", "n_cols", "x_row_stride", "x_col_stride"],
    do_not_specialize_on_alignment=["x_ptr", "var_ptr", "mean_ptr"],
)
def _row_var_mean_kernel(
    x_ptr,
    var_ptr,
    mean_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    correction: tl.float64,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mean = sum(x) / n_cols; var = sum((x - mean) ** 2) / max(n_cols - correction, 0): sums in this file's order."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = _row_total(x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, 0.0, "plain", ACC, ROWS, BLOCK)
    mean = _divide(total, n_cols.to(ACC), ACC)
    squares = _row_total(
        x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, mean, "centred_square", ACC, ROWS, BLOCK
    )
    var = _divide(squares, tl.maximum(n_cols.to(ACC) - tl.full([], correction, ACC), 0.0), ACC)
    tl.store(var_ptr + rows, var.to(var_ptr.dtype.element_ty), mask=rows < n_rows)
    tl.store(mean_ptr + rows, mean.to(mean_ptr.dtype.element_ty), mask=rows < n_rows)


def row_var_mean(x: Tensor, correction: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``reference.row_var_mean`` on the GPU."""
    n_rows, n_cols = x.shape
    var = torch.empty(n_rows, dtype=out_dtype, device=x.device)
    mean = torch.empty(n_rows, dtype=out_dtype, device=x.device)
    if n_rows == 0:
        return var, mean
    tile = row_tile(n_cols)
    with on_device(x):
        _row_var_mean_kernel[(ceil_div(n_rows, tile.block_m),)](
            x,
            var,
            mean,
            n_rows,
            n_cols,
            *x.stride(),
            float(correction),
            ACC=_wider(x.dtype, out_dtype),
            ROWS=tile.block_m,
            BLOCK=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return var, mean


@triton.jit(
    do_not_specialize=["n_rows", "n_cols", "x_row_stride", "x_col_stride"],
    do_not_specialize_on_alignment=["x_ptr", "out_ptr"],
)
def _row_logsumexp_kernel(
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
    """out = max + log(sum(exp(x - max))), with 0 in place of an infinite max; the sum in the order of this file."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = _row_max(x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, ACC, ROWS, BLOCK)
    # inf - inf is NaN; from 0 the sum is 0 or inf, and its logarithm the infinity itself.
    centre = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    total = _row_total(x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, centre, "exp", ACC, ROWS, BLOCK)
    tl.store(out_ptr + rows, (centre + tl.log(total)).to(out_ptr.dtype.element_ty), mask=rows < n_rows)


def row_logsumexp(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_logsumexp`` on the GPU."""
    n_rows, n_cols = x.shape
    out = torch.empty(n_rows, dtype=out_dtype, device=x.device)
    if n_rows == 0:
        return out
    tile = row_tile(n_cols)
    with on_device(x):
        _row_logsumexp_kernel[(ceil_div(n_rows, tile.block_m),)](
            x,
            out,
            n_rows,
            n_cols,
            *x.stride(),
            ACC=_wider(x.dtype, out_dtype),
            ROWS=tile.block_m,
            BLOCK=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return out


@triton.jit(
    do_not_specialize=["n_cols", "x_row_stride", "x_col_stride"],
    do_not_specialize_on_alignment=["x_ptr", "out_ptr"],
)
def _row_cumsum_kernel(x_ptr, out_ptr, n_cols, x_row_stride, x_col_stride, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out[j] = sum(x[: j + 1]) of one row: blocks of BLOCK columns ascending, each a scan plus the sum of those before.

    The scan's own order is that of ``tl.cumsum`` for this BLOCK and this number of warps. Nothing else can choose its
    layout: no argument is specialised, and the block does not follow the columns.
    """
    row = tl.program_id(0).to(tl.int64)
    before = tl.zeros([1], ACC)
    for start in range(0, n_cols, BLOCK):
        cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
        x = tl.load(x_ptr + row * x_row_stride + cols * x_col_stride, mask=cols < n_cols, other=0.0).to(ACC)
        scan = before + tl.cumsum(x, 0)
        tl.store(out_ptr + row * n_cols + cols, scan.to(out_ptr.dtype.element_ty), mask=cols < n_cols)
        # One value and zeros: exact in any order.
        before = tl.zeros([1], ACC) + tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, scan, 0.0), 0)


def row_cumsum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_cumsum`` on the GPU."""
    n_rows, n_cols = x.shape
    out = torch.empty((n_rows, n_cols), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    with on_device(x):
        _row_cumsum_kernel[(n_rows,)](
            x,
            out,
            n_cols,
            *x.stride(),
            ACC=_wider(x.dtype, out_dtype),
            BLOCK=_CUMSUM_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def _wider(dtype: torch.dtype, out_dtype: torch.dtype) -> tl.dtype:
    """The accumulator for sums of ``dtype`` handed out as ``out_dtype``: the wider of the two's own."""
    return accumulator(torch.promote_types(dtype, out_dtype))
