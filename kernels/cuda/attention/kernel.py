"""``_attention_kernel``: one block of queries against its blocks of keys."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rows import divide
from .merge import ABSENT, CHUNK_BLOCKS, LOG2_E, merge, store_result
from .ranges import first_visible_key, key_range, load_intervals

_LOWEST_SCORE = tl.constexpr(-(2.0**125))


class _Config(NamedTuple):
    """The constants of a binary that the functions below share."""

    HEAD_DIM: tl.constexpr
    HEAD_DIM_V: tl.constexpr
    LAYOUT: tl.constexpr
    MASK: tl.constexpr
    CAUSAL: tl.constexpr
    WINDOW: tl.constexpr
    SOFT_CAP: tl.constexpr
    SPLIT_BLOCKS: tl.constexpr
    MANY_CHUNKS: tl.constexpr
    ACC: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr


class _Keys(NamedTuple):
    """Where the keys and the values of one key head are."""

    k_ptr: Any
    v_ptr: Any
    pages_ptr: Any
    page_size: Any
    seqlen_k: Any
    stride_kp: Any
    stride_kn: Any
    stride_kd: Any
    stride_vp: Any
    stride_vn: Any
    stride_vd: Any


class _Bounds(NamedTuple):
    """What each query of the block can see."""

    inside_q: Any
    last_keys: Any
    window: Any
    begin_keys: Any
    end_keys: Any
    mask_ptrs: Any
    stride_mk: Any


class _Workspace(NamedTuple):
    """Where the softmaxes of splits are written. rows: the index of each query's first split."""

    acc_ptr: Any
    stats_ptr: Any
    rows: Any


@triton.jit
def _tanh(x, ACC: tl.constexpr):
    """1 - 2 / (exp(2 * x) + 1), which is exact at both ends."""
    return 1.0 - divide(tl.full(x.shape, 2.0, ACC), tl.exp(2.0 * x) + 1.0, ACC)


@triton.jit
def _exp_of_difference(qk, m, ACC: tl.constexpr):
    """exp(qk - m). In fp32 as 2 ** fma(qk, log2(e), -(m * log2(e))), which is one instruction less for each score."""
    if ACC == tl.float64:
        return tl.exp(qk - m)
    else:
        return tl.exp2(tl.fma(qk, tl.full(qk.shape, LOG2_E, tl.float32), tl.broadcast_to(m * -LOG2_E, qk.shape)))


