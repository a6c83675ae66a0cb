"""The functions of ``reference.py`` for the CPU: each allocates its result and calls the C++ function of its name.

The package's docstring gives the order of the sums.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..reference import accumulator_dtype
from .build import call

# The kinds of `pointwise`, and the names of their parameters.
KINDS = {
    "silu": (),
    "sigmoid": (),
    "gelu": (),
    "gelu_tanh": (),
    "softplus": ("beta", "threshold"),
    "log_sigmoid": (),
    "mish": (),
    "elu": ("alpha", "scale", "input_scale"),
    "rsqrt": (),
    "pow": ("exponent",),
    "exp": (),
    "tanh": (),
    "erf": (),
    "expm1": (),
    "log": (),
    "log1p": (),
    "sin": (),
    "cos": (),
}


def gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One chain ``acc = fma(a[m, k], b[k, n], acc)``, k ascending; ``alpha * acc + beta * bias``; rounded once.

    For out_dtype the operands are made that wide, so that the chain is the one of float32.
    """
    if out_dtype is not None and out_dtype != a.dtype:
        a, b = a.to(out_dtype), b.to(out_dtype)
    if a.dim() == 2:
        return gemm(a[None], b[None], None if bias is None else bias[None], alpha, beta)[0]
    out = torch.empty((a.shape[0], a.shape[1], b.shape[2]), dtype=a.dtype)
    call("gemm", _arg(a), _arg(b), _arg(bias), alpha, beta, _arg(out))
    return out


