"""Products of scaled 8-bit floats: ``scaled_gemm``, ``scaled_grouped_gemm`` and ``scaled_grouped_gemm_over_k``.

Tensor cores sum products of 8-bit floats with fewer bits than float32 has. So the sum has two levels: an instruction's
accumulator holds 128 terms, and these sums are added in float32, K ascending, by additions of their own (``_two_levels``).

What an instruction rounds away may differ from one kind of instruction to another: ``wgmma`` and ``mma.sync``, or ``wgmma`` of
other widths. So every call on a device has the same one, whatever its sizes: a tile has 64 or 128 rows, 64 to each group of
four warps, and always 128 columns and 128 terms; one row is computed in a tile of 64. Warps, stages and the rows of a tile are
free. ``max_num_imprecise_acc`` keeps Triton from making one sum of the two levels, as it does on SM89 and SM100 without it.

Operands are loaded through pointers, with any strides, or from SM90 on through TMA descriptors where K is contiguous.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import Launch
from ..plans import Description, describe, on_device, plan
from ..reference import SCALED_BLOCK
from ..tiles import GROUP_M, ceil_div, device_of, next_power_of_2, scaled_tile
from .matmul import INT32_END, LONGEST_AXIS, MARGIN, _batched, _launch, _rows_of_group, _tile_of


@triton.jit
def _two_levels(
    a_ptrs,
    b_ptrs,
    row,
    col,
    stride_ak,
    stride_bk,
    scale_a_ptrs,
    scale_b_ptrs,
    stride_sag,
    stride_sbg,
    inside_m,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """sum over k of a[:, k] * b[k, :], with the scales: BLOCK_K terms at a time, each such sum from 0, added ascending.

    BY_BLOCK: each block of K has its scales, and they move on with it. After K there are zeros; rows that are not inside are
    zeros, too, and are not read. TMA: a_ptrs and b_ptrs are descriptors of [M, K] and [N, K], read from row and col on.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        if TMA:
            a = a_ptrs.load([row, start])
            b = b_ptrs.load([col, start]).T
        elif EVEN_K:
            a = tl.load(a_ptrs, mask=inside_m[:, None], other=0.0)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=inside_m[:, None] & (offs_k[None, :] < K - start), other=0.0)
            b = tl.load(b_ptrs, mask=offs_k[:, None] < K - start, other=0.0)
        part = tl.dot(a, b, max_num_imprecise_acc=BLOCK_K, out_dtype=tl.float32)
        if BY_BLOCK:
            of_rows = tl.load(scale_a_ptrs, mask=inside_m, other=0.0)
            part = part * (of_rows[:, None] * tl.load(scale_b_ptrs)[None, :])
            scale_a_ptrs += stride_sag
            scale_b_ptrs += stride_sbg
        acc = acc + part
        if not TMA:
            a_ptrs += tl.full([], BLOCK_K, tl.int64) * stride_ak
            b_ptrs += tl.full([], BLOCK_K, tl.int64) * stride_bk
    if not BY_BLOCK:
        of_rows = tl.load(scale_a_ptrs, mask=inside_m, other=0.0)
        acc = acc * (of_rows[:, None] * tl.load(scale_b_ptrs)[None, :])
    return acc


@triton.jit(do_not_specialize=["M"])
def _scaled_gemm_kernel(
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
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
    stride_sab,
    stride_sam,
    stride_sag,
    stride_sbb,
    stride_sbg,
    stride_sbn,
    stride_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SCALE_N: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
):
    """out = a @ b with the scales, + bias, for one tile of one matrix of the batch: ``_two_levels``, the bias, one cast.

    SCALE_N: how many columns have one scale. TMA: a_ptr and b_ptr are descriptors. Columns after the edge read the first ones
    again, or zeros; they and rows after the edge are not stored.
    """
    matrix = tl.program_id(1).to(tl.int64)
    pid_m, pid_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    rows, cols = offs_m.to(tl.int64), (offs_n % N).to(tl.int64)
    if TMA:
        a, b = a_ptr, b_ptr
    else:
        a = a_ptr + matrix * stride_ab + rows[:, None] * stride_am + offs_k[None, :] * stride_ak
        b = b_ptr + matrix * stride_bb + offs_k[:, None] * stride_bk + cols[None, :] * stride_bn
    acc = _two_levels(
        a,
        b,
        pid_m * BLOCK_M,
        pid_n * BLOCK_N,
        stride_ak,
        stride_bk,
        scale_a_ptr + matrix * stride_sab + rows * stride_sam,
        scale_b_ptr + matrix * stride_sbb + cols // SCALE_N * stride_sbn,
        stride_sag,
        stride_sbg,
        offs_m < M,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        BY_BLOCK,
        EVEN_K,
        TMA,
    )
    if HAS_BIAS:
        acc = acc + tl.load(bias_ptr + cols * stride_bias).to(tl.float32)[None, :]
    out_ptrs = out_ptr + matrix * M * N + rows[:, None] * N + offs_n.to(tl.int64)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["T", "G"])
