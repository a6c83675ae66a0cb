"""``index_add``: rows added to rows, in the order of the sources."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plans import on_device
from ..tiles import accumulator, ceil_div


@triton.jit(
    do_not_specialize=["R", "C", "n_sources", "stride_selfr", "stride_selfc", "stride_sourcer", "stride_sourcec"],
    do_not_specialize_on_alignment=["self_ptr", "source_ptr", "order_ptr", "bound_ptr", "out_ptr"],
)
def _index_add_kernel(
    self_ptr,
    source_ptr,
    order_ptr,
    bound_ptr,
    out_ptr,
    R,
    C,
    n_sources,
    stride_selfr,
    stride_selfc,
    stride_sourcer,
    stride_sourcec,
    alpha: tl.float64,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r] = self[r] + alpha * source[i] + ..., for the i with index[i] == r, ascending: order[bound[r]:bound[r + 1]].

    Each product and each sum is rounded on its own in ACC, and the result is cast once. A row with fewer sources than its
    neighbours in the tile keeps its bits while they go on. A source whose index is out of range is before bound[0] or
    from bound[R] on: no row adds it, and the device-side assertion fails.
    """
    all_in_range = (tl.load(bound_ptr) == 0) & (tl.load(bound_ptr + R) == n_sources)
    tl.device_assert(all_in_range, "index_add: an index is out of range")
    blocks = tl.cdiv(C, BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    begin = tl.load(bound_ptr + rows, mask=rows < R, other=0)
    end = tl.load(bound_ptr + rows + 1, mask=rows < R, other=0)
    self_ptrs = self_ptr + rows[:, None] * stride_selfr + cols[None, :] * stride_selfc
    acc = tl.load(self_ptrs, mask=inside, other=0.0).to(ACC)
    for i in range(0, tl.max(end - begin, 0)):
        more = begin + i < end
        source_row = tl.load(order_ptr + begin + i, mask=more, other=0)
        ptrs = source_ptr + source_row[:, None] * stride_sourcer + cols[None, :] * stride_sourcec
        term = tl.full([], alpha, ACC) * tl.load(ptrs, mask=more[:, None] & inside, other=0.0).to(ACC)
        acc = tl.where(more[:, None], acc + term, acc)
    tl.store(out_ptr + rows[:, None] * C + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


def index_add(self: Tensor, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    """``reference.index_add`` on the GPU. A stable sort finds the sources of each row: no atomics, and no wait for the GPU.

    An index out of range fails a device-side assertion, as in ``torch.index_add``: the next synchronisation raises.
    """
    R, C = self.shape
    out = torch.empty((R, C), dtype=self.dtype, device=self.device)
    if out.numel() == 0:
        return out
    targets, order = torch.sort(index, stable=True)
    bounds = torch.searchsorted(targets, torch.arange(R + 1, dtype=index.dtype, device=index.device))
    block = min(1024, triton.next_power_of_2(C))
    rows = max(1, 128 // block)
    with on_device(self):
        _index_add_kernel[(ceil_div(R, rows) * ceil_div(C, block),)](
            self,
            source,
            order,
            bounds,
            out,
            R,
            C,
            index.shape[0],
            *self.stride(),
            *source.stride(),
            float(alpha),
            ACC=accumulator(self.dtype),
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
            debug=True,  # compiles the assertion, and would add those of integer overflow
            sanitize_overflow=False,
        )
    return out
