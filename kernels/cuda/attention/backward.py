"""``attention_backward`` on the GPU: the gradients of q, k and v, without atomics and without a workspace of scores.

    p = exp(sm_scale * q @ k.T - lse), 0 where hidden        ds = p * (do @ v.T - delta)        delta = sum(do * out)
    dv = p.T @ do        dk = sm_scale * ds.T @ q        dq = sm_scale * ds @ k

Two kernels compute the scores again. One has a block of keys a program, and adds over the query heads that share them,
ascending, and in each over the queries, ascending from the first one that sees any key. The other has a block of queries a
program, and adds over the keys, ascending from the first visible one. Each sum is one chain in one accumulator. Queries without
a gradient and hidden keys add exact zeros, so neither what stands beside a row nor padding on either side changes a bit.

Reference: Dao et al., arXiv 2205.14135, appendix B; the two loops, Dao, arXiv 2307.08691.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch
from ...plans import Description, describe, on_device, plan
from ...tiles import accumulator, ceil_div, device_of, next_power_of_2
from ..rows import chunk_sum
from .kernel import _exp_of_difference
from .ranges import _RANGE_QUERIES, Ranges, RangeStrides, first_visible_key

MAX_HEAD_DIM = 128


class _Tile(NamedTuple):
    """Keys of a program and queries at a time, or the other way round."""

    block_own: int
    block_other: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["n_rows", "seqlen_q"], do_not_specialize_on_alignment=["delta_ptr"])
def _attention_delta_kernel(
    out_ptr, do_ptr, delta_ptr, n_rows, seqlen_q, n_heads,
    stride_ob, stride_oh, stride_om, stride_od, stride_gb, stride_gh, stride_gm, stride_gd,
    HEAD_DIM_V: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * do) of each query, in the order of ``rows.py``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_DV).to(tl.int64)
    query, head, batch = rows % seqlen_q, rows // seqlen_q % n_heads, rows // seqlen_q // n_heads
    inside = (rows < n_rows)[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    out_rows = batch * stride_ob + head * stride_oh + query * stride_om
    do_rows = batch * stride_gb + head * stride_gh + query * stride_gm
    out = tl.load(out_ptr + out_rows[:, None] + offs_d[None, :] * stride_od, mask=inside, other=0.0).to(ACC)
    do = tl.load(do_ptr + do_rows[:, None] + offs_d[None, :] * stride_gd, mask=inside, other=0.0).to(ACC)
    tl.store(delta_ptr + rows, chunk_sum(out * do), mask=rows < n_rows)


@triton.jit
def first_visible_query(intervals_ptr, ranges_ptr, stride_iq, n_ranges, MASK: tl.constexpr):
    """The first query of a (batch, head) that sees any key; 0 where none does, or where all share a line of the mask."""
    first = tl.minimum(n_ranges, 0)
    if MASK != "none":
        block = n_ranges
        for i in range(0, n_ranges, 128):
            offs = i + tl.arange(0, 128)
            begin = tl.load(ranges_ptr + offs * 5, mask=offs < n_ranges, other=1)
            end = tl.load(ranges_ptr + (offs * 5 + 1), mask=offs < n_ranges, other=0)
            block = tl.minimum(block, tl.min(tl.where(begin < end, offs, n_ranges), 0))
        if (block < n_ranges) & (stride_iq != 0):
            queries = block * _RANGE_QUERIES + tl.arange(0, _RANGE_QUERIES)
            ptrs = intervals_ptr + queries.to(tl.int64) * stride_iq
            # A block of queries that goes over the end has seen something before it.
            begin = tl.load(ptrs, mask=queries < n_ranges * _RANGE_QUERIES, other=1)
            end = tl.load(ptrs + 1, mask=queries < n_ranges * _RANGE_QUERIES, other=0)
            first = tl.min(tl.where(begin < end, queries, 0x7FFFFFFF), 0)
    return first


@triton.jit
def _has_holes(ranges_ptr, n_ranges, MASK: tl.constexpr):
    """Whether a query does not see all of its own interval."""
    found = tl.minimum(n_ranges, 0)
    if MASK != "none":
        for i in range(0, n_ranges, 128):
            offs = i + tl.arange(0, 128)
            found = tl.maximum(found, tl.max(tl.load(ranges_ptr + (offs * 5 + 4), mask=offs < n_ranges, other=0), 0))
    return found != 0


@triton.jit
def _weights(
    qk, lse, offs_m, offs_n, inside, interval_ptrs, mask_ptrs, stride_mk, causal_offset,
    SEES: tl.constexpr, CAUSAL: tl.constexpr, KEYS_FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """exp(qk - lse) of a block of scores, [queries, keys] or KEYS_FIRST [keys, queries]; 0 where hidden.

    SEES: "all" where every query sees every key; "causal" where causality and the ends alone hide; "interval" where the mask
    lets a query see an interval of keys; "mask" where it has to be read.
    """
    m_axis: tl.constexpr = 0 if KEYS_FIRST else 1
    n_axis: tl.constexpr = 1 if KEYS_FIRST else 0
    p = _exp_of_difference(qk, tl.expand_dims(lse, m_axis), ACC)
    if SEES != "all":
        queries, keys = tl.expand_dims(offs_m, m_axis), tl.expand_dims(offs_n, n_axis)
        visible = inside
        if CAUSAL:
            visible = visible & (keys <= queries + causal_offset)
        if SEES == "interval":
            begin = tl.load(interval_ptrs, mask=lse != float("inf"), other=0)
            end = tl.load(interval_ptrs + 1, mask=lse != float("inf"), other=0)
            visible = visible & (keys >= tl.expand_dims(begin, m_axis)) & (keys < tl.expand_dims(end, m_axis))
        elif SEES == "mask":
            ptrs = tl.expand_dims(mask_ptrs, m_axis) + tl.expand_dims(offs_n.to(tl.int64) * stride_mk, n_axis)
            visible = visible & (tl.load(ptrs, mask=visible, other=0) != 0)
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def _load_rows(ptr, offs, inside, stride, offs_d, stride_d, HEAD_DIM: tl.constexpr):
    ptrs = ptr + offs.to(tl.int64)[:, None] * stride + offs_d.to(tl.int64)[None, :] * stride_d
    if offs_d.shape[0] != HEAD_DIM:
        return tl.load(ptrs, mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=inside[:, None], other=0.0)


@triton.jit
def _load_lse(lse_ptr, delta_ptr, offs_m, inside_m):
    """The logsumexp, infinite where a query sees nothing or is none, so that its weights are 0; and delta."""
    lse = tl.load(lse_ptr + offs_m, mask=inside_m, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse), tl.load(delta_ptr + offs_m, mask=inside_m, other=0.0)


_LENGTHS = "seqlen_q seqlen_k causal_offset stride_mb stride_mh stride_mq stride_mk stride_ib stride_ih stride_iq".split()
_LENGTHS += "stride_rb stride_rh n_ranges".split()
_POINTERS = "lse_ptr delta_ptr mask_ptr intervals_ptr ranges_ptr".split()


@triton.jit
def _add_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, intervals_ptr, mask_ptr, lo, hi, offs_n, inside_n,
    seqlen_q, causal_offset, stride_qm, stride_qd, stride_gm, stride_gd, stride_iq, stride_mq, stride_mk, sm_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, SEES: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The queries from lo to hi, ascending: dv += p.T @ do and dk += ds.T @ q, p and ds rounded to the operands' dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start_m in range(lo, hi, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        inside_m = offs_m < seqlen_q
        q = _load_rows(q_ptr, offs_m, inside_m, stride_qm, offs_d, stride_qd, HEAD_DIM)
        do = _load_rows(do_ptr, offs_m, inside_m, stride_gm, offs_dv, stride_gd, HEAD_DIM_V)
        lse, delta = _load_lse(lse_ptr, delta_ptr, offs_m, inside_m)
        qk = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC) * tl.full([], sm_scale, ACC)
        rows = offs_m.to(tl.int64)
        p = _weights(
            qk, lse, offs_m, offs_n, inside_n[:, None] & inside_m[None, :], intervals_ptr + rows * stride_iq,
            mask_ptr + rows * stride_mq, stride_mk, causal_offset, SEES, CAUSAL, True, ACC,
        )  # fmt: skip
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee", out_dtype=ACC)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee", out_dtype=ACC)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=ACC)
    return dk, dv


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_POINTERS)
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, mask_ptr, intervals_ptr, ranges_ptr, dk_ptr, dv_ptr,
    seqlen_q, seqlen_k, n_key_heads, causal_offset,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ib, stride_ih, stride_iq, stride_rb, stride_rh, n_ranges,
    sm_scale: tl.float64,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys: over the GROUP query heads, ascending, and in each over its queries, ascending.

    The queries are counted from the first one that sees a key. dk is scaled after the last sum, and both are cast once.
    """
    start_n = tl.program_id(0) * BLOCK_N
    batch = (tl.program_id(1) // n_key_heads).to(tl.int64)
    key_head = (tl.program_id(1) % n_key_heads).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    inside_n = offs_n < seqlen_k
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k = _load_rows(k_ptr + batch * stride_kb + key_head * stride_kh, offs_n, inside_n, stride_kn, offs_d, stride_kd, HEAD_DIM)
    v = _load_rows(
        v_ptr + batch * stride_vb + key_head * stride_vh, offs_n, inside_n, stride_vn, offs_dv, stride_vd, HEAD_DIM_V
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        row = (batch * n_key_heads * GROUP + head) * seqlen_q
        intervals = intervals_ptr + batch * stride_ib + head * stride_ih
        ranges = ranges_ptr + batch * stride_rb + head * stride_rh
        first = first_visible_query(intervals, ranges, stride_iq, n_ranges, MASK)
        lo = first
        if CAUSAL:
            lo = first + tl.maximum(start_n - causal_offset - first, 0) // BLOCK_M * BLOCK_M
        # From here on every query sees every key of the block.
        full = lo
        if CAUSAL:
            full = lo + tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - causal_offset - lo, 0), BLOCK_M) * BLOCK_M
            full = tl.minimum(full, tl.maximum(seqlen_q, lo))
        holes = _has_holes(ranges, n_ranges, MASK)
        limits = (lo, full, seqlen_q)
        for phase in tl.static_range(2):
            if MASK == "none":
                begin, end = limits[phase], limits[phase + 1]
            else:
                begin, end = lo, tl.where(holes == (phase == 1), seqlen_q, lo)
            dk, dv = _add_queries(
                dk, dv, k, v, q_ptr + batch * stride_qb + head * stride_qh, do_ptr + batch * stride_gb + head * stride_gh,
                lse_ptr + row, delta_ptr + row, intervals, mask_ptr + batch * stride_mb + head * stride_mh, begin, end,
                offs_n, inside_n, seqlen_q, causal_offset, stride_qm, stride_qd, stride_gm, stride_gd, stride_iq,
                stride_mq, stride_mk, sm_scale, HEAD_DIM, HEAD_DIM_V,
                ("causal", "all")[phase] if MASK == "none" else ("interval", "mask")[phase],
                CAUSAL, ACC, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    rows = (batch * n_key_heads + key_head) * seqlen_k + offs_n
    dk = dk * tl.full([], sm_scale, ACC)
    dk_ptrs = dk_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :]
    dv_ptrs = dv_ptr + rows[:, None] * HEAD_DIM_V + offs_dv[None, :]
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=inside_n[:, None] & (offs_d < HEAD_DIM)[None, :])
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=inside_n[:, None] & (offs_dv < HEAD_DIM_V)[None, :])


