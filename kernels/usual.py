"""Calls as models make them, planned whole: linear layers, softmax, sums, norms and attention on the GPU.

With few rows a step of decoding waits for the Python of its calls. What the checks and the kernels ask of a tensor is its
description, so here it is asked once for each description, and the answer remembered. A function returns None for a call
that is not usual: then the general way serves it, or says what is wrong with it. The kernels are the same ones. What a plan
makes is aligned, as all that torch allocates is.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cuda.attention import plan_attention
from .launch import alignment_bits, plan
from .matmul import plan_gemm
from .norm import norm_rows
from .reduce import reduce_rows
from .reference import accumulator_dtype
from .softmax import softmax_rows
from .tiles import on_device

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MAX_HEAD_DIM = 128  # up to which every dtype is covered


class _Description(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_aligned: bool
    """Whether it begins at a multiple of 16 bytes."""

    def rows(self) -> tuple[int, int] | None:
        """[rows, n_cols] of floats, where these are one after the other in memory, and there is something in them."""
        shape = self.shape
        is_contiguous = self.strides == tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        if not shape or 0 in shape or not is_contiguous or self.dtype not in _DTYPES:
            return None
        return math.prod(shape[:-1]), shape[-1]


_NONE = _Description((), (0,), None, None, False)


def _described(x: Tensor | None) -> tuple[Any, ...]:
    """The fields of its description, as a plain tuple: a named one takes longer to make."""
    return _NONE if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``gemm`` of a contiguous x of any rank by the transposed weight [N, K], with a bias [N] or without."""
    call = _plan_linear(_described(x), _described(weight), _described(bias))
    return None if call is None else call(x, weight, bias)


@plan
def _plan_linear(x, weight, bias) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    x, weight, bias = _Description(*x), _Description(*weight), _Description(*bias)
    rows, shape, has_bias = x.rows(), x.shape, bias != _NONE
    if rows is None or len(weight.shape) != 2 or 0 in weight.shape or weight.shape[1] != rows[1]:
        return None
    (N, K), (stride_n, stride_k) = weight.shape, weight.strides
    given = (weight, bias) if has_bias else (weight,)
    if any((p.dtype, p.device) != (x.dtype, x.device) for p in given) or has_bias and bias.shape != (N,):
        return None
    bits = alignment_bits(x.is_aligned, weight.is_aligned, bias.is_aligned, True)
    strides_bias = (0, *bias.strides) if has_bias else None
    product = plan_gemm(rows, (K, 1), (K, N), (stride_k, stride_n), strides_bias, bits, x.dtype, x.device)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty((*shape[:-1], N))
        with on_device(x):
            product(x, weight, bias, out, 1.0, 1.0)
        return out

    return call


def softmax(x: Tensor, dim: int, log: bool, out_dtype: torch.dtype) -> Tensor | None:
    """``row_softmax`` over the last dim of a contiguous x, which may have any rank."""
    call = _plan_softmax(_described(x), dim, log, out_dtype)
    return None if call is None else call(x)


@plan
def _plan_softmax(x, dim, log, out_dtype) -> Callable[[Tensor], Tensor] | None:
    x = _Description(*x)
    rows = x.rows()
    if rows is None or dim not in (-1, len(x.shape) - 1):
        return None
    bits = alignment_bits(x.is_aligned, True)
    launch = softmax_rows.plan(rows, (rows[1], 1), x.device, x.dtype, (out_dtype,), bits, (), (log,), "exp", out_dtype)

    def call(x: Tensor) -> Tensor:
        out = torch.empty_like(x, dtype=out_dtype)
        with on_device(x):
            launch(x, out)
        return out

    return call


def reduce(x: Tensor, dim: Any, keepdim: bool, result: str, correction: float = 0.0) -> Tensor | None:
    """``row_sum``, ``row_mean`` or the variance of ``row_var_mean`` over the last dim of a contiguous x, in x's dtype.

    result: ``sum``, ``mean`` or ``var``, which takes the correction.
    """
    dim = dim if dim is None or isinstance(dim, int) else tuple(dim)
    call = _plan_reduce(_described(x), dim, keepdim, result, correction)
    return None if call is None else call(x)


@plan
def _plan_reduce(x, dim, keepdim, result, correction) -> Callable[[Tensor], Tensor] | None:
    x = _Description(*x)
    rows, last = x.rows(), len(x.shape) - 1
    if rows is None or dim not in (-1, last, (-1,), (last,)):
        return None
    bits, statistics = alignment_bits(x.is_aligned, True, False), "moments" if result == "var" else "sum"
    how = (float(correction),), (result,), statistics, x.dtype
    launch = reduce_rows.plan(rows, (rows[1], 1), x.device, x.dtype, (x.dtype, None), bits, *how)
    out_shape = (*x.shape[:-1], 1) if keepdim else x.shape[:-1]

    def call(x: Tensor) -> Tensor:
        out = x.new_empty(out_shape)
        with on_device(x):
            launch(x, out, None)
        return out

    return call


def rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor | None:
    """``row_rms_norm`` over the last dim of a contiguous x, which may have any rank, with a weight of floats or without."""
    call = _plan_norm(_described(x), tuple(normalized_shape), _described(weight), _NONE, eps, "square", False)
    return None if call is None else call(x, weight, None)[0]


def layer_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float, with_rstd: bool
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """``row_layer_norm`` over the last dim of a contiguous x: the result, and if asked for mean and rstd as [..., 1]."""
    parameters = _described(weight), _described(bias)
    call = _plan_norm(_described(x), tuple(normalized_shape), *parameters, eps, "moments", with_rstd)
    return None if call is None else call(x, weight, bias)


@plan
def _plan_norm(
    x, normalized_shape, weight, bias, eps, statistics, with_rstd
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] | None:
    x, weight, bias = _Description(*x), _Description(*weight), _Description(*bias)
    rows, shape, wide = x.rows(), x.shape, accumulator_dtype(x.dtype)
    if rows is None or normalized_shape != (rows[1],):
        return None
    dtypes = (x.dtype,) if statistics == "moments" else _DTYPES  # layer_norm has parameters of x's dtype, on CUDA
    given = [parameter for parameter in (weight, bias) if parameter != _NONE]
    if any(p.shape != normalized_shape or p.dtype not in dtypes or p.device != x.device for p in given):
        return None
    launch = norm_rows.plan(
        rows,
        (rows[1], 1),
        x.device,
        x.dtype,
        (weight.dtype, bias.dtype, x.dtype),
        alignment_bits(x.is_aligned, weight.is_aligned, bias.is_aligned, True),
        (*weight.strides, *bias.strides, torch.finfo(wide).eps if eps is None else float(eps)),
        (weight != _NONE, bias != _NONE, with_rstd),
        statistics,
        x.dtype,
    )

    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y = torch.empty_like(x)
        mean = x.new_empty((*shape[:-1], 1), dtype=wide) if with_rstd else None
        rstd = torch.empty_like(mean) if with_rstd else None
        with on_device(x):
            launch(x, weight, bias, y, mean, rstd)
        return y, mean, rstd

    return call


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, grouped: bool, with_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """``attention`` with a boolean mask or none: q [B, H, Sq, D], k and v [B, Hkv, Skv, D], and Hkv = H unless ``grouped``.

    The mask has four dims, each of its full size or 1.
    """
    call = _plan_attention(_described(q), _described(k), _described(v), _described(mask), is_causal, scale, grouped, with_lse)
    return None if call is None else call(q, k, v, mask)


@plan
def _plan_attention(q, k, v, mask, is_causal, scale, grouped, with_lse) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    q, k, v, mask = _Description(*q), _Description(*k), _Description(*v), _Description(*mask)
    dtype, device, has_mask = q.dtype, q.device, mask != _NONE
    if any(len(x.shape) != 4 or 0 in x.shape or (x.dtype, x.device) != (dtype, device) for x in (q, k, v)):
        return None
    (B, H, Sq, D), (_, key_heads, Skv, _), DV = q.shape, k.shape, v.shape[3]
    heads_fit = H % key_heads == 0 if grouped else H == key_heads
    if not heads_fit or k.shape != (B, key_heads, Skv, D) or v.shape != (B, key_heads, Skv, DV):
        return None
    if dtype not in _DTYPES or max(D, DV) > _MAX_HEAD_DIM:
        return None
    scores, expanded = torch.Size((B, H, Sq, Skv)), None
    if has_mask:
        sizes_fit = len(mask.shape) == 4 and all(size in (1, full) for size, full in zip(mask.shape, scores, strict=True))
        if not sizes_fit or (mask.dtype, mask.device) != (torch.bool, device):
            return None
        sizes = zip(mask.shape, scores, mask.strides, strict=True)
        expanded = (torch.bool, scores, tuple(stride if size == full else 0 for size, full, stride in sizes))
    scale = 1.0 / math.sqrt(D) if scale is None else float(scale)
    lse_dtype = accumulator_dtype(dtype) if with_lse else None
    bits = alignment_bits(q.is_aligned, k.is_aligned, v.is_aligned, (mask if has_mask else k).is_aligned)
    shapes, strides = (q.shape, k.shape, v.shape), (q.strides, k.strides, v.strides)
    kernel = plan_attention(shapes, strides, expanded, lse_dtype, bits, is_causal, scale, dtype, device)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = q.new_empty((B, H, Sq, DV))
        lse = q.new_empty((B, H, Sq), dtype=lse_dtype) if with_lse else None
        with on_device(q):
            kernel(q, k, v, out, lse, mask)
        return out, lse

    return call
