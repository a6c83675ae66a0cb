"""What the modules of this package share: the refusal, the kernels of a device and how they are planned, words for shapes."""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pytest_batchinv.kernels.plans import Description

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Step = Callable[[Tensor], Tensor] | None
"""What prepares a tensor for a kernel; None where there is nothing to do."""


class Refused(NotImplementedError):
    """The mode does not cover this call and says so, instead of falling back to a kernel that may vary."""


def kernel_set(x: Tensor | Description) -> ModuleType:
    """The kernels for such a tensor: those of its device, and for complex numbers what is made of them."""
    return kernels_of_complex_numbers() if x.dtype.is_complex else kernels_of_device(x.device)


@functools.cache
def kernels_of_device(device: torch.device) -> ModuleType:
    """C++ for the CPU, Triton for CUDA. Raises Refused for any other."""
    if device.type == "cpu":
        from pytest_batchinv.kernels import cpu

        return cpu
    if device.type == "cuda":
        from pytest_batchinv.kernels import cuda

        return cuda
    raise Refused(f"batch-invariant mode has kernels for cpu and cuda, not for {device.type}.")


@functools.cache
def kernels_of_complex_numbers() -> ModuleType:
    from pytest_batchinv.kernels import complex_parts

    return complex_parts


# A kernel set that plans (CUDA's) is told sizes and strides while planning, and reads a tensor's address alone when called: a
# view at the same address needs not be made. Other sets are called with the views.


def reads_addresses(x: Description) -> bool:
    """Whether the kernels for x read a tensor's address alone when called."""
    return hasattr(kernel_set(x), "plan_gemm")


def planned(
    kernel: str, tensors: tuple[Description | None, ...], *options: Any, shape: Any = None, **spared: bool
) -> Callable[..., Any]:
    """``kernel`` of ``reference.py`` with these options, as a function of such tensors (then of numbers, for ``gemm``).

    shape: of the result; for norms a pair, for y and for what there is of each row. spared: False for results that the caller
    does without, which a set that plans then leaves out (None in its place).
    """
    kernels = kernel_set(_present(tensors))
    if hasattr(kernels, f"plan_{kernel}"):
        return getattr(kernels, f"plan_{kernel}")(*tensors, *options, shape=shape, **spared)
    function = getattr(kernels, kernel)
    if shape is None:
        return lambda *given: function(*given, *options)
    return lambda *given: _viewed(function(*given, *options), shape)


def _present(tensors: tuple[Description | None, ...]) -> Description:
    return next(x for x in tensors if x is not None)


def _viewed(results: Any, shape: Any) -> Any:
    if isinstance(results, Tensor):
        return results.view(shape)
    is_pair = bool(shape) and isinstance(shape[0], tuple)
    first, others = shape if is_pair else (shape, shape)
    return tuple(x if x is None else x.view(others if i else first) for i, x in enumerate(results))


def after(steps: Sequence[Step], call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` of tensors that each have taken their step before."""
    if not any(steps):
        return call

    def prepared(*args: Any) -> Any:
        brought = [x if step is None or x is None else step(x) for step, x in zip(steps, args, strict=False)]
        return call(*brought, *args[len(steps) :])

    return prepared


def merged(x: Description, *groups: Sequence[int]) -> tuple[Description, Step]:
    """x with one dim for each group of its dims, and the step that makes such a tensor of one like x."""
    view, dims = x.merged(*groups), [dim for group in groups for dim in group]
    if view is not None and reads_addresses(x) or [[dim] for dim in range(x.dim())] == [list(group) for group in groups]:
        return x if view is None else view, None
    shape = tuple(math.prod([x.shape[dim] for dim in group]) for group in groups)
    ordered = (lambda x: x) if dims == sorted(dims) else (lambda x: x.permute(dims))
    if view is not None:
        return view, lambda x: ordered(x).reshape(shape)
    return x._replace(shape=shape).contiguous(), lambda x: ordered(x).contiguous().view(shape)


def hashable(dim: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """A dim, or several, as an argument of a plan."""
    return dim if dim is None or isinstance(dim, int) else tuple(dim)


def as_floats(x: Tensor) -> Tensor:
    """Integers and booleans in torch's default dtype, as its own operators take them where they give floats."""
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())


def shape_of(x: Tensor | Description) -> str:
    return "x".join(str(size) for size in x.shape)


def too_few_dims(name: str, *operands: Tensor | Description) -> IndexError:
    """torch reads the sizes before it checks the dims, and so says "dimension out of range"."""
    return IndexError(f"{name}: operands have too few dims: {' and '.join(str(list(x.shape)) for x in operands)}")


def wrap_dim(x: Tensor | Description, dim: int) -> int:
    n_dims = x.dim() or 1
    if not -n_dims <= dim < n_dims:
        raise IndexError(f"Dimension out of range (expected to be in [{-n_dims}, {n_dims - 1}], but got {dim})")
    return dim % n_dims


def factor(scalar: complex, x: Tensor | Description) -> complex:
    """A factor of x: real for a real tensor. Raises RuntimeError, as torch does, for one that is not."""
    if isinstance(scalar, complex) and not x.dtype.is_complex:
        raise RuntimeError(f"expected a real factor for real numbers, but got {scalar}")
    return scalar if isinstance(scalar, complex) else float(scalar)