@triton.jit
def _add_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, interval_ptrs, mask_ptrs, lo, hi, offs_m, inside_m,
    seqlen_k, causal_offset, stride_kn, stride_kd, stride_vn, stride_vd, stride_mk, sm_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, SEES: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The keys from lo to hi, ascending: dq += ds @ k, ds rounded to k's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        inside_n = offs_n < seqlen_k
        k = _load_rows(k_ptr, offs_n, inside_n, stride_kn, offs_d, stride_kd, HEAD_DIM)
        v = _load_rows(v_ptr, offs_n, inside_n, stride_vn, offs_dv, stride_vd, HEAD_DIM_V)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * tl.full([], sm_scale, ACC)
        p = _weights(
            qk, lse, offs_m, offs_n, inside_m[:, None] & inside_n[None, :], interval_ptrs, mask_ptrs, stride_mk,
            causal_offset, SEES, CAUSAL, False, ACC,
        )  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision="ieee", out_dtype=ACC)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee", out_dtype=ACC)
    return dq


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_POINTERS)
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, mask_ptr, intervals_ptr, ranges_ptr, dq_ptr,
    seqlen_q, seqlen_k, n_heads, causal_offset,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ib, stride_ih, stride_iq, stride_rb, stride_rh, n_ranges,
    sm_scale: tl.float64,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head: over the keys, ascending from the first visible one of this (batch, head)."""
    # With a causal mask the last blocks of queries take longest, so they go first.
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = (tl.program_id(1) // n_heads).to(tl.int64)
    head = (tl.program_id(1) % n_heads).to(tl.int64)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    inside_m = offs_m < seqlen_q
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q = _load_rows(q_ptr + batch * stride_qb + head * stride_qh, offs_m, inside_m, stride_qm, offs_d, stride_qd, HEAD_DIM)
    do = _load_rows(do_ptr + batch * stride_gb + head * stride_gh, offs_m, inside_m, stride_gm, offs_dv, stride_gd, HEAD_DIM_V)
    row = (batch * n_heads + head) * seqlen_q
    lse, delta = _load_lse(lse_ptr + row, delta_ptr + row, offs_m, inside_m)
    ranges = ranges_ptr + batch * stride_rb + head * stride_rh
    first_key = first_visible_key(ranges, n_ranges, seqlen_k, MASK, BLOCK_N)
    holes = _has_holes(ranges, n_ranges, MASK)
    end = seqlen_k
    full = first_key + tl.maximum(seqlen_k - first_key, 0) // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(end, tl.minimum(start_m + BLOCK_M, seqlen_q) + causal_offset)
        full = tl.minimum(full, first_key + tl.maximum(start_m + causal_offset + 1 - first_key, 0) // BLOCK_N * BLOCK_N)
    key_head = head // GROUP
    rows = offs_m.to(tl.int64)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    limits = (first_key, full, end)
    for phase in tl.static_range(2):
        if MASK == "none":
            lo, hi = limits[phase], limits[phase + 1]
        else:
            lo, hi = first_key, tl.where(holes == (phase == 1), end, first_key)
        dq = _add_keys(
            dq, q, do, lse, delta, k_ptr + batch * stride_kb + key_head * stride_kh,
            v_ptr + batch * stride_vb + key_head * stride_vh,
            intervals_ptr + batch * stride_ib + head * stride_ih + rows * stride_iq,
            mask_ptr + batch * stride_mb + head * stride_mh + rows * stride_mq, lo, hi, offs_m, inside_m,
            seqlen_k, causal_offset, stride_kn, stride_kd, stride_vn, stride_vd, stride_mk, sm_scale, HEAD_DIM, HEAD_DIM_V,
            ("all", "causal")[phase] if MASK == "none" else ("interval", "mask")[phase],
            CAUSAL, ACC, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dq = dq * tl.full([], sm_scale, ACC)
    dq_ptrs = dq_ptr + (row + rows)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=inside_m[:, None] & (offs_d < HEAD_DIM)[None, :])


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    wants_q: bool = True,
    wants_kv: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``reference.attention_backward`` on the GPU, for boolean masks and head dims up to 128. Raises ValueError for others."""
    described = [describe(x) for x in (grad_out, q, k, v, mask, out, lse)]
    return _plan_backward(*described, is_causal, scale, wants_q, wants_kv)(grad_out, q, k, v, mask, out, lse)


