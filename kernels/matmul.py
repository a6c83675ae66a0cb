"""Matrix products: ``gemm`` and ``grouped_gemm``.

Every element of a result is one chain of sums over K, ascending, in one accumulator (fp32; fp64 for fp64): the order is
the same for every tile, so the tile may follow M. There is no split-K and no atomic. Triton specialises the operands'
strides and pointers, for speed: they choose the width of loads into shared memory, and no order of sums. M it does not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import GROUP_M, accumulator, ceil_div, gemm_tile, on_device


@triton.jit
def _product(
    a_ptrs,
    b_ptrs,
    a_step,
    b_step,
    K,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """sum over k of a[:, k] * b[k, :]: blocks of BLOCK_K, ascending, into one accumulator. Behind K there are zeros."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    offs_k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=offs_k[None, :] < K - start, other=0.0)
            b = tl.load(b_ptrs, mask=offs_k[:, None] < K - start, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
        a_ptrs += a_step
        b_ptrs += b_step
    return acc


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bn,
    stride_biasb,
    stride_biasm,
    stride_biasn,
    alpha: tl.float64,
    beta: tl.float64,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out = alpha * (a @ b) + beta * bias, for one tile of one matrix of the batch.

    Order: the sum over k ascending (``_product``); times alpha; plus (beta times bias): each rounded on its own in ACC,
    then one cast. Rows and columns behind the edge read row or column 0 and up again and are not stored.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    matrix = (pid // (tiles_m * tiles_n)).to(tl.int64)
    pid = pid % (tiles_m * tiles_n)
    group = pid // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + pid % (GROUP_M * tiles_n) % group_m
    pid_n = pid % (GROUP_M * tiles_n) // group_m

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    # An M that divides evenly needs no wrapping, which would hide the contiguity of a transposed operand.
    rows = (offs_m if EVEN_M else offs_m % M).to(tl.int64)
    cols = (offs_n % N).to(tl.int64)
    acc = _product(
        a_ptr + matrix * stride_ab + rows[:, None] * stride_am + offs_k[None, :] * stride_ak,
        b_ptr + matrix * stride_bb + offs_k[:, None] * stride_bk + cols[None, :] * stride_bn,
        tl.full([], BLOCK_K, tl.int64) * stride_ak,
        tl.full([], BLOCK_K, tl.int64) * stride_bk,
        K,
        ACC,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    # Scalars are cast at once: what type a launcher hands them in must not choose the type of the arithmetic.
    acc = acc * tl.full([], alpha, ACC)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs_m = offs_m.to(tl.int64)
    offs_n = offs_n.to(tl.int64)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + matrix * stride_biasb + offs_m[:, None] * stride_biasm + offs_n[None, :] * stride_biasn
        acc = acc + tl.load(bias_ptrs, mask=inside, other=0.0).to(ACC) * tl.full([], beta, ACC)
    out_ptrs = out_ptr + matrix * M * N + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """``reference.gemm`` on the GPU."""
    batch, M, K = a.shape
    N = b.shape[2]
    out = torch.empty((batch, M, N), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    tile = gemm_tile(a.dtype, M, N, batch, a.device)
    has_bias = bias is not None and beta != 0
    grid = (batch * ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n),)
    with on_device(a):
        _gemm_kernel[grid](
            a,
            b,
            bias if has_bias else out,
            out,
            M,
            N,
            K,
            *_strides(a),
            *_strides(b),
            *(_strides(bias) if has_bias else (0, 0, 0)),
            alpha,
            beta,
            ACC=accumulator(a.dtype),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=GROUP_M,
            EVEN_M=M % tile.block_m == 0,
            EVEN_K=K % tile.block_k == 0,
            HAS_BIAS=has_bias,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return out


@triton.jit(do_not_specialize=["T", "G"], do_not_specialize_on_alignment=["offs_ptr"])
def _grouped_gemm_kernel(
    a_ptr,
    b_ptr,
    offs_ptr,
    out_ptr,
    T,
    G,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bg,
    stride_bk,
    stride_bn,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """out[t] = a[t] @ b[g] for one tile of the rows of one group, in the order of ``_gemm_kernel``.

    The grid has room for the most row tiles that any offs can need, cdiv(T, BLOCK_M) + G. A program counts the tiles of
    the groups in front of it (in integers, exactly) to find its own; programs behind the last tile have nothing to do.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n

    groups = tl.arange(0, BLOCK_G)
    ends = tl.minimum(tl.load(offs_ptr + groups, mask=groups < G, other=0), T)
    starts = tl.minimum(tl.load(offs_ptr + groups - 1, mask=(groups > 0) & (groups < G), other=0), T)
    tiles = tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M)
    tiles_up_to = tl.cumsum(tiles, 0)
    group = tl.sum((tiles_up_to <= pid_m).to(tl.int32), 0)
    if group < G:
        mine = groups == group
        row = tl.sum(tl.where(mine, starts + (pid_m - tiles_up_to + tiles) * BLOCK_M, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)

        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        rows = tl.minimum(offs_m, end - 1).to(tl.int64)
        cols = (offs_n % N).to(tl.int64)
        acc = _product(
            a_ptr + rows[:, None] * stride_am + offs_k[None, :] * stride_ak,
            b_ptr + group.to(tl.int64) * stride_bg + offs_k[:, None] * stride_bk + cols[None, :] * stride_bn,
            tl.full([], BLOCK_K, tl.int64) * stride_ak,
            tl.full([], BLOCK_K, tl.int64) * stride_bk,
            K,
            ACC,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
        )
        out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n.to(tl.int64)[None, :]
        inside = (offs_m < end)[:, None] & (offs_n < N)[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_gemm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """``reference.grouped_gemm`` on the GPU. ``offs`` stays there: nothing waits for it."""
    T, K = a.shape
    G, _, N = b.shape
    out = torch.zeros((T, N), dtype=a.dtype, device=a.device)
    if out.numel() == 0 or G == 0:
        return out
    tile = gemm_tile(a.dtype, ceil_div(T, G), N, G, a.device)
    grid = ((ceil_div(T, tile.block_m) + G) * ceil_div(N, tile.block_n),)
    with on_device(a):
        _grouped_gemm_kernel[grid](
            a,
            b,
            offs.contiguous(),
            out,
            T,
            G,
            N,
            K,
            *_strides(a),
            *_strides(b),
            ACC=accumulator(a.dtype),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            BLOCK_G=triton.next_power_of_2(G),
            EVEN_K=K % tile.block_k == 0,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return out


def _strides(x: Tensor) -> tuple[int, ...]:
    """The strides, 0 where the size is 1: torch leaves anything there, and it would only make Triton compile again."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
