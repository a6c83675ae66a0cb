"""Context managers that change torch for the whole process are closed at the latest when the process ends.

A block may never be left: by a daemon thread, a suspended generator, an ``ExitStack`` that nobody closes. Python would then run
the block's ``finally`` while it takes its modules apart; the globals are None by that time, and Python prints the error.
"""

import atexit
import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Generator
from typing import Any, ParamSpec

_P = ParamSpec("_P")
_Block = Generator[Any, None, None]
_numbers = itertools.count()
_blocks: weakref.WeakValueDictionary[int, _Block] = weakref.WeakValueDictionary()  # weak: a dropped block is closed at once
ended = False  # the open blocks have been closed because the process ends: nothing will be compiled or run any more


def closed_at_exit(function: Callable[_P, _Block]) -> Callable[_P, _Block]:
    """Stands between ``contextlib.contextmanager`` and its generator function: blocks open at exit are closed then."""

    @functools.wraps(function)
    def make(*args: _P.args, **kwargs: _P.kwargs) -> _Block:
        block = _blocks[next(_numbers)] = function(*args, **kwargs)
        return block

    return make


@atexit.register
def _close() -> None:
    """Closes the newest block first. If its ``with`` statement ends after that, nothing happens: the generator has ended."""
    global ended
    ended = True
    for _, block in sorted(_blocks.items(), reverse=True):
        with contextlib.suppress(Exception):  # nobody is left to act on it
            block.close()
