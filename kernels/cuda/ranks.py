"""``tree_sum``: sums of a few parts of many numbers each, as ranks and blocks of K give them."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plans import Description, describe, on_device, plan
from ..tiles import accumulator, ceil_div, next_power_of_2
from .rows import unfused

_VALUES_IN_A_PROGRAM = 4096


@triton.jit
def _tree_sum_kernel(parts_ptr, out_ptr, n, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """out[i] = sum over r of parts[r, i]: 0 + 1, 2 + 3, ..., then their sums, up to the root; one cast.

    WIDTH is PARTS up to a power of two. What is missing is -0.0, which changes no other number, so that a last one without a
    neighbour goes on as it is.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, WIDTH)
    there = (offs < n)[:, None] & (part < PARTS)[None, :]
    x = tl.load(parts_ptr + part.to(tl.int64)[None, :] * n + offs[:, None], mask=there, other=0.0).to(ACC)
    # Not the literal -0.0: Triton up to 3.7 makes 0.0 of it.
    x = tl.where(there, x, tl.zeros([BLOCK, WIDTH], ACC) * -1.0)
    for level in tl.static_range(16):
        if (WIDTH >> level) > 1:
            even, odd = tl.split(tl.reshape(x, [BLOCK, WIDTH >> (level + 1), 2]))
            x = even + odd
    out = tl.reshape(x, [BLOCK])
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=offs < n)


def tree_sum(parts: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.tree_sum`` on the GPU."""
    parts = parts.contiguous()
    return _plan_tree_sum(describe(parts), out_dtype)(parts)


@plan
def _plan_tree_sum(parts: Description, out_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    n_parts, n = parts.shape
    if n == 0:
        return lambda parts: parts.new_empty(0, dtype=out_dtype)
    width = next_power_of_2(n_parts)
    block = max(128, _VALUES_IN_A_PROGRAM // width)
    acc = accumulator(torch.promote_types(parts.dtype, out_dtype))
    launch = unfused(_tree_sum_kernel, ceil_div(n, block), (n, n_parts, width, block, acc), 4)

    def call(parts: Tensor) -> Tensor:
        out = parts.new_empty(n, dtype=out_dtype)
        with on_device(parts):
            launch(parts, out)
        return out

    return call
