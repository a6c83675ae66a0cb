"""Layer, group, batch and rms norm, and their gradients."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from pytest_batchinv.kernels.aten.common import FLOATS, Refused, Step, after, kernel_set, merged, planned, shape_of
from pytest_batchinv.kernels.aten.reductions import sum_dim, vector_norm
from pytest_batchinv.kernels.plans import Description, describe, plan
from pytest_batchinv.kernels.reference import accumulator_dtype


def native_layer_norm(input, normalized_shape, weight, bias, eps) -> tuple[Tensor, Tensor, Tensor]:
    parameters = describe(weight), describe(bias)
    return _plan_layer_norm(describe(input), tuple(normalized_shape), *parameters, eps, True)(input, weight, bias)


@plan
def _plan_layer_norm(
    x: Description,
    normalized_shape: tuple[int, ...],
    weight: Description | None,
    bias: Description | None,
    eps: float,
    with_statistics: bool,
) -> Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]:
    n_dims = _check_normalized("layer_norm", x, normalized_shape, weight, bias)
    _check_parameter_dtypes("layer_norm", x, weight, bias)
    (rows, rows_of), (flat, flatten), (flat_bias, flatten_bias) = _rows(x, n_dims), _flat(weight), _flat(bias)
    shape = x.shape, _statistics_shape(x, n_dims)
    norm = planned("row_layer_norm", (rows, flat, flat_bias), eps, shape=shape, with_statistics=with_statistics)
    norm = after((rows_of, flatten, flatten_bias), norm)
    # The CPU's stock layer norm hands its statistics out in the input's dtype when no parameter is wider; CUDA's never.
    dtype = x.dtype
    if x.device.type != "cpu" or _wider(weight, x) or _wider(bias, x) or accumulator_dtype(dtype) == dtype:
        return norm

    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, *statistics = norm(x, weight, bias)
        return y, *(z if z is None else z.to(dtype) for z in statistics)

    return call


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True) -> Tensor:
    """torch's own composite."""
    return torch.native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def planned_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True) -> Tensor:
    """:func:`layer_norm` for calls in which the dispatcher has nothing to do: nobody asks for mean and rstd."""
    if input.dtype not in FLOATS:
        return layer_norm(input, normalized_shape, weight, bias, eps)
    parameters = describe(weight), describe(bias)
    return _plan_layer_norm(describe(input), tuple(normalized_shape), *parameters, eps, False)(input, weight, bias)[0]


