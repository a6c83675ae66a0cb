"""Diverging ops: where compiled code leaves eager code, each operator alone, fed what the eager run gave it."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from pytest_batchinv.compare import first_difference
from pytest_batchinv.diagnose.recorder import Recorder, tensors_of
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import Subject


def diverging_ops(subject: Subject, case: BatchShape) -> list[str]:
    """Names of torch's overloads, in place ones too, whose compiled bits differ from their eager ones.

    The first call of each is taken. All are compiled in one graph, each with inputs of its own, so that no difference is
    handed on to the next.
    """
    recorder = Recorder(_computes)
    subject.in_eager_mode().run(case, recorder)
    first_calls = {}
    for call in recorder.calls:
        if call.args or call.kwargs:
            first_calls.setdefault(call.overload, call)
    calls = list(first_calls.values())

    def replay(inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        return [call.overload(*args, **kwargs) for call, (args, kwargs) in zip(calls, inputs, strict=True)]

    def inputs() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, [(c.args, c.kwargs) for c in calls])

    eager = replay(inputs())
    torch._dynamo.reset()
    compiled = torch.compile(replay)(inputs())
    return sorted(
        call.overload.name()
        for call, expected, actual in zip(calls, eager, compiled, strict=True)
        if isinstance(expected, torch.Tensor) and first_difference(expected, actual) is not None
    )


def _computes(overload: OpOverload, args: tuple[Any, ...]) -> bool:
    """Of floats, and not at random: such an operator has other bits in any case."""
    floats = [x for x in tensors_of(args) if x.is_floating_point() or x.is_complex()]
    is_torchs = overload.namespace in ("aten", "prims") and torch.Tag.nondeterministic_seeded not in overload.tags
    return is_torchs and bool(floats) and not overload.is_view
