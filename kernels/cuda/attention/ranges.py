"""Which keys a block of queries can see: what a mask hides is found on the GPU, so that nothing waits for it."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch
from ...tiles import ceil_div

_RANGE_QUERIES = tl.constexpr(16)
"""Queries that share one entry of what a mask lets them see."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["n_heads", "n_queries", "query_offset", "n_blocks"])
def _ranges_kernel(
    mask_ptr, copy_ptr, intervals_ptr, ranges_ptr,
    n_heads, n_queries, n_keys, query_offset, n_blocks,
    stride_mb, stride_mh, stride_mq, stride_mk,
    lowest: tl.float64,
    BOOL: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What each query of one block can see, as the interval [begin, end) of keys, and what all of them can see together:

    ranges = [begin, end, full begin, full end, has holes]. No query sees a key outside of begin and end. Every query sees
    every key between full begin and full end, if any key is there. has holes: a query does not see all of its own interval.
    All of it is a minimum or a maximum of integers, which is exact in any order. A boolean mask is copied as integers (see
    ``Ranges``).
    """
    block = tl.program_id(0) % n_blocks
    head = tl.program_id(0) // n_blocks % n_heads
    batch = tl.program_id(0) // n_blocks // n_heads
    mask_ptr += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_q = offs_m < n_queries
    copy_ptr += ((batch * n_heads + head).to(tl.int64) * n_queries + offs_m)[:, None] * n_keys
    begin = tl.full([BLOCK_M], 0, tl.int32) + n_keys
    end = tl.zeros([BLOCK_M], tl.int32)
    hidden_again = begin
    for start_n in range(0, n_keys, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        inside = inside_q[:, None] & (offs_n < n_keys)[None, :]
        ptrs = mask_ptr + offs_m.to(tl.int64)[:, None] * stride_mq + offs_n.to(tl.int64)[None, :] * stride_mk
        if BOOL:
            visible = tl.load(ptrs, mask=inside, other=0) != 0
            tl.store(copy_ptr + offs_n[None, :], visible.to(copy_ptr.dtype.element_ty), mask=inside)
        else:
            # "not below or equal" keeps NaN visible.
            visible = inside & ((tl.load(ptrs, mask=inside, other=0.0).to(tl.float64) <= lowest) == 0)
        if CAUSAL:
            visible = visible & (offs_n[None, :] <= (offs_m + query_offset)[:, None])
        begin = tl.minimum(begin, tl.min(tl.where(visible, offs_n[None, :], n_keys), 1))
        end = tl.maximum(end, tl.max(tl.where(visible, offs_n[None, :] + 1, 0), 1))
        hidden = inside & (visible == 0) & (offs_n[None, :] >= begin[:, None])
        hidden_again = tl.minimum(hidden_again, tl.min(tl.where(hidden, offs_n[None, :], n_keys), 1))
    intervals_ptr += ((batch * n_heads + head).to(tl.int64) * n_queries + offs_m) * 2
    tl.store(intervals_ptr, begin, mask=inside_q)
    tl.store(intervals_ptr + 1, end, mask=inside_q)
    ranges_ptr += tl.program_id(0) * 5
    tl.store(ranges_ptr, tl.min(begin, 0))
    tl.store(ranges_ptr + 1, tl.max(end, 0))
    tl.store(ranges_ptr + 2, tl.max(tl.where(inside_q, begin, 0), 0))
    tl.store(ranges_ptr + 3, tl.min(hidden_again, 0))
    tl.store(ranges_ptr + 4, tl.max((hidden_again < end).to(tl.int32), 0))


@triton.jit
def first_visible_key(ranges_ptr, n_ranges, seqlen_k, MASK: tl.constexpr, CHUNK_N: tl.constexpr):
    """The key from which those of a (batch, head) are counted.

    With an additive mask it is the last one at or before key 0 that is a multiple of CHUNK_N before the first visible key.
    """
    first_key = tl.minimum(seqlen_k, 0)
    if MASK != "none":
        first_key = seqlen_k
        for i in range(0, n_ranges, 128):
            offs = i + tl.arange(0, 128)
            begin = tl.load(ranges_ptr + offs * 5, mask=offs < n_ranges, other=seqlen_k)
            first_key = tl.minimum(first_key, tl.min(begin, 0))
        if MASK == "additive":
            first_key = first_key - tl.cdiv(first_key, CHUNK_N) * CHUNK_N
    return first_key


@triton.jit
def key_range(
    ranges_ptr, n_ranges, first_key, start_m, seqlen_q, seqlen_k, causal_offset, window,
    PACK: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the queries of block start_m can see: start, full_end, end and has_holes.

    No query sees a key before start or from end on; start is in step with first_key. Every query sees every key from start
    to full_end. has_holes: a query does not see all of its own interval, as far as a boolean mask tells.
    """
    start = first_key + tl.maximum(-first_key, 0) // BLOCK_N * BLOCK_N  # there is no key before key 0
    end = seqlen_k
    full_end = seqlen_k
    has_holes = True
    first_query = start_m * BLOCK_M // PACK
    last_query = tl.minimum((start_m * BLOCK_M + BLOCK_M - 1) // PACK, seqlen_q - 1)
    if CAUSAL:
        end = tl.minimum(end, last_query + causal_offset + 1)
        full_end = tl.minimum(full_end, first_query + causal_offset + 1)
    if WINDOW:
        start += tl.maximum(first_query + causal_offset - window + 1 - start, 0) // BLOCK_N * BLOCK_N
    if MASK == "bool":
        offs = tl.minimum(first_query // _RANGE_QUERIES, n_ranges - 1) + tl.arange(0, 2 * BLOCK_M // _RANGE_QUERIES)
        mine = offs <= tl.minimum(last_query // _RANGE_QUERIES, n_ranges - 1)
        range_ptrs = ranges_ptr + offs * 5
        start += tl.maximum(tl.min(tl.load(range_ptrs, mask=mine, other=seqlen_k), 0) - start, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(end, tl.max(tl.load(range_ptrs + 1, mask=mine, other=0), 0))
        full_begin = tl.max(tl.load(range_ptrs + 2, mask=mine, other=0), 0)
        full_end = tl.minimum(full_end, tl.min(tl.load(range_ptrs + 3, mask=mine, other=seqlen_k), 0))
        full_end = tl.where(full_begin <= start, full_end, start)
        has_holes = tl.max(tl.load(range_ptrs + 4, mask=mine, other=0), 0) != 0
    if MASK == "additive" or WINDOW:
        full_end = start
    return start, full_end, end, has_holes


@triton.jit
def load_intervals(interval_ptrs, inside_q, seqlen_k):
    """The interval [begin, end) of keys that a boolean mask lets each query see."""
    begin_keys = tl.load(interval_ptrs, mask=inside_q, other=seqlen_k)
    end_keys = tl.load(interval_ptrs + 1, mask=inside_q, other=0)
    return begin_keys, end_keys


class RangeStrides(NamedTuple):
    """Where ``_attention_kernel`` finds a mask, its intervals and its ranges: strides, 0 along dims of size 1."""

    mask_batch: int = 0
    mask_head: int = 0
    mask_query: int = 0
    mask_key: int = 0
    intervals_batch: int = 0
    intervals_head: int = 0
    intervals_query: int = 0
    ranges_batch: int = 0
    ranges_head: int = 0
    n_ranges: int = 0


class Ranges:
    """``_ranges_kernel`` for masks of one layout; itemsize: of q. Dims along which a mask is expanded are read once."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        is_causal: bool,
        causal_offset: int,
        itemsize: int,
    ) -> None:
        self.is_bool = dtype == torch.bool
        self._integers = _INTEGERS[itemsize]
        B, H, n_queries = (1 if stride == 0 else size for size, stride in zip(shape[:3], strides[:3], strict=True))
        n_keys = shape[3]
        n_blocks = ceil_div(n_queries, _RANGE_QUERIES.value)
        self._copy, self._intervals, self._ranges = (B, H, n_queries, n_keys), (B, H, n_queries, 2), (B, H, n_blocks, 5)
        # Queries that share a line of the mask see as much as the last of them, from which causality hides least.
        query_offset = causal_offset + (shape[2] - 1 if n_queries == 1 else 0)
        lowest = 0.0 if self.is_bool else torch.finfo(dtype).min
        block = (_RANGE_QUERIES.value, 256) if n_queries > 1 else (1, 4096)
        numbers = (H, n_queries, n_keys, query_offset, n_blocks, *strides, lowest)
        arguments = (*numbers, self.is_bool, is_causal, *block)
        self._launch = Launch(_ranges_kernel, (B * H * n_blocks, 1, 1), arguments, num_warps=4, enable_fp_fusion=False)
        read = _contiguous_strides(self._copy) if self.is_bool else strides
        mask = [0 if size == 1 else stride for size, stride in zip(self._copy, read, strict=True)]
        intervals, ranges = _contiguous_strides(self._intervals), _contiguous_strides(self._ranges)
        self.strides = RangeStrides(*mask, *intervals[:3], *ranges[:2], n_ranges=n_blocks)

    def __call__(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mask as the kernel loads it, the intervals and the ranges.

        A boolean mask is copied as integers of q's width: Triton (3.6 to 3.9) gives the second product an order of k that
        follows the narrowest load before it, so a kernel that loads bytes would sum in another order than one without a
        mask. In float64 Triton 3.6 knows no other order, and compiles no such kernel.
        """
        copy = torch.empty(self._copy, dtype=self._integers, device=mask.device) if self.is_bool else mask
        intervals = torch.empty(self._intervals, dtype=torch.int32, device=mask.device)
        ranges = torch.empty(self._ranges, dtype=torch.int32, device=mask.device)
        self._launch(mask, copy, intervals, ranges)
        return copy, intervals, ranges


def _contiguous_strides(shape: tuple[int, ...]) -> list[int]:
    """The strides of a contiguous tensor, 0 along dims of size 1."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
