"""``batchinv::attention`` with its gradient, and torch's operators that it stands for."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import Refused, kernel_set, reads_addresses, shape_of, too_few_dims
from pytest_batchinv.kernels.plans import Description, alignment_bits, describe, on_device, plan
from pytest_batchinv.kernels.reference import accumulator_dtype

ATTENTION_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale, "
    "float? soft_cap=None, Tensor? sinks=None, Tensor? positions=None, int mask_window=0) -> (Tensor, Tensor)"
)
MAX_HEAD_DIM = 512

Operand = Tensor | Description
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


def attention(
    query, key, value, mask, is_causal, scale, soft_cap=None, sinks=None, positions=None, mask_window=0, with_lse=True
) -> tuple[Tensor, Tensor | None]:
    """``reference.attention`` on the tensors' device; the mask may be one that only broadcasts to [B, H, Sq, Skv].

    Raises Refused for head dims above 512. Where Triton compiles no kernel for them, it is :func:`_by_operators`.
    """
    described = describe(query), describe(key), describe(value), describe(mask)
    attend = _plan_attention(*described, is_causal, scale, soft_cap, sinks is not None, positions is not None, with_lse)
    if positions is None:
        return attend(query, key, value, mask, sinks)
    _check_positions(positions, query, mask)
    return attend(query, key, value, mask, sinks, positions=positions, mask_window=mask_window)


def _check_positions(positions: Tensor, query: Tensor, mask: Tensor | None) -> None:
    """The kernel reads them by address."""
    B, n_queries = query.shape[0], query.shape[2]
    fits = positions.dim() == 2 and positions.shape[0] in (1, B) and positions.shape[1] == n_queries
    if mask is None or not fits or positions.dtype != torch.int64 or positions.device != query.device:
        beside = "" if mask is not None else ", without a mask"
        raise RuntimeError(
            f"attention: expected positions beside a mask, as int64 of one row or {B}, for {n_queries} queries, on "
            f"{query.device}; got {positions.dtype}, {shape_of(positions)} on {positions.device}{beside}"
        )


@plan
def _plan_attention(
    q: Description,
    k: Description,
    v: Description,
    mask: Description | None,
    is_causal: bool,
    scale: float,
    soft_cap: float | None,
    has_sinks: bool,
    has_positions: bool,
    with_lse: bool,
) -> Attend:
    head_dim = max(q.shape[-1], v.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        raise Refused(f"batch-invariant attention covers head dims up to {MAX_HEAD_DIM}, not {head_dim}.")
    scores = (*q.shape[:3], k.shape[2])
    expanded = None if mask is None else mask.expand(scores)
    if q.is_cuda and head_dim > (128 if q.dtype == torch.float64 else 256):
        return lambda q, k, v, mask, sinks, **_: _by_operators(q, k, v, mask, is_causal, scale, soft_cap, sinks, with_lse)
    is_plain = soft_cap is None and not has_sinks and not has_positions
    if is_plain and reads_addresses(q) and 0 not in (*q.shape, *k.shape, *v.shape):
        return _plan_launch(q, k, v, expanded, is_causal, scale, with_lse)
    options = {"soft_cap": soft_cap, "with_lse": with_lse}
    kernel = kernel_set(q).attention

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, **places: Any):
        mask = None if mask is None else mask.expand(scores)
        return kernel(q, k, v, mask, is_causal, scale, sinks=sinks, **places, **options)

    return call


def _by_operators(q, k, v, mask, is_causal, scale, soft_cap, sinks, with_lse) -> tuple[Tensor, Tensor | None]:
    """``reference.attention`` by products and a softmax, in the accumulator's dtype. The order counts from the first key.

    So keys that are hidden behind the others change no bit, and those before them may.
    """
    kernels, wide, group = kernel_set(q), accumulator_dtype(q.dtype), q.shape[1] // k.shape[1]
    query, key, value = (
        x.to(wide).reshape(-1, *x.shape[2:]) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    scores = kernels.gemm(query, key.transpose(1, 2)).view(*q.shape[:3], k.shape[2]) * scale
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    if is_causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    rows = scores.reshape(-1, scores.shape[-1])
    weights = kernels.row_softmax(rows, False, wide).masked_fill((rows == -math.inf).all(1, keepdim=True), 0.0)
    out = kernels.gemm(weights.view(query.shape[0], q.shape[2], -1)[..., : k.shape[2]], value)
    lse = kernels.row_logsumexp(rows, wide).view(q.shape[:3]) if with_lse else None
    return out.view(*q.shape[:3], v.shape[3]).to(q.dtype), lse


def _plan_launch(
    q: Description, k: Description, v: Description, mask: Description | None, is_causal: bool, scale: float, with_lse: bool
) -> Attend:
    """The kernel and its results, by addresses alone."""
    shape, lse_dtype = (*q.shape[:3], v.shape[3]), accumulator_dtype(q.dtype) if with_lse else None
    tensors = (q, k, v)
    kernel = kernel_set(q).plan_attention(
        tuple(x.shape for x in tensors),
        tuple(x.strides for x in tensors),
        None if mask is None else (mask.dtype, mask.shape, mask.strides),
        lse_dtype,
        alignment_bits(*(x.is_aligned for x in (*tensors, k if mask is None else mask))),
        is_causal,
        scale,
        q.dtype,
        q.device,
    )

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = q.new_empty(shape)
        lse = None if lse_dtype is None else q.new_empty(shape[:3], dtype=lse_dtype)
        with on_device(q):
            kernel(q, k, v, out, lse, mask)
        return out, lse

    return call


def attention_fake(
    query, key, value, mask, is_causal, scale, soft_cap=None, sinks=None, positions=None, mask_window=0
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))


def attention_setup_context(ctx, inputs, output) -> None:
    query, key, value, mask, ctx.is_causal, ctx.scale, ctx.soft_cap, sinks, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, mask, sinks, *output)


BACKWARD_SCHEMA = (
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor out, Tensor lse, "
    "bool is_causal, float scale, bool wants_query, bool wants_key_and_value) -> (Tensor, Tensor, Tensor)"
)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of query, key and value; None for those that nobody needs."""


