"""``attention`` and ``packed_attention``: softmaxes of blocks of keys, merged in ascending order; any mask, grouped heads.

Eight blocks are a split: its blocks are merged into one softmax, and the splits' softmaxes into that of the row. Both count
from the first key that any query of the same (batch, head) can see. So padding on either side changes no bit, nor does the
number of queries: a block of keys that a query cannot see leaves its maximum, its sum and its accumulator as they are, bit
for bit. It may as well be skipped; and blocks or splits may be computed apart, as *parts*, and merged by another kernel.
The values of hidden keys must be finite: 0 * NaN is NaN, as in torch.

References: merging of softmaxes, Milakov and Gimelshein, arXiv 1805.02867; its use in attention, Dao et al., arXiv
2205.14135; blocks apart, Dao et al., "Flash-Decoding" (2023); pages, Kwon et al., arXiv 2309.06180.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch, alignment, plan
from ...reference import accumulator_dtype
from ...tiles import accumulator, attention_tile, ceil_div, device_of, next_power_of_2, on_device
from ..rows import divide

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST_SCORE = tl.constexpr(-(2.0**125))
_RANGE_QUERIES = tl.constexpr(16)
"""Queries that share one entry of what a mask lets them see."""
_SPLIT_BLOCKS = tl.constexpr(8)
"""Blocks of a split. It is part of the order of sums: other splits, other bits."""
_ABSENT = tl.constexpr(-1.0)
"""In place of the sum of a part that nobody computes. No softmax has it."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MERGE_DIMS = 32
"""Dims of a program that merges parts: one for each thread of its warp."""


