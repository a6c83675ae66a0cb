"""Calls back when a module is really imported. A look at its spec (``importlib.util.find_spec``) is no import."""

import importlib
import importlib.machinery
import sys
import threading
from collections.abc import Callable

_lock = threading.Lock()
_waiting: list[tuple[str, Callable[[str], None]]] = []


def has_run(name: str) -> bool:
    """Whether the module is there and has run to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def is_imported(name: str) -> bool:
    """Whether the module is there. Waits for another thread that is importing it, so hold no lock that it could want."""
    if name in sys.modules and not has_run(name):
        importlib.import_module(name)
    return name in sys.modules


def when_imported(name: str, callback: Callable[[str], None]) -> Callable[[], None]:
    """Calls back once with the module's name, right after it has run, in the thread that imports it. Returns what withdraws it.

    For a module that may be there already ask ``is_imported`` too, after this. The finder stands in ``sys.meta_path`` only
    while somebody waits.
    """
    wish = (name, callback)
    with _lock:
        if not _waiting:
            sys.meta_path.insert(0, _finder)
        _waiting.append(wish)

    def withdraw() -> None:
        with _lock:
            if wish in _waiting:
                _waiting.remove(wish)
                _leave_if_nobody_waits()

    return withdraw


def _leave_if_nobody_waits() -> None:
    if not _waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder:
    """Finds what the other finders find, with a loader that calls back after it has executed the module."""

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        with _lock:
            if not any(name == waited_for for waited_for, _ in _waiting):
                return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            if (spec := finder.find_spec(name, path, target)) is not None:
                _call_back_after_execution(spec)
                return spec
        return None


_finder = _Finder()


def _call_back_after_execution(spec: importlib.machinery.ModuleSpec) -> None:
    loader = spec.loader
    if loader is None or isinstance(loader, type):  # a namespace, or a module built into Python: no source to patch
        return
    execute = loader.exec_module

    def exec_module(module) -> None:
        vars(loader).pop("exec_module", None)
        execute(module)
        _arrived(spec.name)

    # On this one loader: its class stays what it is, so that whoever asks it for the source is answered.
    loader.exec_module = exec_module


def _arrived(name: str) -> None:
    with _lock:
        callbacks = [callback for waited_for, callback in _waiting if waited_for == name]
        _waiting[:] = [wish for wish in _waiting if wish[0] != name]
        _leave_if_nobody_waits()
    for callback in callbacks:
        callback(name)
