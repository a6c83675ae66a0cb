"""Matrix products: ``gemm``, ``grouped_gemm`` and ``grouped_gemm_over_k``.

Every element of a result is one chain of sums over K, ascending, in one accumulator (fp32; fp64 for fp64): the order is
the same for every tile, so the tile may follow M. There is no split-K and no atomic. Triton specialises the operands'
strides and pointers, for speed: they choose the width of loads into shared memory, and no order of sums. Not M.

Two kernels compute ``gemm``: one that loads through pointers, any strides, and from SM90 on one that loads and stores
through TMA descriptors, where the operands allow it. They are of one class: it changes no bit which one serves a call.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import Launch
from ..plans import Description, describe, on_device, plan
from ..tiles import GROUP_M, Tile, accumulator, ceil_div, device_of, gemm_tile, next_power_of_2, tiles_and_programs

INT32_END, MARGIN = 1 << 31, 1 << 9
"""What int32 cannot count any more, and more than the longest block."""

LONGEST_AXIS = 65_535
"""Programs on the second or the third axis of a grid: no more, says CUDA."""


@triton.jit
def _product(
    a_ptrs,
    b_ptrs,
    a_step,
    b_step,
    inside_m,
    K,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """sum over k of a[:, k] * b[k, :]: blocks of BLOCK_K, ascending, into one accumulator. After K there are zeros.

    Rows after the last one are zeros, too, and are not read: with one row, fifteen of sixteen.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    offs_k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        if EVEN_K and EVEN_M:
            a = tl.load(a_ptrs)
        elif EVEN_K:
            a = tl.load(a_ptrs, mask=inside_m[:, None], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=inside_m[:, None] & (offs_k[None, :] < K - start), other=0.0)
        if EVEN_K:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=offs_k[:, None] < K - start, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
        a_ptrs += a_step
        b_ptrs += b_step
    return acc


