"""``attention`` and ``packed_attention``: a running maximum over the keys (online softmax), any mask, grouped heads.

The order over the keys counts from the first key that any query of the same (batch, head) can see. So padding on either
side changes no bit, nor does the number of queries: a block of keys that a query cannot see leaves its maximum, its sum
and its accumulator as they are, bit for bit. The values of hidden keys must be finite: 0 * NaN is NaN, as in torch.

References: online softmax, Milakov and Gimelshein, arXiv 1805.02867; its use in attention, Dao et al., arXiv 2205.14135;
splits of the keys, Dao et al., "Flash-Decoding" (2023); pages, Kwon et al., arXiv 2309.06180.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, alignment, plan
from .reference import accumulator_dtype
from .rows import divide
from .tiles import KV_SPLIT, accumulator, attention_tile, ceil_div, device_of, next_power_of_2, on_device

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST_SCORE = tl.constexpr(-(2.0**125))
_FIRST_KEY_QUERIES = 16
_FIRST_KEY_BLOCK = 256
_MERGE_UNROLL = 16


@triton.jit(
    do_not_specialize=["n_heads", "n_queries", "n_keys", "query_offset", "n_blocks"]
    + ["stride_mb", "stride_mh", "stride_mq", "stride_mk"],
    do_not_specialize_on_alignment=["mask_ptr", "first_ptr"],
)
def _first_key_kernel(
    mask_ptr,
    first_ptr,
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
    """first = the smallest key that any query of one block of queries can see; n_keys if there is none.

    Integers only, so exact in any order. The search stops at the first block of keys that holds one.
    """
    block = tl.program_id(0) % n_blocks
    head = tl.program_id(0) // n_blocks % n_heads
    batch = tl.program_id(0) // n_blocks // n_heads
    mask_ptr += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    end = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, tl.minimum(block * BLOCK_M + BLOCK_M, n_queries) + query_offset)
    first = n_keys
    start = tl.program_id(0) * 0
    while start < end:
        keys = start + tl.arange(0, BLOCK_N)
        visible = (queries < n_queries)[:, None] & (keys < n_keys)[None, :]
        ptrs = mask_ptr + queries.to(tl.int64)[:, None] * stride_mq + keys.to(tl.int64)[None, :] * stride_mk
        if BOOL:
            visible = visible & (tl.load(ptrs, mask=visible, other=0) != 0)
        else:
            # "not below or equal" keeps NaN visible.
            visible = visible & ((tl.load(ptrs, mask=visible, other=0.0).to(tl.float64) <= lowest) == 0)
        if CAUSAL:
            visible = visible & (keys[None, :] <= (queries + query_offset)[:, None])
        first = tl.minimum(first, tl.min(tl.min(tl.where(visible, keys[None, :], n_keys), 1), 0))
        start = tl.where(first < n_keys, end, start + BLOCK_N)
    tl.store(first_ptr + tl.program_id(0), first)


@triton.jit
def _attend(
    q,
    k_base,
    v_base,
    mask_ptrs,
    pages_ptr,
    begin,
    queries,
    last_keys,
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
    largest,
    total,
    acc,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WHOLE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One block of keys into a running softmax: (largest, total, acc) -> the same. WHOLE: every query sees every key of it."""
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
    if WHOLE and BLOCK_D == D:
        k = tl.load(k_ptrs)
    elif BLOCK_D == D:
        k = tl.load(k_ptrs, mask=inside_k[None, :], other=0.0)
    else:
        k = tl.load(k_ptrs, mask=inside_k[None, :] & (dims < D)[:, None], other=0.0)
    s = tl.dot(q, k, input_precision="ieee", out_dtype=ACC) * tl.full([], scale, ACC)
    if SOFT_CAP:
        s = _tanh(s / tl.full([], soft_cap, ACC), ACC) * tl.full([], soft_cap, ACC)
    if not WHOLE:
        visible = inside_q[:, None] & inside_k[None, :]
        if MASK == "additive":
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

    new_largest = tl.maximum(largest, tl.max(s, 1))
    # Before the first visible key both maxima are -inf, and their difference would be NaN.
    centre = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    p = _weights(s, centre[:, None], ACC)
    r = _rescaling(largest, centre, ACC)
    if WHOLE and BLOCK_DV == DV:
        v = tl.load(v_ptrs)
    elif BLOCK_DV == DV:
        v = tl.load(v_ptrs, mask=inside_k[:, None], other=0.0)
    else:
        v = tl.load(v_ptrs, mask=inside_k[:, None] & (dims_v < DV)[None, :], other=0.0)
    p = p.to(v.dtype)
    ones = tl.full([BLOCK_N, 16], 1.0, v.dtype)
    total = tl.dot(p, ones, total * r[:, None], input_precision="ieee", out_dtype=ACC)
    acc = tl.dot(p, v, acc * r[:, None], input_precision="ieee", out_dtype=ACC)
    return new_largest, total, acc


