"""The launchers: what is computed with which tile and how many splits, worked out once for tensors of one description."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...launch import Launch
from ...plans import alignment, on_device, plan
from ...reference import accumulator_dtype
from ...tiles import Tile, accumulator, attention_tile, ceil_div, device_of, next_power_of_2
from .kernel import _attention_kernel
from .merge import CHUNK_BLOCKS, Merge, OutStrides, Splits
from .ranges import Ranges, RangeStrides


class _Options(NamedTuple):
    """What is computed, besides the tensors."""

    layout: str
    """Of the keys: dense, packed or paged."""
    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    is_causal: bool
    sm_scale: float
    causal_offset: int = 0
    window: int | None = None
    soft_cap: float | None = None
    page_size: int = 1
    mask_window: int = 0
    """Of the mask, where positions are given."""


class _Dtypes(NamedTuple):
    """The dtypes of the tensors that not every call has. A binary depends on each of them."""

    sinks: torch.dtype | None = None
    q_starts: torch.dtype | None = None
    k_starts: torch.dtype | None = None
    pages: torch.dtype | None = None
    lse: torch.dtype | None = None
    positions: torch.dtype | None = None


class _Heads(NamedTuple):
    """The heads of queries and of keys, and their dims."""

    heads: int
    key_heads: int
    head_dim: int
    head_dim_v: int


class _Strides(NamedTuple):
    """The strides of q, k or v. batch: that of pages where the keys are in pages, 0 where the rows are packed."""

    batch: int
    head: int
    token: int
    dim: int


class _Layout(NamedTuple):
    """Where the operands and the results are."""

    q: _Strides
    k: _Strides
    v: _Strides
    out: OutStrides
    total_queries: int
    """Of all heads."""


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
    positions: Tensor | None = None,
    mask_window: int = 0,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``reference.attention`` on the GPU. What the mask hides is found there: nothing waits for it."""
    B, H, Sq, _ = q.shape
    out = q.new_empty((B, H, Sq, v.shape[3]))
    lse = q.new_empty((B, H, Sq), dtype=accumulator_dtype(q.dtype)) if with_lse else None
    if B * H * Sq == 0:
        return out, lse
    options = _Options("dense", B, Sq, k.shape[2], is_causal, scale, causal_offset, window, soft_cap, 1, mask_window)
    with on_device(q):
        _run(options, q, k, v, out, lse, mask=mask, sinks=sinks, positions=positions)
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
    layout, Skv, page_size = ("packed", k.shape[0], 1) if pages is None else ("paged", pages.shape[1] * k.shape[1], k.shape[1])
    batch = q_starts.shape[0] - 1
    options = _Options(layout, batch, max_queries, Skv, is_causal, scale, 0, window, soft_cap, page_size)
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
    positions: Tensor | None = None,
) -> None:
    kernel = _plan(
        options,
        (q.shape, k.shape, v.shape),
        (q.stride(), k.stride(), v.stride()),
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
        None if pages is None else pages.stride(0),
        0 if positions is None or positions.shape[0] == 1 else positions.stride(0),
        _Dtypes(*[None if x is None else x.dtype for x in (sinks, q_starts, k_starts, pages, lse, positions)]),
        alignment(q, k, v, k if mask is None else mask),
        q.dtype,
        q.device,
    )
    kernel(q, k, v, out, lse, mask, sinks, q_starts, k_starts, pages, positions)


