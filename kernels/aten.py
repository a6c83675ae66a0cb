"""aten's operators by the kernel sets: each function here has the arguments of the aten overload it stands for.

It brings them into the canonical form of ``reference.py`` (matrices with one batch dimension, rows of a 2-d tensor), calls
the kernel set of the tensor's device, and brings the result back. Sums happen in the kernel sets alone; what is left here
is shape, dtype and pointwise work. Results are contiguous.
"""

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from pytest_batchinv.kernels.reference import accumulator_dtype
from torch import Tensor


class Refused(NotImplementedError):
    """The mode does not cover this call and says so, instead of falling back to a kernel that may vary."""


def kernel_set(x: Tensor) -> ModuleType:
    """The kernels for this tensor's device: C++ for the CPU, Triton for CUDA. Raises Refused for any other."""
    if x.device.type == "cpu":
        from pytest_batchinv.kernels import cpu

        return cpu
    if x.device.type == "cuda":
        from pytest_batchinv.kernels import cuda

        return cuda
    raise Refused(f"batch-invariant mode has kernels for cpu and cuda, not for {x.device.type}.")


# --- matrix products ---------------------------------------------------------------------------------------------------


def mm(self: Tensor, mat2: Tensor) -> Tensor:
    _check_product("mm", self, mat2, 2)
    return kernel_set(self).gemm(self[None], mat2[None])[0]


def mm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    return mm(self.to(out_dtype), mat2.to(out_dtype))


def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _check_product("addmm", mat1, mat2, 2)
    bias = _expanded_bias("addmm", self, (mat1.shape[0], mat2.shape[1]), mat1.dtype)
    return kernel_set(mat1).gemm(mat1[None], mat2[None], bias[None], float(alpha), float(beta))[0]


def addmm_dtype(self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1) -> Tensor:
    return addmm(self.to(out_dtype), mat1.to(out_dtype), mat2.to(out_dtype), beta=beta, alpha=alpha)


def addmm_activation(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1, use_gelu: bool = False) -> Tensor:
    out = addmm(self, mat1, mat2, beta=beta, alpha=alpha)
    # The gelu of the fused epilogue is the tanh form on CUDA, and the exact one on the CPU.
    form = "none" if out.device.type == "cpu" else "tanh"
    return torch.nn.functional.gelu(out, approximate=form) if use_gelu else out.relu()


def bmm(self: Tensor, mat2: Tensor) -> Tensor:
    _check_product("bmm", self, mat2, 3)
    return kernel_set(self).gemm(self, mat2)


def bmm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    return bmm(self.to(out_dtype), mat2.to(out_dtype))


def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _check_product("baddbmm", batch1, batch2, 3)
    bias = _expanded_bias("baddbmm", self, (*batch1.shape[:2], batch2.shape[2]), batch1.dtype)
    return kernel_set(batch1).gemm(batch1, batch2, bias, float(alpha), float(beta))


def baddbmm_dtype(self: Tensor, batch1: Tensor, batch2: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1) -> Tensor:
    return baddbmm(self.to(out_dtype), batch1.to(out_dtype), batch2.to(out_dtype), beta=beta, alpha=alpha)


def addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The sum over the batch is one longer K: [M, B * K] @ [B * K, N]."""
    _check_product("addbmm", batch1, batch2, 3)
    rows = batch1.transpose(0, 1).reshape(batch1.shape[1], batch1.shape[0] * batch1.shape[2])
    return addmm(self, rows, batch2.reshape(rows.shape[1], batch2.shape[2]), beta=beta, alpha=alpha)


def mv(self: Tensor, vec: Tensor) -> Tensor:
    _check_vector("mv", vec)
    return mm(self, vec[:, None])[:, 0]


def addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _check_vector("addmv", vec)
    bias = self.expand(mat.shape[0])[:, None]
    return addmm(bias, mat, vec[:, None], beta=beta, alpha=alpha)[:, 0]


def dot(self: Tensor, tensor: Tensor) -> Tensor:
    _check_vector("dot", self)
    _check_vector("dot", tensor)
    return mm(self[None], tensor[:, None])[0, 0]


def grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if bias is not None or out_dtype not in (None, self.dtype):
        raise Refused("batch-invariant mode covers _grouped_mm without bias and in the dtype of its inputs.")
    if self.dim() == 3 and mat2.dim() == 3 and offs is None:
        return bmm(self, mat2)
    if self.dim() == 2 and mat2.dim() == 3 and offs is not None:
        return kernel_set(self).grouped_gemm(self, mat2, offs)
    raise Refused(
        "batch-invariant mode covers _grouped_mm of [T, K] by [G, K, N] with offs, and of [G, M, K] by [G, K, N] without; "
        f"not {list(self.shape)} by {list(mat2.shape)}."
    )


def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Tensor:
    """1-d convolution as one GEMM a group: each output position is a row of the C // groups * k inputs under the kernel."""
    if input.dim() != 3 or transposed:
        kind = "transposed" if transposed else f"{input.dim() - 2}-d"
        raise Refused(f"batch-invariant mode covers 1-d convolution; this one is {kind}. Run it outside the mode.")
    n_batch, channels, _ = input.shape
    out_channels, group_channels, taps = weight.shape
    reach = dilation[0] * (taps - 1) + 1
    columns = torch.nn.functional.pad(input, (padding[0], padding[0])).unfold(2, reach, stride[0])[..., :: dilation[0]]
    length = columns.shape[2]
    columns = columns.reshape(n_batch, groups, group_channels, length, taps)
    rows = columns.permute(1, 0, 3, 2, 4).reshape(groups, n_batch * length, group_channels * taps)
    kernel = weight.reshape(groups, out_channels // groups, group_channels * taps).transpose(1, 2)
    offset = None
    if bias is not None:
        offset = bias.view(groups, 1, -1).expand(groups, rows.shape[1], out_channels // groups)
    out = kernel_set(input).gemm(rows, kernel, offset)
    out = out.view(groups, n_batch, length, out_channels // groups).permute(1, 0, 3, 2)
    return out.reshape(n_batch, out_channels, length)


def _check_product(name: str, a: Tensor, b: Tensor, dims: int) -> None:
    if a.dim() != dims or b.dim() != dims or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        raise RuntimeError(f"{name}: shapes cannot be multiplied ({_shape(a)} and {_shape(b)})")
    if a.dtype != b.dtype:
        raise RuntimeError(f"{name}: expected both matrices to have the same dtype, but got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise RuntimeError(f"{name}: expected both matrices on one device, but got {a.device} and {b.device}")


def _check_vector(name: str, x: Tensor) -> None:
    if x.dim() != 1:
        raise RuntimeError(f"{name}: expected a vector, but got a tensor of shape {_shape(x)}")


def _expanded_bias(name: str, bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if bias.dtype != dtype:
        raise RuntimeError(f"{name}: expected a bias of dtype {dtype}, but got {bias.dtype}")
    return bias.expand(shape)


def _shape(x: Tensor) -> str:
    return "x".join(str(size) for size in x.shape)


# --- reductions --------------------------------------------------------------------------------------------------------


def sum_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return sum_dim(self, None, dtype=dtype)


def sum_dim(self: Tensor, dim, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = self.to(dtype or self.dtype)
    rows = _Rows(x, dim, keepdim)
    return rows.restore(kernel_set(x).row_sum(rows.matrix, x.dtype))


def mean_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return mean_dim(self, None, dtype=dtype)


def mean_dim(self: Tensor, dim, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = self.to(dtype or self.dtype)
    rows = _Rows(x, dim, keepdim)
    return rows.restore(kernel_set(x).row_mean(rows.matrix, x.dtype))


def var(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return var_mean(self, dim, correction=correction, keepdim=keepdim)[0]


def std(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return std_mean(self, dim, correction=correction, keepdim=keepdim)[0]


def var_mean(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    rows = _Rows(self, dim, keepdim)
    var, mean = kernel_set(self).row_var_mean(rows.matrix, _correction(correction), self.dtype)
    return rows.restore(var), rows.restore(mean)


def std_mean(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    rows = _Rows(self, dim, keepdim)
    var, mean = kernel_set(self).row_var_mean(rows.matrix, _correction(correction), accumulator_dtype(self.dtype))
    return rows.restore(var.sqrt().to(self.dtype)), rows.restore(mean.to(self.dtype))


def logsumexp(self: Tensor, dim, keepdim: bool = False) -> Tensor:
    rows = _Rows(self, dim, keepdim)
    return rows.restore(kernel_set(self).row_logsumexp(rows.matrix, self.dtype))


def vector_norm(self: Tensor, ord: float = 2, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    """p = 1 and p = 2 in one kernel; other p as a sum of powers; 0 counts; infinite p is a maximum, free of any order."""
    x = self.to(dtype or self.dtype)
    rows = _Rows(x, dim, keepdim)
    kernels, p = kernel_set(x), float(ord)
    if p in (1.0, 2.0):
        return rows.restore(kernels.row_norm(rows.matrix, p, x.dtype))
    magnitudes = rows.matrix.abs()
    if math.isinf(p):
        return rows.restore(magnitudes.amax(1) if p > 0 else magnitudes.amin(1))
    wide = accumulator_dtype(x.dtype)
    if p == 0.0:
        return rows.restore(kernels.row_sum((magnitudes != 0).to(wide), wide).to(x.dtype))
    total = kernels.row_sum(magnitudes.to(wide).pow(p), wide)
    return rows.restore(total.pow(1.0 / p).to(x.dtype))


def norm_all(self: Tensor, p: float = 2) -> Tensor:
    return vector_norm(self, p)


def norm_all_dtype(self: Tensor, p: float | None, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dtype=dtype)


def norm_dim(self: Tensor, p: float | None, dim, keepdim: bool = False) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim)


def norm_dim_dtype(self: Tensor, p: float | None, dim, keepdim: bool, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


def cumsum(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    x = self.to(dtype or self.dtype)
    return _along(x, dim, lambda matrix: kernel_set(x).row_cumsum(matrix, x.dtype))


def softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    out_dtype = torch.float32 if half_to_float else self.dtype
    return _along(self, dim, lambda matrix: kernel_set(self).row_softmax(matrix, False, out_dtype))


def log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    out_dtype = torch.float32 if half_to_float else self.dtype
    return _along(self, dim, lambda matrix: kernel_set(self).row_softmax(matrix, True, out_dtype))


def topk(self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """The first k of a stable sort, so that ties go to the lower index for any number of rows."""
    if self.dim() == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    if k > self.shape[dim]:
        raise RuntimeError(f"selected index k out of range: k is {k}, dimension {dim} has {self.shape[dim]} elements")
    values, indices = torch.sort(self, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()


class _Rows:
    """A tensor as [rows, n_cols] over the dims that are reduced, and the way back for one value a row."""

    def __init__(self, x: Tensor, dim: int | Sequence[int] | None, keepdim: bool) -> None:
        dims = _dims(x, dim)
        kept = [d for d in range(x.dim()) if d not in dims]
        n_cols = math.prod(x.shape[d] for d in dims)
        n_rows = math.prod(x.shape[d] for d in kept)
        self.matrix = x.permute(*kept, *dims).reshape(n_rows, n_cols)
        self._shape = [1 if d in dims else x.shape[d] for d in range(x.dim()) if keepdim or d not in dims]

    def restore(self, values: Tensor) -> Tensor:
        return values.view(self._shape)


def _dims(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    """The reduced dims in ascending order; none given, or an empty list, means all of them."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    wrapped = [_wrap(x, d) for d in dims] if x.dim() else []
    if len(set(wrapped)) != len(wrapped):
        raise RuntimeError(f"dim {dims} names a dimension more than once")
    return sorted(wrapped)


def _wrap(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < max(x.dim(), 1):
        raise IndexError(f"Dimension out of range (expected to be in [{-x.dim()}, {x.dim() - 1}], but got {dim})")
    return dim % max(x.dim(), 1)


def _along(x: Tensor, dim: int, function) -> Tensor:
    """``function`` of [rows, n_cols] -> [rows, n_cols], applied along any dim."""
    if x.dim() == 0:
        return function(x.view(1, 1)).view(())
    dim = _wrap(x, dim)
    moved = x.movedim(dim, -1)
    n_cols = moved.shape[-1]
    out = function(moved.reshape(math.prod(moved.shape[:-1]), n_cols))
    return out.view(moved.shape).movedim(-1, dim).contiguous()


def _correction(correction: float | None) -> float:
    return 1.0 if correction is None else float(correction)


# --- norms -------------------------------------------------------------------------------------------------------------


def native_layer_norm(input, normalized_shape, weight, bias, eps) -> tuple[Tensor, Tensor, Tensor]:
    n_dims = len(normalized_shape)
    if list(input.shape[input.dim() - n_dims :]) != list(normalized_shape):
        raise RuntimeError(
            f"Given normalized_shape={list(normalized_shape)}, expected input with shape "
            f"[*, {', '.join(map(str, normalized_shape))}], but got input of size {list(input.shape)}"
        )
    leading = input.shape[: input.dim() - n_dims]
    matrix = input.reshape(math.prod(leading), math.prod(normalized_shape))
    y, mean, rstd = kernel_set(input).row_layer_norm(matrix, _flat(weight), _flat(bias), eps)
    stats = (*leading, *[1] * n_dims)
    # The CPU's stock layer norm hands its statistics out in the input's dtype when no parameter is wider; CUDA's never.
    stats_dtype = input.dtype if input.device.type == "cpu" and not _wider(weight, input) else mean.dtype
    return y.view(input.shape), mean.view(stats).to(stats_dtype), rstd.view(stats).to(stats_dtype)


def native_group_norm(input, weight, bias, N, C, HxW, group, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of C // group * HxW values normalised by the layer norm's kernel, then one scale and shift a channel."""
    matrix = input.reshape(N * group, C // group * HxW)
    wide = accumulator_dtype(input.dtype)
    y, mean, rstd = kernel_set(input).row_layer_norm(matrix.to(wide), None, None, eps)
    y = y.view(N, C, HxW)
    y = y if weight is None else y * weight.to(wide).view(1, C, 1)
    y = y if bias is None else y + bias.to(wide).view(1, C, 1)
    stats_dtype = input.dtype if input.device.type != "cpu" or not _wider(weight, input) else mean.dtype
    y = y.to(input.dtype).view(input.shape)
    return y, mean.view(N, group).to(stats_dtype), rstd.view(N, group).to(stats_dtype)


def fused_rms_norm(input, normalized_shape, weight, eps) -> tuple[Tensor, Tensor]:
    n_dims = len(normalized_shape)
    leading = input.shape[: input.dim() - n_dims]
    matrix = input.reshape(math.prod(leading), math.prod(normalized_shape))
    eps = torch.finfo(accumulator_dtype(input.dtype)).eps if eps is None else eps
    y, rstd = kernel_set(input).row_rms_norm(matrix, _flat(weight), eps)
    return y.view(input.shape), rstd.view(*leading, *[1] * n_dims)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1)


def _wider(parameter: Tensor | None, x: Tensor) -> bool:
    return parameter is not None and parameter.dtype != x.dtype


# --- attention ---------------------------------------------------------------------------------------------------------

ATTENTION_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale) -> (Tensor, Tensor)"
)
MAX_HEAD_DIM = 256


def attention(query, key, value, mask, is_causal, scale) -> tuple[Tensor, Tensor]:
    """``reference.attention`` on the tensors' device. Raises Refused for head dims above 256."""
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        raise Refused(f"batch-invariant attention covers head dims up to {MAX_HEAD_DIM}, not {query.shape[-1]}.")
    if query.device.type == "cuda" and query.dtype == torch.float64 and max(query.shape[-1], value.shape[-1]) > 128:
        raise Refused("batch-invariant attention in float64 covers head dims up to 128 on CUDA: Triton compiles no larger.")
    return kernel_set(query).attention(query, key, value, mask, is_causal, scale)


def attention_fake(query, key, value, mask, is_causal, scale) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))


def attention_setup_context(ctx, inputs, output) -> None:
    query, key, value, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def attention_backward(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    """The weights are computed again from the logsumexp: P = exp(S - lse), dS = P * (dO @ V.T - rowsum(dO * O) + dlse)."""
    query, key, value, mask, out, lse = ctx.saved_tensors
    wide = accumulator_dtype(query.dtype)
    group = query.shape[1] // key.shape[1]
    q, k, v, out, grad_out = (x.to(wide) for x in (query, key, value, out, grad_out))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * ctx.scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if ctx.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = (scores - lse[..., None]).exp().masked_fill((lse == -torch.inf)[..., None], 0.0)
    delta = (grad_out * out).sum(-1, keepdim=True) - (0 if grad_lse is None else grad_lse.to(wide)[..., None])
    grad_scores = weights * (grad_out @ v.transpose(-1, -2) - delta) * ctx.scale
    grad_q = grad_scores @ k
    grad_k = (grad_scores.transpose(-1, -2) @ q).unflatten(1, (-1, group)).sum(2)
    grad_v = (weights.transpose(-1, -2) @ grad_out).unflatten(1, (-1, group)).sum(2)
    return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(value.dtype), None, None, None


def flash_attention_for_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    _refuse_dropout(dropout_p)
    mask = _expanded_mask(attn_mask, query, key)
    return attention(query, key, value, mask, is_causal, _scale(query, scale))


def efficient_attention(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    _refuse_dropout(dropout_p)
    mask = _expanded_mask(attn_bias, query, key)
    out, lse = attention(query, key, value, mask, is_causal, _scale(query, scale))
    seed = torch.empty((), dtype=torch.int64, device=query.device)
    return out, lse if compute_log_sumexp else lse[..., :0], seed, seed.clone()


# --- composites: above autograd, made of differentiable operators that the table covers --------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Always one product of [rows, K] by [K, N] with the bias in its epilogue.

    torch chooses between addmm and a product followed by an addition by contiguity, which can depend on the batch.
    """
    if weight.dim() == 1:
        out = input.matmul(weight)
        return out if bias is None else out + bias
    rows = input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out if input.dim() == 2 else out.view(*input.shape[:-1], weight.shape[0])


def rms_norm(input: Tensor, normalized_shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """In the accumulator's dtype, weight included, rounded once; the same operators in eager and compiled code."""
    wide = accumulator_dtype(input.dtype)
    x = input.to(wide)
    eps = torch.finfo(wide).eps if eps is None else eps
    dims = list(range(-len(normalized_shape), 0))
    x = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    x = x if weight is None else x * weight.to(wide)
    return x.to(input.dtype)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Tensor:
    """One kernel whatever backend torch would pick: the pick depends on masks, strides and head dims."""
    _refuse_dropout(dropout_p)
    if attn_mask is not None and is_causal:
        raise RuntimeError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
    if attn_mask is not None and attn_mask.requires_grad:
        raise Refused("batch-invariant attention has no gradient for attn_mask; detach it.")
    if query.dim() < 3 or key.dim() != query.dim() or value.dim() != query.dim():
        raise Refused(
            "batch-invariant attention covers query, key and value of one rank from 3 on, "
            f"not {list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
        )
    leading = query.shape[:-2]
    query, key, value = (_four_dims(x) for x in (query, key, value))
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise RuntimeError(
            f"scaled_dot_product_attention: {query.shape[1]} query heads and {key.shape[1]} key heads need enable_gqa=True"
        )
    if attn_mask is not None:
        attn_mask = _expanded_mask(_four_dims(attn_mask) if attn_mask.dim() > 4 else attn_mask, query, key)
    out, _ = torch.ops.batchinv.attention(query, key, value, attn_mask, is_causal, _scale(query, scale))
    return out.view(*leading, *out.shape[-2:])


def _four_dims(x: Tensor) -> Tensor:
    """[B, H, S, D] from any rank: a missing batch is 1, and further leading dims go into the batch."""
    if x.dim() == 3:
        return x[None]
    return x if x.dim() == 4 else x.flatten(0, x.dim() - 4)


def _expanded_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


def _scale(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p > 0.0:
        raise Refused("batch-invariant attention has no dropout; call it with dropout_p=0 (model.eval()).")


# --- scatter -----------------------------------------------------------------------------------------------------------


def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    if self.dim() == 0:
        return index_add(self[None], 0, index, source.reshape(1), alpha=alpha)[0]
    if index.dim() > 1 or self.dtype != source.dtype:
        raise RuntimeError(f"index_add: expected a vector as index and one dtype, but got {_shape(index)}, {source.dtype}")
    dim = _wrap(self, dim)
    moved, index = self.movedim(dim, 0), _checked(index.reshape(-1).long(), self.shape[dim])
    source = source.reshape(self.shape[:dim] + index.shape + self.shape[dim + 1 :]).movedim(dim, 0)
    n_cols = math.prod(moved.shape[1:])
    out = kernel_set(self).index_add(
        moved.reshape(moved.shape[0], n_cols), index, source.reshape(index.shape[0], n_cols), float(alpha)
    )
    return out.view(moved.shape).movedim(0, dim).contiguous()


def scatter_add(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """Each value as a row of one column, added at its place in the flat tensor, in the order of the flat index."""
    if self.dim() == 0:
        return scatter_add(self[None], 0, index.reshape(1), src.reshape(1))[0]
    dim = _wrap(self, dim)
    index = _checked(index, self.shape[dim])
    src = src[tuple(slice(size) for size in index.shape)]
    strides = [math.prod(self.shape[d + 1 :]) for d in range(self.dim())]
    place = index * strides[dim]
    for d in range(self.dim()):
        if d != dim:
            steps = torch.arange(index.shape[d], device=index.device) * strides[d]
            place = place + steps.view([-1 if i == d else 1 for i in range(self.dim())])
    out = kernel_set(self).index_add(self.reshape(-1, 1), place.reshape(-1), src.reshape(-1, 1), 1.0)
    return out.view(self.shape)


def _checked(index: Tensor, size: int) -> Tensor:
    """On the CPU an index out of range is an IndexError; on CUDA such rows are left out, as asking would wait for the GPU."""
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise IndexError(f"index out of range: indices must be from 0 to {size - 1}")
    return index


# --- pointwise operators whose stock CPU kernels treat the vector's tail differently -----------------------------------


def _pointwise(x: Tensor, kind: str, *params: float) -> Tensor:
    from pytest_batchinv.kernels import cpu

    return cpu.pointwise(x, kind, params)


def unary(kind: str) -> Callable[[Tensor], Tensor]:
    """A pointwise operator without further arguments."""
    return lambda self: _pointwise(self, kind)


def gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    return _pointwise(self, "gelu_tanh" if approximate == "tanh" else "gelu")


def softplus(self: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return _pointwise(self, "softplus", beta, threshold)


def elu(self: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return _pointwise(self, "elu", alpha, scale, input_scale)


def pow(self: Tensor, exponent: float) -> Tensor:
    return _pointwise(self, "pow", exponent)
