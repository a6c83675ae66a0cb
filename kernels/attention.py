"""``attention``: one pass over the keys with a running maximum (online softmax), any mask, grouped heads, any strides.

The order over the keys counts from the first key that any query of the same (batch, head) can see. So padding on either
side changes no bit, nor does the number of queries: a block of keys that a query cannot see leaves its maximum, its sum
and its accumulator as they are, bit for bit. The values of hidden keys must be finite: 0 * NaN is NaN, as in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import _divide, _tree_sum
from .reference import accumulator_dtype
from .tiles import accumulator, attention_tile, ceil_div, on_device

_FIRST_KEY_QUERIES = 16
_FIRST_KEY_BLOCK = 256


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


@triton.jit(
    do_not_specialize=["n_blocks", "Sq", "Skv", "n_packs", "pack", "heads_per_key_head"]
    + ["stride_mb", "stride_mh", "stride_mq", "stride_mk", "stride_fb", "stride_fh", "n_firsts"],
    do_not_specialize_on_alignment=["mask_ptr", "first_ptr", "lse_ptr"],
)
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    first_ptr,
    out_ptr,
    lse_ptr,
    n_blocks,
    Sq,
    Skv,
    n_packs,
    pack,
    heads_per_key_head,
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
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_fb,
    stride_fh,
    n_firsts,
    scale: tl.float64,
    D: tl.constexpr,
    DV: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = softmax(scale * q @ k.T + mask) @ v for one block of queries of ``pack`` heads that share a key head.

    For blocks of BLOCK_N keys, ascending from the first visible key:
        s = scale * (q @ k.T) + mask, the product over the head dim ascending; hidden keys are -inf
        m' = max(m, max(s)); p = exp(s - m'); r = exp(m - m')
        l = l * r + sum(p), the sum by the tree of ``reduce.py``
        acc = acc * r + p @ v, p rounded to v's dtype first, the product over the keys ascending
    and at the end out = acc / l, lse = m + log(l). A block with no visible key has m' = m, p = 0, r = 1.

    An additive mask may hide keys by its dtype's lowest value instead of -inf, and such keys do count for a query that
    sees no others. So with it the blocks start at or before key 0, still in step with the first visible key.
    """
    # With a causal mask the last blocks are the longest, so they go first.
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    pack_index = tl.program_id(0) // n_blocks % n_packs
    batch = (tl.program_id(0) // n_blocks // n_packs).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = rows // pack
    heads = (pack_index * pack + rows % pack).to(tl.int64)
    inside_q = queries < Sq
    key_head = (pack_index * pack // heads_per_key_head).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)

    first = tl.minimum(Skv, 0)
    start = first
    if MASK != "none":
        first_ptr += batch * stride_fb + (pack_index * pack).to(tl.int64) * stride_fh
        first = Skv
        for i in range(0, n_firsts, 128):
            offs = i + tl.arange(0, 128)
            first = tl.minimum(first, tl.min(tl.load(first_ptr + offs, mask=offs < n_firsts, other=Skv), 0))
        start = first
        if MASK == "additive":
            start = first - tl.cdiv(first, BLOCK_N) * BLOCK_N
    end = Skv
    if CAUSAL:
        # Blocks behind the last query of this block are hidden from all of it.
        end = tl.minimum(Skv, tl.minimum((block * BLOCK_M + BLOCK_M - 1) // pack, Sq - 1) + 1)

    q_ptrs = q_ptr + batch * stride_qb + heads[:, None] * stride_qh + queries.to(tl.int64)[:, None] * stride_qm
    q_ptrs += dims.to(tl.int64)[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=inside_q[:, None] & (dims < D)[None, :], other=0.0)
    k_ptr += batch * stride_kb + key_head * stride_kh
    v_ptr += batch * stride_vb + key_head * stride_vh
    mask_ptrs = mask_ptr + batch * stride_mb + heads * stride_mh + queries.to(tl.int64) * stride_mq

    largest = tl.full([BLOCK_M], -float("inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    for begin in range(start, end, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        offs_k = keys.to(tl.int64)
        inside_k = (keys >= 0) & (keys < Skv)
        k_ptrs = k_ptr + offs_k[None, :] * stride_kn + dims.to(tl.int64)[:, None] * stride_kd
        if BLOCK_D == D:
            k = tl.load(k_ptrs, mask=inside_k[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs, mask=inside_k[None, :] & (dims < D)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision="ieee", out_dtype=ACC) * tl.full([], scale, ACC)
        visible = inside_q[:, None] & inside_k[None, :]
        if MASK == "additive":
            s = s + tl.load(mask_ptrs[:, None] + offs_k[None, :] * stride_mk, mask=visible, other=0.0).to(ACC)
        elif MASK == "bool":
            visible = visible & (tl.load(mask_ptrs[:, None] + offs_k[None, :] * stride_mk, mask=visible, other=0) != 0)
        if CAUSAL:
            visible = visible & (keys[None, :] <= queries[:, None])
        s = tl.where(visible, s, -float("inf"))

        new_largest = tl.maximum(largest, tl.max(s, 1))
        # Before the first visible key both maxima are -inf, and their difference would be NaN.
        centre = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        p = tl.exp(s - centre[:, None])
        r = tl.exp(largest - centre)
        total = total * r + _tree_sum(p, BLOCK_M, BLOCK_N)
        v_ptrs = v_ptr + offs_k[:, None] * stride_vn + dims_v.to(tl.int64)[None, :] * stride_vd
        if BLOCK_DV == DV:
            v = tl.load(v_ptrs, mask=inside_k[:, None], other=0.0)
        else:
            v = tl.load(v_ptrs, mask=inside_k[:, None] & (dims_v < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * r[:, None], input_precision="ieee", out_dtype=ACC)
        largest = new_largest

    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    out_rows = (batch * n_packs * pack + heads) * Sq + queries
    out_ptrs = out_ptr + out_rows[:, None] * DV + dims_v.to(tl.int64)[None, :]
    out = _divide(acc, tl.broadcast_to(total[:, None], [BLOCK_M, BLOCK_DV]), ACC).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=inside_q[:, None] & (dims_v < DV)[None, :])
    lse = tl.where(seen, largest + tl.log(total), -float("inf"))
    tl.store(lse_ptr + out_rows, lse, mask=inside_q)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """``reference.attention`` on the GPU. What the mask hides is found there: nothing waits for it."""
    B, H, Sq, D = q.shape
    Hkv, Skv, DV = k.shape[1], k.shape[2], v.shape[3]
    out = torch.empty((B, H, Sq, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Sq), dtype=accumulator_dtype(q.dtype), device=q.device)
    if lse.numel() == 0:
        return out, lse
    group = H // Hkv
    # Heads that share keys go through one tile, so that few queries still fill it; unless each has a mask of its own.
    pack = group if mask is None or mask.stride(1) == 0 else 1
    tile = attention_tile(q.dtype, max(D, DV), Sq * pack, q.device)
    n_blocks = ceil_div(Sq * pack, tile.block_m)
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    with on_device(q):
        mask = None if mask is None else _loadable(mask)
        firsts = lse if mask is None else _first_keys(mask, kind == "bool", is_causal)
        _attention_kernel[(n_blocks * (H // pack) * B,)](
            q,
            k,
            v,
            lse if mask is None else mask,
            firsts,
            out,
            lse,
            n_blocks,
            Sq,
            Skv,
            H // pack,
            pack,
            group,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *((0, 0, 0) if mask is None else (*(_step(firsts, dim) for dim in (0, 1)), firsts.shape[2])),
            float(scale),
            D=D,
            DV=DV,
            MASK=kind,
            CAUSAL=bool(is_causal),
            ACC=accumulator(q.dtype),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            BLOCK_DV=max(16, triton.next_power_of_2(DV)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return out, lse


def _first_keys(mask: Tensor, is_bool: bool, is_causal: bool) -> Tensor:
    """For each batch, head and block of queries, the first key one of them can see: int32 [B or 1, H or 1, blocks].

    Dims along which the mask is expanded are looked at once; for queries at the last, as causality hides least from it.
    """
    last_query = mask.shape[2] - 1
    B, H, n_queries = (1 if mask.stride(dim) == 0 else mask.shape[dim] for dim in range(3))
    n_blocks = ceil_div(n_queries, _FIRST_KEY_QUERIES)
    firsts = torch.empty((B, H, n_blocks), dtype=torch.int32, device=mask.device)
    _first_key_kernel[(firsts.numel(),)](
        mask,
        firsts,
        H,
        n_queries,
        mask.shape[3],
        last_query if n_queries == 1 else 0,
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


def _step(x: Tensor, dim: int) -> int:
    """The stride to walk a dim that may have been looked at once for all."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)
