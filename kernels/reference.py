"""What every kernel computes, in plain torch and fp64, rounded once at the end.

These functions are the contract of a *kernel set*: ``cpu.py`` (C++) and ``cuda.py`` (Triton) hold functions of the same
names and signatures. All work on a canonical form: matrices with a batch dimension in front, rows of a 2-d tensor.
``kernels/aten/`` brings aten's arguments (dims, overloads, ``alpha``, ``correction``) into that form.

Dtypes: float64, float32, float16, bfloat16. Inputs may have any strides (0 too), any size (0 too) and any alignment.
Results are contiguous. No result may depend on the number of rows, on the strides, on the alignment, or on the number of
threads. A size of 0 gives what torch gives: an empty result, or the neutral element of the sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``alpha * (a @ b) + beta * bias`` as [B, M, N], rounded once.

    a: [B, M, K]; b: [B, K, N] of the same dtype; bias: [B, M, N] of the same dtype (usually an expanded view), or None.
    One product may come without the batch dimension, which the result does not have then.
    With ``beta == 0`` the bias is not read, so NaN in it does not spread. ``K == 0`` gives ``beta * bias``.
    out_dtype: a's, or the accumulator's.
    """
    out = alpha * (a.double() @ b.double())
    if bias is not None and beta != 0:
        out = out + beta * bias.double()
    return out.to(out_dtype or a.dtype).contiguous()


