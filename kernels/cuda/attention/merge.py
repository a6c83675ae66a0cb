"""Two softmaxes merged into one, and ``_merge_splits_kernel``, which merges the splits of a workspace."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch
from ...tiles import ceil_div, next_power_of_2
from ..rows import divide

LOG2_E = tl.constexpr(1.4426950408889634)
CHUNK_BLOCKS = tl.constexpr(8)
"""Blocks of a chunk. It is part of the order of sums: other chunks, other bits."""
ABSENT = tl.constexpr(-1.0)
"""Stands for the sum of a split that no program computes. No softmax has this sum."""
_BLOCK_DV = 32
"""Most dims of a program of ``_merge_splits_kernel``: one for each thread of its warp."""


class Splits(NamedTuple):
    """How the keys of a row are divided among programs."""

    split_blocks: int
    """Blocks of a split: 1, or those of a chunk; 0 where one program computes the row."""
    num_splits: int
    splits_per_program: int

    @property
    def is_finest(self) -> bool:
        """Whether each program has one block of keys, so that there is nothing to load ahead."""
        return self.split_blocks * self.splits_per_program == 1

    @property
    def merged_at_once(self) -> int:
        """Splits that ``_merge_splits_kernel`` loads at once: a multiple of those of a chunk."""
        return max(CHUNK_BLOCKS.value, min(16, next_power_of_2(self.num_splits)))

    @property
    def stored(self) -> int:
        """Splits for which the workspace has room: num_splits, rounded up to what is merged at once."""
        return ceil_div(self.num_splits, self.merged_at_once) * self.merged_at_once


class OutStrides(NamedTuple):
    """The strides of the result, whose dims lie side by side, and of the logsumexp, whose queries do."""

    batch: int
    head: int
    token: int
    lse_batch: int
    lse_head: int


@triton.jit
def _rescaling(old, new, ACC: tl.constexpr):
    """exp(old - new), and exactly 1 where they are equal, which 2 ** fma(old, log2(e), -(new * log2(e))) would not be."""
    if ACC == tl.float64:
        return tl.exp(old - new)
    else:
        return tl.exp2((old - new) * LOG2_E)


@triton.jit
def merge(m_i, l_i, acc, m_j, l_j, acc_j, ACC: tl.constexpr):
    """The softmaxes i and j as one:

        m = max(m_i, m_j); [l, acc] = fma([l_i, acc], exp(m_i - m), [l_j, acc_j] * exp(m_j - m))

    The product of j is rounded, that of i is not.
    """
    m = tl.maximum(m_i, m_j)
    # Before the first visible key both maxima are -inf.
    centre = tl.where(m == -float("inf"), 0.0, m)
    r_i = _rescaling(m_i, centre, ACC)[:, None]
    r_j = _rescaling(m_j, centre, ACC)[:, None]
    l_i = tl.fma(l_i, tl.broadcast_to(r_i, l_i.shape), l_j * r_j)
    acc = tl.fma(acc, tl.broadcast_to(r_i, acc.shape), tl.broadcast_to(acc_j * r_j, acc.shape))
    return m, l_i, acc


@triton.jit
def store_result(
    m_i, l_i, acc, sinks_ptr, heads, out_ptrs, lse_ptrs, stored, stored_lse,
    SINKS: tl.constexpr, LSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = acc * (1 / l_i), lse = m_i + log(l_i). A head's sink is merged last, as one more key whose value is 0."""
    if SINKS:
        sink = tl.load(sinks_ptr + heads).to(ACC)
        zero = tl.zeros([sink.shape[0], 1], ACC)
        m_i, l_i, acc = merge(m_i, l_i[:, None], acc, sink, zero + 1.0, zero, ACC)
        l_i = tl.reshape(l_i, [sink.shape[0]])
    seen = l_i != 0.0
    divisor = tl.where(seen, l_i, 1.0)
    out = acc * divide(tl.full(divisor.shape, 1.0, ACC), divisor, ACC)[:, None]
    # A hidden block turns -0 (an underflow) into 0; here every -0 becomes 0.
    out = tl.where(out == 0.0, 0.0, out)
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=stored)
    if LSE:
        tl.store(lse_ptrs, tl.where(seen, m_i + tl.log(divisor), -float("inf")), mask=stored_lse)


