"""Processes that are started inside the mode. A forked one has it; a spawned one has not, unless its initializer enters it."""

import contextlib
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any


class ModeWarning(UserWarning):
    """A process was started inside the mode that does not have it."""


@contextlib.contextmanager
def warn_of_processes_without_the_mode(initializer: Callable[..., object]) -> Iterator[None]:
    """Inside, a process that starts from nothing, and is not given this initializer, is told by a ModeWarning."""
    stock_start = BaseProcess.start

    def start(self: Any) -> None:
        method = self._start_method or multiprocessing.get_start_method()
        # DataLoader, Pool and ProcessPoolExecutor hand an initializer to their workers as an argument.
        if method != "fork" and initializer not in self._args:
            warnings.warn(
                ModeWarning(
                    f"a process was started by {method} inside batch-invariant mode, and runs stock torch. Give DataLoader "
                    "worker_init_fn=pytest_batchinv.mode.worker_init_fn, give a pool that as its initializer, or enter the "
                    "mode in the process itself."
                ),
                stacklevel=2,
            )
        stock_start(self)

    BaseProcess.start = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        if BaseProcess.start is start:
            BaseProcess.start = stock_start  # type: ignore[method-assign]
