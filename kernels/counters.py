"""How often the table answered: calls by overload, ``aten::`` from eager code, ``batchinv::`` from compiled code."""

import contextlib
from collections.abc import Iterator

_hits: dict[str, int] = {}


def count(name: str) -> None:
    """Counts one call. A lost update between threads would only make a count smaller, never zero."""
    _hits[name] = _hits.get(name, 0) + 1


@contextlib.contextmanager
def counting_apart() -> Iterator[dict[str, int]]:
    """Calls inside are counted in the dict that is handed out, and in nothing else."""
    global _hits
    before, _hits = _hits, {}
    try:
        yield _hits
    finally:
        _hits = before


def hits() -> dict[str, int]:
    """Calls by overload since the process began: ``aten::`` from eager code, ``batchinv::`` from compiled code."""
    return dict(_hits)
