"""Contexts that are held around every compilation by Inductor, in whichever thread it happens.

``torch._inductor.compile_fx.compile_fx`` is the one way into Inductor and is looked up by name at each compilation. It is
wrapped while any block is open. Setting the configuration for the block would not reach other threads: from torch 2.12 on it is
kept by thread.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from pytest_batchinv.patches.at_exit import closed_at_exit

_lock = threading.RLock()
_makers: dict[object, Callable[[], contextlib.AbstractContextManager[Any]]] = {}  # by block: two may have the same maker
_wrapper: Any = None


@contextlib.contextmanager
@closed_at_exit
def around_compilation(make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, every compilation runs in a context made by ``make``; the context of the block opened last is innermost.

    A compilation may enter several such contexts of one block, as ``compile_fx`` calls itself.
    """
    global _wrapper
    with warnings.catch_warnings():
        # Inductor of torch 2.13 imports modules that use torch.jit, of which torch warns. Ends with torch.jit itself.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        from torch._inductor import compile_fx as module
    block = object()
    try:
        with _lock:
            _makers[block] = make
            if len(_makers) == 1:
                _wrapper = module.compile_fx = _wrapped(module.compile_fx)
        yield
    finally:
        with _lock:
            _makers.pop(block, None)
            if not _makers and module.compile_fx is _wrapper:  # otherwise another library has wrapped it: it is theirs
                module.compile_fx = _wrapper.__wrapped__


def _wrapped(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for make in tuple(_makers.values()):
                stack.enter_context(make())
            return stock(*args, **kwargs)

    return compile_fx