def grouped_gemm(a: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Row t of group g is ``a[t] @ b[g]``, as [T, N].

    a: [T, K]; b: [G, K, N] of the same dtype; offs: int32 [G], where each group ends. Groups may be empty.
    Rows behind the last group are 0. out_dtype: a's, or the accumulator's.
    """
    out = a.new_zeros(a.shape[0], b.shape[2], dtype=out_dtype or a.dtype)
    start = 0
    for group, end in enumerate(offs.tolist()):
        out[start:end] = (a[start:end].double() @ b[group].double()).to(out.dtype)
        start = end
    return out


def grouped_gemm_over_k(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """Of group g the product of its columns of a and its rows of b, as [G, M, N].

    a: [M, T]; b: [T, N] of the same dtype; offs: int32 [G], where each group ends. An empty group gives zeros; what is behind
    the last group is in no product. k ascends from the group's first row, wherever that is.
    """
    out = a.new_zeros(offs.shape[0], a.shape[0], b.shape[1])
    start = 0
    for group, end in enumerate(offs.tolist()):
        out[group] = (a[:, start:end].double() @ b[start:end].double()).to(a.dtype)
        start = end
    return out


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution of images as [N, O, P, Q], rounded once. On CUDA alone: ``aten.convolution`` unfolds the others.

    x: [N, C, H, W]; weight: [O, C // groups, R, S] of the same dtype; bias: [O], or None. One sum for each pixel and channel:
    over the rows of the kernel, its columns, the channels of the group, ascending. The result is ``channels_last`` where x or
    the weight is, else contiguous.
    """
    of_bias = None if bias is None else bias.double()
    out = torch.nn.functional.conv2d(x.double(), weight.double(), of_bias, list(stride), list(padding), list(dilation), groups)
    return out.to(x.dtype)


SCALED_BLOCK = 128
"""Terms of a product of 8-bit floats that are summed before they are added to the sum of all; rows and columns of a scale."""


def scaled_gemm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The product of scaled 8-bit floats as [B, M, N], rounded once to out_dtype: float32, bfloat16 or float16.

    a: [B, M, K]; b: [B, K, N]; each in float8_e4m3fn or float8_e5m2. scale_a: float32 [B, M, groups]; scale_b: float32
    [B, groups, N], or [B, groups, ceil(N / 128)] with one for 128 columns. groups: 1 (scales of whole rows and columns), or
    ceil(K / 128), one for each block of K. bias: [N] in any of the three, or None. One product may come without the batch
    dimension, which the result does not have then. ``K == 0`` gives the bias.

    Order: K in blocks of 128, ascending. A block's products are one sum that begins with 0, in float32 or in what tensor cores
    have for 8-bit floats, which keep fewer bits; and it is added to the float32 accumulator of the whole: two levels, as
    CUTLASS and DeepSeek-V3 promote their sums. With several groups a block's sum is first multiplied by
    ``scale_a[m, g] * scale_b[g, n]``, rounded on its own; with one group the accumulator is, after the last block. So a K of up
    to 128 has the same bits in either form. Then the bias is added, in float32.
    """
    groups, blocks = scale_a.shape[-1], range(0, a.shape[-1], SCALED_BLOCK)
    scale_b = scale_b.double()
    if scale_b.shape[-1] != b.shape[-1]:
        scale_b = scale_b.repeat_interleave(SCALED_BLOCK, -1)[..., : b.shape[-1]]
    out = torch.zeros((*a.shape[:-1], b.shape[-1]), dtype=torch.float64, device=a.device)
    for block, start in enumerate(blocks):
        end = start + SCALED_BLOCK
        part = a[..., start:end].double() @ b[..., start:end, :].double()
        of_block = slice(block, block + 1) if groups > 1 else slice(0, 1)
        out += part * (scale_a[..., of_block].double() * scale_b[..., of_block, :])
    return (out if bias is None else out + bias.double()).to(out_dtype).contiguous()


def scaled_grouped_gemm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Row t of group g is ``a[t] @ b[g]`` with the scales of row t and of the columns of g, as [T, N]. The order is the same.

    a: [T, K]; b: [G, K, N]; scale_a: float32 [T]; scale_b: float32 [G, N]; offs: int32 [G], as in ``grouped_gemm``. Rows behind
    the last group are 0.
    """
    out = torch.zeros(a.shape[0], b.shape[2], dtype=out_dtype, device=a.device)
    start = 0
    for group, end in enumerate(offs.tolist()):
        scales = scale_a[start:end, None], scale_b[group][None]
        out[start:end] = scaled_gemm(a[start:end], b[group], *scales, None, out_dtype)
        start = end
    return out


def scaled_grouped_gemm_over_k(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Of group g the product of its columns of a and its rows of b, as [G, M, N]. Blocks of K count from the group's first row.

    a: [M, T]; b: [T, N]; scale_a: float32 [G, M]; scale_b: float32 [G, N]; offs: int32 [G], as in ``grouped_gemm_over_k``.
    """
    out = torch.zeros(offs.shape[0], a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    start = 0
    for group, end in enumerate(offs.tolist()):
        scales = scale_a[group][:, None], scale_b[group][None]
        out[group] = scaled_gemm(a[:, start:end], b[start:end], *scales, None, out_dtype)
        start = end
    return out


def tree_sum(parts: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Sum of the parts, as [n]. parts: [R, n], R parts of n numbers each.

    Order: neighbours are added, 0 + 1, 2 + 3, ..., and then their sums, until one is left; a last one without a neighbour goes
    on as it is. In the accumulator's dtype (float64 for float64, else float32), rounded once. So the sum of a power of two of
    parts is the sum of the sums of its halves, whoever makes them.
    """
    return parts.double().sum(0).to(out_dtype)


def row_sum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Sum of each row. x: [rows, n_cols] -> [rows]."""
    return x.double().sum(-1).to(out_dtype)


def row_mean(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Mean of each row; NaN where ``n_cols == 0``. x: [rows, n_cols] -> [rows]."""
    return x.double().mean(-1).to(out_dtype)


def row_mean_of_squares(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Mean of ``x ** 2`` of each row. x: [rows, n_cols]; out_dtype: the accumulator's of x -> [rows].

    The bits are those of ``row_mean`` of ``x ** 2``, each square rounded to the accumulator's dtype.
    """
    return x.double().square().mean(-1).to(out_dtype)


def row_norm(x: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    """``sum(|x| ** p) ** (1 / p)`` of each row, for p = 1 and p = 2. x: [rows, n_cols] -> [rows]."""
    return torch.linalg.vector_norm(x.double(), p, -1).to(out_dtype)


def row_var_mean(x: Tensor, correction: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two passes: the mean, then ``sum((x - mean) ** 2) / max(n_cols - correction, 0)``. x: [rows, n_cols] -> 2 x [rows]."""
    var, mean = torch.var_mean(x.double(), -1, correction=correction)
    return var.to(out_dtype), mean.to(out_dtype)


def row_logsumexp(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``max + log(sum(exp(x - max)))`` of each row; the maximum itself where it is infinite. x: [rows, n_cols] -> [rows]."""
    return torch.logsumexp(x.double(), -1).to(out_dtype)


def row_softmax(x: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """softmax (or log_softmax) of each row. x: [rows, n_cols] -> [rows, n_cols].

    Columns of -inf (masked) behind the row's last value change no bit of the others.
    """
    return (torch.log_softmax if log else torch.softmax)(x.double(), -1).to(out_dtype).contiguous()


def row_logprobs(x: Tensor, index: Tensor, out_dtype: torch.dtype) -> Tensor:
    """log_softmax of each row at some columns, bit for bit ``row_softmax(x, True, out_dtype).gather(1, index)``.

    x: [rows, n_cols]; index: int64 [rows, k] -> [rows, k]. An index out of range is a RuntimeError on the CPU, and an assertion
    that fails on the device on CUDA, as with ``gather``.
    """
    return row_softmax(x, True, out_dtype).gather(1, index)


def row_cumsum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Running sum of each row. x: [rows, n_cols] -> [rows, n_cols]."""
    return x.double().cumsum(-1).to(out_dtype).contiguous()


def row_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd * weight + bias``. x: [rows, n_cols]; weight, bias: [n_cols] -> y like x, mean [rows], rstd [rows].

    mean and rstd have the accumulator's dtype: float32, or float64 for float64.
    """
    wide = x.double()
    var, mean = torch.var_mean(wide, -1, correction=0)
    rstd = (var + eps).rsqrt()
    y = (wide - mean[:, None]) * rstd[:, None]
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    acc_dtype = accumulator_dtype(x.dtype)
    return y.to(x.dtype).contiguous(), mean.to(acc_dtype), rstd.to(acc_dtype)


def row_rms_norm(x: Tensor, weight: Tensor | None, eps: float, with_rstd: bool = True) -> tuple[Tensor, Tensor | None]:
    """``x * rstd * weight``, ``rstd = rsqrt(mean(x ** 2) + eps)``. x: [rows, n_cols]; weight: [n_cols] -> y, rstd [rows].

    Without ``with_rstd``, None in its place.
    """
    wide = x.double()
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    y = wide * rstd[:, None]
    y = y if weight is None else y * weight.double()
    return y.to(x.dtype).contiguous(), rstd.to(accumulator_dtype(x.dtype)) if with_rstd else None


def row_softmax_backward(grad: Tensor, y: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """The gradient of each row of x, where y = softmax(x) (or log_softmax). grad, y: [rows, n_cols] -> [rows, n_cols].

    ``(grad - sum(grad * y)) * y``, or ``grad - exp(y) * sum(grad)``.
    """
    grad, y = grad.double(), y.double()
    if log:
        out = grad - y.exp() * grad.sum(-1, keepdim=True)
    else:
        out = (grad - (grad * y).sum(-1, keepdim=True)) * y
    return out.to(out_dtype).contiguous()


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
    """The gradients of x, weight and bias, where ``y = (x - mean) * rstd * weight + bias``, None for those not wanted.

    grad, x: [rows, n_cols]; mean, rstd: [rows] as the forward gave them; without mean it is rms_norm; weight: [n_cols]
    -> like x, and twice [n_cols], in the weight's dtype, or x's. With ``z = (x - mean) * rstd`` and ``g = grad * weight``:
    ``grad_x = rstd * (g - mean(g) - z * mean(g * z))``, without mean(g) for rms_norm; ``grad_weight = sum(grad * z)`` and
    ``grad_bias = sum(grad)`` over the rows, in an order that follows the row's index alone.
    """
    wide, z = grad.double(), x.double()
    z = (z if mean is None else z - mean.double()[:, None]) * rstd.double()[:, None]
    g = wide if weight is None else wide * weight.double()
    grad_x = g - z * (g * z).mean(-1, keepdim=True)
    grad_x = grad_x if mean is None else grad_x - g.mean(-1, keepdim=True)
    grad_x = (grad_x * rstd.double()[:, None]).to(x.dtype).contiguous()
    dtype = x.dtype if weight is None else weight.dtype
    of_weight, of_bias = (wide * z).sum(0).to(dtype), wide.sum(0).to(dtype)
    return grad_x if wants_x else None, of_weight if wants_weight else None, of_bias if wants_bias else None


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
    """``softmax(scale * q @ k.T + mask) @ v`` -> out [B, H, Sq, Dv], logsumexp [B, H, Sq] in the accumulator's dtype.

    q: [B, H, Sq, D]; k: [B, Hkv, Skv, D]; v: [B, Hkv, Skv, Dv], H a multiple of Hkv: query head h reads key head
    ``h // (H // Hkv)``. D and Dv up to 256. mask: [B, H, Sq, Skv] (usually an expanded view), bool (True: visible) or of
    q's dtype (added), or None. is_causal: key j is visible to query i if ``j <= i + causal_offset`` (0: aligned at the top
    left). window: and if ``j > i + causal_offset - window``. soft_cap: scores s become ``soft_cap * tanh(s / soft_cap)``
    before the mask. sinks: [H], a score for each head that takes part in the softmax and has no value.
    A query that sees no key gives 0 and a logsumexp of -inf. Where all that it sees is hidden by the lowest value of the
    mask's dtype, the keys weigh the same, and the logsumexp is some very low number. Without ``with_lse``, None in its place.

    The order over the keys counts from the first key that any query of the same (batch, head) can see, so padding on
    either side changes no bit. positions: int64 [B, Sq], and mask_window: with both, the mask hides from a query at position p
    of its row all keys before position p - mask_window + 1. Then the order counts from position 0 of the row, whether those
    keys are hidden or not there at all: a token has the same bits at once and decoded.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * (q.double() @ k.double().transpose(-1, -2))
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    last_keys = torch.arange(q.shape[2], device=q.device)[:, None] + causal_offset
    keys = torch.arange(k.shape[2], device=q.device)
    if is_causal:
        scores = scores.masked_fill(keys > last_keys, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(keys <= last_keys - window, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        sink = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1).masked_fill((lse == -torch.inf)[..., None], 0.0)
    out = (weights @ v.double()).to(q.dtype).contiguous()
    return out, lse.to(accumulator_dtype(q.dtype)) if with_lse else None


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
    """The gradients of q, k and v, None for those not wanted, where ``out, lse = attention(q, k, v, mask, is_causal, scale)``.

    A mask must be boolean. Head dims up to 128, no float64 on CUDA. grad_out: like out -> like q, k and v.
    ``P = exp(scale * q @ k.T - lse)``, 0 where hidden; ``dS = P * (grad_out @ v.T - sum(grad_out * out))``; the gradients are
    ``scale * dS @ k``, ``scale * dS.T @ q`` and ``P.T @ grad_out``, the last two summed over the query heads that share them.
    """
    group = q.shape[1] // k.shape[1]
    wide_q, wide_k, wide_v, grad, wide_out = (x.double() for x in (q, k, v, grad_out, out))
    wide_k, wide_v = wide_k.repeat_interleave(group, 1), wide_v.repeat_interleave(group, 1)
    scores = scale * (wide_q @ wide_k.transpose(-1, -2))
    visible = torch.ones(scores.shape, dtype=torch.bool, device=q.device)
    visible = visible.tril() if is_causal else visible
    visible = visible if mask is None else visible & mask
    weights = torch.where(visible, (scores - lse.double()[..., None]).exp(), 0.0)
    delta = (grad * wide_out).sum(-1, keepdim=True)
    of_scores = weights * (grad @ wide_v.transpose(-1, -2) - delta) * scale
    grad_q = of_scores @ wide_k
    grad_k = (of_scores.transpose(-1, -2) @ wide_q).unflatten(1, (-1, group)).sum(2)
    grad_v = (weights.transpose(-1, -2) @ grad).unflatten(1, (-1, group)).sum(2)
    grads = ((grad_q, q, wants_q), (grad_k, k, wants_kv), (grad_v, v, wants_kv))
    return tuple(g.to(x.dtype).contiguous() if wanted else None for g, x, wanted in grads)


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
    """``attention`` of rows that lie behind each other -> out [T, H, Dv], logsumexp [H, T] in the accumulator's dtype.

    q: [T, H, D], the queries of row i at ``q_starts[i] : q_starts[i + 1]``; they are the last ones of the row, so with
    is_causal the last query sees every key. max_queries: of any row. q_starts: int32 [rows + 1].
    Keys without pages: k [Tk, Hkv, D] and v [Tk, Hkv, Dv], those of row i at ``k_starts[i] : k_starts[i + 1]``; k_starts:
    int32 [rows + 1]. With pages: k [n_pages, page size, Hkv, D], v likewise; pages: int32 [rows, most pages of a row], where
    key j of row i is in page ``pages[i, j // page size]`` at ``j % page size``; k_starts: int32 [rows], the number of keys.

    The order over the keys is that of ``attention``: whole, in chunks or one query at a time, a row has the same bits.
    """
    outs, lses = [], []
    for row in range(len(q_starts) - 1):
        mine = q[q_starts[row] : q_starts[row + 1]]
        if pages is None:
            keys, values = (x[k_starts[row] : k_starts[row + 1]] for x in (k, v))
        else:
            keys, values = (x[pages[row].long()].flatten(0, 1)[: k_starts[row]] for x in (k, v))
        out, lse = attention(
            *(x.transpose(0, 1)[None] for x in (mine, keys, values)),
            None,
            is_causal,
            scale,
            causal_offset=len(keys) - len(mine),
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs).contiguous(), torch.cat(lses, 1).contiguous()


def index_add(self: Tensor, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    """``self[index[i]] += alpha * source[i]`` for i ascending, summed in the accumulator's dtype, rounded once.

    self: [R, C]; index: int64 [n], each in [0, R); source: [n, C] -> [R, C].
    """
    return self.double().index_add(0, index, source.double(), alpha=alpha).to(self.dtype).contiguous()


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of this dtype are handed out in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
