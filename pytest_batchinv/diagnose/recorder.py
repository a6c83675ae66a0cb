"""The one dispatch mode: which operators a forward calls, in order, with their tensors if asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_batchinv.kernels import scanned


@dataclass
class Call:
    """One operator of a forward. args, kwargs: copies of its inputs; empty unless they were kept.

    dtype: what the scan's data knows it under (``kernels/scanned.py``); "" for one that neither takes nor gives floats.
    """

    overload: OpOverload
    device: str
    dtype: str = ""
    gives_floats: bool = False
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
        call = Call(func, _device(args, kwargs), scanned.dtype_of((args, kwargs)))
        takes_floats = scanned.has_floats((args, kwargs))
        if self._keeps_inputs is not None and self._keeps_inputs(func, args):
            call.args, call.kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        self.calls.append(call)
        out = func(*args, **kwargs)
        call.gives_floats = scanned.has_floats(out)
        if not takes_floats:
            call.dtype = (call.dtype or scanned.dtype_of(out)) if call.gives_floats else ""
        return out


def _device(args: Any, kwargs: Any) -> str:
    """The type of the device of the first tensor; "" without one."""
    return next((x.device.type for x in _tensors((args, kwargs))), "")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