def _scaled_grouped_gemm_kernel(
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
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
    stride_sa,
    stride_sbg,
    stride_sbn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """out[t] = a[t] @ b[g] with the scales, for one tile of the rows of one group, as ``_grouped_gemm_kernel`` finds it."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    group, row, end = _rows_of_group(offs_ptr, pid_m, T, G, BLOCK_M, BLOCK_G)
    if group < G:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        rows, cols, matrix = offs_m.to(tl.int64), (offs_n % N).to(tl.int64), group.to(tl.int64)
        inside_m = (offs_m >= 0) & (offs_m < end)
        acc = _two_levels(
            a_ptr + rows[:, None] * stride_am + offs_k[None, :] * stride_ak,
            b_ptr + matrix * stride_bg + offs_k[:, None] * stride_bk + cols[None, :] * stride_bn,
            row,
            0,
            stride_ak,
            stride_bk,
            scale_a_ptr + rows * stride_sa,
            scale_b_ptr + matrix * stride_sbg + cols * stride_sbn,
            0,
            0,
            inside_m,
            K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            False,
            EVEN_K,
            False,
        )
        out_ptrs = out_ptr + rows[:, None] * N + offs_n.to(tl.int64)[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside_m[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["T"])
def _scaled_grouped_gemm_over_k_kernel(
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
    offs_ptr,
    out_ptr,
    T,
    M,
    N,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_sag,
    stride_sam,
    stride_sbg,
    stride_sbn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[g] = a[:, start:end] @ b[start:end] with the scales of g, for one tile of one group; blocks count from ``start``."""
    group = tl.program_id(1).to(tl.int64)
    end = tl.maximum(tl.minimum(tl.load(offs_ptr + group), T), 0)
    start = tl.maximum(tl.minimum(tl.load(offs_ptr + group - 1, mask=group > 0, other=0), T), 0)
    pid_m, pid_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = start.to(tl.int64) + tl.arange(0, BLOCK_K)
    rows, cols = offs_m.to(tl.int64), (offs_n % N).to(tl.int64)
    acc = _two_levels(
        a_ptr + rows[:, None] * stride_am + first[None, :] * stride_ak,
        b_ptr + first[:, None] * stride_bk + cols[None, :] * stride_bn,
        0,
        0,
        stride_ak,
        stride_bk,
        scale_a_ptr + group * stride_sag + rows * stride_sam,
        scale_b_ptr + group * stride_sbg + cols * stride_sbn,
        0,
        0,
        offs_m < M,
        end - start,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        False,
        False,
        False,
    )
    out_ptrs = out_ptr + (group * M + rows)[:, None] * N + offs_n.to(tl.int64)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def scaled_gemm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """``reference.scaled_gemm`` on the GPU."""
    described = [describe(x) for x in (a, b, scale_a, scale_b)]
    return _plan_scaled_gemm(*described, describe(bias), out_dtype)(a, b, scale_a, scale_b, bias)


@plan
def _plan_scaled_gemm(
    a: Description,
    b: Description,
    scale_a: Description,
    scale_b: Description,
    bias: Description | None,
    out_dtype: torch.dtype,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    shape = (*a.shape[:-1], b.shape[-1])
    batch, (M, K), N = shape[0] if len(shape) == 3 else 1, a.shape[-2:], b.shape[-1]
    if 0 in shape:
        return lambda a, *_: a.new_empty(shape, dtype=out_dtype)
    if batch > LONGEST_AXIS:
        raise ValueError(f"scaled_gemm takes up to {LONGEST_AXIS} products at once, not {batch}.")
    _check_sizes("scaled_gemm", a, b)
    groups = scale_a.shape[-1]
    strides_of_rows = _batched(a.shape, a.strides)[1:], _batched(b.shape, b.strides)[:0:-1]
    fits_tma = device_of(a.device).has_tma and batch == 1 and min(M, K) >= 16 and a.is_aligned and b.is_aligned
    fits_tma = fits_tma and all(within == 1 and row % 16 == 0 and row >= K for row, within in strides_of_rows)
    tile = scaled_tile(M, N, a.device, fits_tma)
    strides = [stride for x in (a, b, scale_a, scale_b) for stride in _batched(x.shape, x.strides)]
    arguments = (M, N, K, *strides, 0 if bias is None else _strides(bias)[0], *tile[:3], GROUP_M)
    arguments += (1 if scale_b.shape[-1] == N else SCALED_BLOCK, groups != 1, K % tile.block_k == 0, bias is not None, tile.tma)
    grid = ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n), batch, 1
    launch = _launch(_scaled_gemm_kernel, grid, arguments, tile)

    descriptors = [
        ([rows, K], [strides[0], 1], [block, tile.block_k])
        for rows, strides, block in zip((M, N), strides_of_rows, tile[:2], strict=True)
    ]

    def call(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
        out = a.new_empty(shape, dtype=out_dtype)
        operands = [TensorDescriptor(x, *how) for x, how in zip((a, b), descriptors, strict=True)] if tile.tma else (a, b)
        with on_device(a):
            launch(*operands, scale_a, scale_b, bias, out)
        return out

    return call


def scaled_grouped_gemm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.scaled_grouped_gemm`` on the GPU. ``offs`` stays there: nothing waits for it."""
    tensors = a, b, scale_a, scale_b, offs.contiguous()
    return _plan_scaled_grouped_gemm(*[describe(x) for x in tensors], out_dtype)(*tensors)


@plan
def _plan_scaled_grouped_gemm(
    a: Description, b: Description, scale_a: Description, scale_b: Description, offs: Description, out_dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    (T, K), (G, _, N) = a.shape, b.shape
    if 0 in (T, N, G):
        return lambda a, *_: a.new_zeros((T, N), dtype=out_dtype)
    _check_sizes("scaled_grouped_gemm", a, b)
    tile = scaled_tile(ceil_div(T, G), N, a.device)
    strides = [stride for x in (a, b, scale_a, scale_b) for stride in _strides(x)]
    arguments = (T, G, N, K, *strides, *tile[:3], next_power_of_2(G), K % tile.block_k == 0)
    programs = (ceil_div(T, tile.block_m) + G) * ceil_div(N, tile.block_n)
    launch = _launch(_scaled_grouped_gemm_kernel, (programs, 1, 1), arguments, tile)
    return _with_result(launch, (T, N), out_dtype)


def scaled_grouped_gemm_over_k(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """``reference.scaled_grouped_gemm_over_k`` on the GPU. ``offs`` stays there: nothing waits for it."""
    tensors = a, b, scale_a, scale_b, offs.contiguous()
    return _plan_scaled_grouped_gemm_over_k(*[describe(x) for x in tensors], out_dtype)(*tensors)


@plan
def _plan_scaled_grouped_gemm_over_k(
    a: Description, b: Description, scale_a: Description, scale_b: Description, offs: Description, out_dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    (M, T), N, G = a.shape, b.shape[1], offs.shape[0]
    if 0 in (M, N, G):
        return lambda a, *_: a.new_zeros((G, M, N), dtype=out_dtype)
    if G > LONGEST_AXIS:
        raise ValueError(f"scaled_grouped_gemm_over_k takes up to {LONGEST_AXIS} groups, not {G}.")
    _check_sizes("scaled_grouped_gemm_over_k", a, b)
    tile = scaled_tile(M, N, a.device)
    strides = [stride for x in (a, b, scale_a, scale_b) for stride in _strides(x)]
    arguments = (T, M, N, *strides, *tile[:3], GROUP_M)
    grid = ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n), G, 1
    launch = _launch(_scaled_grouped_gemm_over_k_kernel, grid, arguments, tile)
    return _with_result(launch, (G, M, N), out_dtype)


def _with_result(
    launch: Launch, shape: tuple[int, ...], out_dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The launch of five tensors and a result, which is 0 where no group is."""

    def call(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor) -> Tensor:
        out = a.new_zeros(shape, dtype=out_dtype)
        with on_device(a):
            launch(a, b, scale_a, scale_b, offs, out)
        return out

    return call


def _strides(x: Description) -> tuple[int, ...]:
    """0 where the size is 1, as torch leaves anything there."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.strides, strict=True))


def _check_sizes(name: str, a: Description, b: Description) -> None:
    """What int32 has to count: rows, columns, terms and programs."""
    programs = ceil_div(a.shape[-2], 64) * ceil_div(b.shape[-1], 128)
    if max(*a.shape, *b.shape, programs) > INT32_END - MARGIN:
        sizes = f"{list(a.shape)} by {list(b.shape)}"
        raise ValueError(f"{name} takes fewer than {INT32_END - MARGIN} rows, columns and terms, not {sizes}.")
