"""Pointwise operators whose stock CPU kernels treat the tail of a vector differently from its body."""

from collections.abc import Callable

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten import vectors
from pytest_batchinv.kernels.aten.common import Refused, as_floats, shape_of


def _pointwise(x: Tensor, kind: str, *params: float) -> Tensor:
    from pytest_batchinv.kernels import cpu

    return cpu.pointwise(as_floats(x), kind, params)


def unary(kind: str) -> Callable[[Tensor], Tensor]:
    """A pointwise operator without further arguments. Complex numbers go to torch's own kernel, in whole vectors."""
    of_complex = vectors.whole_vectors(kind)
    return lambda self: of_complex(self) if self.is_complex() else _pointwise(self, kind)


def addr(self: Tensor, vec1: Tensor, vec2: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Tensor:
    """``beta * self + alpha * (vec1[:, None] * vec2)``, each step rounded."""
    if vec1.dim() != 1 or vec2.dim() != 1:
        raise RuntimeError(f"addr: expected two vectors, but got shapes {shape_of(vec1)} and {shape_of(vec2)}")
    added = alpha * (vec1[:, None] * vec2)
    out = added if beta == 0 else beta * self.expand(added.shape) + added
    return out.contiguous()


def cross(self: Tensor, other: Tensor, dim: int | None = None) -> Tensor:
    """``linalg_cross``. Raises Refused without ``dim`` where torch would choose one of several dims."""
    return torch.linalg.cross(self, other, dim=_dim_of_cross(self, dim))


def cross_out(self: Tensor, other: Tensor, dim: int | None = None, *, out: Tensor) -> Tensor:
    return torch.linalg.cross(self, other, dim=_dim_of_cross(self, dim), out=out)


def _dim_of_cross(self: Tensor, dim: int | None) -> int:
    if dim is not None:
        return dim
    threes = [d for d, size in enumerate(self.shape) if size == 3]
    if not threes:
        raise RuntimeError("no dimension of size 3 in input")
    if len(threes) > 1:
        raise Refused(
            f"batch-invariant mode does not cover torch.cross of {shape_of(self)} without dim: torch takes the first dimension "
            "of size 3, which in a batch of 3 rows is that of the rows. Give it dim."
        )
    return threes[0]


def gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")
    return _pointwise(self, "gelu_tanh" if approximate == "tanh" else "gelu")


def softplus(self: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return _pointwise(self, "softplus", beta, threshold)


def elu(self: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return _pointwise(self, "elu", alpha, scale, input_scale)


def pow(self: Tensor, exponent: complex) -> Tensor:
    if self.is_complex() or isinstance(exponent, complex):
        return _pow_of_complex(self, exponent)
    return _pointwise(self, "pow", exponent)


_pow_of_complex = vectors.whole_vectors("pow.Tensor_Scalar")