@triton.jit
def _merge(largest, total, acc, part_largest, part_total, part_acc, ACC: tl.constexpr):
    """Two running softmaxes into one: both sums times exp(own maximum - the larger one), then added."""
    new_largest = tl.maximum(largest, part_largest)
    centre = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    r = _rescaling(largest, centre, ACC)
    part_r = _rescaling(part_largest, centre, ACC)
    total = total * r[:, None] + part_total * part_r[:, None]
    acc = acc * r[:, None] + part_acc * part_r[:, None]
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
def _store_result(
    largest,
    total,
    acc,
    sinks_ptr,
    heads,
    out_ptrs,
    lse_ptrs,
    inside_q,
    DV: tl.constexpr,
    SINKS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = acc * (1 / total), lse = largest + log(total), with a head's sink as one more key whose value is 0."""
    if SINKS:
        sink = tl.load(sinks_ptr + heads, mask=inside_q, other=0.0).to(ACC)
        nothing = tl.zeros([ROWS, 1], ACC)
        largest, total, acc = _merge(largest, total[:, None], acc, sink, nothing + 1.0, nothing, ACC)
        total = tl.reshape(total, [ROWS])
    seen = total != 0.0
    divisor = tl.where(seen, total, 1.0)
    out = acc * divide(tl.full([ROWS], 1.0, ACC), divisor, ACC)[:, None]
    # A hidden block turns -0 (an underflow) into 0; here all of them are turned.
    out = tl.where(out == 0.0, 0.0, out)
    dims_v = tl.arange(0, BLOCK_DV)
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=inside_q[:, None] & (dims_v < DV)[None, :])
    tl.store(lse_ptrs, tl.where(seen, largest + tl.log(divisor), -float("inf")), mask=inside_q)


