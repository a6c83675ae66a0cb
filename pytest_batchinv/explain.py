"""Where compiled code leaves eager code: each pointwise operator alone, fed the inputs that the eager run gave it."""

from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_batchinv.compare import first_difference


def ops_that_stop(run: Callable[[], object]) -> list[str]:
    """Names of the pointwise overloads that ``run()`` calls whose compiled bits differ from their eager ones.

    All are compiled in one graph, each with inputs of its own, so that no difference is handed on to the next.
    """
    with _Recorder() as recorder:
        run()
    calls = list(recorder.calls.items())

    def replay(inputs: list[tuple[tuple, dict]]) -> list:
        return [overload(*args, **kwargs) for (overload, _), (args, kwargs) in zip(calls, inputs, strict=True)]

    inputs = [given for _, given in calls]
    eager = replay(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(replay)(inputs)
    return sorted(
        overload.name()
        for (overload, _), expected, actual in zip(calls, eager, compiled, strict=True)
        if first_difference(expected, actual) is not None
    )


class _Recorder(TorchDispatchMode):
    """Keeps the first call of every pointwise overload on floats, with copies of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[OpOverload, tuple[tuple, dict]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.calls and _is_pointwise_on_floats(func, args):
            self.calls[func] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        return func(*args, **kwargs)


def _is_pointwise_on_floats(overload: OpOverload, args: tuple) -> bool:
    floats = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return torch.Tag.pointwise in overload.tags and bool(floats) and not overload._schema.is_mutable
