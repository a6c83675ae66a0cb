"""Contexts that are held around every compilation by Inductor, in whichever thread it happens.

``torch._inductor.compile_fx.compile_fx`` is the one way into Inductor, looked up by name at each compilation. It is wrapped
as long as somebody asks, and from the moment on at which its module is imported. Setting the configuration instead would
not do: from torch 2.12 on that is kept by thread.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator

from pytest_batchinv.patches.imports import is_imported, when_imported

MODULE = "torch._inductor.compile_fx"

_lock = threading.RLock()
_makers: dict[object, Callable[[], contextlib.AbstractContextManager]] = {}  # by block: two may have the same maker
_stock: Callable | None = None
_wrapper: Callable | None = None
_stop_waiting: Callable[[], None] | None = None


@contextlib.contextmanager
def around_compilation(make: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Inside, every compilation is done within a context made by ``make``; the one that was asked for last is innermost."""
    global _stop_waiting
    block = object()
    with _lock:
        _makers[block] = make
        if len(_makers) == 1:
            _stop_waiting = when_imported(MODULE, _wrap)
    try:
        if is_imported(MODULE):
            _wrap()
        yield
    finally:
        with _lock:
            del _makers[block]
            if not _makers:
                _stop_waiting()
                _unwrap()


def _wrap(_: str = MODULE) -> None:
    global _stock, _wrapper
    with _lock:
        module = sys.modules[MODULE]
        if not _makers or _wrapper is not None:
            return
        stock = _stock = module.compile_fx

        @functools.wraps(stock)
        def compile_fx(model_, example_inputs_, *args, **kwargs):
            with contextlib.ExitStack() as stack:
                # None for a wrapper that was left standing: another library had put its own on top of it.
                for make in tuple(_makers.values()) if _wrapper is compile_fx else ():
                    stack.enter_context(make())
                return stock(model_, example_inputs_, *args, **kwargs)

        _wrapper = module.compile_fx = compile_fx


def _unwrap() -> None:
    global _stock, _wrapper
    module = sys.modules.get(MODULE)
    if _wrapper is not None and module.compile_fx is _wrapper:  # else another library has wrapped it since: it is theirs
        module.compile_fx = _stock
    _stock = _wrapper = None
