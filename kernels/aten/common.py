"""What the modules of this package share: the refusal, the kernels of a device, words for shapes."""

import functools
from types import ModuleType

import torch
from torch import Tensor


class Refused(NotImplementedError):
    """The mode does not cover this call and says so, instead of falling back to a kernel that may vary."""


def kernel_set(x: Tensor) -> ModuleType:
    """The kernels for this tensor: those of its device, and for complex numbers what is made of them."""
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


def usual(name: str, x: Tensor, *args):
    """The result of a usual call on CUDA (``kernels/usual.py``), or None where the general way must be taken."""
    return getattr(_usual_calls(), name)(x, *args) if x.is_cuda else None


@functools.cache
def _usual_calls() -> ModuleType:
    from pytest_batchinv.kernels import usual

    return usual


def as_floats(x: Tensor) -> Tensor:
    """Integers and booleans in torch's default dtype, as its own operators take them where they give floats."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def shape_of(x: Tensor) -> str:
    return "x".join(str(size) for size in x.shape)


def too_few_dims(name: str, *operands: Tensor) -> IndexError:
    """torch reads the sizes before it checks the dims, and so says "dimension out of range"."""
    return IndexError(f"{name}: operands have too few dims: {' and '.join(str(list(x.shape)) for x in operands)}")


def wrap_dim(x: Tensor, dim: int) -> int:
    n_dims = x.dim() or 1
    if not -n_dims <= dim < n_dims:
        raise IndexError(f"Dimension out of range (expected to be in [{-n_dims}, {n_dims - 1}], but got {dim})")
    return dim % n_dims


def factor(scalar: complex, x: Tensor) -> complex:
    """A factor of x: real for a real tensor. Raises RuntimeError, as torch does, for one that is not."""
    if isinstance(scalar, complex) and not x.dtype.is_complex:
        raise RuntimeError(f"expected a real factor for real numbers, but got {scalar}")
    return scalar if isinstance(scalar, complex) else float(scalar)