def backward_kernel(
    grad_out, query, key, value, mask, out, lse, is_causal, scale, wants_query, wants_key_and_value
) -> Gradients:
    """``reference.attention_backward`` on the tensors' device; the mask may be one that only broadcasts to [B, H, Sq, Skv]."""
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    wants = wants_query, wants_key_and_value
    return kernel_set(query).attention_backward(grad_out, query, key, value, mask, out, lse, is_causal, scale, *wants)


def backward_fake(grad_out, query, key, value, mask, out, lse, is_causal, scale, wants_query, wants_key_and_value) -> Gradients:
    wanted = (query, wants_query), (key, wants_key_and_value), (value, wants_key_and_value)
    return tuple(x.new_empty(x.shape) if wants else None for x, wants in wanted)


def attention_backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    """By the kernel; by operators that have gradients themselves where those are asked for, or where it lacks this form."""
    query, key, value, mask, sinks, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    if torch.is_grad_enabled() or grad_lse is not None or sinks is not None or ctx.soft_cap is not None:
        return _attention_backward_by_operators(ctx, torch.zeros_like(out) if grad_out is None else grad_out, grad_lse)
    if not _has_backward_kernel(query, value, mask):
        return _attention_backward_by_operators(ctx, grad_out, grad_lse)
    backward = torch.ops.batchinv.attention_backward.default
    wants = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grads = backward(grad_out, query, key, value, mask, out, lse, ctx.is_causal, ctx.scale, *wants)
    return *grads, *(None,) * 7