def plan_attention(
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    mask: tuple[torch.dtype, torch.Size, tuple[int, ...]] | None,
    lse_dtype: torch.dtype | None,
    aligned: int,
    is_causal: bool,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> "_Attention":
    """``attention`` of q, k and v like these. mask: dtype, full shape, strides; aligned: the bits of q, k, v and the mask."""
    (B, _, Sq, _), (_, _, Skv, _), _ = shapes
    options = _Options("dense", B, Sq, Skv, is_causal, scale)
    return _plan(options, shapes, strides, mask, None, 0, _Dtypes(lse=lse_dtype), aligned, dtype, device)


@plan
def _plan(
    options: _Options,
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    mask: tuple[torch.dtype, torch.Size, tuple[int, ...]] | None,
    stride_pages: int | None,
    stride_positions: int,
    dtypes: _Dtypes,
    aligned: int,
    dtype: torch.dtype,
    device: torch.device,
) -> "_Attention":
    """How attention over tensors like these is computed. aligned: only tells plans apart, as a binary depends on it."""
    heads, layout = _layout(options, shapes, strides)
    ranges = None if mask is None else Ranges(*mask, options.is_causal, options.causal_offset, dtype.itemsize)
    range_strides = RangeStrides() if ranges is None else ranges.strides
    mask_kind = "none" if ranges is None else "bool" if ranges.is_bool else "additive"
    # Heads that share keys go through one tile, so that few queries still fill it; unless each has a mask of its own.
    group = heads.heads // heads.key_heads
    pack = group if range_strides.mask_head == 0 else 1
    n_packs = heads.heads // pack
    # Keys may be counted from one that is not there.
    counts_before = mask_kind == "additive" or dtypes.positions is not None
    tile, splits, many_chunks = _tile_and_splits(options, heads, pack, mask_kind != "none", counts_before, dtype, device)
    n_blocks_m = ceil_div(options.max_seqlen_q * pack, tile.block_m)
    numbers = (
        *(n_blocks_m, options.max_seqlen_q, options.max_seqlen_k, n_packs, layout.total_queries),
        *(options.page_size, options.window or 0, options.causal_offset, options.mask_window, stride_positions),
        *(*layout.q, *layout.k, *layout.v, *layout.out, *range_strides),
        *(stride_pages or 0, splits.stored, splits.splits_per_program),
        *(float(options.sm_scale), options.soft_cap or 0.0),
    )
    stride_kn = _constant_stride(layout.k.token, heads.head_dim, heads)
    stride_vn = _constant_stride(layout.v.token, heads.head_dim_v, heads)
    has_sinks, has_lse, acc = dtypes.sinks is not None, dtypes.lse is not None, accumulator(dtype)
    constants = (
        *(heads.head_dim, heads.head_dim_v, group, pack, stride_kn, stride_vn, options.layout, mask_kind),
        *(options.is_causal, options.window is not None, options.soft_cap is not None, has_sinks, has_lse),
        dtypes.positions is not None,
        *(splits.split_blocks, many_chunks, acc, tile.block_m, tile.block_n),
        *(max(16, next_power_of_2(heads.head_dim)), max(16, next_power_of_2(heads.head_dim_v))),
    )
    grid = (n_blocks_m * n_packs * options.batch, ceil_div(splits.num_splits, splits.splits_per_program), 1)
    launch_options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    launch = Launch(_attention_kernel, grid, numbers + constants, **launch_options)
    merge = None
    if splits.split_blocks:
        merge = Merge(splits, layout.total_queries, heads.heads, heads.head_dim_v, layout.out, has_sinks, has_lse, acc)
    return _Attention(ranges, launch, merge)


def _layout(options: _Options, shapes: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...]]) -> tuple[_Heads, _Layout]:
    """Dense: [batch, heads, tokens, dim]. Packed: [tokens, heads, dim]. Keys in pages: [pages, tokens, heads, dim]."""
    (q, k, v), (stride_q, stride_k, stride_v) = shapes, strides
    head = 1 if options.layout == "dense" else -2
    heads = _Heads(q[head], k[head], q[-1], v[-1])
    H, DV = heads.heads, heads.head_dim_v
    if options.layout == "dense":
        Sq = options.max_seqlen_q
        out = OutStrides(H * Sq * DV, Sq * DV, DV, H * Sq, Sq)
        total_queries = options.batch * H * Sq
        return heads, _Layout(_Strides(*stride_q), _Strides(*stride_k), _Strides(*stride_v), out, total_queries)
    T, is_paged = q[0], options.layout == "paged"

    def with_tokens_first(stride: tuple[int, ...], stride_page: int) -> _Strides:
        token, head, dim = stride[-3:]
        return _Strides(stride_page, head, token, dim)

    return heads, _Layout(
        with_tokens_first(stride_q, 0),
        with_tokens_first(stride_k, stride_k[0] if is_paged else 0),
        with_tokens_first(stride_v, stride_v[0] if is_paged else 0),
        OutStrides(0, DV, H * DV, 0, T),
        H * T,
    )