@triton.jit
def _tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Which block of rows and of columns a tile is: GROUP_M blocks of rows go column by column, to share operands in L2."""
    group = tile // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + within % group_m, within // group_m


@triton.jit
def _tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, TILES_IN_GRID: tl.constexpr):
    """Which matrix of the batch, block of rows and block of columns a program has.

    TILES_IN_GRID: they are its place on the grid's axes, and no division comes before the first load.
    """
    if TILES_IN_GRID:
        matrix, pid_m, pid_n = tl.program_id(2), tl.program_id(0), tl.program_id(1)
    else:
        tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        matrix = tl.program_id(0) // (tiles_m * tiles_n)
        pid_m, pid_n = _tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    return matrix, pid_m, pid_n


@triton.jit
def _scaled(
    acc, alpha, beta, bias_ptr, offs_m, offs_n, M, N, stride_biasm, stride_biasn, HAS_BIAS: tl.constexpr, ACC: tl.constexpr
):
    """alpha * acc + beta * bias: each product and the sum rounded on its own in ACC."""
    # Scalars are cast at once: what type a launcher hands them in must not choose the type of the arithmetic.
    acc = acc * tl.full([], alpha, ACC)
    if HAS_BIAS:
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        bias_ptrs = bias_ptr + offs_m.to(tl.int64)[:, None] * stride_biasm + offs_n.to(tl.int64)[None, :] * stride_biasn
        acc = acc + tl.load(bias_ptrs, mask=inside, other=0.0).to(ACC) * tl.full([], beta, ACC)
    return acc


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    alpha: tl.float64,
    beta: tl.float64,
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
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TILES_IN_GRID: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
):
    """out = alpha * (a @ b) + beta * bias, for one tile of one matrix of the batch.

    Order: the sum over k ascending (``_product``); then ``_scaled``, unless it IS_PLAIN: a product alone, whose
    multiplication by an alpha of 1 would take time and change no bit; then one cast. Columns after the edge read column 0
    and up again; they and rows after the edge are not stored.
    """
    matrix, pid_m, pid_n = _tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M, TILES_IN_GRID)
    matrix = matrix.to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    rows = offs_m.to(tl.int64)
    cols = (offs_n if EVEN_N else offs_n % N).to(tl.int64)
    acc = _product(
        a_ptr + matrix * stride_ab + rows[:, None] * stride_am + offs_k[None, :] * stride_ak,
        b_ptr + matrix * stride_bb + offs_k[:, None] * stride_bk + cols[None, :] * stride_bn,
        tl.full([], BLOCK_K, tl.int64) * stride_ak,
        tl.full([], BLOCK_K, tl.int64) * stride_bk,
        offs_m < M,
        K,
        ACC,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_M,
        EVEN_K,
    )
    bias_ptr += matrix * stride_biasb
    if not IS_PLAIN:
        acc = _scaled(acc, alpha, beta, bias_ptr, offs_m, offs_n, M, N, stride_biasm, stride_biasn, HAS_BIAS, ACC)
    out_ptrs = out_ptr + matrix * M * N + offs_m.to(tl.int64)[:, None] * N + offs_n.to(tl.int64)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _load_columns(b_desc, col, start, B_IS_TRANSPOSED: tl.constexpr):
    if B_IS_TRANSPOSED:
        b = b_desc.load([col, start]).T
    else:
        b = b_desc.load([start, col])
    return b


@triton.jit
def _store_columns(
    out_desc,
    acc,
    row,
    col,
    alpha,
    beta,
    bias_ptr,
    M,
    N,
    stride_biasm,
    stride_biasn,
    HAS_BIAS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
):
    offs_m = row + tl.arange(0, acc.shape[0])
    offs_n = col + tl.arange(0, acc.shape[1])
    if not IS_PLAIN:
        acc = _scaled(acc, alpha, beta, bias_ptr, offs_m, offs_n, M, N, stride_biasm, stride_biasn, HAS_BIAS, tl.float32)
    out_desc.store([row, col], acc.to(out_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def _gemm_tma_kernel(
    a_desc,
    b_desc,
    out_desc,
    narrow_b_desc,
    narrow_out_desc,
    bias_ptr,
    alpha: tl.float64,
    beta: tl.float64,
    M,
    N,
    K,
    stride_biasm,
    stride_biasn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NARROW_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORES: tl.constexpr,
    B_IS_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILES_IN_GRID: tl.constexpr,
    IS_PLAIN: tl.constexpr,
):
    """out = alpha * (a @ b) + beta * bias: TILES_IN_GRID, one tile a program; else every num_programs-th, one by one.

    The order of ``_gemm_kernel``. b comes as [K, N], or transposed as [N, K]. After the edges the descriptors read
    zeros and store nothing. A tile has BLOCK_N columns, stored in STORES blocks, left to right, which needs less shared
    memory; and NARROW_N more, since no single block of Triton's has a width that is no power of two.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N + NARROW_N)
    if TILES_IN_GRID:
        first, end, step = 0, 1, 1
    else:
        first, end, step = tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)
    for tile in tl.range(first, end, step, flatten=not TILES_IN_GRID):
        if TILES_IN_GRID:
            pid_m, pid_n = tl.program_id(0), tl.program_id(1)
        else:
            pid_m, pid_n = _tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * (BLOCK_N + NARROW_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if NARROW_N > 0:
            narrow = tl.zeros([BLOCK_M, NARROW_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            a = a_desc.load([row, start])
            b = _load_columns(b_desc, col, start, B_IS_TRANSPOSED)
            acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)
            if NARROW_N > 0:
                b = _load_columns(narrow_b_desc, col + BLOCK_N, start, B_IS_TRANSPOSED)
                narrow = tl.dot(a, b, narrow, input_precision="ieee", out_dtype=tl.float32)
        how = (alpha, beta, bias_ptr, M, N, stride_biasm, stride_biasn, HAS_BIAS, IS_PLAIN)
        if STORES == 1:
            _store_columns(out_desc, acc, row, col, *how)
        else:
            left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
            _store_columns(out_desc, left, row, col, *how)
            _store_columns(out_desc, right, row, col + BLOCK_N // 2, *how)
        if NARROW_N > 0:
            _store_columns(narrow_out_desc, narrow, row, col + BLOCK_N, *how)


def gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``reference.gemm`` on the GPU."""
    bias = None if beta == 0 else bias
    return plan_gemm(describe(a), describe(b), describe(bias), out_dtype=out_dtype)(a, b, bias, alpha, beta)


@plan
def plan_gemm(
    a: Description,
    b: Description,
    bias: Description | None,
    shape: tuple[int, ...] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Callable[[Tensor, Tensor, Tensor | None, float, float], Tensor]:
    """``gemm`` of tensors at the addresses of matrices like these: (a, b, bias, alpha, beta) -> the product.

    shape: of the result, if it is not [B, M, N]. A bias is read, so with beta = 0 it must be None. out_dtype: of the
    result, if it is not a's.
    """
    shape = (*a.shape[:-1], b.shape[-1]) if shape is None else shape
    out_dtype = a.dtype if out_dtype is None else out_dtype
    if 0 in shape:
        return lambda a, *_: a.new_empty(shape, dtype=out_dtype)
    multiply = _planned(a, b, bias, out_dtype)

    def call(a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float) -> Tensor:
        out = a.new_empty(shape, dtype=out_dtype)
        with on_device(a):
            multiply(a, b, bias, out, alpha, beta)
        return out

    return call


def _planned(
    a: Description, b: Description, bias: Description | None, out_dtype: torch.dtype
) -> "_Product | _TmaProduct | _LongProduct":
    sizes = Sizes.of(a.shape, a.strides, b.shape, b.strides, None if bias is None else bias.strides)
    if sizes.are_long():
        return _LongProduct(sizes)
    # A wider result needs more shared memory than the tuned tiles leave to the store.
    has_tma = device_of(a.device).has_tma and a.dtype.itemsize == out_dtype.itemsize == 2
    fits = has_tma and a.is_aligned and b.is_aligned and sizes.fit_tma()
    bias_blocks = 0
    if bias is not None and sizes.bias is not None:
        bias_blocks = 1 if sizes.bias[2] == 1 and sizes.bias[1] % 8 == 0 and bias.is_aligned else 2
    tile = gemm_tile(a.dtype, sizes.M, sizes.N, sizes.K, sizes.batch, a.device, fits, bias_blocks)
    return product(sizes, a.dtype, a.device, tile)


def product(sizes: "Sizes", dtype: torch.dtype, device: torch.device, tile: Tile) -> "_Product":
    """A callable (a, b, bias, out, alpha, beta) that computes products of these sizes with this tile."""
    return (_TmaProduct if tile.tma else _Product)(sizes, dtype, device, tile)


class Sizes(NamedTuple):
    batch: int
    M: int
    N: int
    K: int
    a: tuple[int, int, int]
    b: tuple[int, int, int]
    """Strides by batch, row and column; 0 where the size is 1, as torch leaves anything there."""
    bias: tuple[int, int, int] | None

    @classmethod
    def of(cls, shape_a, strides_a, shape_b, strides_b, strides_bias=None) -> "Sizes":
        """From the operands' shapes and strides, with a batch dim or without."""
        M, K, N = shape_a[-2], shape_a[-1], shape_b[-1]
        bias = None if strides_bias is None else _batched((*shape_a[:-1], N), strides_bias)
        batch = shape_a[0] if len(shape_a) == 3 else 1
        return cls(batch, M, N, K, _batched(shape_a, strides_a), _batched(shape_b, strides_b), bias)

    def fit_tma(self) -> bool:
        """Whether descriptors can describe the operands: one matrix, contiguous rows, each at a multiple of 16 bytes.

        The operands' addresses must be multiples of 16 bytes as well.
        """
        if self.batch != 1 or min(self.M, self.K) < 8 or self.N % 8:
            return False
        rows_of_b = _has_tma_rows(*self.b[1:], self.N) or _has_tma_rows(*self.b[:0:-1], self.K)
        return _has_tma_rows(*self.a[1:], self.K) and rows_of_b

    def are_long(self) -> bool:
        """Whether rows, columns, terms or programs cannot be counted in int32, up to the end of the last block."""
        most_programs = self.batch * ceil_div(self.M, 16) * ceil_div(self.N, 16)
        return max(self.M, self.N, most_programs) > INT32_END - MARGIN or INT32_END - MARGIN < self.K < INT32_END


def _batched(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    strides = tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
    return strides if len(strides) == 3 else (0, *strides)


def _has_tma_rows(row_stride: int, col_stride: int, n_cols: int) -> bool:
    return col_stride == 1 and row_stride % 8 == 0 and row_stride >= n_cols


class _Product:
    """``_gemm_kernel`` for operands of these sizes."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device, tile: Tile) -> None:
        batch, M, N, K, strides_a, strides_b, strides_bias = sizes
        grid = ceil_div(M, tile.block_m), ceil_div(N, tile.block_n), batch
        # Then the order of programs is that of ``_tile_of``.
        tiles_in_grid = grid[0] <= GROUP_M and max(grid) <= LONGEST_AXIS
        arguments = (M, N, K, *strides_a, *strides_b, *(strides_bias or (0, 0, 0)), accumulator(dtype), *tile[:3])
        arguments += (GROUP_M, tiles_in_grid, *(size % block == 0 for size, block in zip((M, N, K), tile[:3], strict=True)))
        arguments += (strides_bias is not None,)
        grid = grid if tiles_in_grid else (math.prod(grid), 1, 1)
        self._scaled, self._plain = (_launch(_gemm_kernel, grid, (*arguments, plain), tile) for plain in (False, True))

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, alpha: float, beta: float) -> None:
        launch = self._plain if bias is None and alpha == 1.0 else self._scaled
        launch(a, b, bias, out, numbers=(alpha, beta))


class _LongProduct:
    """The same bits by halves of the longest dim, or with zeros after K, which int64 counts then."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, alpha: float, beta: float) -> None:
        batch, M, N, K, strides_a, strides_b, strides_bias = self._sizes
        a, b = a.as_strided((batch, M, K), strides_a), b.as_strided((batch, K, N), strides_b)
        bias = None if bias is None else bias.as_strided((batch, M, N), strides_bias)
        out = out.view(batch, M, N)
        if INT32_END - MARGIN < K < INT32_END:
            behind = INT32_END - K
            a, b = nn.functional.pad(a, (0, behind)), nn.functional.pad(b, (0, 0, 0, behind))
            out.copy_(gemm(a, b, bias, alpha, beta, out.dtype))
            return
        dim = max(range(3), key=out.shape.__getitem__)

        def halves(x: Tensor | None, is_split: bool = True) -> tuple[Tensor | None, ...]:
            return x.chunk(2, dim) if is_split and x is not None else (x, x)

        parts = zip(halves(a, dim != 2), halves(b, dim != 1), halves(bias), halves(out), strict=True)
        for some_a, some_b, some_bias, some_out in parts:
            some_out.copy_(gemm(some_a, some_b, some_bias, alpha, beta, out.dtype))


_Descriptor = tuple[list[int], list[int], list[int]]
"""Shape, strides and block of a ``TensorDescriptor``."""


class _TmaProduct:
    """``_gemm_tma_kernel`` for operands of these sizes."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device, tile: Tile) -> None:
        _, M, N, K, strides_a, strides_b, strides_bias = sizes
        transposed = not _has_tma_rows(*strides_b[1:], N)
        wide, narrow = tile.parts_n
        stores = 2 if wide > 128 else 1

        def of_b(width: int) -> _Descriptor:  # b's rows are the ones that are contiguous
            if transposed:
                return [N, K], [strides_b[2], 1], [width, tile.block_k]
            return [K, N], [strides_b[1], 1], [tile.block_k, width]

        def of_out(width: int) -> _Descriptor:
            return [M, N], [N, 1], [tile.block_m, width]

        of_a = [M, K], [strides_a[1], 1], [tile.block_m, tile.block_k]
        beside = (of_b(narrow), of_out(narrow)) if narrow else (None, None)
        self._descriptors = of_a, of_b(wide), of_out(wide // stores), *beside
        tiles, programs = tiles_and_programs(tile, M, N, device)
        grid = ceil_div(M, tile.block_m), ceil_div(N, tile.block_n), 1
        tiles_in_grid = tiles == programs
        arguments = (M, N, K, *(strides_bias or (0, 0, 0))[1:], tile.block_m, wide, tile.block_k, narrow)
        arguments += (GROUP_M, stores, transposed, strides_bias is not None, tiles_in_grid)
        grid = grid if tiles_in_grid else (programs, 1, 1)
        self._scaled, self._plain = (_launch(_gemm_tma_kernel, grid, (*arguments, plain), tile) for plain in (False, True))
        # On a persistent grid Triton 3.6 stores a plain result without stmatrix, and the next tile's loads hide the scaling.
        if not tiles_in_grid:
            self._plain = self._scaled

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, alpha: float, beta: float) -> None:
        operands = zip((a, b, out, b, out), self._descriptors, strict=True)
        descriptors = [None if how is None else TensorDescriptor(x, *how) for x, how in operands]
        launch = self._plain if bias is None and alpha == 1.0 else self._scaled
        launch(*descriptors, out if bias is None else bias, numbers=(alpha, beta))


def _launch(kernel: JITFunction, grid: tuple[int, int, int], arguments: tuple[Any, ...], tile: Tile) -> Launch:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    return Launch(kernel, grid, arguments, **options)


@triton.jit
def _rows_of_group(offs_ptr, pid_m, T, G, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """The group of a tile of rows, its first row, and where the group ends. After the last tile the group is G."""
    groups = tl.arange(0, BLOCK_G)
    ends = tl.minimum(tl.load(offs_ptr + groups, mask=groups < G, other=0), T)
    starts = tl.minimum(tl.load(offs_ptr + groups - 1, mask=(groups > 0) & (groups < G), other=0), T)
    tiles = tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M)
    tiles_up_to = tl.cumsum(tiles, 0)
    group = tl.sum((tiles_up_to <= pid_m).to(tl.int32), 0)
    mine = groups == group
    row = tl.sum(tl.where(mine, starts + (pid_m - tiles_up_to + tiles) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return group, row, end


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

    The grid has as many programs as any offs can need row tiles, cdiv(T, BLOCK_M) + G. A program counts the tiles of
    the groups before it (in integers, exactly) to find its own; programs after the last tile have nothing to do.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n
    group, row, end = _rows_of_group(offs_ptr, pid_m, T, G, BLOCK_M, BLOCK_G)
    if group < G:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        rows = offs_m.to(tl.int64)
        cols = (offs_n % N).to(tl.int64)
        acc = _product(
            a_ptr + rows[:, None] * stride_am + offs_k[None, :] * stride_ak,
            b_ptr + group.to(tl.int64) * stride_bg + offs_k[:, None] * stride_bk + cols[None, :] * stride_bn,
            tl.full([], BLOCK_K, tl.int64) * stride_ak,
            tl.full([], BLOCK_K, tl.int64) * stride_bk,
            offs_m < end,
            K,
            ACC,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            False,
            EVEN_K,
        )
        out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n.to(tl.int64)[None, :]
        inside = (offs_m < end)[:, None] & (offs_n < N)[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_gemm(a: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """``reference.grouped_gemm`` on the GPU. ``offs`` stays there: nothing waits for it."""
    offs = offs.contiguous()
    return _plan_grouped_gemm(describe(a), describe(b), describe(offs), out_dtype or a.dtype)(a, b, offs)


@plan
def _plan_grouped_gemm(
    a: Description, b: Description, offs: Description, out_dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    shape_a, shape_b = a.shape, b.shape
    (T, K), (G, _, N) = shape_a, shape_b
    if 0 in (T, N, G):
        return lambda a, b, offs: a.new_zeros((T, N), dtype=out_dtype)
    if Sizes.of(shape_a, a.strides, shape_b[1:], b.strides[1:]).are_long():
        sizes = f"{list(shape_a)} by {list(shape_b)}"
        raise ValueError(f"grouped_gemm takes fewer than {INT32_END - MARGIN} rows, columns and terms, not {sizes}.")
    tile = gemm_tile(a.dtype, ceil_div(T, G), N, K, G, a.device)
    # 0 where the size is 1: torch leaves anything there, and it would only make Triton compile again.
    strides = [0 if n == 1 else stride for n, stride in zip((*shape_a, *shape_b), (*a.strides, *b.strides), strict=True)]
    arguments = (T, G, N, K, *strides, accumulator(a.dtype), *tile[:3], next_power_of_2(G), K % tile.block_k == 0)
    programs = (ceil_div(T, tile.block_m) + G) * ceil_div(N, tile.block_n)
    launch = _launch(_grouped_gemm_kernel, (programs, 1, 1), arguments, tile)

    def call(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        out = a.new_zeros((T, N), dtype=out_dtype)
        with on_device(a):
            launch(a, b, offs, out)
        return out

    return call


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["offs_ptr"])
def _grouped_gemm_over_k_kernel(
    a_ptr,
    b_ptr,
    offs_ptr,
    out_ptr,
    T,
    M,
    N,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[g] = a[:, start:end] @ b[start:end] for one tile of one group: k ascending from ``start``, in one accumulator.

    Only the last block of K is masked; after the group's end there are zeros. Columns and rows after the edges read the first
    ones again, and are not stored.
    """
    group = tl.program_id(1).to(tl.int64)
    end = tl.minimum(tl.load(offs_ptr + group), T)
    start = tl.minimum(tl.load(offs_ptr + group - 1, mask=group > 0, other=0), T)
    pid_m, pid_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    first = start.to(tl.int64) + offs_k
    a_ptrs = a_ptr + (offs_m % M).to(tl.int64)[:, None] * stride_am + first[None, :] * stride_ak
    b_ptrs = b_ptr + first[:, None] * stride_bk + (offs_n % N).to(tl.int64)[None, :] * stride_bn
    a_step, b_step = tl.full([], BLOCK_K, tl.int64) * stride_ak, tl.full([], BLOCK_K, tl.int64) * stride_bk
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    whole = tl.maximum(end - start, 0) // BLOCK_K
    for _ in range(0, whole):
        acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc, input_precision="ieee", out_dtype=ACC)
        a_ptrs += a_step
        b_ptrs += b_step
    left = end - start - whole * BLOCK_K
    if left > 0:
        a = tl.load(a_ptrs, mask=(offs_k < left)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(offs_k < left)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
    out_ptrs = out_ptr + (group * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def grouped_gemm_over_k(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """``reference.grouped_gemm_over_k`` on the GPU. ``offs`` stays there: nothing waits for it."""
    offs = offs.contiguous()
    return _plan_grouped_gemm_over_k(describe(a), describe(b), describe(offs))(a, b, offs)


@plan
def _plan_grouped_gemm_over_k(a: Description, b: Description, offs: Description) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    (M, T), N, G = a.shape, b.shape[1], offs.shape[0]
    if 0 in (M, N, G, T):
        return lambda a, b, offs: a.new_zeros((G, M, N))
    if Sizes.of(a.shape, a.strides, b.shape, b.strides).are_long() or G > LONGEST_AXIS:
        sizes = f"{list(a.shape)} by {list(b.shape)} in {G} groups"
        raise ValueError(
            f"grouped_gemm_over_k takes fewer than {INT32_END - MARGIN} rows, columns and terms and up to {LONGEST_AXIS} "
            f"groups, not {sizes}."
        )
    tile = gemm_tile(a.dtype, M, N, ceil_div(T, G), G, a.device)
    strides = [0 if n == 1 else stride for n, stride in zip((*a.shape, *b.shape), (*a.strides, *b.strides), strict=True)]
    arguments = (T, M, N, *strides, accumulator(a.dtype), *tile[:3], GROUP_M)
    grid = ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n), G, 1
    launch = _launch(_grouped_gemm_over_k_kernel, grid, arguments, tile)

    def call(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        out = a.new_empty((G, M, N))
        with on_device(a):
            launch(a, b, offs, out)
        return out

    return call
