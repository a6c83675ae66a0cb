"""Convolutions of any number of dimensions, and their gradients: products of the values under the kernel, one a group.

On CUDA those of one and two dimensions have a kernel of their own, ``cuda/implicit_gemm.py``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import kernel_set, shape_of
from pytest_batchinv.kernels.aten.reductions import sum_dim

MOST_VALUES = 1 << 24
"""Values of a matrix of what lies under the kernel, from which the batch is taken in parts: each row has its own product."""


def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Tensor:
    """input: [N, C, *sizes]; weight: [O, C // groups, *taps], transposed: [C, O // groups, *taps] -> [N, O, *sizes].

    Each output position is a row of the ``C // groups * taps`` values under the kernel. Where the kernel is as long as the
    stride (a patch embedding), that is the input itself in another shape.
    """
    n_dims = weight.dim() - 2
    if input.dim() == n_dims + 1:  # without a batch
        args = (weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        return convolution(input[None], *args)[0]
    stride, padding, dilation, output_padding = (
        _one_each(sizes, n_dims) for sizes in (stride, padding, dilation, output_padding)
    )
    _check(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    if transposed:
        return _transposed(input, weight, bias, stride, padding, dilation, output_padding, groups)
    return _direct(input, weight, bias, stride, padding, dilation, groups)


def convolution_backward(
    grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias; None for those not wanted.

    That of the input is the convolution of the other kind, so it belongs to its row. That of the weight is one product a group,
    whose K are the batch and then the output positions, ascending; that of the bias a sum over the same.
    """
    n_dims = weight.dim() - 2
    if input.dim() == n_dims + 1:  # without a batch
        args = (weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask)
        grad_input, *others = convolution_backward(grad_output[None], input[None], *args)
        return grad_input if grad_input is None else grad_input[0], *others
    stride, padding, dilation, output_padding = (
        _one_each(sizes, n_dims) for sizes in (stride, padding, dilation, output_padding)
    )
    taps = weight.shape[2:]
    of_input = of_weight = of_bias = None
    if output_mask[0]:
        if transposed:
            of_input = convolution(grad_output, weight, None, stride, padding, dilation, False, output_padding, groups)
            of_input = of_input[(..., *(slice(size) for size in input.shape[2:]))].contiguous()
        else:
            reached = [
                (size - 1) * s - 2 * p + d * (k - 1) + 1
                for size, s, p, d, k in zip(grad_output.shape[2:], stride, padding, dilation, taps, strict=True)
            ]
            behind = [size - r for size, r in zip(input.shape[2:], reached, strict=True)]
            of_input = _transposed(grad_output, weight, None, stride, padding, dilation, behind, groups)
    if output_mask[1]:
        x, grad = (grad_output, input) if transposed else (input, grad_output)
        of_weight = _weight_gradient(_padded(x, [(p, p) for p in padding]), grad, weight.shape, stride, dilation, groups)
    if output_mask[2]:
        of_bias = sum_dim(grad_output, [0, *range(2, grad_output.dim())])
    return of_input, of_weight, of_bias


def _weight_gradient(x: Tensor, grad: Tensor, shape: Sequence[int], stride, dilation, groups: int) -> Tensor:
    """Of the direct convolution of x, which has its padding."""
    taps, sizes = shape[2:], grad.shape[2:]
    view = x
    for dim, (k, s, d) in enumerate(zip(taps, stride, dilation, strict=True), 2):
        view = view.unfold(dim, d * (k - 1) + 1, s)[..., ::d]  # [N, C, *sizes, *taps]
    view = view[(slice(None), slice(None), *(slice(size) for size in sizes))].unflatten(1, (groups, -1))
    places = list(range(3, 3 + len(taps)))
    rows = view.permute(1, 0, *places, 2, *range(3 + len(taps), view.dim())).reshape(groups, -1, math.prod(shape[1:]))
    grads = grad.unflatten(1, (groups, -1)).permute(1, 2, 0, *places).reshape(groups, shape[0] // groups, rows.shape[1])
    return kernel_set(x).gemm(grads, rows).view(tuple(shape))


def _transposed(input, weight, bias, stride, padding, dilation, output_padding, groups) -> Tensor:
    """A convolution by the mirrored kernel, of the input with zeros between its values, which add nothing."""
    taps = weight.shape[2:]
    spread = input
    if any(s > 1 for s in stride):
        sizes = [s * (size - 1) + 1 if size else 0 for s, size in zip(stride, input.shape[2:], strict=True)]
        spread = input.new_zeros(*input.shape[:2], *sizes)
        spread[(..., *(slice(None, None, s) for s in stride))] = input
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, taps, padding, strict=True)]
    padded = _padded(spread, [(r, r + extra) for r, extra in zip(reach, output_padding, strict=True)])
    mirrored = weight.flip(list(range(2, weight.dim()))).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return _direct(padded, mirrored, bias, [1] * len(taps), [0] * len(taps), dilation, groups)


