"""The one dispatch mode: which operators a forward calls, in order, with their tensors if asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Call:
    """One operator of a forward. args, kwargs: copies of its inputs; empty unless they were kept."""

    overload: OpOverload
    on_cpu_floats: bool
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Records the operators that are dispatched inside. Compiled code dispatches few: record eager code.

    keeps_inputs: asked for each call; where it says yes, the call's tensors are copied.
    """

    def __init__(self, keeps_inputs: Callable[[OpOverload, tuple[Any, ...]], bool] | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._keeps_inputs = keeps_inputs

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = Call(func, _on_cpu_floats(args, kwargs))
        if self._keeps_inputs is not None and self._keeps_inputs(func, args):
            call.args, call.kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        self.calls.append(call)
        return func(*args, **kwargs)


def _on_cpu_floats(args: Any, kwargs: Any) -> bool:
    tensors = (x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
    return any(x.device.type == "cpu" and (x.is_floating_point() or x.is_complex()) for x in tensors)