def grouped_gemm(a: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """The chain of :func:`gemm` for each row, with the matrix of the row's group."""
    if out_dtype is not None and out_dtype != a.dtype:
        a, b = a.to(out_dtype), b.to(out_dtype)
    out = torch.empty((a.shape[0], b.shape[2]), dtype=a.dtype)
    offs = offs.to(torch.int32).contiguous()
    call("grouped_gemm", _arg(a), _arg(b), offs.data_ptr(), offs.numel(), _arg(out))
    return out


def grouped_gemm_over_k(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """The chain of :func:`gemm` over the rows of each group."""
    out = torch.empty((offs.numel(), a.shape[0], b.shape[1]), dtype=a.dtype)
    offs = offs.to(torch.int32).contiguous()
    call("grouped_gemm_over_k", _arg(a), _arg(b), offs.data_ptr(), offs.numel(), _arg(out))
    return out


def scaled_gemm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The chain of :func:`gemm` in float32 over each 128 of K, from 0; these sums in one chain, ascending.

    8-bit floats are exact in bfloat16, and their products in float32.
    """
    if a.dim() == 2:
        return scaled_gemm(a[None], b[None], scale_a[None], scale_b[None], bias, out_dtype)[0]
    out = torch.empty((a.shape[0], a.shape[1], b.shape[2]), dtype=out_dtype)
    a, b, bias = a.to(torch.bfloat16), b.to(torch.bfloat16), None if bias is None else bias.float()
    call("scaled_gemm", _arg(a), _arg(b), _arg(scale_a), _arg(scale_b), _arg(bias), _arg(out))
    return out


def scaled_grouped_gemm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The sums of :func:`scaled_gemm` for each row, with the matrix of the row's group."""
    out = torch.empty((a.shape[0], b.shape[2]), dtype=out_dtype)
    a, b, offs = a.to(torch.bfloat16), b.to(torch.bfloat16), offs.to(torch.int32).contiguous()
    call("scaled_grouped_gemm", _arg(a), _arg(b), _arg(scale_a), _arg(scale_b), offs.data_ptr(), offs.numel(), _arg(out))
    return out


def scaled_grouped_gemm_over_k(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The sums of :func:`scaled_gemm` over the rows of each group."""
    out = torch.empty((offs.numel(), a.shape[0], b.shape[1]), dtype=out_dtype)
    a, b, offs = a.to(torch.bfloat16), b.to(torch.bfloat16), offs.to(torch.int32).contiguous()
    call("scaled_grouped_gemm_over_k", _arg(a), _arg(b), _arg(scale_a), _arg(scale_b), offs.data_ptr(), offs.numel(), _arg(out))
    return out


def tree_sum(parts: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Neighbours, then their sums, by torch's additions of two numbers: each is rounded on its own, so no place changes it."""
    level = list(parts.to(accumulator_dtype(torch.promote_types(parts.dtype, out_dtype))))
    while len(level) > 1:
        alone = [level.pop()] if len(level) % 2 else []
        level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)] + alone
    return level[0].to(out_dtype)


def row_sum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The sum of each row: 32 lanes in float64, then a tree."""
    out = torch.empty(x.shape[0], dtype=out_dtype)
    call("row_sum", _arg(x), _arg(out))
    return out


def row_mean(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The sum of :func:`row_sum` before its rounding, divided by ``n_cols``."""
    out = torch.empty(x.shape[0], dtype=out_dtype)
    call("row_mean", _arg(x), _arg(out))
    return out


def row_mean_of_squares(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``row_mean`` of the squares, each rounded to out_dtype."""
    wide = x.to(out_dtype)
    return row_mean(wide * wide, out_dtype)


def row_norm(x: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    """``|x|`` (p = 1) or ``x * x`` (p = 2), summed as in :func:`row_sum`; the root for p = 2."""
    out = torch.empty(x.shape[0], dtype=out_dtype)
    call("row_norm", _arg(x), p, _arg(out))
    return out


def row_var_mean(x: Tensor, correction: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean in float64, then ``(x - mean) ** 2``, both summed as in :func:`row_sum`."""
    var, mean = torch.empty(x.shape[0], dtype=out_dtype), torch.empty(x.shape[0], dtype=out_dtype)
    call("row_var_mean", _arg(x), correction, _arg(var), _arg(mean))
    return var, mean


def row_logsumexp(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``max + log(sum)``, ``exp(x - max)`` being summed as in :func:`row_sum`."""
    out = torch.empty(x.shape[0], dtype=out_dtype)
    call("row_logsumexp", _arg(x), _arg(out))
    return out


def row_softmax(x: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """``exp(x - max) / sum``, or ``(x - max) - log(sum)``, the sum as in :func:`row_sum`."""
    out = torch.empty(x.shape, dtype=out_dtype)
    call("row_softmax", _arg(x), log, _arg(out))
    return out


def row_logprobs(x: Tensor, index: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Some columns of ``row_softmax``, which fits this device's memory whole."""
    return row_softmax(x, True, out_dtype).gather(1, index)


def row_cumsum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """One chain over the columns; each partial sum is rounded on its own."""
    out = torch.empty(x.shape, dtype=out_dtype)
    call("row_cumsum", _arg(x), _arg(out))
    return out


def row_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd * weight + bias``, each step rounded in float64; the sums as in :func:`row_var_mean`."""
    y = torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=accumulator_dtype(x.dtype)) for _ in range(2))
    call("row_layer_norm", _arg(x), _arg(weight), _arg(bias), eps, _arg(y), _arg(mean), _arg(rstd))
    return y, mean, rstd


def row_rms_norm(x: Tensor, weight: Tensor | None, eps: float, with_rstd: bool = True) -> tuple[Tensor, Tensor | None]:
    """``x * rstd * weight``, each step rounded in float64; ``x * x`` is summed as in :func:`row_sum`."""
    y, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[0], dtype=accumulator_dtype(x.dtype))
    call("row_rms_norm", _arg(x), _arg(weight), eps, _arg(y), _arg(rstd))
    return y, rstd if with_rstd else None


def row_softmax_backward(grad: Tensor, y: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """``(grad - sum) * y`` or ``grad - exp(y) * sum``, the sum (of ``grad * y``, or of grad) as in :func:`row_sum`."""
    out = torch.empty(y.shape, dtype=out_dtype)
    call("row_softmax_backward", _arg(grad), _arg(y), log, _arg(out))
    return out


def row_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    wants_x: bool = True,
    wants_weight: bool = True,
    wants_bias: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Each step in float64; sums over a row as in :func:`row_sum`, sums over the rows as one chain, ascending."""
    statistics = _arg(mean), _arg(rstd)
    grad_x = torch.empty(x.shape, dtype=x.dtype) if wants_x else None
    if grad_x is not None:
        call("row_norm_backward", _arg(grad), _arg(x), *statistics, _arg(weight), _arg(grad_x))
    dtype = x.dtype if weight is None else weight.dtype
    of_weight, of_bias = (torch.empty(x.shape[1], dtype=dtype) if wanted else None for wanted in (wants_weight, wants_bias))
    if wants_weight or wants_bias:
        call("norm_backward_parameters", _arg(grad), _arg(x), *statistics, _arg(of_weight), _arg(of_bias))
    return grad_x, of_weight, of_bias


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
    """One chain over d, one over the keys; the division by the sum of the weights comes last.

    A hidden key changes nothing in a chain, so positions are not asked for.
    """
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    options = (is_causal, scale, causal_offset, window or 0, soft_cap or 0.0, _arg(sinks))
    call("attention", _arg(q), _arg(k), _arg(v), _arg(mask, _WITH_BOOL), *options, _arg(out), _arg(lse))
    return out, lse if with_lse else None


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    wants_q: bool = True,
    wants_kv: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Products as in :func:`gemm`, of B * Hkv matrices in wide: the query heads of a key head are one sum over queries."""
    B, H, Sq, D = q.shape
    Hkv, Skv, wide = k.shape[1], k.shape[2], accumulator_dtype(q.dtype)
    if not q.numel() or not k.numel() or not v.numel():
        return tuple(x.new_zeros(x.shape) if w else None for x, w in ((q, wants_q), (k, wants_kv), (v, wants_kv)))
    # [B * Hkv, H // Hkv * Sq, ...]: the queries of all heads that share a key head, behind each other.
    rows, grad, delta_of = (x.to(wide).reshape(B * Hkv, H // Hkv * Sq, x.shape[3]) for x in (q, grad_out, out))
    keys, values = (x.to(wide).reshape(B * Hkv, Skv, x.shape[3]) for x in (k, v))
    scores = gemm(rows, keys.transpose(1, 2)).mul_(scale).view(B, H, Sq, Skv)
    lse = lse.to(wide)[..., None]
    weights = (scores - torch.where(lse == -torch.inf, torch.inf, lse)).reshape(-1)
    weights = pointwise(weights, "exp").view(scores.shape)
    if is_causal:
        weights.tril_()
    if mask is not None:
        weights.masked_fill_(~mask, 0.0)
    weights = weights.reshape(B * Hkv, -1, Skv)
    delta = row_sum((grad * delta_of).reshape(-1, grad.shape[2]), wide).view(B * Hkv, -1, 1)
    of_scores = (gemm(grad, values.transpose(1, 2)) - delta).mul_(weights).mul_(scale)
    grad_q = gemm(of_scores, keys) if wants_q else None
    grad_k = gemm(of_scores.transpose(1, 2), rows) if wants_kv else None
    grad_v = gemm(weights.transpose(1, 2), grad) if wants_kv else None
    return tuple(None if g is None else g.view(x.shape).to(x.dtype) for g, x in ((grad_q, q), (grad_k, k), (grad_v, v)))


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
    """``attention`` of one row after the other."""
    out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=accumulator_dtype(q.dtype))
    ends = q_starts.tolist()
    keys_of = _slices(k_starts.tolist(), k, v) if pages is None else _gathered(k_starts.tolist(), pages, k, v)
    for start, end, (keys, values) in zip(ends[:-1], ends[1:], keys_of, strict=True):
        mine = (x.transpose(0, 1)[None] for x in (q[start:end], keys, values))
        offset = len(keys) - (end - start)
        options = {"causal_offset": offset, "window": window, "soft_cap": soft_cap, "sinks": sinks}
        row_out, row_lse = attention(*mine, None, is_causal, scale, **options)
        out[start:end], lse[:, start:end] = row_out[0].transpose(0, 1), row_lse[0]
    return out, lse


def _slices(starts: list[int], *stores: Tensor) -> Iterator[list[Tensor]]:
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        yield [store[start:end] for store in stores]


def _gathered(lengths: list[int], pages: Tensor, *stores: Tensor) -> Iterator[list[Tensor]]:
    for length, mine in zip(lengths, pages.long(), strict=True):
        yield [store[mine].flatten(0, 1)[:length] for store in stores]


def index_add(self: Tensor, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    """``acc[index[i]] += alpha * source[i]`` in float64, i ascending; rounded once."""
    out = torch.empty(self.shape, dtype=self.dtype)
    index = index.to(torch.int64)
    call("index_add", _arg(self), _arg(index, _INDEX), _arg(source), alpha, _arg(out))
    return out


def pointwise(x: Tensor, kind: str, params: Sequence[float] = ()) -> Tensor:
    """A function of `KINDS` for each element, in float64, rounded once. The strides are those of ``torch.empty_like(x)``."""
    if len(params) != len(KINDS.get(kind, params)):
        raise ValueError(f"pointwise {kind} needs the params {KINDS[kind]}, not {tuple(params)}.")
    dtype, out = _DTYPES[x.dtype], torch.empty_like(x)
    if x.stride() != out.stride():
        x = out.copy_(x)
    values = (ctypes.c_double * 3)(*params)
    call("pointwise", kind.encode(), values, dtype, x.data_ptr(), out.data_ptr(), x.numel())
    return out


class _Dtypes(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise TypeError(f"The CPU kernels know float64, float32, float16 and bfloat16, not {dtype}.")


# The values of enum Dtype in common.h.
_DTYPES = _Dtypes({torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3})
_WITH_BOOL = _Dtypes(_DTYPES | {torch.bool: 4})
_INDEX = _Dtypes({torch.int64: 5})
_PACK = [struct.Struct(f"{2 + 2 * n_dims}q").pack for n_dims in range(5)]


def _arg(x: Tensor | None, dtypes: _Dtypes = _DTYPES) -> bytes | None:
    """Packs x as the struct Tensor of common.h: data, dtype, sizes, strides."""
    return None if x is None else _PACK[x.dim()](x.data_ptr(), dtypes[x.dtype], *x.shape, *x.stride())