def _direct(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    """By the kernel of CUDA, which reads images where they lie, or of rows that are unfolded."""
    n_dims = weight.dim() - 2
    if input.is_cuda and not input.is_complex() and n_dims <= 2:
        kernel = kernel_set(input).convolution
        if n_dims == 2:
            return kernel(input, weight, bias, stride, padding, dilation, groups)
        one_row = (input.unsqueeze(2), weight.unsqueeze(2), bias, [1, *stride], [0, *padding], [1, *dilation])
        return kernel(*one_row, groups).squeeze(2)
    return _unfolded(_padded(input, [(p, p) for p in padding]), weight, bias, stride, dilation, groups)


def _unfolded(input: Tensor, weight: Tensor, bias: Tensor | None, stride, dilation, groups: int) -> Tensor:
    """Of an input that has its padding."""
    n_batch, taps, out_channels = input.shape[0], weight.shape[2:], weight.shape[0]
    view = input
    for dim, (k, s, d) in enumerate(zip(taps, stride, dilation, strict=True), 2):
        view = view.unfold(dim, d * (k - 1) + 1, s)[..., ::d]  # [N, C, *sizes, *taps]
    sizes, K = view.shape[2 : 2 + len(taps)], weight[0].numel()
    kernel = weight.reshape(groups, out_channels // groups, K).transpose(1, 2)
    out = input.new_empty(n_batch, out_channels, *sizes)
    step = max(1, MOST_VALUES // max(1, math.prod(sizes) * groups * K))
    for start in range(0, n_batch, step):
        part = view[start : start + step]
        out[start : start + step] = _product(part, kernel, bias, sizes, len(taps), groups)
    return out


def _product(view: Tensor, kernel: Tensor, bias: Tensor | None, sizes: Sequence[int], n_taps: int, groups: int) -> Tensor:
    n_batch, _, N = view.shape[0], *kernel.shape[1:]
    grouped = view.unflatten(1, (groups, -1))  # [N, groups, C // groups, *sizes, *taps]
    places = list(range(3, 3 + n_taps))
    rows = grouped.permute(1, 0, *places, 2, *range(3 + n_taps, grouped.dim())).reshape(groups, -1, kernel.shape[1])
    offset = None if bias is None else bias.view(groups, 1, N).expand(groups, rows.shape[1], N)
    out = kernel_set(view).gemm(rows, kernel, offset).view(groups, n_batch, *sizes, N)
    return out.permute(1, 0, -1, *range(2, 2 + n_taps)).reshape(n_batch, groups * N, *sizes)


def _padded(x: Tensor, before_and_after: Sequence[tuple[int, int]]) -> Tensor:
    """With zeros at the ends of the last dims; a negative number takes values away."""
    flat = [amount for pair in reversed(before_and_after) for amount in pair]
    return torch.constant_pad_nd(x, flat) if any(flat) else x


def _one_each(sizes: Sequence[int], n_dims: int) -> list[int]:
    return list(sizes) * n_dims if len(sizes) == 1 else list(sizes)


def _check(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> None:
    """torch's own conditions."""
    n_dims = weight.dim() - 2
    if n_dims < 1 or input.dim() != n_dims + 2 or any(len(x) != n_dims for x in (stride, padding, dilation, output_padding)):
        raise RuntimeError(
            f"convolution: a weight of {weight.dim()} dims needs an input of as many, or one less, and one stride, padding, "
            f"dilation and output_padding for each but two of them; the input is {shape_of(input)}"
        )
    if min(stride) < 1 or min(padding) < 0 or min(dilation) < 1 or min(output_padding) < 0 or groups < 1:
        raise RuntimeError(
            f"convolution: stride {stride}, dilation {dilation} and groups {groups} must be positive, "
            f"padding {padding} and output_padding {output_padding} not negative"
        )
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if weight.shape[0] % groups or input.shape[1] != channels or 0 in weight.shape:
        raise RuntimeError(
            f"convolution: a weight of shape {shape_of(weight)} in {groups} groups does not fit {shape_of(input)}"
        )
    out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise RuntimeError(f"convolution: expected one bias for each of {out_channels} channels, but got {shape_of(bias)}")
    if any(x is not None and (x.dtype != input.dtype or x.device != input.device) for x in (weight, bias)):
        raise RuntimeError("convolution: expected input, weight and bias of one dtype on one device")
    if any(size == 0 for size in input.shape[2:]) and input.shape[0] and input.shape[1]:
        raise RuntimeError(f"convolution: only batch and channels may be empty, but the input is {shape_of(input)}")
    reaches = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if transposed and input.shape[0]:
        if any(extra >= max(s, d) for extra, s, d in zip(output_padding, stride, dilation, strict=True)):
            raise RuntimeError(
                f"convolution: output_padding {output_padding} must be smaller than stride {stride} or dilation {dilation}"
            )
        ends = zip(input.shape[2:], stride, padding, reaches, output_padding, strict=True)
        if any(s * (size - 1) - 2 * p + reach + extra < 1 for size, s, p, reach, extra in ends):
            raise RuntimeError(f"convolution: the output would be empty, of {shape_of(input)} with padding {padding}")
    elif not transposed and any(size + 2 * p < reach for size, p, reach in zip(input.shape[2:], padding, reaches, strict=True)):
        raise RuntimeError(f"convolution: a kernel of {shape_of(weight)} is longer than the padded input {shape_of(input)}")