@triton.jit(
    do_not_specialize=["n_blocks", "Sq", "Skv", "n_packs", "pack", "heads_per_key_head", "n_rows", "page_size", "window"]
    + ["causal_offset", "stride_mb", "stride_mh", "stride_mq", "stride_mk", "stride_fb", "stride_fh", "n_firsts"]
    + ["stride_lb", "stride_lh", "stride_pages"],
    do_not_specialize_on_alignment=["mask_ptr", "first_ptr", "lse_ptr", "part_ptr", "part_stats_ptr"]
    + ["q_starts_ptr", "k_starts_ptr", "pages_ptr", "sinks_ptr"],
)
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    first_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_stats_ptr,
    q_starts_ptr,
    k_starts_ptr,
    pages_ptr,
    sinks_ptr,
    n_blocks,
    Sq,
    Skv,
    n_packs,
    pack,
    heads_per_key_head,
    n_rows,
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
    stride_fb,
    stride_fh,
    n_firsts,
    stride_pages,
    scale: tl.float64,
    soft_cap: tl.float64,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT_GRID: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = softmax(scale * q @ k.T + mask) @ v for one block of queries of ``pack`` heads that share a key head.

    The keys of a row are counted from its first visible one, in splits of SPLIT keys, and those in blocks of BLOCK_N.
    A split is a running softmax of its own, over its blocks, ascending (``_attend``):
        s = scale * (q @ k.T), capped, + mask, the product over the head dim ascending; hidden keys are -inf
        m' = max(m, max(s)); p = exp(s - m'), rounded to v's dtype; r = exp(m - m')
        [total, acc] = [total, acc] * r + p @ [1, v], the product over the keys ascending
    The splits are merged, ascending (``_merge``), and at the end out = acc * (1 / total), lse = m + log(total). A block or a
    split with no visible key has m' = m, p = 0, r = 1 and changes nothing. So the order is a function of a key's distance
    from the start of its row: neither the number of queries nor what is in front of or behind the row takes part.

    With SPLIT_GRID a program computes one split, for ``_merge_splits_kernel`` to merge: the same sums in the same order.

    An additive mask may hide keys by its dtype's lowest value instead of -inf, and such keys do count for a query that
    sees no others. So with it the splits start at or before key 0, still in step with the first visible key.
    """
    # With a causal mask the last blocks are the longest, so they go first.
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    pack_index = tl.program_id(0) // n_blocks % n_packs
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
        part_ptr += q_start * DV
        part_stats_ptr += q_start * 2
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
        part_ptr += q_start * DV
        part_stats_ptr += q_start * 2
        pages_ptr += batch * stride_pages
    else:
        q_ptr += batch * stride_qb
        out_ptr += batch * stride_ob
        k_ptr += batch * stride_kb
        v_ptr += batch * stride_vb
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = rows // pack
    heads = (pack_index * pack + rows % pack).to(tl.int64)
    inside_q = queries < Sq
    key_head = (pack_index * pack // heads_per_key_head).to(tl.int64)
    last_keys = queries + causal_offset
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)

    first = tl.minimum(Skv, 0)
    if MASK != "none":
        first_ptr += batch * stride_fb + (pack_index * pack).to(tl.int64) * stride_fh
        first = Skv
        for i in range(0, n_firsts, 128):
            offs = i + tl.arange(0, 128)
            first = tl.minimum(first, tl.min(tl.load(first_ptr + offs, mask=offs < n_firsts, other=Skv), 0))
        if MASK == "additive":
            first = first - tl.cdiv(first, SPLIT) * SPLIT
    start = first
    end = Skv
    whole_end = Skv
    if CAUSAL:
        # Blocks behind the last query of this block are hidden from all of it.
        last_query = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // pack, Sq - 1)
        end = tl.minimum(Skv, last_query + causal_offset + 1)
        whole_end = tl.minimum(Skv, block * BLOCK_M // pack + causal_offset + 1)
    if WINDOW:
        lowest = block * BLOCK_M // pack + causal_offset - window + 1
        start += tl.maximum(lowest - start, 0) // BLOCK_N * BLOCK_N
    if SPLIT_GRID:
        split = tl.program_id(1)
        start = tl.maximum(start, first + split * SPLIT)
        end = tl.minimum(end, first + split * SPLIT + SPLIT)
        whole_end = tl.minimum(whole_end, end)
    if MASK != "none" or WINDOW:
        whole_end = start
    else:
        whole_end = start + tl.maximum(whole_end - start, 0) // BLOCK_N * BLOCK_N

    q_ptrs = q_ptr + heads[:, None] * stride_qh + queries.to(tl.int64)[:, None] * stride_qm
    q_ptrs += dims.to(tl.int64)[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=inside_q[:, None] & (dims < D)[None, :], other=0.0)
    k_ptr += key_head * stride_kh
    v_ptr += key_head * stride_vh
    mask_ptrs = mask_ptr + batch * stride_mb + heads * stride_mh + queries.to(tl.int64) * stride_mq

    largest = tl.full([BLOCK_M], -float("inf"), ACC)
    total = tl.zeros([BLOCK_M, 16], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    part_largest = tl.full([BLOCK_M], -float("inf"), ACC)
    part_total = tl.zeros([BLOCK_M, 16], ACC)
    part_acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    for begin in range(start, whole_end, BLOCK_N):
        part_largest, part_total, part_acc = _attend(
            q,
            k_ptr,
            v_ptr,
            mask_ptrs,
            pages_ptr,
            begin,
            queries,
            last_keys,
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
            part_largest,
            part_total,
            part_acc,
            D,
            DV,
            KEYS,
            MASK,
            CAUSAL,
            WINDOW,
            SOFT_CAP,
            True,
            ACC,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
        )
        if not SPLIT_GRID:
            if (begin - first + BLOCK_N) % SPLIT == 0:
                largest, total, acc = _merge(largest, total, acc, part_largest, part_total, part_acc, ACC)
                part_largest = tl.full([BLOCK_M], -float("inf"), ACC)
                part_total = tl.zeros([BLOCK_M, 16], ACC)
                part_acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    for begin in range(whole_end, end, BLOCK_N):
        part_largest, part_total, part_acc = _attend(
            q,
            k_ptr,
            v_ptr,
            mask_ptrs,
            pages_ptr,
            begin,
            queries,
            last_keys,
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
            part_largest,
            part_total,
            part_acc,
            D,
            DV,
            KEYS,
            MASK,
            CAUSAL,
            WINDOW,
            SOFT_CAP,
            False,
            ACC,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
        )
        if not SPLIT_GRID:
            if (begin - first + BLOCK_N) % SPLIT == 0:
                largest, total, acc = _merge(largest, total, acc, part_largest, part_total, part_acc, ACC)
                part_largest = tl.full([BLOCK_M], -float("inf"), ACC)
                part_total = tl.zeros([BLOCK_M, 16], ACC)
                part_acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)

    out_rows = heads * stride_lh + queries
    if KEYS == "dense":
        out_rows += batch * stride_lb
    if SPLIT_GRID:
        out_rows += split.to(tl.int64) * n_rows
        part_ptrs = part_ptr + out_rows[:, None] * DV + dims_v.to(tl.int64)[None, :]
        tl.store(part_ptrs, part_acc, mask=inside_q[:, None] & (dims_v < DV)[None, :])
        tl.store(part_stats_ptr + out_rows * 2, part_largest, mask=inside_q)
        tl.store(part_stats_ptr + out_rows * 2 + 1, tl.max(part_total, 1), mask=inside_q)
    else:
        largest, total, acc = _merge(largest, total, acc, part_largest, part_total, part_acc, ACC)
        out_ptrs = out_ptr + heads[:, None] * stride_oh + queries.to(tl.int64)[:, None] * stride_om
        out_ptrs += dims_v.to(tl.int64)[None, :]
        _store_result(
            largest,
            tl.max(total, 1),  # sixteen equal columns
            acc,
            sinks_ptr,
            heads,
            out_ptrs,
            lse_ptr + out_rows,
            inside_q,
            DV,
            SINKS,
            ACC,
            BLOCK_M,
            BLOCK_DV,
        )


@triton.jit(
    do_not_specialize=["n_rows", "n_splits", "n_heads", "stride_lh", "stride_ob", "stride_oh", "stride_om"],
    do_not_specialize_on_alignment=["part_ptr", "part_stats_ptr", "sinks_ptr", "out_ptr", "lse_ptr"],
)
def _merge_splits_kernel(
    part_ptr,
    part_stats_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    n_rows,
    n_splits,
    n_heads,
    stride_lh,
    stride_ob,
    stride_oh,
    stride_om,
    DV: tl.constexpr,
    SINKS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The splits of ``_attention_kernel`` merged, ascending, for ROWS rows. Splits behind the last one change nothing."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    dims_v = tl.arange(0, BLOCK_DV)
    largest = tl.full([ROWS], -float("inf"), ACC)
    total = tl.zeros([ROWS, 1], ACC)
    acc = tl.zeros([ROWS, BLOCK_DV], ACC)
    for start in range(0, n_splits, UNROLL):
        # Unrolled, so that the loads of several splits are under way at once.
        for i in tl.static_range(UNROLL):
            splits = tl.full([ROWS], i, tl.int64) + start
            part_rows = splits * n_rows + rows
            there = inside & (splits < n_splits)
            part_largest = tl.load(part_stats_ptr + part_rows * 2, mask=there, other=-float("inf"))
            part_total = tl.load(part_stats_ptr + part_rows * 2 + 1, mask=there, other=0.0)
            part_ptrs = part_ptr + part_rows[:, None] * DV + dims_v.to(tl.int64)[None, :]
            part_acc = tl.load(part_ptrs, mask=there[:, None] & (dims_v < DV)[None, :], other=0.0)
            largest, total, acc = _merge(largest, total, acc, part_largest, part_total[:, None], part_acc, ACC)
    batch = rows // (n_heads * stride_lh)
    heads = rows // stride_lh % n_heads
    out_ptrs = out_ptr + (batch * stride_ob + heads * stride_oh + rows % stride_lh * stride_om)[:, None]
    _store_result(
        largest,
        tl.reshape(total, [ROWS]),
        acc,
        sinks_ptr,
        heads,
        out_ptrs + dims_v.to(tl.int64)[None, :],
        lse_ptr + rows,
        inside,
        DV,
        SINKS,
        ACC,
        ROWS,
        BLOCK_DV,
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
) -> tuple[Tensor, Tensor]:
    """``reference.attention`` on the GPU. What the mask hides is found there: nothing waits for it."""
    B, H, Sq, _ = q.shape
    out = torch.empty((B, H, Sq, v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Sq), dtype=accumulator_dtype(q.dtype), device=q.device)
    if lse.numel() == 0:
        return out, lse
    with on_device(q):
        firsts = None
        if mask is not None:
            firsts = _first_keys(mask, is_causal, causal_offset)
            mask = _loadable(mask)
        options = _Options("dense", B, Sq, k.shape[2], is_causal, scale, causal_offset, window, soft_cap)
        _run(options, q, k, v, out, lse, mask=mask, firsts=firsts, sinks=sinks)
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
    out = torch.empty((T, H, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((H, T), dtype=accumulator_dtype(q.dtype), device=q.device)
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
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    firsts: Tensor | None = None,
    sinks: Tensor | None = None,
    q_starts: Tensor | None = None,
    k_starts: Tensor | None = None,
    pages: Tensor | None = None,
) -> None:
    kernel = _plan(
        options,
        q.shape,
        q.stride(),
        k.shape,
        k.stride(),
        v.shape,
        v.stride(),
        tuple(_layout(x) for x in (mask, firsts, sinks, q_starts, k_starts, pages)),
        alignment(q, k, v),
        q.dtype,
        q.device,
    )
    # What is absent is not read; lse stands in its place.
    optional = tuple(lse if x is None else x for x in (mask, firsts, q_starts, k_starts, pages, sinks))
    kernel(q, k, v, out, lse, *optional)


def _layout(x: Tensor | None) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]] | None:
    return None if x is None else (x.dtype, x.shape, x.stride())


@plan
def _plan(options, shape_q, strides_q, shape_k, strides_k, shape_v, strides_v, optional, aligned, dtype, device):
    """How attention over tensors like these is computed. optional: ``_layout`` of what ``_run`` may get."""
    mask, firsts, sinks, _, _, pages = optional
    H, D, DV = shape_q[-3 if options.keys == "dense" else -2], shape_q[-1], shape_v[-1]
    group = H // shape_k[1 if options.keys == "dense" else -2]
    if options.keys == "dense":
        T = H * options.Sq
        strides = (*strides_q, *strides_k, *strides_v, T * DV, options.Sq * DV, DV, T, options.Sq)
        n_queries = options.n_rows * T
    else:
        T = shape_q[0]
        page_k, page_v = (strides_k[0], strides_v[0]) if options.keys == "paged" else (0, 0)
        strides = (0, strides_q[1], strides_q[0], strides_q[2], page_k, strides_k[-2], strides_k[-3], strides_k[-1])
        strides += (page_v, strides_v[-2], strides_v[-3], strides_v[-1], 0, DV, H * DV, 0, T)
        n_queries = H * T
    kind = "none" if mask is None else "additive" if mask[0].is_floating_point else "bool"
    # Heads that share keys go through one tile, so that few queries still fill it; unless each has a mask of its own.
    pack = group if mask is None or mask[2][1] == 0 else 1
    tile = attention_tile(dtype, max(D, DV), options.Sq * pack, device)
    n_blocks = ceil_div(options.Sq * pack, tile.block_m)
    programs = n_blocks * (H // pack) * options.n_rows
    n_splits = ceil_div(options.Skv, KV_SPLIT) + (kind == "additive")
    if n_splits == 1 or n_blocks > 1 or programs >= 2 * device_of(device).multiprocessors:
        n_splits = 0
    constants = (D, DV, options.keys, kind, options.is_causal, options.window is not None, options.soft_cap is not None)
    constants += (sinks is not None, n_splits > 0, KV_SPLIT, accumulator(dtype), tile.block_m, tile.block_n)
    constants += (max(16, next_power_of_2(D)), max(16, next_power_of_2(DV)))
    first_strides = (0, 0, 0) if firsts is None else (_step(*firsts[1:], 0), _step(*firsts[1:], 1), firsts[1][2])
    return _Attention(
        n_queries,
        H,
        n_splits,
        (
            *(n_blocks, options.Sq, options.Skv, H // pack, pack, group, n_queries),
            *(options.page_size, options.window or 0, options.causal_offset),
            *strides,
            *((0, 0, 0, 0) if mask is None else mask[2]),
            *first_strides,
            0 if pages is None else pages[2][0],
            float(options.scale),
            options.soft_cap or 0.0,
        ),
        constants,
        strides,
        Launch(
            _attention_kernel,
            (programs, max(n_splits, 1), 1),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        ),
    )


class _Attention:
    """``_attention_kernel`` for tensors of given sizes, and ``_merge_splits_kernel`` behind it where there are splits."""

    def __init__(
        self, n_queries: int, n_heads: int, n_splits: int, numbers: tuple, constants: tuple, strides: tuple, launch: Launch
    ) -> None:
        self._n_queries, self._n_splits, self._launch = n_queries, n_splits, launch
        self._numbers, self._constants = numbers, constants
        if n_splits:
            _, DV, *_, block_dv = constants
            has_sinks, acc = constants[7], constants[10]
            self._DV, rows = DV, 1
            self._merge_numbers = (n_queries, n_splits, n_heads, strides[-1], *strides[-5:-2])
            self._merge_constants = (DV, has_sinks, acc, rows, block_dv, _MERGE_UNROLL)
            grid = (ceil_div(n_queries, rows), 1, 1)
            self._merge = Launch(_merge_splits_kernel, grid, num_warps=1, enable_fp_fusion=False)

    def __call__(self, q, k, v, out, lse, mask, firsts, q_starts, k_starts, pages, sinks) -> None:
        parts = stats = lse
        if self._n_splits:
            parts = lse.new_empty((self._n_splits, self._n_queries, self._DV))
            stats = lse.new_empty((self._n_splits, self._n_queries, 2))
        pointers = (q, k, v, mask, firsts, out, lse, parts, stats, q_starts, k_starts, pages, sinks)
        self._launch(*pointers, *self._numbers, *self._constants)
        if self._n_splits:
            self._merge(parts, stats, sinks, out, lse, *self._merge_numbers, *self._merge_constants)


def _first_keys(mask: Tensor, is_causal: bool, causal_offset: int) -> Tensor:
    """For each batch, head and block of queries, the first key one of them can see: int32 [B or 1, H or 1, blocks].

    Dims along which the mask is expanded are looked at once; for queries at the last, as causality hides least from it.
    """
    last_query = mask.shape[2] - 1
    B, H, n_queries = (1 if mask.stride(dim) == 0 else mask.shape[dim] for dim in range(3))
    n_blocks = ceil_div(n_queries, _FIRST_KEY_QUERIES)
    is_bool = mask.dtype == torch.bool
    firsts = torch.empty((B, H, n_blocks), dtype=torch.int32, device=mask.device)
    _first_key_kernel[(firsts.numel(),)](
        mask,
        firsts,
        H,
        n_queries,
        mask.shape[3],
        causal_offset + (last_query if n_queries == 1 else 0),
        n_blocks,
        *mask.stride(),
        0.0 if is_bool else torch.finfo(mask.dtype).min,
        BOOL=is_bool,
        CAUSAL=bool(is_causal),
        BLOCK_M=_FIRST_KEY_QUERIES,
        BLOCK_N=_FIRST_KEY_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return firsts


def _loadable(mask: Tensor) -> Tensor:
    """A boolean mask as int16; dims along which it is expanded stay so.

    Not as bytes: Triton (3.6 to 3.9) gives the second product an order of k that follows the narrowest load in front of it,
    so a kernel that loads bytes would sum in another order than one without a mask.
    """
    if mask.dtype != torch.bool:
        return mask
    once = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
    return once.to(torch.int16).expand(mask.shape)


def _step(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> int:
    """The stride to walk a dim that may have been looked at once for all."""
    return 0 if shape[dim] == 1 else strides[dim]
