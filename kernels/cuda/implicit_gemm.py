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
from ..tiles import Tile, accumulator, ceil_div, convolution_tile, device_of
from .matmul import INT32_END, LONGEST_AXIS, MARGIN, _launch, gemm

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
    batch, N, C, ALL_CHANNELS, P, Q, boxes_h, boxes_w,
    stride_on, stride_op, stride_oq,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, R: tl.constexpr, S: tl.constexpr, HAS_BIAS: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What ``_convolution_kernel`` computes, in its order, of images whose channels lie side by side.

    A tile has a box of BOX_H by BOX_W pixels of BOX_N images; a tap's values are a box of the input, for which the descriptor
    reads zeros outside of the image. x_desc: [batch, H / STRIDE_H, STRIDE_H, W / STRIDE_W, STRIDE_W * ALL_CHANNELS], so that
    the values of a tap, which are STRIDE_W apart, are a box, too; w_desc: [channels, R * S * C].
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    group = tl.program_id(2)
    box = tl.program_id(0)
    first_q = box % boxes_w * BOX_W
    first_p = box // boxes_w % boxes_h * BOX_H
    first_n = box // boxes_w // boxes_h * BOX_N
    col = tl.program_id(1) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    r, s, c = 0, 0, 0
    for start in range(0, R * S * C, BLOCK_K):
        # PAD * STRIDE is a multiple of STRIDE that makes them positive, as the remainder of a negative number is no phase.
        h = r * DILATION_H - PAD_H + PAD_H * STRIDE_H
        w = s * DILATION_W - PAD_W + PAD_W * STRIDE_W
        row, column = first_p + h // STRIDE_H - PAD_H, first_q + w // STRIDE_W - PAD_W
        channel = w % STRIDE_W * ALL_CHANNELS + group * C + c
        values = tl.reshape(x_desc.load([first_n, row, h % STRIDE_H, column, channel]), [BLOCK_M, BLOCK_K])
        weights = w_desc.load([group * N + col, start]).T
        acc = tl.dot(values, weights, acc, input_precision="ieee", out_dtype=tl.float32)
        # Counted on, as divisions by C would take as long as the products.
        c += BLOCK_K
        next_tap = c == C
        c = tl.where(next_tap, 0, c)
        s += next_tap.to(tl.int32)
        next_row = s == S
        s = tl.where(next_row, 0, s)
        r += next_row.to(tl.int32)
    offs_m = tl.arange(0, BLOCK_M)
    n = first_n + offs_m // (BOX_H * BOX_W)
    p = first_p + offs_m // BOX_W % BOX_H
    q = first_q + offs_m % BOX_W
    offs_n = col + tl.arange(0, BLOCK_N)
    channels = group * N + offs_n
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channels, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    rows = n.to(tl.int64) * stride_on + p.to(tl.int64) * stride_op + q.to(tl.int64) * stride_oq
    inside = ((n < batch) & (p < P) & (q < Q))[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptr + rows[:, None] + channels[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _transpose_kernel(x_ptr, out_ptr, ROWS, COLS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[b, c, r] = x[b, r, c], of contiguous matrices."""
    matrix = tl.program_id(2).to(tl.int64) * ROWS * COLS
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
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
    if sizes[0] * sizes[2] * sizes[3] >= INT32_END - MARGIN:  # the same bits by halves of the batch
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
    grid = ceil_div(rows, block), ceil_div(cols, block), batch
    if max(grid[1:]) > LONGEST_AXIS:
        return lambda x, out: out.as_strided((batch, cols, rows), (rows * cols, rows, 1)).copy_(
            x.as_strided((batch, rows, cols), (rows * cols, cols, 1)).mT
        )
    return Launch(_transpose_kernel, grid, (rows, cols, block, block), num_warps=4)


_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...], channels_last: bool) -> Tensor:
    """Where each value is under one tap alone: rows of the same values in the same order, which are the input itself."""
    N, channels, P, Q = sizes
    R, S = weight.shape[2:]
    kernel = weight.permute(0, 2, 3, 1).reshape(channels, -1)
    x = x[:, :, : P * R, : Q * S]
    if R * S == 1 and not channels_last:
        offset = None if bias is None else bias[:, None].expand(N, channels, P * Q)
        return gemm(kernel.expand(N, *kernel.shape), x.flatten(2), offset).view(sizes)
    rows = x.unflatten(3, (Q, S)).unflatten(2, (P, R)).permute(0, 2, 4, 3, 5, 1).reshape(N * P * Q, -1)
    offset = None if bias is None else bias.expand(N * P * Q, channels)
    out = gemm(rows, kernel.t(), offset).view(N, P, Q, channels).permute(0, 3, 1, 2)
    return out if channels_last else with_channels_first(out)


@plan
def _plan(
    x: Description, weight: Description, out: Description, has_bias: bool, taps: Taps, groups: int
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], None]:
    (N, _, H, W), (channels, C, R, S), (_, _, P, Q) = x.shape, weight.shape, out.shape
    reach = sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], x.strides[1:], strict=True))
    if max(reach, R * S * C) >= INT32_END - MARGIN or groups > LONGEST_AXIS:
        raise ValueError(
            f"convolution takes images of fewer than {INT32_END - MARGIN} values and up to {LONGEST_AXIS} groups, not "
            f"{list(x.shape)} in {groups}"
        )
    fits_tma = _fits_tma(x, weight, taps)
    tile = convolution_tile(x.dtype, N * P * Q, channels // groups, C, groups, x.device, fits_tma)
    if tile.tma:
        return _with_boxes(x, weight, out, has_bias, taps, groups, tile)
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


def _with_boxes(
    x: Description, weight: Description, out: Description, has_bias: bool, taps: Taps, groups: int, tile: Tile
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], None]:
    """``_convolution_tma_kernel`` for tensors like these."""
    (N, every, H, W), (channels, C, R, S), (_, _, P, Q) = x.shape, weight.shape, out.shape
    (step_h, step_w), (box_n, box_h, box_w) = taps.stride, smallest_boxes(tile.block_m, N, P, Q)
    of_x = (
        [N, H // step_h, step_h, W // step_w, step_w * every],
        [H * W * every, step_h * W * every, W * every, step_w * every, 1],
        [box_n, box_h, 1, box_w, tile.block_k],
    )
    of_weight = [channels, R * S * C], [R * S * C, 1], [tile.block_n, tile.block_k]
    boxes_h, boxes_w = ceil_div(P, box_h), ceil_div(Q, box_w)
    numbers = (N, channels // groups, C, every, P, Q, boxes_h, boxes_w, out.strides[0], *out.strides[2:])
    constants = (*taps.stride, *taps.padding, *taps.dilation, R, S, has_bias, box_n, box_h, box_w, *tile[1:3])
    grid = ceil_div(N, box_n) * boxes_h * boxes_w, ceil_div(channels // groups, tile.block_n), groups
    launch = _launch(_convolution_tma_kernel, grid, (*numbers, *constants), tile)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        launch(TensorDescriptor(x, *of_x), TensorDescriptor(weight, *of_weight), out if bias is None else bias, out)

    return call


def smallest_boxes(block_m: int, batch: int, P: int, Q: int) -> tuple[int, int, int]:
    """Images, rows and columns of a box of block_m pixels: powers of two, whose boxes reach over the fewest pixels."""
    sizes = [1 << i for i in range(block_m.bit_length())]
    boxes = [(block_m // h // w, h, w) for w in sizes for h in sizes if h * w <= block_m]

    def pixels(box: tuple[int, int, int]) -> int:
        return math.prod(ceil_div(size, of_box) * of_box for size, of_box in zip((batch, P, Q), box, strict=True))

    return min(boxes, key=lambda box: (pixels(box), -box[2], -box[1]))