@triton.jit(do_not_specialize=["n_heads", "n_queries", "query_offset", "n_blocks"])
def _ranges_kernel(
    mask_ptr,
    copy_ptr,
    intervals_ptr,
    ranges_ptr,
    n_heads,
    n_queries,
    n_keys,
    query_offset,
    n_blocks,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    lowest: tl.float64,
    BOOL: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What each query of one block can see, as the interval [begin, end) of keys, and for all of them together:

    ranges = [begin, end, whole begin, whole end, has holes]. No query sees a key outside of begin and end; between whole begin
    and whole end, if that is anything, all see every key; has holes: one does not see all of its own interval. Integers only,
    so exact in any order. A boolean mask is copied as integers (see ``_Ranges``).
    """
    block = tl.program_id(0) % n_blocks
    head = tl.program_id(0) // n_blocks % n_heads
    batch = tl.program_id(0) // n_blocks // n_heads
    mask_ptr += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_q = queries < n_queries
    copy_ptr += ((batch * n_heads + head).to(tl.int64) * n_queries + queries)[:, None] * n_keys
    begin = tl.full([BLOCK_M], 0, tl.int32) + n_keys
    end = tl.zeros([BLOCK_M], tl.int32)
    hidden_again = begin
    for start in range(0, n_keys, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = inside_q[:, None] & (keys < n_keys)[None, :]
        ptrs = mask_ptr + queries.to(tl.int64)[:, None] * stride_mq + keys.to(tl.int64)[None, :] * stride_mk
        if BOOL:
            visible = tl.load(ptrs, mask=inside, other=0) != 0
            tl.store(copy_ptr + keys[None, :], visible.to(copy_ptr.dtype.element_ty), mask=inside)
        else:
            # "not below or equal" keeps NaN visible.
            visible = inside & ((tl.load(ptrs, mask=inside, other=0.0).to(tl.float64) <= lowest) == 0)
        if CAUSAL:
            visible = visible & (keys[None, :] <= (queries + query_offset)[:, None])
        begin = tl.minimum(begin, tl.min(tl.where(visible, keys[None, :], n_keys), 1))
        end = tl.maximum(end, tl.max(tl.where(visible, keys[None, :] + 1, 0), 1))
        hidden = inside & (visible == 0) & (keys[None, :] >= begin[:, None])
        hidden_again = tl.minimum(hidden_again, tl.min(tl.where(hidden, keys[None, :], n_keys), 1))
    intervals_ptr += ((batch * n_heads + head).to(tl.int64) * n_queries + queries) * 2
    tl.store(intervals_ptr, begin, mask=inside_q)
    tl.store(intervals_ptr + 1, end, mask=inside_q)
    ranges_ptr += tl.program_id(0) * 5
    tl.store(ranges_ptr, tl.min(begin, 0))
    tl.store(ranges_ptr + 1, tl.max(end, 0))
    tl.store(ranges_ptr + 2, tl.max(tl.where(inside_q, begin, 0), 0))
    tl.store(ranges_ptr + 3, tl.min(hidden_again, 0))
    tl.store(ranges_ptr + 4, tl.max((hidden_again < end).to(tl.int32), 0))


@triton.jit
def _block(
    q,
    k_base,
    v_base,
    mask_ptrs,
    pages_ptr,
    begin,
    queries,
    last_keys,
    begin_keys,
    end_keys,
    inside_q,
    Skv,
    page_size,
    window,
    scale,
    soft_cap,
    stride_kp,
    stride_kn,
    stride_kd,
    stride_vp,
    stride_vn,
    stride_vd,
    stride_mk,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SEES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The softmax of one block of keys: its maximum, sum and product with v.

    SEES: "all" where every query sees every key of it, "interval" where begin_keys and end_keys tell what the mask lets a
    query see, else "some".
    """
    keys = begin + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    inside_k = (keys >= 0) & (keys < Skv)
    offs_k = keys.to(tl.int64) * stride_kn
    offs_v = keys.to(tl.int64) * stride_vn
    if KEYS == "paged":
        pages = tl.load(pages_ptr + keys // page_size, mask=inside_k, other=0).to(tl.int64)
        within = (keys % page_size).to(tl.int64)
        offs_k = pages * stride_kp + within * stride_kn
        offs_v = pages * stride_vp + within * stride_vn
    k_ptrs = k_base + offs_k[None, :] + dims.to(tl.int64)[:, None] * stride_kd
    v_ptrs = v_base + offs_v[:, None] + dims_v.to(tl.int64)[None, :] * stride_vd
    if SEES == "all" and BLOCK_D == D:
        k = tl.load(k_ptrs)
    elif BLOCK_D == D:
        k = tl.load(k_ptrs, mask=inside_k[None, :], other=0.0)
    else:
        k = tl.load(k_ptrs, mask=inside_k[None, :] & (dims < D)[:, None], other=0.0)
    s = tl.dot(q, k, input_precision="ieee", out_dtype=ACC) * tl.full([], scale, ACC)
    if SOFT_CAP:
        s = _tanh(s / tl.full([], soft_cap, ACC), ACC) * tl.full([], soft_cap, ACC)
    if SEES != "all":
        visible = inside_q[:, None] & inside_k[None, :]
        if SEES == "interval":
            visible = visible & (keys[None, :] >= begin_keys[:, None]) & (keys[None, :] < end_keys[:, None])
        elif MASK == "additive":
            offs_mask = keys.to(tl.int64)[None, :] * stride_mk
            added = tl.load(mask_ptrs[:, None] + offs_mask, mask=visible, other=0.0).to(ACC)
            if ACC == tl.float32:
                # The lowest float32 times log2(e) would overflow; the bound says "hidden" just as well.
                added = tl.where(added == -float("inf"), added, tl.maximum(added, _LOWEST_SCORE))
            s = s + added
        elif MASK == "bool":
            offs_mask = keys.to(tl.int64)[None, :] * stride_mk
            visible = visible & (tl.load(mask_ptrs[:, None] + offs_mask, mask=visible, other=0) != 0)
        if CAUSAL:
            visible = visible & (keys[None, :] <= last_keys[:, None])
        if WINDOW:
            visible = visible & (keys[None, :] > last_keys[:, None] - window)
        s = tl.where(visible, s, -float("inf"))

    largest = tl.max(s, 1)
    # Of a query that sees none of these keys the maximum is -inf, and -inf - -inf would be NaN.
    p = _weights(s, tl.where(largest == -float("inf"), 0.0, largest)[:, None], ACC)
    if SEES == "all" and BLOCK_DV == DV:
        v = tl.load(v_ptrs)
    elif BLOCK_DV == DV:
        v = tl.load(v_ptrs, mask=inside_k[:, None], other=0.0)
    else:
        v = tl.load(v_ptrs, mask=inside_k[:, None] & (dims_v < DV)[None, :], other=0.0)
    p = p.to(v.dtype)
    ones = tl.full([BLOCK_N, 16], 1.0, tl.float32).to(v.dtype)  # the interpreter of Triton 3.6 has no bf16 constants but 0
    total = tl.dot(p, ones, input_precision="ieee", out_dtype=ACC)
    acc = tl.dot(p, v, input_precision="ieee", out_dtype=ACC)
    return largest, total, acc


@triton.jit
def _merge(largest, total, acc, part_largest, part_total, part_acc, ACC: tl.constexpr):
    """Two softmaxes into one: the sums times exp(own maximum - the larger one), the second product rounded, the first not."""
    new_largest = tl.maximum(largest, part_largest)
    # Before the first visible key both maxima are -inf.
    centre = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    r = _rescaling(largest, centre, ACC)[:, None]
    part_r = _rescaling(part_largest, centre, ACC)[:, None]
    total = tl.fma(total, tl.broadcast_to(r, total.shape), part_total * part_r)
    acc = tl.fma(acc, tl.broadcast_to(r, acc.shape), tl.broadcast_to(part_acc * part_r, acc.shape))
    return new_largest, total, acc


@triton.jit
def _weights(s, centre, ACC: tl.constexpr):
    """exp(s - centre). In fp32 as 2 ** fma(s, log2(e), -(centre * log2(e))), one instruction less for each score."""
    if ACC == tl.float64:
        return tl.exp(s - centre)
    else:
        return tl.exp2(tl.fma(s, tl.full(s.shape, _LOG2_E, tl.float32), tl.broadcast_to(centre * -_LOG2_E, s.shape)))


@triton.jit
def _rescaling(old, new, ACC: tl.constexpr):
    """exp(old - new), and exactly 1 where they are equal, which the form of ``_weights`` would not be."""
    if ACC == tl.float64:
        return tl.exp(old - new)
    else:
        return tl.exp2((old - new) * _LOG2_E)


@triton.jit
def _tanh(x, ACC: tl.constexpr):
    """1 - 2 / (exp(2 * x) + 1), which is exact at both ends."""
    return 1.0 - divide(tl.full(x.shape, 2.0, ACC), tl.exp(2.0 * x) + 1.0, ACC)


@triton.jit
def _store_part(part_ptr, part_stats_ptr, rows, largest, total, acc, inside_q, DV: tl.constexpr):
    """One part of the keys for ``_merge_parts_kernel``: rows count the parts of each query."""
    dims_v = tl.arange(0, acc.shape[1])
    part_ptrs = part_ptr + rows[:, None] * DV + dims_v[None, :]
    tl.store(part_ptrs, acc, mask=inside_q[:, None] & (dims_v < DV)[None, :])
    tl.store(part_stats_ptr + rows * 2, largest, mask=inside_q)
    tl.store(part_stats_ptr + (rows * 2 + 1), tl.max(total, 1), mask=inside_q)  # of sixteen equal columns


@triton.jit
def _store_result(
    largest,
    total,
    acc,
    sinks_ptr,
    heads,
    out_ptrs,
    lse_ptrs,
    stored,
    stored_lse,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = acc * (1 / total), lse = largest + log(total), with a head's sink as one more key whose value is 0."""
    if SINKS:
        sink = tl.load(sinks_ptr + heads).to(ACC)
        nothing = tl.zeros([sink.shape[0], 1], ACC)
        largest, total, acc = _merge(largest, total[:, None], acc, sink, nothing + 1.0, nothing, ACC)
        total = tl.reshape(total, [sink.shape[0]])
    seen = total != 0.0
    divisor = tl.where(seen, total, 1.0)
    out = acc * divide(tl.full(divisor.shape, 1.0, ACC), divisor, ACC)[:, None]
    # A hidden block turns -0 (an underflow) into 0; here all of them are turned.
    out = tl.where(out == 0.0, 0.0, out)
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=stored)
    if LSE:
        tl.store(lse_ptrs, tl.where(seen, largest + tl.log(divisor), -float("inf")), mask=stored_lse)


@triton.jit(
    do_not_specialize=[
        "n_blocks",
        "Sq",
        "Skv",
        "n_packs",
        "n_queries_in_all",
        "page_size",
        "window",
    ]
    + ["causal_offset", "stride_mb", "stride_mh", "stride_mq", "stride_mk", "stride_ib", "stride_ih", "stride_iq"]
    + ["stride_rb", "stride_rh", "n_ranges"]
    + ["stride_lb", "stride_lh", "stride_pages", "n_parts", "parts_a_program"],
    do_not_specialize_on_alignment=["mask_ptr", "intervals_ptr", "ranges_ptr", "lse_ptr", "part_ptr"]
    + ["q_starts_ptr", "k_starts_ptr", "pages_ptr", "sinks_ptr"],
)
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    intervals_ptr,
    ranges_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    q_starts_ptr,
    k_starts_ptr,
    pages_ptr,
    sinks_ptr,
    n_blocks,
    Sq,
    Skv,
    n_packs,
    n_queries_in_all,
    page_size,
    window,
    causal_offset,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_om,
    stride_lb,
    stride_lh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_ib,
    stride_ih,
    stride_iq,
    stride_rb,
    stride_rh,
    n_ranges,
    stride_pages,
    n_parts,
    parts_a_program,
    scale: tl.float64,
    soft_cap: tl.float64,
    D: tl.constexpr,
    DV: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    MANY_SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = softmax(scale * q @ k.T + mask) @ v for one block of queries of PACK heads that share a key head.

    The keys of a row are counted from its first visible one, in blocks of BLOCK_N. Each has a softmax of its own (``_block``):
        s = scale * (q @ k.T), capped, + mask, the product over the head dim ascending; hidden keys are -inf
        m = max(s); p = exp(s - m), rounded to v's dtype; [t, a] = p @ [1, v], the product over the keys ascending
    and they are merged, ascending (``_merge``):
        M' = max(M, m); [T, A] = fma([T, A], exp(M - M'), [t, a] * exp(m - M')); M = M'
    first the eight of a split, then, in the same way, the splits of the row. At the end out = A * (1 / T), lse = M + log(T). A
    block with no visible key has m = -inf, t = a = 0 and changes nothing. So the order is a function of a key's distance from
    the start of its row: neither the number of queries nor what is in front of or behind the row takes part.

    With PART_BLOCKS (1, or those of a split) a program computes ``parts_a_program`` parts, for ``_merge_parts_kernel`` to
    merge: the same sums in the same order. MANY_SPLITS: whether a row may have more than one.

    An additive mask may hide keys by its dtype's lowest value instead of -inf, and such keys do count for a query that
    sees no others. So with it the splits start at or before key 0, still in step with the first visible key.
    """
    # What the compiler knows it folds into the addresses: a quarter of the instructions of a loop with few queries.
    if K_STRIDE:
        stride_kn = K_STRIDE
    if V_STRIDE:
        stride_vn = V_STRIDE
    # With a causal mask the last blocks are the longest, so they go first.
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    pack_index = tl.program_id(0) // n_blocks % n_packs
    # Behind the parts' products [n_queries_in_all, n_parts, DV]: their maxima and sums.
    part_stats_ptr = part_ptr + tl.cast(n_parts, tl.int64) * n_queries_in_all * DV
    batch = (tl.program_id(0) // n_blocks // n_packs).to(tl.int64)
    if KEYS == "packed":
        q_start = tl.load(q_starts_ptr + batch).to(tl.int64)
        k_start = tl.load(k_starts_ptr + batch).to(tl.int64)
        Sq = tl.load(q_starts_ptr + batch + 1).to(tl.int32) - q_start.to(tl.int32)
        Skv = tl.load(k_starts_ptr + batch + 1).to(tl.int32) - k_start.to(tl.int32)
        causal_offset = Skv - Sq
        q_ptr += q_start * stride_qm
        out_ptr += q_start * stride_om
        lse_ptr += q_start
        part_ptr += q_start * n_parts * DV
        part_stats_ptr += q_start * n_parts * 2
        k_ptr += k_start * stride_kn
        v_ptr += k_start * stride_vn
    elif KEYS == "paged":
        q_start = tl.load(q_starts_ptr + batch).to(tl.int64)
        Sq = tl.load(q_starts_ptr + batch + 1).to(tl.int32) - q_start.to(tl.int32)
        Skv = tl.load(k_starts_ptr + batch).to(tl.int32)
        causal_offset = Skv - Sq
        q_ptr += q_start * stride_qm
        out_ptr += q_start * stride_om
        lse_ptr += q_start
        part_ptr += q_start * n_parts * DV
        part_stats_ptr += q_start * n_parts * 2
        pages_ptr += batch * stride_pages
    else:
        q_ptr += batch * stride_qb
        out_ptr += batch * stride_ob
        k_ptr += batch * stride_kb
        v_ptr += batch * stride_vb
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = rows // PACK
    heads = (pack_index * PACK + rows % PACK).to(tl.int64)
    inside_q = queries < Sq
    key_head = (pack_index * PACK // GROUP).to(tl.int64)
    last_keys = queries + causal_offset
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)

    first = tl.minimum(Skv, 0)
    if MASK != "none":
        ranges_ptr += batch * stride_rb + (pack_index * PACK).to(tl.int64) * stride_rh
        first = Skv
        for i in range(0, n_ranges, 128):
            offs = i + tl.arange(0, 128)
            first = tl.minimum(first, tl.min(tl.load(ranges_ptr + offs * 5, mask=offs < n_ranges, other=Skv), 0))
        if MASK == "additive":
            first = first - tl.cdiv(first, _SPLIT_BLOCKS * BLOCK_N) * (_SPLIT_BLOCKS * BLOCK_N)
    # The blocks from start to end: whole ones, those that intervals describe, and those for which the mask is read.
    start = first
    if MASK == "additive":
        start += -first // BLOCK_N * BLOCK_N  # nothing is in front of key 0
    end = Skv
    whole_end = Skv
    has_holes = True
    begin_keys = queries
    end_keys = queries
    first_query = block * BLOCK_M // PACK
    last_query = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // PACK, Sq - 1)
    if CAUSAL:
        end = tl.minimum(end, last_query + causal_offset + 1)
        whole_end = tl.minimum(whole_end, first_query + causal_offset + 1)
    if WINDOW:
        start += tl.maximum(first_query + causal_offset - window + 1 - start, 0) // BLOCK_N * BLOCK_N
    if MASK == "bool":
        offs = tl.minimum(first_query // _RANGE_QUERIES, n_ranges - 1) + tl.arange(0, 2 * BLOCK_M // _RANGE_QUERIES)
        mine = offs <= tl.minimum(last_query // _RANGE_QUERIES, n_ranges - 1)
        range_ptrs = ranges_ptr + offs * 5
        start += tl.maximum(tl.min(tl.load(range_ptrs, mask=mine, other=Skv), 0) - start, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(end, tl.max(tl.load(range_ptrs + 1, mask=mine, other=0), 0))
        whole_begin = tl.max(tl.load(range_ptrs + 2, mask=mine, other=0), 0)
        whole_end = tl.minimum(whole_end, tl.min(tl.load(range_ptrs + 3, mask=mine, other=Skv), 0))
        whole_end = tl.where(whole_begin <= start, whole_end, start)
        has_holes = tl.max(tl.load(range_ptrs + 4, mask=mine, other=0), 0) != 0
        interval_ptrs = intervals_ptr + batch * stride_ib + heads * stride_ih + queries.to(tl.int64) * stride_iq
        begin_keys = tl.load(interval_ptrs, mask=inside_q, other=Skv)
        end_keys = tl.load(interval_ptrs + 1, mask=inside_q, other=0)
    if MASK == "additive" or WINDOW:
        whole_end = start

    out_rows = heads * stride_lh + queries
    if KEYS == "dense":
        out_rows += batch * stride_lb
    part_rows = out_rows * n_parts
    PART_N: tl.constexpr = PART_BLOCKS * BLOCK_N
    SPLIT_N: tl.constexpr = _SPLIT_BLOCKS * BLOCK_N
    if PART_BLOCKS:
        part_begin = tl.program_id(1) * parts_a_program
        # The last one also sees to the parts that only round their number up.
        is_last = tl.program_id(1) == tl.num_programs(1) - 1
        part_end = tl.where(is_last, n_parts, part_begin + parts_a_program)
        for part in range(part_begin, part_end):
            begin = first + part * PART_N
            if (begin + PART_N <= start) | (begin >= end) | (start >= end):
                stats_ptrs = part_stats_ptr + (part_rows + part) * 2
                tl.store(stats_ptrs, tl.full([BLOCK_M], -float("inf"), ACC), mask=inside_q)
                tl.store(stats_ptrs + 1, tl.full([BLOCK_M], _ABSENT, ACC), mask=inside_q)
        start = tl.maximum(start, first + part_begin * PART_N)
        end = tl.minimum(end, first + part_end * PART_N)
        whole_end = tl.minimum(whole_end, end)
    whole_end = start + tl.maximum(whole_end - start, 0) // BLOCK_N * BLOCK_N
    interval_end = whole_end
    if MASK == "bool":
        interval_end = tl.where(has_holes, whole_end, tl.maximum(whole_end, end))

    q_ptrs = q_ptr + heads[:, None] * stride_qh + queries.to(tl.int64)[:, None] * stride_qm
    q_ptrs += dims.to(tl.int64)[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=inside_q[:, None] & (dims < D)[None, :], other=0.0)
    k_ptr += key_head * stride_kh
    v_ptr += key_head * stride_vh
    mask_ptrs = mask_ptr + batch * stride_mb + heads * stride_mh + queries.to(tl.int64) * stride_mq

    largest = tl.full([BLOCK_M], -float("inf"), ACC)
    total = tl.zeros([BLOCK_M, 16], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    row_largest, row_total, row_acc = largest, total, acc
    for phase in tl.static_range(3):
        if phase == 0:
            phase_begin, phase_end = start, whole_end
        elif phase == 1:
            phase_begin, phase_end = whole_end, interval_end
        else:
            phase_begin, phase_end = interval_end, end
        if phase_begin < phase_end:  # without it, a loop of no block would still set up its loads
            for begin in range(phase_begin, phase_end, BLOCK_N):
                if MANY_SPLITS and (begin > start) & ((begin - first) % SPLIT_N == 0):  # the first block of the next split
                    if PART_BLOCKS:
                        done = part_rows + (begin - first) // PART_N - 1
                        _store_part(part_ptr, part_stats_ptr, done, largest, total, acc, inside_q, DV)
                    else:
                        row_largest, row_total, row_acc = _merge(row_largest, row_total, row_acc, largest, total, acc, ACC)
                    largest = tl.full([BLOCK_M], -float("inf"), ACC)
                    total = tl.zeros([BLOCK_M, 16], ACC)
                    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
                block_largest, block_total, block_acc = _block(
                    q,
                    k_ptr,
                    v_ptr,
                    mask_ptrs,
                    pages_ptr,
                    begin,
                    queries,
                    last_keys,
                    begin_keys,
                    end_keys,
                    inside_q,
                    Skv,
                    page_size,
                    window,
                    scale,
                    soft_cap,
                    stride_kb,
                    stride_kn,
                    stride_kd,
                    stride_vb,
                    stride_vn,
                    stride_vd,
                    stride_mk,
                    D,
                    DV,
                    KEYS,
                    MASK,
                    CAUSAL,
                    WINDOW,
                    SOFT_CAP,
                    "all" if phase == 0 else "interval" if phase == 1 else "some",
                    ACC,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_DV,
                )
                if PART_BLOCKS == 1:
                    block_rows = part_rows + (begin - first) // BLOCK_N
                    _store_part(part_ptr, part_stats_ptr, block_rows, block_largest, block_total, block_acc, inside_q, DV)
                else:
                    largest, total, acc = _merge(largest, total, acc, block_largest, block_total, block_acc, ACC)

    if PART_BLOCKS == _SPLIT_BLOCKS and start < end:
        _store_part(part_ptr, part_stats_ptr, part_rows + (end - 1 - first) // PART_N, largest, total, acc, inside_q, DV)
    if not PART_BLOCKS:
        if MANY_SPLITS:
            largest, total, acc = _merge(row_largest, row_total, row_acc, largest, total, acc, ACC)
        out_ptrs = out_ptr + heads[:, None] * stride_oh + queries.to(tl.int64)[:, None] * stride_om
        _store_result(
            largest,
            tl.max(total, 1),
            acc,
            sinks_ptr,
            heads,
            out_ptrs + dims_v.to(tl.int64)[None, :],
            lse_ptr + out_rows,
            inside_q[:, None] & (dims_v < DV)[None, :],
            inside_q,
            SINKS,
            LSE,
            ACC,
        )


@triton.jit(
    do_not_specialize=["n_queries_in_all", "n_parts", "n_heads", "stride_lh", "stride_ob", "stride_oh", "stride_om"],
    do_not_specialize_on_alignment=["part_ptr", "sinks_ptr", "out_ptr", "lse_ptr"],
)
def _merge_parts_kernel(
    part_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    n_queries_in_all,
    n_parts,
    n_heads,
    stride_lh,
    stride_ob,
    stride_oh,
    stride_om,
    DV: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PARTS_A_SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The parts of ``_attention_kernel`` merged as there, for one query and BLOCK_DV of its dims.

    PARTS_A_SPLIT parts are a split. An absent part has a maximum of -inf, has stored no product, and changes nothing.
    """
    query = tl.program_id(0)
    # In 32 bits, in which a grid is counted: a division in 64 takes as long as all the rest.
    batch = query // (n_heads * stride_lh)
    head = query // stride_lh % n_heads
    out_ptr += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + (query % stride_lh).to(tl.int64) * stride_om
    query = query.to(tl.int64)
    dims_v = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    inside = dims_v < DV
    stats_ptrs = part_ptr + (tl.cast(n_parts, tl.int64) * n_queries_in_all * DV + query * n_parts * 2) + tl.zeros([1], tl.int32)
    part_ptrs = part_ptr + query * n_parts * DV + dims_v[None, :]
    largest = tl.full([1], -float("inf"), ACC)
    total = tl.zeros([1, 1], ACC)
    acc = tl.zeros([1, BLOCK_DV], ACC)
    split_largest, split_total, split_acc = largest, total, acc
    for _ in range(0, n_parts, UNROLL):
        # All loads before the first sum, so that they are under way at once: the compiler does not bring them forward.
        loaded = ()
        for i in tl.static_range(UNROLL):
            part_largest = tl.load(stats_ptrs + i * 2)
            part_total = tl.load(stats_ptrs + (i * 2 + 1))
            if DV % BLOCK_DV == 0:
                part_acc = tl.load(part_ptrs + i * DV)
            else:
                part_acc = tl.load(part_ptrs + i * DV, mask=inside[None, :], other=0.0)
            loaded = loaded + ((part_largest, part_total[:, None], part_acc),)
        for i in tl.static_range(UNROLL):
            part_largest, part_total, part_acc = loaded[i]
            is_absent = part_total == _ABSENT
            part_total, part_acc = tl.where(is_absent, 0.0, part_total), tl.where(is_absent, 0.0, part_acc)
            if i % PARTS_A_SPLIT == 0:
                split_largest, split_total, split_acc = part_largest, part_total, part_acc
            else:
                split_largest, split_total, split_acc = _merge(
                    split_largest, split_total, split_acc, part_largest, part_total, part_acc, ACC
                )
            if i % PARTS_A_SPLIT == PARTS_A_SPLIT - 1:
                largest, total, acc = _merge(largest, total, acc, split_largest, split_total, split_acc, ACC)
        stats_ptrs += UNROLL * 2
        part_ptrs += UNROLL * DV
    _store_result(
        largest,
        tl.reshape(total, [1]),
        acc,
        sinks_ptr,
        head + tl.zeros([1], tl.int64),
        out_ptr + dims_v.to(tl.int64)[None, :],
        lse_ptr + query + tl.zeros([1], tl.int64),
        inside[None, :],
        tl.zeros([1], tl.int32) == tl.program_id(1),
        SINKS,
        LSE,
        ACC,
    )


class _Options(NamedTuple):
    """What hides or changes scores, besides a mask. n_rows: of a batch; Sq and Skv: the most of any row."""

    keys: str  # dense, packed, paged
    n_rows: int
    Sq: int
    Skv: int
    is_causal: bool
    scale: float
    causal_offset: int = 0
    window: int | None = None
    soft_cap: float | None = None
    page_size: int = 1


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    causal_offset: int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``reference.attention`` on the GPU. What the mask hides is found there: nothing waits for it."""
    B, H, Sq, _ = q.shape
    out = q.new_empty((B, H, Sq, v.shape[3]))
    lse = q.new_empty((B, H, Sq), dtype=accumulator_dtype(q.dtype)) if with_lse else None
    if B * H * Sq == 0:
        return out, lse
    options = _Options("dense", B, Sq, k.shape[2], is_causal, scale, causal_offset, window, soft_cap)
    with on_device(q):
        _run(options, q, k, v, out, lse, mask=mask, sinks=sinks)
    return out, lse


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    scale: float,
    *,
    is_causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``reference.packed_attention`` on the GPU. The starts stay there: nothing waits for them."""
    T, H, _ = q.shape
    out = q.new_empty((T, H, v.shape[-1]))
    lse = q.new_empty((H, T), dtype=accumulator_dtype(q.dtype))
    if lse.numel() == 0:
        return out, lse
    keys, Skv, page_size = ("packed", k.shape[0], 1) if pages is None else ("paged", pages.shape[1] * k.shape[1], k.shape[1])
    n_rows = q_starts.shape[0] - 1
    options = _Options(keys, n_rows, max_queries, Skv, is_causal, scale, 0, window, soft_cap, page_size)
    with on_device(q):
        _run(options, q, k, v, out, lse, q_starts=q_starts, k_starts=k_starts, pages=pages, sinks=sinks)
    return out, lse


def _run(
    options: _Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    q_starts: Tensor | None = None,
    k_starts: Tensor | None = None,
    pages: Tensor | None = None,
) -> None:
    kernel = _plan(
        options,
        (q.shape, k.shape, v.shape),
        (q.stride(), k.stride(), v.stride()),
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
        None if pages is None else pages.stride(0),
        tuple([None if x is None else x.dtype for x in (sinks, q_starts, k_starts, pages, lse)]),
        alignment(q, k, v, k if mask is None else mask),
        q.dtype,
        q.device,
    )
    kernel(q, k, v, out, lse, mask, sinks, q_starts, k_starts, pages)


def plan_attention(shapes, strides, mask, lse_dtype, aligned, is_causal, scale, dtype, device) -> "_Attention":
    """``attention`` over q, k and v like these. mask: dtype, full shape, strides; aligned: q, k, v, the mask."""
    (B, _, Sq, _), (_, _, Skv, _), _ = shapes
    options = _Options("dense", B, Sq, Skv, is_causal, scale)
    return _plan(options, shapes, strides, mask, None, (None, None, None, None, lse_dtype), aligned, dtype, device)


@plan
def _plan(options, shapes, strides, mask, stride_pages, dtypes, aligned, dtype, device):
    """How attention over tensors like these is computed. mask: its dtype, shape and strides; dtypes: of what else there is."""
    shape_q, shape_k, shape_v = shapes
    strides_q, strides_k, strides_v = strides
    dim_of_heads = 1 if options.keys == "dense" else -2
    H, key_heads, D, DV = shape_q[dim_of_heads], shape_k[dim_of_heads], shape_q[-1], shape_v[-1]
    group = H // key_heads
    if options.keys == "dense":
        T = H * options.Sq
        strides = (*strides_q, *strides_k, *strides_v, T * DV, options.Sq * DV, DV, T, options.Sq)
        n_queries_in_all = options.n_rows * T
    else:
        T = shape_q[0]
        page_k, page_v = (strides_k[0], strides_v[0]) if options.keys == "paged" else (0, 0)
        strides = (0, strides_q[1], strides_q[0], strides_q[2], page_k, strides_k[-2], strides_k[-3], strides_k[-1])
        strides += (page_v, strides_v[-2], strides_v[-3], strides_v[-1], 0, DV, H * DV, 0, T)
        n_queries_in_all = H * T
    stride_kn, stride_vn = strides[6], strides[10]
    ranges = None if mask is None else _Ranges(*mask, options, dtype.itemsize)
    kind = "none" if ranges is None else "bool" if ranges.is_bool else "additive"
    # Heads that share keys go through one tile, so that few queries still fill it; unless each has a mask of its own.
    pack = group if ranges is None or ranges.stride_h == 0 else 1
    size = (dtype, max(D, DV), options.Sq * pack, device, ranges is not None)
    tile = attention_tile(*size)
    n_blocks = ceil_div(options.Sq * pack, tile.block_m)
    programs = n_blocks * (H // pack) * options.n_rows
    # With an additive mask the first split may begin before the first key.
    n_key_blocks = ceil_div(options.Skv, tile.block_n) + (_SPLIT_BLOCKS.value if kind == "additive" else 0)
    division = _Division(0, 1, 1)
    if n_blocks == 1:
        multiprocessors = device_of(device).multiprocessors
        division = _division(programs, n_key_blocks, multiprocessors)
        if division.part_blocks or programs <= multiprocessors:
            tile = attention_tile(*size, division.part_blocks > 0, stages=1 if division.is_finest else 3)
    n_parts = ceil_div(division.n_parts, division.merged_at_once) * division.merged_at_once
    many_splits = division.part_blocks != 1 and n_key_blocks > _SPLIT_BLOCKS.value
    known_strides = _known_stride(stride_kn, D, H, key_heads), _known_stride(stride_vn, DV, H, key_heads)
    constants = (
        D,
        DV,
        group,
        pack,
        *known_strides,
        options.keys,
        kind,
        options.is_causal,
        options.window is not None,
        options.soft_cap is not None,
    )
    has_sinks, has_lse = dtypes[0] is not None, dtypes[-1] is not None
    constants += (has_sinks, has_lse, division.part_blocks, many_splits, accumulator(dtype), tile.block_m, tile.block_n)
    constants += (max(16, next_power_of_2(D)), max(16, next_power_of_2(DV)))
    numbers = (
        *(n_blocks, options.Sq, options.Skv, H // pack, n_queries_in_all),
        *(options.page_size, options.window or 0, options.causal_offset),
        *strides,
        *((0,) * 10 if ranges is None else ranges.strides),
        stride_pages or 0,
        n_parts,
        division.parts_a_program,
        float(options.scale),
        options.soft_cap or 0.0,
    )
    grid = (programs, ceil_div(division.n_parts, division.parts_a_program), 1)
    how = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    launch = Launch(_attention_kernel, grid, numbers + constants, **how)
    merge = None
    if division.part_blocks:
        merge = _Merge(division, n_parts, n_queries_in_all, H, DV, strides, has_sinks, has_lse, accumulator(dtype))
    return _Attention(ranges, launch, merge)


def _known_stride(stride: int, dim: int, heads: int, key_heads: int) -> int:
    """The distance of two keys where it is a model's own, else 0: others, by batch or length, would make ever more binaries.

    That is: heads apart, tokens of key heads, tokens of query, key and value as one.
    """
    return stride if stride in (dim, key_heads * dim, (heads + 2 * key_heads) * dim) else 0


class _Attention:
    """``_attention_kernel`` for tensors of given sizes, with the kernels in front of it and behind it where it needs them."""

    def __init__(self, ranges: "_Ranges | None", launch: Launch, merge: "_Merge | None") -> None:
        self._ranges, self._launch, self._merge = ranges, launch, merge

    def __call__(self, q, k, v, out, lse=None, mask=None, sinks=None, q_starts=None, k_starts=None, pages=None) -> None:
        intervals = ranges = parts = None
        if self._ranges is not None:
            mask, intervals, ranges = self._ranges(mask)
        if self._merge is not None:
            parts = self._merge.room(q)
        self._launch(q, k, v, mask, intervals, ranges, out, lse, parts, q_starts, k_starts, pages, sinks)
        if self._merge is not None:
            self._merge(parts, sinks, out, lse)


class _Ranges:
    """``_ranges_kernel`` for one layout of masks; itemsize: of q. Dims along which a mask is expanded are looked at once."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        options: _Options,
        itemsize: int,
    ) -> None:
        self.is_bool = dtype == torch.bool
        self._integers = _INTEGERS[itemsize]
        B, H, n_queries = (1 if stride == 0 else size for size, stride in zip(shape[:3], strides[:3], strict=True))
        n_keys = shape[3]
        n_blocks = ceil_div(n_queries, _RANGE_QUERIES.value)
        self._copy, self._intervals, self._ranges = (B, H, n_queries, n_keys), (B, H, n_queries, 2), (B, H, n_blocks, 5)
        # Queries that share a line of the mask see as much as the last of them, from whom causality hides least.
        query_offset = options.causal_offset + (shape[2] - 1 if n_queries == 1 else 0)
        lowest = 0.0 if self.is_bool else torch.finfo(dtype).min
        block = (_RANGE_QUERIES.value, 256) if n_queries > 1 else (1, 4096)
        numbers = (H, n_queries, n_keys, query_offset, n_blocks, *strides, lowest)
        arguments = (*numbers, self.is_bool, options.is_causal, *block)
        self._launch = Launch(_ranges_kernel, (B * H * n_blocks, 1, 1), arguments, num_warps=4, enable_fp_fusion=False)
        strides = _strides_of(self._copy) if self.is_bool else strides
        strides = [0 if size == 1 else stride for size, stride in zip(self._copy, strides, strict=True)]
        intervals, ranges = (_strides_of(shape) for shape in (self._intervals, self._ranges))
        self.stride_h = strides[1]
        self.strides = (*strides, *intervals[:3], *ranges[:2], n_blocks)

    def __call__(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mask as the kernel loads it, the intervals and the ranges.

        In integers of q's width: Triton (3.6 to 3.9) gives the second product an order of k that follows the narrowest load in
        front of it, so a kernel that loads bytes would sum in another order than one without a mask. In float64 Triton 3.6
        knows no other order, and compiles no such kernel.
        """
        copy = torch.empty(self._copy, dtype=self._integers, device=mask.device) if self.is_bool else mask
        intervals, ranges = (
            torch.empty(shape, dtype=torch.int32, device=mask.device) for shape in (self._intervals, self._ranges)
        )
        self._launch(mask, copy, intervals, ranges)
        return copy, intervals, ranges


def _strides_of(shape: tuple[int, ...]) -> list[int]:
    """Of a contiguous tensor, and 0 where there is but one."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]


class _Division(NamedTuple):
    """How the keys of a row are divided among programs."""

    part_blocks: int
    """Blocks of a part: 1, or those of a split; or 0: one program computes the row."""
    n_parts: int
    parts_a_program: int

    @property
    def is_finest(self) -> bool:
        """One block a program: there is nothing to load ahead."""
        return self.part_blocks * self.parts_a_program == 1

    @property
    def merged_at_once(self) -> int:
        """A multiple of the parts of a split."""
        return max(_SPLIT_BLOCKS.value, min(16, next_power_of_2(self.n_parts)))


@functools.cache
def _division(programs: int, n_key_blocks: int, multiprocessors: int) -> _Division:
    """The fastest one, where ``programs`` of them would compute the rows.

    By a fit to what was measured on an H200, in the time that a program takes for one more block while the others rest. To
    store a part takes a quarter of that, the merge two and one for each 32 parts. Programs of one block overlap, two on a
    multiprocessor; what comes after those waits for them.
    """
    best = (n_key_blocks * _pace(programs / multiprocessors), _Division(0, 1, 1))
    for part_blocks in (1, _SPLIT_BLOCKS.value) if n_key_blocks > 1 else ():
        n_parts = ceil_div(n_key_blocks, part_blocks)
        for parts_a_program in range(1, n_parts + 1):
            division = _Division(part_blocks, n_parts, parts_a_program)
            shared = programs * ceil_div(n_parts, parts_a_program) / multiprocessors
            if division.is_finest:
                time = 2.1 * shared + (1.75 if shared > 2.0 else 0.0)
            else:
                time = math.ceil(shared) * parts_a_program * (part_blocks * _pace(min(1.0, shared)) + 0.25)
            best = min(best, (time + 2.0 + n_parts / 32, division))
    return best[1]


def _pace(shared: float) -> float:
    """The time of one block where so many programs share a multiprocessor. Memory is busy when each has one of them."""
    return 1.0 + 0.75 * shared * shared if shared <= 1.0 else 1.75 * shared


class _Merge:
    """``_merge_parts_kernel`` for results of given sizes."""

    def __init__(
        self,
        division: _Division,
        n_parts: int,
        n_queries_in_all: int,
        n_heads: int,
        DV: int,
        strides: tuple[int, ...],
        has_sinks: bool,
        has_lse: bool,
        acc: tl.dtype,
    ) -> None:
        self._dtype = torch.float64 if acc == tl.float64 else torch.float32
        self._room = n_parts * n_queries_in_all * (DV + 2)
        dims = min(_MERGE_DIMS, max(16, next_power_of_2(DV)))
        numbers = (n_queries_in_all, n_parts, n_heads, strides[-1], *strides[-5:-2])
        parts_a_split = _SPLIT_BLOCKS.value // division.part_blocks
        arguments = (*numbers, DV, has_sinks, has_lse, acc, dims, parts_a_split, division.merged_at_once)
        grid = (n_queries_in_all, ceil_div(DV, dims), 1)
        self._launch = Launch(_merge_parts_kernel, grid, arguments, num_warps=1, enable_fp_fusion=False)

    def room(self, q: Tensor) -> Tensor:
        """For the parts' products, and for their maxima and sums."""
        return torch.empty(self._room, dtype=self._dtype, device=q.device)

    def __call__(self, parts: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
        self._launch(parts, sinks, out, lse)
