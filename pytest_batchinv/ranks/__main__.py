"""The launcher: imports once what all ranks need, forks them, and stays until they or the process that asked have ended."""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from pytest_batchinv.ranks import rank

_POLL_SECONDS = 0.1


def main(words: dict[str, Any]) -> None:
    import torch  # noqa: F401  (before the fork, as it takes seconds)

    target = _load(words["target"])
    sys.stdout.flush()
    children = {}
    for number, fd in enumerate(words["ranks"]):
        child = os.fork()
        if child == 0:
            for other in (*words["ranks"], words["control"]):
                if other != fd:
                    os.close(other)
            rank.serve(number, Connection(fd), target, words)  # does not return
        children[child] = number
    for fd in words["ranks"]:
        os.close(fd)
    _watch(children, Connection(words["control"]), words["parent"])


def _load(target: str) -> Callable[..., Any]:
    where, _, name = target.rpartition(":")
    if where.endswith(".py"):
        function: Callable[..., Any] = runpy.run_path(where)[name]
    else:
        module = importlib.import_module(where)
        function = getattr(module, name)
        getattr(module, "_import_before_the_fork", lambda: None)()
    return function


def _watch(children: dict[int, int], control: Connection, parent: int) -> None:
    """Tells how each rank ended. The control's end is the end of all."""
    while children:
        readable, _, _ = select.select([control], [], [], _POLL_SECONDS)
        if readable or os.getppid() != parent:  # nobody writes to it: it was closed
            os.killpg(os.getpid(), signal.SIGKILL)
        while children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                break
            with contextlib.suppress(OSError):
                control.send((children.pop(child), status))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
