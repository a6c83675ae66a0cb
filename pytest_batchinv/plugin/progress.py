"""Signs of life on long runs: a line now and then, for whoever listens."""

import contextlib
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 15.0

_listener: Callable[[str], None] | None = None
_last = 0.0


def report(text: str) -> None:
    """Tells the listener, at most every ``SECONDS_BETWEEN_LINES``."""
    global _last
    now = time.monotonic()
    if _listener is not None and now - _last >= SECONDS_BETWEEN_LINES:
        _last = now
        _listener(text)


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Hands every reported line inside to ``listener``; the first at the earliest after ``SECONDS_BETWEEN_LINES``."""
    global _listener, _last
    before, _listener, _last = _listener, listener, time.monotonic()
    try:
        yield
    finally:
        _listener = before
