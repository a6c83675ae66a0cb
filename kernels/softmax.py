"""``row_softmax``: softmax and log_softmax of rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import _divide, _load_block, _row_max, _row_total, _wider
from .tiles import ceil_div, on_device, row_tile


@triton.jit(
    do_not_specialize=["n_rows", "n_cols", "x_row_stride", "x_col_stride"],
    do_not_specialize_on_alignment=["x_ptr", "out_ptr"],
)
def _row_softmax_kernel(
    x_ptr,
    out_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    LOG: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = exp(x - max) / sum(exp(x - max)), or x - max - log(sum(exp(x - max))), of each row.

    Three passes over the row: the maximum, the sum (in the order of ``reduce.py``), the results. Columns of -inf add
    exact zeros to the sum. A row of nothing but -inf gives NaN, as in torch.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = _row_max(x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, ACC, ROWS, BLOCK)
    total = _row_total(x_ptr, rows, n_rows, n_cols, x_row_stride, x_col_stride, largest, "exp", ACC, ROWS, BLOCK)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_block(x_ptr, rows, cols, n_rows, n_cols, x_row_stride, x_col_stride, 0.0, ACC) - largest[:, None]
        if LOG:
            y = x - tl.log(total)[:, None]
        else:
            y = _divide(tl.exp(x), tl.broadcast_to(total[:, None], [ROWS, BLOCK]), ACC)
        out_ptrs = out_ptr + rows[:, None] * n_cols + cols.to(tl.int64)[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :])


def row_softmax(x: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_softmax`` on the GPU."""
    n_rows, n_cols = x.shape
    out = torch.empty((n_rows, n_cols), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = row_tile(n_cols)
    with on_device(x):
        _row_softmax_kernel[(ceil_div(n_rows, tile.block_m),)](
            x,
            out,
            n_rows,
            n_cols,
            *x.stride(),
            LOG=bool(log),
            ACC=_wider(x.dtype, out_dtype),
            ROWS=tile.block_m,
            BLOCK=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return out