def covers(q: Description | Tensor, v: Description | Tensor, mask: Description | Tensor | None) -> bool:
    """Whether the kernels compute these gradients."""
    is_small = max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM and q.dtype != torch.float64
    return is_small and (mask is None or mask.dtype == torch.bool)


@plan
def _plan_backward(
    grad_out: Description,
    q: Description,
    k: Description,
    v: Description,
    mask: Description | None,
    out: Description,
    lse: Description,
    is_causal: bool,
    scale: float,
    wants_q: bool,
    wants_kv: bool,
) -> Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]:
    if not covers(q, v, mask):
        raise ValueError(
            f"attention_backward takes no mask or a boolean one, head dims up to {MAX_HEAD_DIM} and no float64, not {q.dtype} "
            f"{list(q.shape)} with a mask of {None if mask is None else mask.dtype}"
        )
    (B, H, Sq, D), (_, Hkv, Skv, _), DV = q.shape, k.shape, v.shape[3]
    if 0 in (*q.shape, *k.shape, *v.shape):
        wants = wants_q, wants_kv, wants_kv
        return lambda grad_out, *qkv: tuple(x.new_zeros(x.shape) if w else None for x, w in zip(qkv, wants, strict=False))
    acc, wide = accumulator(q.dtype), torch.float32
    block_d, block_dv = max(16, next_power_of_2(D)), max(16, next_power_of_2(DV))
    ranges, range_strides = None, RangeStrides()
    if mask is not None:
        expanded = mask.expand((B, H, Sq, Skv))
        ranges = Ranges(mask.dtype, expanded.shape, expanded.strides, is_causal, 0, q.dtype.itemsize)
        range_strides = ranges.strides
    mask_kind = "none" if mask is None else "bool"
    strides = (*q.strides, *k.strides, *v.strides, *grad_out.strides, *range_strides)
    kind = (D, DV, H // Hkv, mask_kind, is_causal, acc)
    of_keys, of_queries = (_tile(of, q.dtype, max(block_d, block_dv), q.device, mask is not None) for of in ("keys", "queries"))

    def launch(kernel, grid, numbers, tile: _Tile, blocks: tuple[int, int]) -> Launch:
        arguments = (*numbers, 0, *strides, float(scale), *kind, *blocks, block_d, block_dv)
        return Launch(kernel, grid, arguments, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False)

    rows = max(1, 1024 // block_dv)
    n_rows = B * H * Sq
    delta_arguments = (n_rows, Sq, H, *out.strides, *grad_out.strides, DV, acc, rows, block_dv)
    sum_delta = Launch(
        _attention_delta_kernel, (ceil_div(n_rows, rows), 1, 1), delta_arguments, num_warps=4, enable_fp_fusion=False
    )
    grid = ceil_div(Skv, of_keys.block_own), B * Hkv, 1
    add_queries = launch(_attention_dkdv_kernel, grid, (Sq, Skv, Hkv), of_keys, (of_keys.block_other, of_keys.block_own))
    grid = ceil_div(Sq, of_queries.block_own), B * H, 1
    add_keys = launch(_attention_dq_kernel, grid, (Sq, Skv, H), of_queries, (of_queries.block_own, of_queries.block_other))

    def call(grad_out, q, k, v, mask, out, lse) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dq = q.new_empty(q.shape) if wants_q else None
        dk, dv = (x.new_empty(x.shape) if wants_kv else None for x in (k, v))
        delta = q.new_empty((B, H, Sq), dtype=wide)
        with on_device(q):
            seen = (None, None, None) if ranges is None else ranges(mask)
            sum_delta(out, grad_out, delta)
            if wants_kv:
                add_queries(q, k, v, grad_out, lse, delta, *seen, dk, dv)
            if wants_q:
                add_keys(q, k, v, grad_out, lse, delta, *seen, dq)
        return dq, dk, dv

    return call


def _tile(of: str, dtype: torch.dtype, block_d: int, device: torch.device, has_mask: bool) -> _Tile:
    """of: "keys" or "queries", what a program owns. Tiles are of one class, as those of products are: any gives the same bits.

    A block of keys has two accumulators beside its scores: more than a thread's registers where the other side is long.
    """
    if dtype.itemsize > 2:
        return _Tile(32, 32, 4, 1)
    if device_of(device).capability >= 90:
        return _Tile(128, 32, 8, 3) if of == "keys" and has_mask else _Tile(128, 64, 8, 2)
    return _Tile(128, 32, 8, 2) if of == "keys" and block_d <= 64 else _Tile(64, 64, 8, 2)