@triton.jit(
    do_not_specialize=["total_queries", "num_splits", "n_heads", "stride_lh", "stride_ob", "stride_oh", "stride_om"],
    do_not_specialize_on_alignment=["workspace_ptr", "sinks_ptr", "out_ptr", "lse_ptr"],
)
def _merge_splits_kernel(
    workspace_ptr, sinks_ptr, out_ptr, lse_ptr,
    total_queries, num_splits, n_heads, stride_lh, stride_ob, stride_oh, stride_om,
    HEAD_DIM_V: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_DV: tl.constexpr, SPLITS_PER_CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The splits of ``_attention_kernel``, merged as there, for one query and BLOCK_DV of its dims.

    The SPLITS_PER_CHUNK splits of a chunk are merged in ascending order (``merge``), then, in the same way, the chunks.
    An absent split has a maximum of -inf and no accumulator, and changes nothing.
    """
    query = tl.program_id(0)
    # In 32 bits, in which a grid is counted: a division in 64 takes as long as all the rest.
    batch = query // (n_heads * stride_lh)
    head = query // stride_lh % n_heads
    out_ptr += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + (query % stride_lh).to(tl.int64) * stride_om
    query = query.to(tl.int64)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    inside = offs_dv < HEAD_DIM_V
    stats_ptrs = workspace_ptr + (tl.cast(num_splits, tl.int64) * total_queries * HEAD_DIM_V + query * num_splits * 2)
    stats_ptrs += tl.zeros([1], tl.int32)
    acc_ptrs = workspace_ptr + query * num_splits * HEAD_DIM_V + offs_dv[None, :]
    m_i = tl.full([1], -float("inf"), ACC)
    l_i = tl.zeros([1, 1], ACC)
    acc = tl.zeros([1, BLOCK_DV], ACC)
    chunk_m_i, chunk_l_i, chunk_acc = m_i, l_i, acc
    for _ in range(0, num_splits, UNROLL):
        # All loads come before the first sum, so that they are under way at once: the compiler does not move them up.
        loaded = ()
        for i in tl.static_range(UNROLL):
            m_j = tl.load(stats_ptrs + i * 2)
            l_j = tl.load(stats_ptrs + (i * 2 + 1))
            if HEAD_DIM_V % BLOCK_DV == 0:
                acc_j = tl.load(acc_ptrs + i * HEAD_DIM_V)
            else:
                acc_j = tl.load(acc_ptrs + i * HEAD_DIM_V, mask=inside[None, :], other=0.0)
            loaded = loaded + ((m_j, l_j[:, None], acc_j),)
        for i in tl.static_range(UNROLL):
            m_j, l_j, acc_j = loaded[i]
            is_absent = l_j == ABSENT
            l_j, acc_j = tl.where(is_absent, 0.0, l_j), tl.where(is_absent, 0.0, acc_j)
            if i % SPLITS_PER_CHUNK == 0:
                chunk_m_i, chunk_l_i, chunk_acc = m_j, l_j, acc_j
            else:
                chunk_m_i, chunk_l_i, chunk_acc = merge(chunk_m_i, chunk_l_i, chunk_acc, m_j, l_j, acc_j, ACC)
            if i % SPLITS_PER_CHUNK == SPLITS_PER_CHUNK - 1:
                m_i, l_i, acc = merge(m_i, l_i, acc, chunk_m_i, chunk_l_i, chunk_acc, ACC)
        stats_ptrs += UNROLL * 2
        acc_ptrs += UNROLL * HEAD_DIM_V
    store_result(
        m_i, tl.reshape(l_i, [1]), acc, sinks_ptr, head + tl.zeros([1], tl.int64),
        out_ptr + offs_dv.to(tl.int64)[None, :], lse_ptr + query + tl.zeros([1], tl.int64),
        inside[None, :], tl.zeros([1], tl.int32) == tl.program_id(1), SINKS, LSE, ACC,
    )  # fmt: skip


class Merge:
    """``_merge_splits_kernel`` for results of given sizes, and the workspace that it reads."""

    def __init__(
        self,
        splits: Splits,
        total_queries: int,
        n_heads: int,
        head_dim_v: int,
        out: OutStrides,
        has_sinks: bool,
        has_lse: bool,
        acc: tl.dtype,
    ) -> None:
        self._dtype = torch.float64 if acc == tl.float64 else torch.float32
        self._workspace_size = splits.stored * total_queries * (head_dim_v + 2)
        block_dv = min(_BLOCK_DV, max(16, next_power_of_2(head_dim_v)))
        numbers = (total_queries, splits.stored, n_heads, out.lse_head, out.batch, out.head, out.token)
        splits_per_chunk = CHUNK_BLOCKS.value // splits.split_blocks
        arguments = (*numbers, head_dim_v, has_sinks, has_lse, acc, block_dv, splits_per_chunk, splits.merged_at_once)
        grid = (total_queries, ceil_div(head_dim_v, block_dv), 1)
        self._launch = Launch(_merge_splits_kernel, grid, arguments, num_warps=1, enable_fp_fusion=False)

    def workspace(self, q: Tensor) -> Tensor:
        """Memory for the accumulators of the splits, and for their maxima and sums."""
        return torch.empty(self._workspace_size, dtype=self._dtype, device=q.device)

    def __call__(self, workspace: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
        self._launch(workspace, sinks, out, lse)