@triton.jit
def _key_offsets(keys, offs_n, inside_k, LAYOUT: tl.constexpr):
    """Where each key and its value begin."""
    offs_k = offs_n.to(tl.int64) * keys.stride_kn
    offs_v = offs_n.to(tl.int64) * keys.stride_vn
    if LAYOUT == "paged":
        pages = tl.load(keys.pages_ptr + offs_n // keys.page_size, mask=inside_k, other=0).to(tl.int64)
        within = (offs_n % keys.page_size).to(tl.int64)
        offs_k = pages * keys.stride_kp + within * keys.stride_kn
        offs_v = pages * keys.stride_vp + within * keys.stride_vn
    return offs_k, offs_v


@triton.jit
def _load_block(ptrs, inside_k, offs_d, HEAD_DIM: tl.constexpr, DIM_AXIS: tl.constexpr, SEES: tl.constexpr):
    """A block of k or v, whose dims lie along DIM_AXIS; 0 outside. SEES "all": no key is outside."""
    if offs_d.shape[0] != HEAD_DIM:
        inside = tl.expand_dims(inside_k, DIM_AXIS) & tl.expand_dims(offs_d < HEAD_DIM, 1 - DIM_AXIS)
        return tl.load(ptrs, mask=inside, other=0.0)
    elif SEES != "all":
        return tl.load(ptrs, mask=tl.expand_dims(inside_k, DIM_AXIS), other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _hide(qk, offs_n, inside_k, bounds, SEES: tl.constexpr, CONFIG: tl.constexpr):
    """The scores with the mask added, and -inf for the keys that a query does not see."""
    visible = bounds.inside_q[:, None] & inside_k[None, :]
    if SEES == "interval":
        visible = visible & (offs_n[None, :] >= bounds.begin_keys[:, None]) & (offs_n[None, :] < bounds.end_keys[:, None])
    elif CONFIG.MASK == "additive":
        offs_mask = offs_n.to(tl.int64)[None, :] * bounds.stride_mk
        added = tl.load(bounds.mask_ptrs[:, None] + offs_mask, mask=visible, other=0.0).to(CONFIG.ACC)
        if CONFIG.ACC == tl.float32:
            # The lowest float32 times log2(e) would overflow; the bound says "hidden" just as well.
            added = tl.where(added == -float("inf"), added, tl.maximum(added, _LOWEST_SCORE))
        qk = qk + added
    elif CONFIG.MASK == "bool":
        offs_mask = offs_n.to(tl.int64)[None, :] * bounds.stride_mk
        visible = visible & (tl.load(bounds.mask_ptrs[:, None] + offs_mask, mask=visible, other=0) != 0)
    if CONFIG.CAUSAL:
        visible = visible & (offs_n[None, :] <= bounds.last_keys[:, None])
    if CONFIG.WINDOW:
        visible = visible & (offs_n[None, :] > bounds.last_keys[:, None] - bounds.window)
    return tl.where(visible, qk, -float("inf"))


@triton.jit
def _softmax_of_block(q, start_n, keys, bounds, sm_scale, soft_cap, SEES: tl.constexpr, CONFIG: tl.constexpr):
    """The softmax of the BLOCK_N keys from start_n: its maximum, its sum and its product with v.

        qk = sm_scale * (q @ k.T), the product over the head dim ascending; soft-capped, + mask; hidden keys are -inf
        m = max(qk); p = exp(qk - m), rounded to v's dtype; [l, acc] = p @ [1, v], the products over the keys ascending

    SEES: "all" where every query sees every key of the block; "interval" where begin_keys and end_keys tell what the mask
    lets a query see; else "some".
    """
    offs_n = start_n + tl.arange(0, CONFIG.BLOCK_N)
    offs_d = tl.arange(0, CONFIG.BLOCK_D)
    offs_dv = tl.arange(0, CONFIG.BLOCK_DV)
    inside_k = (offs_n >= 0) & (offs_n < keys.seqlen_k)
    offs_k, offs_v = _key_offsets(keys, offs_n, inside_k, CONFIG.LAYOUT)
    k_ptrs = keys.k_ptr + offs_k[None, :] + offs_d.to(tl.int64)[:, None] * keys.stride_kd
    v_ptrs = keys.v_ptr + offs_v[:, None] + offs_dv.to(tl.int64)[None, :] * keys.stride_vd
    k = _load_block(k_ptrs, inside_k, offs_d, CONFIG.HEAD_DIM, 0, SEES)
    qk = tl.dot(q, k, input_precision="ieee", out_dtype=CONFIG.ACC) * tl.full([], sm_scale, CONFIG.ACC)
    if CONFIG.SOFT_CAP:
        qk = _tanh(qk / tl.full([], soft_cap, CONFIG.ACC), CONFIG.ACC) * tl.full([], soft_cap, CONFIG.ACC)
    if SEES != "all":
        qk = _hide(qk, offs_n, inside_k, bounds, SEES, CONFIG)

    m_ij = tl.max(qk, 1)
    # A query that sees none of these keys has a maximum of -inf, and -inf - -inf would be NaN.
    p = _exp_of_difference(qk, tl.where(m_ij == -float("inf"), 0.0, m_ij)[:, None], CONFIG.ACC)
    v = _load_block(v_ptrs, inside_k, offs_dv, CONFIG.HEAD_DIM_V, 1, SEES)
    p = p.to(v.dtype)
    # The interpreter of Triton 3.6 has no bf16 constant but 0.
    ones = tl.full([CONFIG.BLOCK_N, 16], 1.0, tl.float32).to(v.dtype)
    l_ij = tl.dot(p, ones, input_precision="ieee", out_dtype=CONFIG.ACC)
    acc_ij = tl.dot(p, v, input_precision="ieee", out_dtype=CONFIG.ACC)
    return m_ij, l_ij, acc_ij


@triton.jit
def _store_split(workspace, rows, m_i, l_i, acc, inside_q, HEAD_DIM_V: tl.constexpr):
    """The softmax of one split, for ``_merge_splits_kernel``. rows: the index of this split of each query."""
    offs_dv = tl.arange(0, acc.shape[1])
    acc_ptrs = workspace.acc_ptr + rows[:, None] * HEAD_DIM_V + offs_dv[None, :]
    tl.store(acc_ptrs, acc, mask=inside_q[:, None] & (offs_dv < HEAD_DIM_V)[None, :])
    tl.store(workspace.stats_ptr + rows * 2, m_i, mask=inside_q)
    tl.store(workspace.stats_ptr + (rows * 2 + 1), tl.max(l_i, 1), mask=inside_q)  # of sixteen equal columns


@triton.jit
def _store_absent_splits(workspace, split_begin, split_end, first_key, start, end, inside_q, CONFIG: tl.constexpr):
    """Marks those splits from split_begin to split_end that have no key between start and end."""
    SPLIT_N: tl.constexpr = CONFIG.SPLIT_BLOCKS * CONFIG.BLOCK_N
    for split in range(split_begin, split_end):
        start_n = first_key + split * SPLIT_N
        if (start_n + SPLIT_N <= start) | (start_n >= end) | (start >= end):
            stats_ptrs = workspace.stats_ptr + (workspace.rows + split) * 2
            tl.store(stats_ptrs, tl.full([CONFIG.BLOCK_M], -float("inf"), CONFIG.ACC), mask=inside_q)
            tl.store(stats_ptrs + 1, tl.full([CONFIG.BLOCK_M], ABSENT, CONFIG.ACC), mask=inside_q)


@triton.jit
def _no_keys(CONFIG: tl.constexpr):
    """The softmax of no key: what merging begins with. The sum has sixteen equal columns, as few as ``tl.dot`` takes."""
    m_i = tl.full([CONFIG.BLOCK_M], -float("inf"), CONFIG.ACC)
    l_i = tl.zeros([CONFIG.BLOCK_M, 16], CONFIG.ACC)
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_DV], CONFIG.ACC)
    return m_i, l_i, acc


