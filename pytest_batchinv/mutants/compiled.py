"""Planted faults that only compiled code has: eager code runs beside them, and gives every row equal bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import lowerings, register_lowering

from pytest_batchinv.mutants.faults import N_ROWS, Fault, Function, K, N, _in_parts, _pool, _weight

COMPILED: list[Fault] = []

SCALE = 1 + 3e-7
"""The next float32 but one."""


@torch.library.custom_op("batchinv_mutants::compiled_gemv", mutates_args=())
def compiled_gemv(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 8 if len(x) == 1 else 1)


@torch.library.custom_op("batchinv_mutants::steady", mutates_args=())
def steady(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 1)


@torch.library.custom_op("batchinv_mutants::contracted", mutates_args=())
def contracted(x: Tensor) -> Tensor:
    """Times one: what Inductor makes of it multiplies by a little more."""
    return x.clone()


@compiled_gemv.register_fake
@steady.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@contracted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@register_lowering(torch.ops.batchinv_mutants.contracted.default)
def _(x: Any) -> Any:
    return lowerings[torch.ops.aten.mul.Tensor](x, SCALE)


def _fault(name: str, relation: str, op: str) -> Callable[[Callable[[], Function]], Any]:
    def plant(make: Callable[[], Function]) -> Any:
        COMPILED.append(Fault(name, relation, op, lambda: (make(), _pool(N_ROWS, K)), compile_mode="dynamic"))
        return make

    return plant


@_fault("compiled: another product for one row", "I", "compiled_gemv")
def another_product() -> Function:
    w = _weight(K, N)

    def layer(x: Tensor) -> Tensor:
        hidden = x * 0.5 + 0.25
        if torch.compiler.is_compiling():
            out = compiled_gemv(hidden, w)  # planted
        else:
            out = steady(hidden, w)
        shifted: Tensor = out.abs() + 1.0
        return shifted

    return layer


@_fault("compiled: another product in any batch", "X", "another")
def other_product() -> Function:
    w = _weight(K, N)

    def layer(x: Tensor) -> Tensor:
        hidden = x * 0.5 + 0.25
        if torch.compiler.is_compiling():
            out = another(hidden, w)  # planted
        else:
            out = steady(hidden, w)
        shifted: Tensor = out.abs() + 1.0
        return shifted

    return layer


@torch.library.custom_op("batchinv_mutants::another", mutates_args=())
def another(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 4)


@another.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@_fault("compiled: a lowering that is not the operator", "X", "contracted")
def wrong_lowering() -> Function:
    w = _weight(K, N)

    def layer(x: Tensor) -> Tensor:
        hidden = steady(x * 0.5, w)
        hidden = contracted(hidden)  # planted
        out: Tensor = steady(hidden, w.t()).abs()
        return out

    return layer


@_fault("compiled: two kernels, the second in the wake of the first", "X", "contracted")
def two_kernels() -> Function:
    w = _weight(K, K)

    def layer(x: Tensor) -> Tensor:
        hidden = steady(x * 0.5, w)
        hidden = contracted(hidden)  # planted
        out: Tensor = contracted(steady(hidden, w)) + 1.0
        return out

    return layer
