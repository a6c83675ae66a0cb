"""What Dynamo must not trace: the Python that the dispatcher calls for an entry of the table.

After a graph break Dynamo tries to compile each Python frame that runs, this one too, and would guard on what it reads:
the counters, which change with every call.
"""

from collections.abc import Callable
from typing import TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

_Function = TypeVar("_Function", bound=Callable[..., object])
_SKIPPED = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)


def not_traced(function: _Function) -> _Function:
    """Tells Dynamo to run this plain function, and all that it calls, as it is. A call costs nothing more."""
    set_code_exec_strategy(function.__code__, _SKIPPED)
    return function


def not_compiled(function: _Function) -> _Function:
    """The same for what a compiled function may call itself: there Dynamo breaks the graph, and inlines nothing of it."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return not_traced(function)
