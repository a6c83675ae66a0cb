"""Where an operator was called: the module's path, the user's line, and which parameters it was given."""

from __future__ import annotations

import linecache
import os
import sys
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from pytest_batchinv import kernels, patches, subjects

_NOT_THE_USERS = tuple(
    f"{Path(file).parent}/" for file in (torch.__file__, kernels.__file__, patches.__file__, __file__) if file is not None
)
_SUBJECTS = f"{Path(subjects.__file__).parent}/"


class Where(NamedTuple):
    """module: its path from the outermost module on; "" outside of any. source: "file:line"; line: its text.

    made_of: of a fused kernel, the operators in it and the lines that they come from.
    """

    module: str
    source: str
    line: str
    made_of: tuple[str, ...] = ()


class Places:
    """Entered around a run: keeps the path of the module that runs, and knows the parameters by their memory.

    n_forwards: how often a module was entered from outside of any.
    """

    def __init__(self) -> None:
        self._stack: list[nn.Module] = []
        self._forward: dict[int, Where] = {}  # by the number that autograd gave to the operator
        self._names: dict[nn.Module, str] = {}
        self.parameters: dict[int, str] = {}
        self.n_forwards = 0

    def __enter__(self) -> Places:
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def is_inside(self) -> bool:
        return bool(self._stack)

    def here(self) -> Where:
        """Of the operator that is being dispatched; in a backward pass that of the operator whose gradient it computes."""
        source, line = _users_line()
        node = torch._C._current_autograd_node()
        if node is not None:
            forward = self._forward.get(node._sequence_nr(), Where("", "", ""))
            module = f"the backward of {forward.module}" if forward.module else ""
            return Where(module, source or forward.source, line or forward.line)
        here = Where(self._names.get(self._stack[-1], "") if self._stack else "", source, line)
        # An operator that has no gradient takes no number: the first one to see it has it.
        self._forward.setdefault(torch.autograd._get_sequence_nr() - 1, here)
        return here

    def parameter(self, x: Tensor) -> str:
        """The name of the parameter or buffer in whose memory this tensor lies, with where in it; "" for others."""
        name = self.parameters.get(storage_of(x), "")
        return f"{name}@{x.storage_offset()}" if name else ""

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in self._names and not type(module).__module__.startswith("pytest_batchinv.subjects."):
            self._names |= {child: name for name, child in module.named_modules()}
            held = [*module.named_parameters(), *module.named_buffers()]
            self.parameters |= {storage_of(x): name for name, x in held}
        self.n_forwards += not self._stack
        self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()


def storage_of(x: Tensor) -> int:
    """Names the memory that the tensor lies in; 0 where it has none of its own."""
    try:
        return x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse tensors and their like
        return 0


def _users_line() -> tuple[str, str]:
    """Empty for what torch, or a subject, calls by itself."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_SUBJECTS):
            break
        if not file.startswith((*_NOT_THE_USERS, "<")):
            return f"{from_a_root(file)}:{frame.f_lineno}", linecache.getline(file, frame.f_lineno).strip()
        frame = frame.f_back  # type: ignore[assignment]
    return "", ""


@cache
def from_a_root(file: str) -> str:
    """The path from where Python imports it, or from the working directory: records travel, and folders of a machine do not."""
    roots = sorted({os.getcwd(), *filter(None, sys.path)}, key=len, reverse=True)
    return next((os.path.relpath(file, root) for root in roots if file.startswith(f"{root}/")), file)