def _tile_and_splits(
    options: _Options, heads: _Heads, pack: int, has_mask: bool, counts_before: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tile, Splits, bool]:
    """The tile, the splits, and whether a program may see more than one chunk of keys.

    counts_before: whether the first chunk may begin before the first key.
    """
    rows = options.max_seqlen_q * pack
    size = (dtype, max(heads.head_dim, heads.head_dim_v), rows, device, has_mask)
    tile, splits = attention_tile(*size), Splits(0, 1, 1)
    n_blocks_m = ceil_div(rows, tile.block_m)
    programs = n_blocks_m * (heads.heads // pack) * options.batch
    n_key_blocks = ceil_div(options.max_seqlen_k, tile.block_n) + (CHUNK_BLOCKS.value if counts_before else 0)
    if n_blocks_m == 1:
        multiprocessors = device_of(device).multiprocessors
        splits = num_splits_heuristic(programs, n_key_blocks, multiprocessors)
        if splits.split_blocks or programs <= multiprocessors:
            tile = attention_tile(*size, splits.split_blocks > 0, stages=1 if splits.is_finest else 3)
    return tile, splits, splits.split_blocks != 1 and n_key_blocks > CHUNK_BLOCKS.value


def _constant_stride(stride: int, dim: int, heads: _Heads) -> int:
    """The distance of two keys if only the model decides it, else 0.

    It is the model's own where the tokens of one head, of all key heads, or of query, key and value as one are contiguous.
    Other strides follow a batch or a length: as constants they would make ever more binaries.
    """
    own = (dim, heads.key_heads * dim, (heads.heads + 2 * heads.key_heads) * dim)
    return stride if stride in own else 0


@functools.cache
def num_splits_heuristic(programs: int, n_key_blocks: int, multiprocessors: int) -> Splits:
    """The fastest splits, where ``programs`` programs would compute the rows without any.

    It minimises a model of the time that was fitted to an H200. The unit is the time that a program takes for one more block
    while the other multiprocessors are idle. Storing a split takes a quarter of it; merging takes 2, and 1 for each 32 splits.
    Programs of one block overlap, two on a multiprocessor; the programs after those wait for them.
    """
    best = (n_key_blocks * _block_time(programs / multiprocessors), Splits(0, 1, 1))
    for split_blocks in (1, CHUNK_BLOCKS.value) if n_key_blocks > 1 else ():
        num_splits = ceil_div(n_key_blocks, split_blocks)
        for splits_per_program in range(1, num_splits + 1):
            splits = Splits(split_blocks, num_splits, splits_per_program)
            load = programs * ceil_div(num_splits, splits_per_program) / multiprocessors
            if splits.is_finest:
                time = 2.1 * load + (1.75 if load > 2.0 else 0.0)
            else:
                time = math.ceil(load) * splits_per_program * (split_blocks * _block_time(min(1.0, load)) + 0.25)
            best = min(best, (time + 2.0 + num_splits / 32, splits))
    return best[1]


def _block_time(load: float) -> float:
    """The time of one block where ``load`` programs share a multiprocessor. At one program each the memory is busy."""
    return 1.0 + 0.75 * load * load if load <= 1.0 else 1.75 * load


class _Attention:
    """``_attention_kernel`` for tensors of given sizes, and the kernels that run before and after it where it needs them."""

    def __init__(self, ranges: Ranges | None, launch: Launch, merge: Merge | None) -> None:
        self._ranges, self._launch, self._merge = ranges, launch, merge

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None = None,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        q_starts: Tensor | None = None,
        k_starts: Tensor | None = None,
        pages: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        intervals = ranges = workspace = None
        if self._ranges is not None:
            mask, intervals, ranges = self._ranges(mask)
        if self._merge is not None:
            workspace = self._merge.workspace(q)
        self._launch(q, k, v, mask, intervals, ranges, out, lse, workspace, q_starts, k_starts, pages, sinks, positions)
        if self._merge is not None:
            self._merge(workspace, sinks, out, lse)