def _has_backward_kernel(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """On CUDA: boolean masks, head dims up to 128, no float64. On the CPU any head dim and float64, too."""
    if mask is not None and mask.dtype != torch.bool:
        return False
    return not query.is_cuda or query.dtype != torch.float64 and max(query.shape[-1], value.shape[-1]) <= 128


def _attention_backward_by_operators(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    """The weights are computed again from the logsumexp: P = exp(S - lse), dS = P * (dO @ V.T - rowsum(dO * O) + dlse)."""
    query, key, value, mask, sinks, out, lse = ctx.saved_tensors
    wide = accumulator_dtype(query.dtype)
    group = query.shape[1] // key.shape[1]
    q, k, v, out, grad_out = (x.to(wide) for x in (query, key, value, out, grad_out))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * ctx.scale
    if ctx.soft_cap is not None:
        capped = torch.tanh(scores / ctx.soft_cap)
        scores = capped * ctx.soft_cap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if ctx.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = (scores - lse[..., None]).exp().masked_fill((lse == -torch.inf)[..., None], 0.0)
    delta = (grad_out * out).sum(-1, keepdim=True) - (0 if grad_lse is None else grad_lse.to(wide)[..., None])
    grad_scores = weights * (grad_out @ v.transpose(-1, -2) - delta) * ctx.scale
    if ctx.soft_cap is not None:
        grad_scores = grad_scores * (1 - capped * capped)
    grad_q = grad_scores @ k
    grad_k = (grad_scores.transpose(-1, -2) @ q).unflatten(1, (-1, group)).sum(2)
    grad_v = (weights.transpose(-1, -2) @ grad_out).unflatten(1, (-1, group)).sum(2)
    grad_sinks = None
    if sinks is not None:  # a key that every query sees, whose value is 0
        sink_weights = (sinks.to(wide)[:, None] - lse).exp()
        grad_sinks = -(sink_weights * delta[..., 0]).sum((0, 2)).to(sinks.dtype)
    return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(value.dtype), None, None, None, None, grad_sinks, None, None


def flash_attention_for_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    _check_four_dims(query, key, value, attn_mask, dropout_p)
    if query.shape[3] != value.shape[3]:
        raise RuntimeError(f"attention: expected one head size, but got {shape_of(query)}, {shape_of(key)}, {shape_of(value)}")
    mask = _expanded_mask(attn_mask, query, key)
    return attention(query, key, value, mask, is_causal, _scale(query, scale))


def efficient_attention(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """On CUDA, with the conditions of torch's own kernel, except that these take any strides."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise too_few_dims("attention", query, key, value)
    _check_four_dims(query, key, value, attn_bias, dropout_p)
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"efficient attention is for float32, float16 and bfloat16, not for {query.dtype}")
    scores = (*query.shape[:3], key.shape[2])
    if attn_bias is not None and (attn_bias.dtype != query.dtype or attn_bias.shape != scores):
        raise RuntimeError(
            f"efficient attention: expected a bias in {query.dtype} of shape {list(scores)}, "
            f"but got {attn_bias.dtype}, {list(attn_bias.shape)}"
        )
    mask = _expanded_mask(attn_bias, query, key)
    out, lse = attention(query, key, value, mask, is_causal, _scale(query, scale))
    # Padded to a multiple of 32 queries, as torch's fake implementation and its backward have it.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf) if compute_log_sumexp else lse[..., :0]
    seed = torch.empty((), dtype=torch.int64, device=query.device)
    return out, lse, seed, seed.clone()


def _check_four_dims(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    _refuse_dropout(dropout_p)
    if query.dim() < 3:
        raise too_few_dims("attention", query, key, value)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise RuntimeError(f"attention: expected 4 dims, but got {shape_of(query)}, {shape_of(key)}, {shape_of(value)}")
    if mask is not None and mask.dim() not in (2, 4):
        raise RuntimeError(f"attention: expected a mask of 2 or 4 dims, but got {shape_of(mask)}")
    _check_attention(query, key, value, mask)
    heads, groups = query.shape[1], key.shape[1]
    heads_fit = groups == value.shape[1] and (heads % groups == 0 if groups else heads == 0)
    if not query.shape[0] == key.shape[0] == value.shape[0] or not heads_fit:
        raise RuntimeError(f"attention: batches and heads differ: {shape_of(query)}, {shape_of(key)}, {shape_of(value)}")


def _check_attention(query: Operand, key: Operand, value: Operand, mask: Operand | None) -> None:
    """Dtypes, devices and the last two dims: what torch itself asks for."""
    q, k, v = query.shape, key.shape, value.shape
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise RuntimeError(
            "attention: expected query, key and value of one dtype on one device, but got "
            f"{query.dtype} on {query.device}, {key.dtype} on {key.device}, {value.dtype} on {value.device}"
        )
    if min(len(q), len(k), len(v)) < 2:
        raise RuntimeError(f"attention: expected 2 dims or more, but got {shape_of(query)}, {shape_of(key)}, {shape_of(value)}")
    if q[-1] != k[-1] or k[-2] != v[-2]:
        raise RuntimeError(f"attention: sizes do not fit together: {shape_of(query)}, {shape_of(key)}, {shape_of(value)}")
    if mask is not None and (mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device):
        raise RuntimeError(
            f"attention: expected a mask of bool, float32 or {query.dtype} on {query.device}, "
            f"but got {mask.dtype} on {mask.device}"
        )


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Tensor:
    """One kernel whatever backend torch would pick: the pick depends on masks, strides and head dims."""
    needs_gradient = attn_mask is not None and attn_mask.requires_grad
    _check_sdpa(query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, enable_gqa)
    attend = torch.ops.batchinv.attention.default
    return _attention_of_any_rank(attend, query, key, value, attn_mask, is_causal, scale, enable_gqa)


def planned_sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False) -> Tensor:
    """:func:`scaled_dot_product_attention` for calls in which the dispatcher has nothing to do: nobody asks for the lse."""
    described = describe(query), describe(key), describe(value), describe(attn_mask)
    needs_gradient = attn_mask is not None and attn_mask.requires_grad
    return _plan_sdpa(*described, needs_gradient, dropout_p, is_causal, scale, enable_gqa)(query, key, value, attn_mask)


@plan
def _plan_sdpa(
    q: Description,
    k: Description,
    v: Description,
    mask: Description | None,
    mask_needs_gradient: bool,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    _check_sdpa(q, k, v, mask, mask_needs_gradient, dropout_p, is_causal, enable_gqa)
    q, k, v = _broadcast(q, k, v, enable_gqa)
    if reads_addresses(q) and q.dim() == 4 and (mask is None or mask.dim() <= 4 and mask.dtype in (torch.bool, q.dtype)):
        attend = _plan_attention(q, k, v, mask, is_causal, _scale(q, scale), None, False, False, False)
        return lambda q, k, v, mask: attend(q, k, v, mask, None)[0]

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _attention_of_any_rank(_without_lse, q, k, v, mask, is_causal, scale, enable_gqa)

    return call


def _without_lse(*args: Any) -> tuple[Tensor, Tensor | None]:
    return attention(*args, with_lse=False)


def _attention_of_any_rank(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """``attend`` of tensors whose leading dims are broadcast and become a batch and heads."""
    query, key, value = _broadcast(query, key, value, enable_gqa)
    if mask is not None and mask.dim() > query.dim():
        raise RuntimeError(f"attention: a mask of {shape_of(mask)} has more dims than the query, {shape_of(query)}")
    leading = query.shape[:-2]
    if len(leading) != 2:
        query, key, value = (_four_dims(x) for x in (query, key, value))
    if mask is not None:
        if len(leading) > 2:  # several dims become the batch: the mask is broadcast over each of them first
            mask = _four_dims(mask.expand(*leading, query.shape[2], key.shape[2]))
        mask = _expanded_mask(mask, query, key)
    out, _ = attend(query, key, value, mask, is_causal, _scale(query, scale))
    return out if len(leading) == 2 else out.view(*leading, *out.shape[-2:])


def _check_sdpa(
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Operand | None,
    mask_needs_gradient: bool,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) == 2:
        raise too_few_dims("scaled_dot_product_attention", query, key, value)
    _check_attention(query, key, value, mask)
    if mask is not None and is_causal:
        raise RuntimeError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
    _refuse_dropout(dropout_p)
    if not query.is_floating_point():
        raise Refused(f"batch-invariant attention covers floats, not {query.dtype}.")
    if mask_needs_gradient:
        raise Refused("batch-invariant attention has no gradient for attn_mask; detach it.")


def _broadcast(query: Operand, key: Operand, value: Operand, enable_gqa: bool) -> tuple[Operand, Operand, Operand]:
    """Leading dims as torch's product would broadcast them; with ``enable_gqa`` the heads (dim -3) stay as they are."""
    q, k, v = query.shape, key.shape, value.shape
    if enable_gqa:
        if k[-3] != v[-3] or (q[-3] if k[-3] == 0 else q[-3] % k[-3]):
            raise RuntimeError(f"attention: with enable_gqa {k} and {v} need heads whose number divides that of {q}")
        if q[:-3] == k[:-3] == v[:-3]:
            return query, key, value
        batch = torch.broadcast_shapes(q[:-3], k[:-3], v[:-3])
        return tuple(x if x.shape[:-3] == batch else x.expand((*batch, *x.shape[-3:])) for x in (query, key, value))
    if q[:-2] == k[:-2] == v[:-2]:
        return query, key, value
    leading = torch.broadcast_shapes(q[:-2], k[:-2], v[:-2])
    return tuple(x.expand((*leading, *x.shape[-2:])) for x in (query, key, value))


def _four_dims(x: Tensor) -> Tensor:
    """[B, H, S, D] from any rank: a missing batch is 1, and further leading dims go into the batch."""
    if x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x.flatten(0, x.dim() - 4)


def _expanded_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """As [B, H, Sq, Skv], bool or in the query's dtype: a float32 mask of 16-bit tensors is rounded."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


def _scale(query: Operand, scale: float | None) -> float:
    if not query.shape[-1]:
        return 1.0  # all scores are sums of nothing
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p != 0.0:
        raise Refused("batch-invariant attention has no dropout; call it with dropout_p=0 (model.eval()).")
