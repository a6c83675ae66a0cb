"""Layer, group and rms norm."""

import math
from collections.abc import Sequence

import torch
from pytest_batchinv.kernels.aten.common import Refused, kernel_set, shape_of
from pytest_batchinv.kernels.reference import accumulator_dtype
from torch import Tensor
from torch._prims_common import suggest_memory_format


def native_layer_norm(input, normalized_shape, weight, bias, eps) -> tuple[Tensor, Tensor, Tensor]:
    n_dims = _check_normalized("layer_norm", input, normalized_shape, weight, bias)
    _check_parameter_dtypes("layer_norm", input, weight, bias)
    leading = input.shape[: input.dim() - n_dims]
    matrix = input.reshape(math.prod(leading), math.prod(normalized_shape))
    y, mean, rstd = kernel_set(input).row_layer_norm(matrix, _flat(weight), _flat(bias), eps)
    stats = (*leading, *[1] * n_dims)
    # The CPU's stock layer norm hands its statistics out in the input's dtype when no parameter is wider; CUDA's never.
    wider = _wider(weight, input) or _wider(bias, input)
    stats_dtype = input.dtype if input.device.type == "cpu" and not wider else mean.dtype
    return y.view(input.shape), mean.view(stats).to(stats_dtype), rstd.view(stats).to(stats_dtype)


def native_group_norm(input, weight, bias, N, C, HxW, group, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of C // group * HxW values normalised by the layer norm's kernel, then one scale and shift a channel."""
    if group < 1 or C % group or input.numel() != N * C * HxW:
        raise RuntimeError(f"group_norm: {N} x {C} x {HxW} values in {group} groups do not fit an input of {shape_of(input)}")
    if any(x is not None and tuple(x.shape) != (C,) for x in (weight, bias)):
        raise RuntimeError(f"group_norm: expected weight and bias of {C} values, one for each channel")
    if not input.is_contiguous(memory_format=suggest_memory_format(input)):
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


def fused_rms_norm(input, normalized_shape, weight, eps) -> tuple[Tensor, Tensor]:
    n_dims = _check_normalized("rms_norm", input, normalized_shape, weight)
    leading = input.shape[: input.dim() - n_dims]
    matrix = input.reshape(math.prod(leading), math.prod(normalized_shape))
    eps = torch.finfo(accumulator_dtype(input.dtype)).eps if eps is None else eps
    y, rstd = kernel_set(input).row_rms_norm(matrix, _flat(weight), eps)
    return y.view(input.shape), rstd.view(*leading, *[1] * n_dims)


def _check_normalized(name: str, input: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> int:
    """How many dims are normalised. Raises RuntimeError where they are not the input's last, or not the parameters'."""
    shape, n_dims = tuple(normalized_shape), len(normalized_shape)
    for parameter in parameters:
        if parameter is not None and tuple(parameter.shape) != shape:
            raise RuntimeError(f"{name}: expected weight and bias of shape {list(shape)}, but got {list(parameter.shape)}")
    if n_dims == 0 or n_dims > input.dim() or tuple(input.shape[input.dim() - n_dims :]) != shape:
        error = ValueError if name == "rms_norm" and n_dims > input.dim() else RuntimeError  # torch's types
        raise error(
            f"{name}: normalized_shape={list(shape)} must hold the last sizes of the input, at least one, "
            f"and the input is {list(input.shape)}"
        )
    return n_dims


def _check_parameter_dtypes(name: str, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """The parameters share one dtype: the input's, or float32 beside 16 bits on the CPU."""
    dtypes = {x.dtype for x in (weight, bias) if x is not None}
    is_mixed = input.device.type == "cpu" and input.dtype in (torch.float16, torch.bfloat16) and dtypes == {torch.float32}
    if not (dtypes <= {input.dtype} or is_mixed):
        raise RuntimeError(
            f"{name}: expected weight and bias in the input's dtype {input.dtype}, or both in float32 beside 16 bits "
            f"on the CPU, but got {', '.join(map(str, dtypes))}"
        )


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1)


def _wider(parameter: Tensor | None, x: Tensor) -> bool:
    return parameter is not None and parameter.dtype != x.dtype


def rms_norm(input: Tensor, normalized_shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """In the accumulator's dtype, weight included, rounded once; the same operators in eager and compiled code."""
    n_dims = _check_normalized("rms_norm", input, normalized_shape, weight)
    if not input.is_floating_point():
        raise (Refused if input.is_complex() else NotImplementedError)(f"rms_norm is for floats, not for {input.dtype}.")
    wide = accumulator_dtype(input.dtype)
    x = input.to(wide)
    eps = torch.finfo(wide).eps if eps is None else eps
    dims = list(range(-n_dims, 0))
    x = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    x = x if weight is None else x * weight.to(wide)
    return x.to(input.dtype).contiguous()
