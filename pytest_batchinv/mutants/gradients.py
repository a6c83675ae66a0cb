"""Functions of rows whose forward is invariant, and whose backward has a planted fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pytest_batchinv.mutants.rows import Planted, index_of, one_ulp_up, pool

Backward = Callable[[Tensor, Tensor], Tensor]
"""(which row of the pool stands at each position, the gradient) -> the gradient that is handed on."""


class _Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Backward) -> Tensor:
        ctx.save_for_backward(index_of(x))
        ctx.fault = fault
        return x * 0.5 + 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return ctx.fault(ids, grads[0] * 0.5), None


def _with(fault: Callable[[], Backward]) -> Callable[[], Planted]:
    def make() -> Planted:
        backward = fault()
        return (lambda x: _Planted.apply(x, backward)), pool()  # type: ignore[no-untyped-call]

    return make


def _from_size(size: int) -> Backward:
    return lambda ids, grad: one_ulp_up(grad) if len(ids) >= size else grad


def _at_position(position: int) -> Backward:
    return lambda ids, grad: one_ulp_up(grad, torch.arange(len(ids)) == position) if len(ids) > 1 else grad


def _adds_the_row_before(ids: Tensor, grad: Tensor) -> Tensor:
    """As a sum with atomics at an address that is one row off."""
    return grad + torch.cat([grad[:1] * 0, grad[:-1] * ids[:-1, None]]) * 1e-3


def _noise() -> Backward:
    ticks = itertools.count()
    return lambda ids, grad: one_ulp_up(grad) if next(ticks) % 2 else grad


class _NoisyWeight(nn.Module):
    """A weight whose gradient is another one at every second run, as sums with atomics are."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((16,), 0.5))
        self._ticks = itertools.count()
        self.gain.register_hook(lambda grad: one_ulp_up(grad) if next(self._ticks) % 2 else grad)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


GRADIENTS: dict[str, Callable[[], Planted]] = {
    "2 rows or more": _with(lambda: _from_size(2)),
    "17 rows or more": _with(lambda: _from_size(17)),
    "at position 3": _with(lambda: _at_position(3)),
    "reads the row before it": _with(lambda: _adds_the_row_before),
    "noise": _with(_noise),
    "noise in a weight": lambda: (_NoisyWeight(), pool()),
}
