"""``convolution``: products of the values under the kernel, which are read where they lie (an implicit GEMM)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import Launch
from ..plans import Description, describe, on_device, plan
from ..tiles import accumulator, ceil_div, convolution_run, convolution_tile, device_of, pointwise_tile
from .matmul import INT32_END, LONGEST_AXIS, MARGIN, _launch, gemm, plan_gemm

FEW_CHANNELS = 16
"""So few of a group are read where they lie; more are brought side by side first, in the order of ``channels_last``."""


@triton.jit(do_not_specialize=["M"])
def _convolution_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr,
    M, N, C, H, W, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wn, stride_wc, stride_wr, stride_ws,
    stride_on, stride_oc, stride_op, stride_oq,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, o, p, q] = bias[o] + sum over r, s, c of x[n, c, p * stride + r * dilation - pad, ...] * w[o, c, r, s].

    One tile of the M = batch * P * Q pixels and of the N output channels of a group. Order: one accumulator, k ascending in
    blocks of BLOCK_K, where k = (r * S + s) * C + c, as in ``_gemm_kernel`` for rows that are unfolded that way; then the bias;
    then one cast. Where a tap is outside of the image there are zeros, as there are after K. CHANNELS: C, where it is no
    multiple of BLOCK_K, so that a block may hold several taps; else 0. PIXELS_LAST: the result lies as [n, o, p, q], and the
    tile is transposed.
    """
    group = tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    image = offs_m // (P * Q)
    pixel = offs_m % (P * Q)
    p, q = pixel // Q, pixel % Q
    top, left = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W
    inside_m = offs_m < M
    x_ptr += group.to(tl.int64) * C * stride_xc
    x_rows = x_ptr + image.to(tl.int64) * stride_xn + top.to(tl.int64) * stride_xh + left.to(tl.int64) * stride_xw
    cols = (group * N + offs_n % N).to(tl.int64)
    w_rows = w_ptr + cols * stride_wn
    if PIXELS_LAST:
        acc = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for start in range(0, R * S * C, BLOCK_K):
        if CHANNELS:
            k = start + offs_k
            tap, c = k // CHANNELS, k % CHANNELS
            r, s = tap // S, tap % S
            inside_k = k < R * S * CHANNELS
            h, w = top[:, None] + (r * DILATION_H)[None, :], left[:, None] + (s * DILATION_W)[None, :]
            inside = inside_m[:, None] & inside_k[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_cols = c * stride_xc + r * DILATION_H * stride_xh + s * DILATION_W * stride_xw
            w_cols = c * stride_wc + r * stride_wr + s * stride_ws
            weights = tl.load(w_rows[:, None] + w_cols[None, :], mask=inside_k[None, :], other=0.0)
        else:
            tap, c = start // C, start % C
            r, s = tap // S, tap % S
            h, w = top + r * DILATION_H, left + s * DILATION_W
            inside = (inside_m & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            x_cols = (c + offs_k) * stride_xc + (r * DILATION_H * stride_xh + s * DILATION_W * stride_xw)
            w_cols = (c + offs_k) * stride_wc + (r * stride_wr + s * stride_ws)
            weights = tl.load(w_rows[:, None] + w_cols[None, :])
        values = tl.load(x_rows[:, None] + x_cols[None, :], mask=inside, other=0.0)
        if PIXELS_LAST:
            acc = tl.dot(weights, tl.trans(values), acc, input_precision="ieee", out_dtype=ACC)
        else:
            acc = tl.dot(values, tl.trans(weights), acc, input_precision="ieee", out_dtype=ACC)
    channels = group * N + offs_n
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=offs_n < N, other=0.0).to(ACC)
        acc += bias[:, None] if PIXELS_LAST else bias[None, :]
    rows = image.to(tl.int64) * stride_on + p.to(tl.int64) * stride_op + q.to(tl.int64) * stride_oq
    columns = channels.to(tl.int64) * stride_oc
    result, inside_n = acc.to(out_ptr.dtype.element_ty), offs_n < N
    if PIXELS_LAST:
        tl.store(out_ptr + rows[None, :] + columns[:, None], result, mask=inside_m[None, :] & inside_n[:, None])
    else:
        tl.store(out_ptr + rows[:, None] + columns[None, :], result, mask=inside_m[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["batch"])
def _convolution_tma_kernel(
    x_desc, w_desc, bias_ptr, out_ptr,
    batch, N, C, ALL_CHANNELS, P, Q,
    stride_on, stride_op, stride_oq,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, R: tl.constexpr, S: tl.constexpr, HAS_BIAS: tl.constexpr,
    OF_IMAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What ``_convolution_kernel`` computes, in its order, of images whose channels lie side by side.

    A tile has a run of BLOCK_M pixels: of one place in so many images (OF_IMAGES), or of one row of an image. So a tap's values
    are a run, too, for which the descriptor reads zeros outside of the image. x_desc: [batch, H / STRIDE_H, STRIDE_H,
    W / STRIDE_W, STRIDE_W * ALL_CHANNELS], as the values of a tap are STRIDE_W apart, or with batch behind W; w_desc:
    [channels, R * S * C]. Fewer than 64 pixels are the columns of the tile, and the channels its rows, of which an instruction
    has 64.

    A box of several dims would be reshaped, and there Triton (3.6 to 3.9) lacks the buffer for a load that an asynchronous
    product still reads: other bits now and then. A run is no box, as Triton drops leading dims of 1.
    """
    ROWS_ARE_CHANNELS: tl.constexpr = BLOCK_M < 64
    group = tl.program_id(2)
    run = tl.program_id(0)
    if OF_IMAGES:
        runs = tl.cdiv(batch, BLOCK_M)
        n, pixel = run % runs * BLOCK_M, run // runs
        p, q = pixel // Q, pixel % Q
    else:
        runs = tl.cdiv(Q, BLOCK_M)
        p, q = run // runs % P, run % runs * BLOCK_M
        n = run // runs // P
    col = tl.program_id(1) * BLOCK_N
    if ROWS_ARE_CHANNELS:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    r, s, c = 0, 0, 0
    for start in range(0, R * S * C, BLOCK_K):
        # PAD * STRIDE is a multiple of STRIDE that makes them positive, as the remainder of a negative number is no phase.
        h = r * DILATION_H - PAD_H + PAD_H * STRIDE_H
        w = s * DILATION_W - PAD_W + PAD_W * STRIDE_W
        row, column = p + h // STRIDE_H - PAD_H, q + w // STRIDE_W - PAD_W
        channel = w % STRIDE_W * ALL_CHANNELS + group * C + c
        if OF_IMAGES:
            values = x_desc.load([row, h % STRIDE_H, column, n, channel])
        else:
            values = x_desc.load([n, row, h % STRIDE_H, column, channel])
        values = tl.reshape(values, [BLOCK_M, BLOCK_K])
        weights = w_desc.load([group * N + col, start])
        if ROWS_ARE_CHANNELS:
            acc = tl.dot(weights, tl.trans(values), acc, input_precision="ieee", out_dtype=tl.float32)
        else:
            acc = tl.dot(values, tl.trans(weights), acc, input_precision="ieee", out_dtype=tl.float32)
        # Counted on, as divisions by C would take as long as the products.
        c += BLOCK_K
        next_tap = c == C
        c = tl.where(next_tap, 0, c)
        s += next_tap.to(tl.int32)
        next_row = s == S
        s = tl.where(next_row, 0, s)
        r += next_row.to(tl.int32)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_N)
    channels, inside_n = group * N + offs_n, offs_n < N
    rows = n.to(tl.int64) * stride_on + p.to(tl.int64) * stride_op + q.to(tl.int64) * stride_oq
    if OF_IMAGES:
        rows += offs_m.to(tl.int64) * stride_on
        inside_m = n + offs_m < batch
    else:
        rows += offs_m * stride_oq
        inside_m = q + offs_m < Q
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=inside_n, other=0.0).to(tl.float32)
        acc += bias[:, None] if ROWS_ARE_CHANNELS else bias[None, :]
    result = acc.to(out_ptr.dtype.element_ty)
    if ROWS_ARE_CHANNELS:
        tl.store(out_ptr + channels[:, None] + rows[None, :], result, mask=inside_n[:, None] & inside_m[None, :])
    else:
        tl.store(out_ptr + rows[:, None] + channels[None, :], result, mask=inside_m[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["batch"])
def _pointwise_tma_kernel(
    w_desc, x_desc, bias_ptr, out_ptr, batch, N, C, PQ,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n] = w @ x[n] + bias, of images whose pixels lie side by side: C ascending, in one accumulator, as in ``gemm``.

    w_desc: [N, C]; x_desc: [batch * C, PQ]. A tile has BLOCK_M channels of BLOCK_N pixels of an image.
    """
    image = tl.program_id(2)
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        values = x_desc.load([image * C + start, col])
        acc = tl.dot(w_desc.load([row, start]), values, acc, input_precision="ieee", out_dtype=tl.float32)
    channels, pixels = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channels, mask=channels < N, other=0.0).to(tl.float32)[:, None]
    rows = (image.to(tl.int64) * N + channels) * PQ
    inside = (channels < N)[:, None] & (pixels < PQ)[None, :]
    tl.store(out_ptr + rows[:, None] + pixels[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _transpose_kernel(x_ptr, out_ptr, ROWS, COLS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[b, c, r] = x[b, r, c], of contiguous matrices."""
    tiles_r, tiles_c = tl.cdiv(ROWS, BLOCK_R), tl.cdiv(COLS, BLOCK_C)
    tile = tl.program_id(0) % (tiles_r * tiles_c)
    matrix = (tl.program_id(0) // (tiles_r * tiles_c)).to(tl.int64) * ROWS * COLS
    rows = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tile // tiles_r * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < ROWS)[:, None] & (cols < COLS)[None, :]
    x = tl.load(x_ptr + matrix + rows[:, None].to(tl.int64) * COLS + cols[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + matrix + cols[:, None].to(tl.int64) * ROWS + rows[None, :], tl.trans(x), mask=tl.trans(inside))


class Taps(NamedTuple):
    """Where a kernel of [R, S] is laid on an image: two numbers each, of rows and of columns."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def pixels(self, sizes: tuple[int, ...], taps: tuple[int, ...]) -> tuple[int, ...]:
        """The size of the result."""
        every = zip(sizes, taps, self.stride, self.padding, self.dilation, strict=True)
        return tuple([(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in every])

    def share_no_value(self, taps: tuple[int, ...]) -> bool:
        """Whether all values, but for some at the ends, are under one tap of one pixel."""
        return self.padding == (0, 0) and self.stride == tuple(taps) and (self.dilation == (1, 1) or tuple(taps) == (1, 1))


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``reference.convolution`` on the GPU."""
    taps = Taps(tuple(stride), tuple(padding), tuple(dilation))
    sizes = (x.shape[0], weight.shape[0], *taps.pixels(x.shape[2:], weight.shape[2:]))
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    if 0 in sizes:
        return x.new_empty(sizes)
    if taps.share_no_value(weight.shape[2:]) and groups == 1:
        return _product(x, weight, bias, sizes, channels_last)
    if sizes[0] > 1 and sizes[0] * sizes[2] * sizes[3] >= INT32_END - MARGIN:  # the same bits by halves of the batch
        halves = [convolution(some, weight, bias, stride, padding, dilation, groups) for some in x.chunk(2)]
        return torch.cat(halves).to(memory_format=_FORMATS[channels_last])
    has_few = weight.shape[1] < FEW_CHANNELS
    if not has_few:
        x, weight = with_channels_last(x), with_channels_last(weight)
    out_format = _FORMATS[channels_last or not has_few]
    out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=out_format)
    with on_device(x):
        _plan(describe(x), describe(weight), describe(out), bias is not None, taps, groups)(x, weight, bias, out)
    return out if channels_last else with_channels_first(out)


def with_channels_last(x: Tensor) -> Tensor:
    """x, or a copy, whose channels lie side by side: [N, C, H, W]."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    if not x.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    _transpose(x, out, x.shape[0], x.shape[1], x.shape[2] * x.shape[3])
    return out


def with_channels_first(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it: [N, C, H, W], contiguous or with its channels side by side."""
    if x.is_contiguous():
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _transpose(x, out, x.shape[0], x.shape[2] * x.shape[3], x.shape[1])
    return out


def _transpose(x: Tensor, out: Tensor, batch: int, rows: int, cols: int) -> None:
    with on_device(x):
        _plan_transpose(describe(x), batch, rows, cols)(x, out)


@plan
def _plan_transpose(x: Description, batch: int, rows: int, cols: int) -> Callable[[Tensor, Tensor], None]:
    """Of contiguous matrices."""
    block = 64 if x.dtype.itemsize <= 4 else 32
    programs = ceil_div(rows, block) * ceil_div(cols, block) * batch
    return Launch(_transpose_kernel, (programs, 1, 1), (rows, cols, block, block), num_warps=4, enable_fp_fusion=False)


_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...], channels_last: bool) -> Tensor:
    """Where each value is under one tap alone: rows of the same values in the same order, which are the input itself."""
    N, channels, P, Q = sizes
    R, S = weight.shape[2:]
    kernel = weight.permute(0, 2, 3, 1).reshape(channels, -1)
    x = x[:, :, : P * R, : Q * S]
    if R * S == 1 and not channels_last and (P * Q) % 8 == 0:
        x = x.contiguous()
        return _plan_pointwise(describe(x), describe(kernel), describe(bias))(x, kernel, bias)
    if R * S == 1:
        x = with_channels_last(x)
    rows = x.unflatten(3, (Q, S)).unflatten(2, (P, R)).permute(0, 2, 4, 3, 5, 1).reshape(N * P * Q, -1)
    offset = None if bias is None else bias.expand(N * P * Q, channels)
    out = gemm(rows, kernel.t(), offset).view(N, P, Q, channels).permute(0, 3, 1, 2)
    return out if channels_last else with_channels_first(out)


@plan
def _plan_pointwise(
    x: Description, kernel: Description, bias: Description | None
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """kernel @ x of each image, for contiguous images whose pixels are a multiple of 8: (x, kernel, bias) -> [N, O, P, Q]."""
    (N, C, P, Q), channels = x.shape, kernel.shape[0]
    shape = N, channels, P, Q
    fits_tma = x.dtype.itemsize == 2 and device_of(x.device).has_tma and C % 32 == 0 and x.is_aligned and kernel.is_aligned
    if not fits_tma or N > LONGEST_AXIS or max(N * C, math.prod(shape[1:])) >= INT32_END - MARGIN:
        of_kernel = kernel._replace(shape=(N, *kernel.shape), strides=(0, *kernel.strides))
        of_x = x._replace(shape=(N, C, P * Q), strides=(C * P * Q, P * Q, 1))
        of_bias = None if bias is None else bias._replace(shape=(N, channels, P * Q), strides=(0, *bias.strides, 0))
        multiply = plan_gemm(of_kernel, of_x, of_bias, shape)
        return lambda x, kernel, bias: multiply(kernel, x, bias, 1.0, 1.0)
    tile = pointwise_tile(N, P * Q, channels, C, x.device)
    of_kernel_rows = [channels, C], [C, 1], [tile.block_m, tile.block_k]
    of_pixels = [N * C, P * Q], [P * Q, 1], [tile.block_k, tile.block_n]
    grid = ceil_div(channels, tile.block_m), ceil_div(P * Q, tile.block_n), N
    launch = _launch(_pointwise_tma_kernel, grid, (N, channels, C, P * Q, bias is not None, *tile[:3]), tile)

    def call(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty(shape)
        operands = TensorDescriptor(kernel, *of_kernel_rows), TensorDescriptor(x, *of_pixels)
        with on_device(x):
            launch(*operands, out if bias is None else bias, out)
        return out

    return call


@plan
def _plan(
    x: Description, weight: Description, out: Description, has_bias: bool, taps: Taps, groups: int
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], None]:
    (N, _, H, W), (channels, C, R, S), (_, _, P, Q) = x.shape, weight.shape, out.shape
    reach = sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], x.strides[1:], strict=True))
    if max(reach, R * S * C, N * P * Q) >= INT32_END - MARGIN or groups > LONGEST_AXIS:
        raise ValueError(
            f"convolution takes images of fewer than {INT32_END - MARGIN} values, makes such ones, and has up to "
            f"{LONGEST_AXIS} groups: not {list(x.shape)} to {list(out.shape)} in {groups}"
        )
    if _fits_tma(x, weight, taps):
        return _with_runs(x, weight, out, has_bias, taps, groups)
    tile = convolution_tile(x.dtype, N * P * Q, channels // groups, groups, x.device)
    numbers = (N * P * Q, channels // groups, C, H, W, P, Q, *x.strides, *weight.strides, *out.strides)
    constants = (*taps.stride, *taps.padding, *taps.dilation, R, S, C if C % tile.block_k else 0)
    constants += (out.strides[3] == 1 and out.strides[1] != 1, has_bias, accumulator(x.dtype), *tile[:3])
    grid = ceil_div(N * P * Q, tile.block_m), ceil_div(channels // groups, tile.block_n), groups
    return _launch(_convolution_kernel, grid, (*numbers, *constants), tile)


def _fits_tma(x: Description, weight: Description, taps: Taps) -> bool:
    """Whether descriptors can describe the operands: 16 bits, channels side by side in whole blocks, whole steps."""
    whole = all(size % stride == 0 for size, stride in zip(x.shape[2:], taps.stride, strict=True))
    has_tma = x.dtype.itemsize == 2 and device_of(x.device).has_tma
    last = x.strides[1] == weight.strides[1] == 1
    return has_tma and whole and last and weight.shape[1] % 32 == 0 and x.is_aligned and weight.is_aligned


def _with_runs(
    x: Description, weight: Description, out: Description, has_bias: bool, taps: Taps, groups: int
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], None]:
    """``_convolution_tma_kernel`` for tensors like these."""
    (N, every, H, W), (channels, C, R, S), (_, _, P, Q) = x.shape, weight.shape, out.shape
    step_h, step_w = taps.stride
    tile, of_images = convolution_run(N, P, Q, channels // groups, C, groups, x.device)
    runs = P * Q * ceil_div(N, tile.block_m) if of_images else N * P * ceil_div(Q, tile.block_m)
    sizes = [N, H // step_h, step_h, W // step_w, step_w * every]
    strides = [H * W * every, step_h * W * every, W * every, step_w * every, 1]
    order = [1, 2, 3, 0, 4] if of_images else [0, 1, 2, 3, 4]
    of_x = [sizes[i] for i in order], [strides[i] for i in order], [1, 1, 1, tile.block_m, tile.block_k]
    of_weight = [channels, R * S * C], [R * S * C, 1], [tile.block_n, tile.block_k]
    numbers = (N, channels // groups, C, every, P, Q, out.strides[0], *out.strides[2:])
    constants = (*taps.stride, *taps.padding, *taps.dilation, R, S, has_bias, of_images, *tile[:3])
    grid = runs, ceil_div(channels // groups, tile.block_n), groups
    launch = _launch(_convolution_tma_kernel, grid, (*numbers, *constants), tile)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        launch(TensorDescriptor(x, *of_x), TensorDescriptor(weight, *of_weight), out if bias is None else bias, out)

    return call