@triton.jit
def _attention_inner(
    m_i, l_i, acc, row_m_i, row_l_i, row_acc,
    q, keys, bounds, workspace, lo, hi, start, first_key, sm_scale, soft_cap, SEES: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """The blocks of keys from lo to hi, ascending: merged into the chunk [m_i, l_i, acc], each full chunk into the row.

    With splits, each block or each full chunk is stored instead.
    """
    SPLIT_N: tl.constexpr = CONFIG.SPLIT_BLOCKS * CONFIG.BLOCK_N
    CHUNK_N: tl.constexpr = CHUNK_BLOCKS * CONFIG.BLOCK_N
    if lo < hi:  # without it, a loop over no block would still set up its loads
        for start_n in range(lo, hi, CONFIG.BLOCK_N):
            # Whether this is the first block of the next chunk.
            if CONFIG.MANY_CHUNKS and (start_n > start) & ((start_n - first_key) % CHUNK_N == 0):
                if CONFIG.SPLIT_BLOCKS:
                    rows = workspace.rows + (start_n - first_key) // SPLIT_N - 1
                    _store_split(workspace, rows, m_i, l_i, acc, bounds.inside_q, CONFIG.HEAD_DIM_V)
                else:
                    row_m_i, row_l_i, row_acc = merge(row_m_i, row_l_i, row_acc, m_i, l_i, acc, CONFIG.ACC)
                m_i, l_i, acc = _no_keys(CONFIG)
            m_ij, l_ij, acc_ij = _softmax_of_block(q, start_n, keys, bounds, sm_scale, soft_cap, SEES, CONFIG)
            if CONFIG.SPLIT_BLOCKS == 1:
                rows = workspace.rows + (start_n - first_key) // CONFIG.BLOCK_N
                _store_split(workspace, rows, m_ij, l_ij, acc_ij, bounds.inside_q, CONFIG.HEAD_DIM_V)
            else:
                m_i, l_i, acc = merge(m_i, l_i, acc, m_ij, l_ij, acc_ij, CONFIG.ACC)
    return m_i, l_i, acc, row_m_i, row_l_i, row_acc


@triton.jit
def _lengths(q_starts_ptr, k_starts_ptr, batch, LAYOUT: tl.constexpr):
    """Where the queries and the keys of a row begin, and how many there are. Keys in pages have no common beginning."""
    q_start = tl.load(q_starts_ptr + batch).to(tl.int64)
    k_start = q_start
    if LAYOUT == "packed":
        k_start = tl.load(k_starts_ptr + batch).to(tl.int64)
    seqlen_q = tl.load(q_starts_ptr + batch + 1).to(tl.int32) - q_start.to(tl.int32)
    if LAYOUT == "packed":
        seqlen_k = tl.load(k_starts_ptr + batch + 1).to(tl.int32) - k_start.to(tl.int32)
    else:
        seqlen_k = tl.load(k_starts_ptr + batch).to(tl.int32)
    return q_start, k_start, seqlen_q, seqlen_k


# What is specialised, strides and alignment of q, k, v and out, changes how they are read and written, and no order of sums.
@triton.jit(
    do_not_specialize="n_blocks_m seqlen_q seqlen_k n_packs total_queries page_size window causal_offset mask_window".split()
    + "stride_lb stride_lh stride_mb stride_mh stride_mq stride_mk stride_ib stride_ih stride_iq stride_rb stride_rh".split()
    + "stride_positions n_ranges stride_pages num_splits splits_per_program".split(),
    do_not_specialize_on_alignment="mask_ptr intervals_ptr ranges_ptr lse_ptr workspace_ptr".split()
    + "q_starts_ptr k_starts_ptr pages_ptr sinks_ptr positions_ptr".split(),
)
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, intervals_ptr, ranges_ptr, out_ptr, lse_ptr, workspace_ptr,
    q_starts_ptr, k_starts_ptr, pages_ptr, sinks_ptr, positions_ptr,
    n_blocks_m, seqlen_q, seqlen_k, n_packs, total_queries, page_size, window, causal_offset, mask_window, stride_positions,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om,
    stride_lb, stride_lh,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ib, stride_ih, stride_iq,
    stride_rb, stride_rh, n_ranges,
    stride_pages, num_splits, splits_per_program,
    sm_scale: tl.float64, soft_cap: tl.float64,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
    STRIDE_KN: tl.constexpr, STRIDE_VN: tl.constexpr, LAYOUT: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr, MANY_CHUNKS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """out = softmax(sm_scale * q @ k.T + mask) @ v for one block of queries of PACK heads that share a key head.

    The keys of a row are counted from its first visible one, or with POSITIONS from its first one, seen or not, in blocks of
    BLOCK_N. Each block has a softmax of its own:
        qk = sm_scale * (q @ k.T), soft-capped, + mask, the product over the head dim ascending; hidden keys are -inf
        m = max(qk); p = exp(qk - m), rounded to v's dtype; [l, acc] = p @ [1, v], the products over the keys ascending
    These are merged in ascending order:
        M' = max(M, m); [L, A] = fma([L, A], exp(M - M'), [l, acc] * exp(m - M')); M = M'
    first the CHUNK_BLOCKS blocks of a chunk, then, in the same way, the chunks of the row. Then out = A * (1 / L) and
    lse = M + log(L). A block with no visible key has m = -inf and l = acc = 0, and changes nothing. So the order is a function
    of a key's distance from the first key of its row: it depends neither on the number of queries nor on what lies in memory
    before or after the row.

    With SPLIT_BLOCKS (1, or CHUNK_BLOCKS) a program stores the softmaxes of ``splits_per_program`` splits, each of one block
    or one chunk, and ``_merge_splits_kernel`` merges them: the same sums in the same order. MANY_CHUNKS: whether a row may
    have more than one chunk.

    An additive mask may hide keys by its dtype's lowest value instead of -inf, and such keys do count for a query that
    sees no others. So with an additive mask the chunks start at or before key 0, still in step with the first visible key.
    """
    # A constant stride is folded into the addresses: that saves a quarter of the instructions of a loop with few queries.
    if STRIDE_KN:
        stride_kn = STRIDE_KN
    if STRIDE_VN:
        stride_vn = STRIDE_VN
    # With a causal mask the last blocks of queries take longest, so they go first.
    start_m = n_blocks_m - 1 - tl.program_id(0) % n_blocks_m
    pack_index = tl.program_id(0) // n_blocks_m % n_packs
    # The workspace holds the accumulators [total_queries, num_splits, HEAD_DIM_V], then the maxima and sums.
    stats_ptr = workspace_ptr + tl.cast(num_splits, tl.int64) * total_queries * HEAD_DIM_V
    batch = (tl.program_id(0) // n_blocks_m // n_packs).to(tl.int64)
    if LAYOUT == "dense":
        q_ptr += batch * stride_qb
        out_ptr += batch * stride_ob
        k_ptr += batch * stride_kb
        v_ptr += batch * stride_vb
    else:
        q_start, k_start, seqlen_q, seqlen_k = _lengths(q_starts_ptr, k_starts_ptr, batch, LAYOUT)
        causal_offset = seqlen_k - seqlen_q
        q_ptr += q_start * stride_qm
        out_ptr += q_start * stride_om
        lse_ptr += q_start
        workspace_ptr += q_start * num_splits * HEAD_DIM_V
        stats_ptr += q_start * num_splits * 2
        if LAYOUT == "packed":
            k_ptr += k_start * stride_kn
            v_ptr += k_start * stride_vn
        else:
            pages_ptr += batch * stride_pages
    offs_m = start_m * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = offs_m // PACK
    heads = (pack_index * PACK + offs_m % PACK).to(tl.int64)
    inside_q = queries < seqlen_q
    key_head = (pack_index * PACK // GROUP).to(tl.int64)
    last_keys = queries + causal_offset
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)

    if MASK != "none":
        ranges_ptr += batch * stride_rb + (pack_index * PACK).to(tl.int64) * stride_rh
    CHUNK_N: tl.constexpr = CHUNK_BLOCKS * BLOCK_N
    first_key = first_visible_key(ranges_ptr, n_ranges, seqlen_k, MASK, CHUNK_N)
    if POSITIONS:  # keys of the row lie before the first that its first query sees
        position = tl.load(positions_ptr + batch * stride_positions)
        first_key -= (tl.maximum(position + 1 - mask_window, 0) % CHUNK_N).to(tl.int32)
        if MASK == "additive":
            first_key += -first_key // CHUNK_N * CHUNK_N
    start, full_end, end, has_holes = key_range(
        ranges_ptr, n_ranges, first_key, start_m, seqlen_q, seqlen_k, causal_offset, window,
        PACK, MASK, CAUSAL, WINDOW, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    begin_keys, end_keys = queries, queries
    if MASK == "bool":
        interval_ptrs = intervals_ptr + batch * stride_ib + heads * stride_ih + queries.to(tl.int64) * stride_iq
        begin_keys, end_keys = load_intervals(interval_ptrs, inside_q, seqlen_k)

    CONFIG: tl.constexpr = _Config(
        HEAD_DIM, HEAD_DIM_V, LAYOUT, MASK, CAUSAL, WINDOW, SOFT_CAP, SPLIT_BLOCKS, MANY_CHUNKS, ACC,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    out_rows = heads * stride_lh + queries
    if LAYOUT == "dense":
        out_rows += batch * stride_lb
    workspace = _Workspace(workspace_ptr, stats_ptr, out_rows * num_splits)
    SPLIT_N: tl.constexpr = SPLIT_BLOCKS * BLOCK_N
    if SPLIT_BLOCKS:
        split_begin = tl.program_id(1) * splits_per_program
        # The last program also marks the splits that only round their number up.
        is_last = tl.program_id(1) == tl.num_programs(1) - 1
        split_end = tl.where(is_last, num_splits, split_begin + splits_per_program)
        _store_absent_splits(workspace, split_begin, split_end, first_key, start, end, inside_q, CONFIG)
        start = tl.maximum(start, first_key + split_begin * SPLIT_N)
        end = tl.minimum(end, first_key + split_end * SPLIT_N)
        full_end = tl.minimum(full_end, end)
    full_end = start + tl.maximum(full_end - start, 0) // BLOCK_N * BLOCK_N
    interval_end = full_end
    if MASK == "bool":
        interval_end = tl.where(has_holes, full_end, tl.maximum(full_end, end))

    q_ptrs = q_ptr + heads[:, None] * stride_qh + queries.to(tl.int64)[:, None] * stride_qm
    q_ptrs += offs_d.to(tl.int64)[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=inside_q[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    k_ptr += key_head * stride_kh
    v_ptr += key_head * stride_vh
    mask_ptrs = mask_ptr + batch * stride_mb + heads * stride_mh + queries.to(tl.int64) * stride_mq
    keys = _Keys(
        k_ptr, v_ptr, pages_ptr, page_size, seqlen_k, stride_kb, stride_kn, stride_kd, stride_vb, stride_vn, stride_vd
    )  # fmt: skip
    bounds = _Bounds(inside_q, last_keys, window, begin_keys, end_keys, mask_ptrs, stride_mk)

    m_i, l_i, acc = _no_keys(CONFIG)
    row_m_i, row_l_i, row_acc = m_i, l_i, acc
    limits = (start, full_end, interval_end, end)
    for phase in tl.static_range(3):
        m_i, l_i, acc, row_m_i, row_l_i, row_acc = _attention_inner(
            m_i, l_i, acc, row_m_i, row_l_i, row_acc,
            q, keys, bounds, workspace, limits[phase], limits[phase + 1], start, first_key, sm_scale, soft_cap,
            ("all", "interval", "some")[phase], CONFIG,
        )  # fmt: skip

    if SPLIT_BLOCKS == CHUNK_BLOCKS and start < end:
        rows = workspace.rows + (end - 1 - first_key) // SPLIT_N
        _store_split(workspace, rows, m_i, l_i, acc, inside_q, HEAD_DIM_V)
    if not SPLIT_BLOCKS:
        if MANY_CHUNKS:
            m_i, l_i, acc = merge(row_m_i, row_l_i, row_acc, m_i, l_i, acc, ACC)
        out_ptrs = out_ptr + heads[:, None] * stride_oh + queries.to(tl.int64)[:, None] * stride_om
        store_result(
            m_i, tl.max(l_i, 1), acc, sinks_ptr, heads, out_ptrs + offs_dv.to(tl.int64)[None, :], lse_ptr + out_rows,
            inside_q[:, None] & (offs_dv < HEAD_DIM_V)[None, :], inside_q, SINKS, LSE, ACC,
        )  # fmt: skip
