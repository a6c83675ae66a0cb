"""The one dispatch mode: which operators a forward calls, in order, from where, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_batchinv.kernels import scanned, table
from pytest_batchinv.patches.dispatcher import COMPOSITE


@dataclass
class Call:
    """One operator of a forward. args, kwargs: copies of its inputs; empty unless they were kept.

    name, dtype: what the scan's data knows it under (``kernels/scanned.py``). dtype is "" for one that neither takes nor gives
    floats.
    """

    overload: OpOverload
    device: str
    name: str = ""
    dtype: str = ""
    gives_floats: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


Around = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Runs the operator with these arguments, or another one in its place, and gives the result."""


class Recorder(TorchDispatchMode):
    """Records the operators that are dispatched inside. Compiled code dispatches few: record eager code.

    A composite that arrives whole, as under ``torch.inference_mode``, is recorded as what it is made of, and a wrapper of
    the table as what it calls.

    keeps_inputs: asked for each call; where it says yes, the call's tensors are copied. around: runs each call.
    """

    def __init__(
        self,
        keeps_inputs: Callable[[OpOverload, tuple[Any, ...]], bool] | None = None,
        around: Around | None = None,
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._keeps_inputs = keeps_inputs
        self._around = around

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if key := _made_of_others(func, args, kwargs):
            with self:
                return func._op_dk(key, *args, **kwargs)
        call = Call(func, _device(args, kwargs), scanned.cell_name(func, kwargs), scanned.dtype_of((args, kwargs)))
        takes_floats = scanned.has_floats((args, kwargs))
        if self._keeps_inputs is not None and self._keeps_inputs(func, args):
            call.args, call.kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        self.calls.append(call)
        out = func(*args, **kwargs) if self._around is None else self._around(func, args, kwargs)
        call.gives_floats = scanned.has_floats(out)
        call.dtype = scanned.dtype_of_call(call.dtype, takes_floats, out)
        return out


def _made_of_others(func: OpOverload, args: Any, kwargs: Any) -> torch._C.DispatchKey | None:
    """The key of the kernel that calls nothing but operators; None for an operator that is recorded itself.

    A composite of another library than torch may compute by itself.
    """
    if func.name() in table.WRAPPERS:
        return torch._C.DispatchKey.CPU if _device(args, kwargs) == "cpu" else None
    if torch.is_inference_mode_enabled() and _is_composite(func):
        return torch._C.DispatchKey.CompositeImplicitAutograd
    return None


@cache
def _is_composite(func: OpOverload) -> bool:
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)


def _device(args: Any, kwargs: Any) -> str:
    """The type of the device of the first tensor; "" without one."""
    return next((x.device.type for x in tensors_of((args, kwargs))), "")


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
