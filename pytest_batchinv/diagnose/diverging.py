"""Diverging ops: where compiled code leaves eager code, each pointwise operator alone, fed what the eager run gave it."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from pytest_batchinv.compare import first_difference
from pytest_batchinv.diagnose.recorder import Recorder
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import Subject


def diverging_ops(subject: Subject, case: BatchShape) -> list[str]:
    """Names of the pointwise overloads, in place ones too, whose compiled bits differ from their eager ones.

    The first call of each is taken. All are compiled in one graph, each with inputs of its own, so that no difference is
    handed on to the next.
    """
    recorder = Recorder(_is_pointwise_on_floats)
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


def _is_pointwise_on_floats(overload: OpOverload, args: tuple[Any, ...]) -> bool:
    floats = [a for a in args if isinstance(a, torch.Tensor) and (a.is_floating_point() or a.is_complex())]
    return torch.Tag.pointwise in overload.tags and bool(floats)