def native_group_norm(input, weight, bias, N, C, HxW, group, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of C // group * HxW values normalised by the layer norm's kernel, then one scale and shift a channel."""
    if group < 1 or C % group or input.numel() != N * C * HxW:
        raise RuntimeError(f"group_norm: {N} x {C} x {HxW} values in {group} groups do not fit an input of {shape_of(input)}")
    if torch.__version__ >= "2.14" and (C < 1 or HxW < 1):  # as torch has it since; an empty batch stays allowed
        raise RuntimeError(f"group_norm: expected at least one channel and one value in each, but got {C} x {HxW}")
    if any(x is not None and tuple(x.shape) != (C,) for x in (weight, bias)):
        raise RuntimeError(f"group_norm: expected weight and bias of {C} values, one for each channel")
    # Before torch 2.14 as torch has it; its composite made the input contiguous, which a later one leaves to the kernel.
    if torch.__version__ < "2.14" and not input.is_contiguous(memory_format=suggest_memory_format(input)):
        raise RuntimeError(f"group_norm: expected a contiguous input, but got strides {input.stride()}; call contiguous()")
    _check_parameter_dtypes("group_norm", input, weight, bias)
    if not input.numel():
        return input.new_empty(input.shape), input.new_zeros(N, group), input.new_zeros(N, group)
    matrix = input.reshape(N * group, C // group * HxW)
    wide = accumulator_dtype(input.dtype)
    y, mean, rstd = kernel_set(input).row_layer_norm(matrix.to(wide), None, None, eps)
    y = y.view(N, C, HxW)
    y = y if weight is None else y * weight.to(wide).view(1, C, 1)
    y = y if bias is None else y + bias.to(wide).view(1, C, 1)
    wider = _wider(weight, input) or _wider(bias, input)
    stats_dtype = input.dtype if input.device.type != "cpu" or not wider else mean.dtype
    y = y.to(input.dtype).view(input.shape)
    return y, mean.view(N, group).to(stats_dtype), rstd.view(N, group).to(stats_dtype)


def batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled) -> Tensor:
    """``(x - mean) * (rstd * weight) + bias`` a channel, each step rounded in the accumulator's dtype; the result once.

    input: [N, C, *sizes]. Trained with, mean and variance are the batch's, in the order of ``var_mean``: rows then depend on
    each other, as they should. Else they are the running ones, and each value is by itself.
    """
    if input.dim() < 2:
        raise RuntimeError(f"batch_norm: expected an input of at least 2 dims, but got {shape_of(input)}")
    channels = input.shape[1]
    for parameter in (weight, bias, running_mean, running_var):
        if parameter is not None and parameter.numel() != channels:
            raise RuntimeError(
                f"batch_norm: expected parameters and statistics of {channels} values, not {shape_of(parameter)}"
            )
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError("batch_norm: running_mean and running_var must be defined in evaluation mode")
    wide = accumulator_dtype(input.dtype)
    x, of_channel = input.to(wide), (1, channels, *[1] * (input.dim() - 2))
    if training:
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        _update_running(running_mean, running_var, mean, var, input.numel() // max(channels, 1), momentum)
    else:
        var, mean = running_var.to(wide), running_mean.to(wide)
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight.to(wide)
    y = (x - mean.view(of_channel)) * scale.view(of_channel)
    y = y if bias is None else y + bias.to(wide).view(of_channel)
    return y.to(input.dtype)


@torch.no_grad()
def _update_running(running_mean, running_var, mean: Tensor, var: Tensor, n: int, momentum: float) -> None:
    unbiased = var * (n / max(n - 1, 1))
    for running, of_batch in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            running.copy_(running * (1 - momentum) + of_batch * momentum)


def weight_norm_interface(v, g, dim: int = 0) -> tuple[Tensor, Tensor]:
    """``v * (g / |v|)``, the norm over all dims but one by ``vector_norm``; and the norm, in the accumulator's dtype."""
    wide = accumulator_dtype(v.dtype)
    norms = vector_norm(v.to(wide), 2, [d for d in range(v.dim()) if d != dim % v.dim()], True)
    return (v.to(wide) * (g.to(wide) / norms)).to(v.dtype), norms


def fused_rms_norm(input, normalized_shape, weight, eps) -> tuple[Tensor, Tensor]:
    return _plan_rms_norm(describe(input), tuple(normalized_shape), describe(weight), eps, True)(input, weight)


def rms_norm(input, normalized_shape, weight=None, eps=None) -> Tensor:
    """The same kernel in eager and in compiled code, with a gradient and without."""
    _check_rms_norm(input, normalized_shape, weight)
    return torch.ops.batchinv._fused_rms_norm.default(input, normalized_shape, weight, eps)[0]


def planned_rms_norm(input, normalized_shape, weight=None, eps=None) -> Tensor:
    """:func:`rms_norm` for calls in which the dispatcher has nothing to do: nobody asks for rstd."""
    return _plan_rms_norm_alone(describe(input), tuple(normalized_shape), describe(weight), eps)(input, weight)[0]


@plan
def _plan_rms_norm_alone(
    x: Description, normalized_shape: tuple[int, ...], weight: Description | None, eps: float | None
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    _check_rms_norm(x, normalized_shape, weight)
    return _plan_rms_norm(x, normalized_shape, weight, eps, False)


def _check_rms_norm(x: Tensor | Description, normalized_shape: Sequence[int], weight: Tensor | Description | None) -> None:
    """What the composite refuses by errors of other types than the leaf, as torch has it."""
    if not 0 < len(normalized_shape) <= x.dim():
        _check_normalized("rms_norm", x, normalized_shape, weight)
    if not x.is_floating_point():
        _check_normalized("rms_norm", x, normalized_shape, weight)
        raise (Refused if x.is_complex() else NotImplementedError)(f"rms_norm is for floats, not for {x.dtype}.")


@plan
def _plan_rms_norm(
    x: Description, normalized_shape: tuple[int, ...], weight: Description | None, eps: float | None, with_rstd: bool
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    n_dims = _check_normalized("_fused_rms_norm", x, normalized_shape, weight)
    wide = accumulator_dtype(x.dtype)
    if weight is not None and not weight.is_floating_point():
        norm = _plan_rms_norm(x, normalized_shape, weight._replace(dtype=wide).contiguous(), eps, with_rstd)
        return after((None, lambda weight: weight.to(wide, memory_format=torch.contiguous_format)), norm)
    (rows, rows_of), (flat, flatten) = _rows(x, n_dims), _flat(weight)
    eps = torch.finfo(wide).eps if eps is None else eps
    norm = planned("row_rms_norm", (rows, flat), eps, with_rstd, shape=(x.shape, _statistics_shape(x, n_dims)))
    return after((rows_of, flatten), norm)


NORM_BACKWARD_SCHEMA = (
    "norm_backward(Tensor grad, Tensor input, SymInt[] normalized_shape, Tensor? mean, Tensor rstd, Tensor? weight, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of x, weight and bias; None for those that nobody needs."""


def norm_backward(grad, input, normalized_shape, mean, rstd, weight, output_mask) -> Gradients:
    """The gradients of a layer norm, or without mean of an rms norm. mean, rstd: the forward's, one value a row."""
    described = [describe(x) for x in (grad, input, mean, rstd, weight)]
    return _plan_norm_backward(*described, tuple(normalized_shape), tuple(output_mask))(grad, input, mean, rstd, weight)


@plan
def _plan_norm_backward(
    grad: Description,
    x: Description,
    mean: Description | None,
    rstd: Description,
    weight: Description | None,
    normalized_shape: tuple[int, ...],
    wants: tuple[bool, bool, bool],
) -> Callable[..., Gradients]:
    n_dims = _check_normalized("norm_backward", x, normalized_shape, weight)
    if grad.shape != x.shape or grad.device != x.device:
        raise RuntimeError(f"norm_backward: expected a gradient like the input {shape_of(x)}, but got {shape_of(grad)}")
    n_rows = math.prod(x.shape[: len(x.shape) - n_dims])
    for statistic in (mean, rstd):
        if statistic is not None and (math.prod(statistic.shape) != n_rows or statistic.device != x.device):
            raise RuntimeError(
                f"norm_backward: expected a mean and an rstd for each of {n_rows} rows on {x.device}, but got "
                f"{shape_of(statistic)} on {statistic.device}"
            )
    brought = [_rows(grad, n_dims), _rows(x, n_dims), _flat(mean), _flat(rstd), _flat(weight)]
    rows, steps = zip(*brought, strict=True)
    return after(steps, planned("row_norm_backward", rows, *wants, shape=(x.shape, normalized_shape)))


def norm_backward_fake(grad, input, normalized_shape, mean, rstd, weight, output_mask) -> Gradients:
    like_parameters = (input if weight is None else weight).new_empty(normalized_shape)
    results = input.new_empty(input.shape), like_parameters, like_parameters.new_empty(normalized_shape)
    return tuple(x if wanted else None for x, wanted in zip(results, output_mask, strict=True))


def native_layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask) -> Gradients:
    if bias is not None and tuple(bias.shape) != tuple(normalized_shape):
        raise RuntimeError(f"layer_norm: expected a bias of shape {tuple(normalized_shape)}, but got {shape_of(bias)}")
    return norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, output_mask)


def fused_rms_norm_backward(
    grad_out, input, normalized_shape, rstd, weight, output_mask
) -> tuple[Tensor | None, Tensor | None]:
    wants = output_mask[0], output_mask[1] and weight is not None, False
    return norm_backward(grad_out, input, normalized_shape, None, rstd, weight, wants)[:2]


def native_group_norm_backward(grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask) -> Gradients:
    """The layer norm's kernel on rows of C // group * HxW values, after one scale a channel; sums over rows and places."""
    wide, by_channel = accumulator_dtype(input.dtype), (N, C, HxW)
    grad, x = (t.to(wide).reshape(by_channel) for t in (grad_out, input))
    mean, rstd = (t.to(wide).reshape(N * group) for t in (mean, rstd))
    grad_x = of_weight = of_bias = None
    if output_mask[0]:
        scaled = grad if weight is None else grad * weight.to(wide).view(1, C, 1)
        rows = (t.reshape(N * group, C // group * HxW) for t in (scaled, x))
        grad_x = norm_backward(*rows, (C // group * HxW,), mean, rstd, None, (True, False, False))[0]
        grad_x = grad_x.to(input.dtype).view(input.shape)
    dtype = input.dtype if weight is None else weight.dtype
    if output_mask[1]:
        per_channel = (t.view(N, group, 1).expand(N, group, C // group).reshape(N, C, 1) for t in (mean, rstd))
        centre, scale = per_channel
        of_weight = sum_dim(grad * ((x - centre) * scale), [0, 2]).to(dtype)
    if output_mask[2]:
        of_bias = sum_dim(grad, [0, 2]).to(dtype)
    return grad_x, of_weight, of_bias


def rms_norm_setup_context(ctx, inputs, output) -> None:
    input, ctx.normalized_shape, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, output[1])
    ctx.save_for_forward(input, weight, output[1])


def rms_norm_backward(ctx, grad_y: Tensor | None, grad_rstd: Tensor | None):
    """By the kernel; by operators that have gradients themselves where those are asked for, or where rstd was used."""
    input, weight, rstd = ctx.saved_tensors
    if grad_y is None and grad_rstd is None:
        return None, None, None, None
    if torch.is_grad_enabled() or grad_rstd is not None:
        grad_y = torch.zeros_like(input) if grad_y is None else grad_y
        return _rms_norm_backward_by_operators(ctx, grad_y, grad_rstd)
    wants = ctx.needs_input_grad[0], ctx.needs_input_grad[2], False
    backward = torch.ops.batchinv.norm_backward.default
    grad_x, grad_weight, _ = backward(grad_y, input, ctx.normalized_shape, None, rstd, weight, wants)
    return grad_x, None, grad_weight, None


def _rms_norm_backward_by_operators(ctx, grad_y: Tensor, grad_rstd: Tensor | None):
    """Of y = x * rstd * weight, where the derivative of rstd = (mean(x ** 2) + eps) ** -0.5 is -rstd ** 3 * x / n."""
    input, weight, rstd = ctx.saved_tensors
    shape = ctx.normalized_shape
    x, grad = input.to(rstd.dtype), grad_y.to(rstd.dtype)
    grad_weight = None
    if ctx.needs_input_grad[2]:
        rows = math.prod(input.shape[: input.dim() - len(shape)])
        grad_weight = (grad * (x * rstd)).reshape(rows, *shape).sum(0).to(weight.dtype)
    grad = grad if weight is None else grad * weight.to(rstd.dtype)
    of_rstd = (grad * x).mean(_last(shape), keepdim=True)
    of_rstd = of_rstd if grad_rstd is None else of_rstd + grad_rstd / math.prod(shape)
    grad_x = grad * rstd - x * (rstd * rstd * rstd * of_rstd)
    return grad_x.to(input.dtype), None, grad_weight, None


def rms_norm_jvp(ctx, tangent: Tensor | None, _shape, weight_tangent: Tensor | None, _eps) -> tuple[Tensor, Tensor]:
    input, weight, rstd = ctx.saved_tensors
    x = input.to(rstd.dtype)
    y, rstd_tangent = torch.zeros_like(x), torch.zeros_like(rstd)
    if tangent is not None:
        tangent = tangent.to(rstd.dtype)
        rstd_tangent = -rstd * rstd * rstd * (x * tangent).mean(_last(ctx.normalized_shape), keepdim=True)
        y = tangent * rstd + x * rstd_tangent
        y = y if weight is None else y * weight.to(rstd.dtype)
    if weight_tangent is not None:
        y = y + x * rstd * weight_tangent.to(rstd.dtype)
    return y.to(input.dtype), rstd_tangent


def _last(normalized_shape: Sequence[int]) -> list[int]:
    return list(range(-len(normalized_shape), 0))


def _check_normalized(
    name: str, input: Tensor | Description, normalized_shape: Sequence[int], *parameters: Tensor | Description | None
) -> int:
    """How many dims are normalised. Raises RuntimeError where they are not the input's last, or not the parameters'."""
    shape, n_dims = tuple(normalized_shape), len(normalized_shape)
    for parameter in parameters:
        if parameter is not None and parameter.shape != shape:
            raise RuntimeError(f"{name}: expected weight and bias of shape {list(shape)}, but got {list(parameter.shape)}")
        if parameter is not None and parameter.device != input.device:
            raise RuntimeError(f"{name}: expected weight and bias on {input.device}, but got one on {parameter.device}")
    sizes = input.shape
    if n_dims == 0 or n_dims > len(sizes) or sizes[-1] != shape[-1] or n_dims > 1 and sizes[-n_dims:] != shape:
        error = ValueError if name == "rms_norm" and n_dims > input.dim() else RuntimeError  # torch's types
        raise error(
            f"{name}: normalized_shape={list(shape)} must hold the last sizes of the input, at least one, "
            f"and the input is {list(input.shape)}"
        )
    return n_dims


def _check_parameter_dtypes(
    name: str, input: Tensor | Description, weight: Tensor | Description | None, bias: Tensor | Description | None
) -> None:
    """The parameters share one dtype: the input's, or float32 beside 16 bits on the CPU."""
    dtypes = {x.dtype for x in (weight, bias) if x is not None}
    is_mixed = input.device.type == "cpu" and input.dtype in (torch.float16, torch.bfloat16) and dtypes == {torch.float32}
    if not (dtypes <= {input.dtype} or is_mixed):
        raise RuntimeError(
            f"{name}: expected weight and bias in the input's dtype {input.dtype}, or both in float32 beside 16 bits "
            f"on the CPU, but got {', '.join(map(str, dtypes))}"
        )


def _rows(x: Description, n_dims: int) -> tuple[Description, Step]:
    """[rows, n_cols]: the last n_dims are a row."""
    first = x.dim() - n_dims
    return merged(x, range(first), range(first, x.dim()))


def _statistics_shape(x: Description, n_dims: int) -> tuple[int, ...]:
    return (*x.shape[: x.dim() - n_dims], *[1] * n_dims)


def _flat(parameter: Description | None) -> tuple[Description | None, Step]:
    return (None, None) if parameter is None else merged(parameter, range(parameter.dim()))


def _wider(parameter: Tensor | Description | None, x: Tensor | Description) -> bool:
    return parameter is not None and parameter.dtype != x.dtype
