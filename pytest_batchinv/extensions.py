"""What other packages add by entry points: relations and engines. Found by name without importing them; loaded when asked for.

[project.entry-points."pytest_batchinv.relations"]  LETTER = "module:Class", a ``Relation`` of this letter.
[project.entry-points."pytest_batchinv.engines"]    NAME = "module:factory", called as ``factory(model=, device=, dtype=, attn=,
url=)``; it gives a ``Subject``, or raises ValueError with a sentence.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

RELATIONS = "pytest_batchinv.relations"
ENGINES = "pytest_batchinv.engines"


@cache
def found(group: str) -> dict[str, EntryPoint]:
    """By name. Raises ValueError where two packages give one name: which of them would run is not to be left to chance."""
    by_name: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = by_name.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ValueError(
                f"{_origin(other)} and {_origin(entry)} both give {entry.name!r} in {group}; uninstall one of them"
            )
    return by_name


def names(group: str, ours: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Those of other packages, sorted. Raises ValueError for a package that takes one of our names."""
    theirs = found(group)
    for name in ours:
        if name in theirs:
            raise ValueError(f"{_origin(theirs[name])} gives {name!r} in {group}, which pytest-batchinv has itself")
    return tuple(sorted(theirs))


def load(group: str, name: str) -> Any:
    """What the entry point names. Raises ValueError, with the package and the reason, where it cannot be imported."""
    entry = found(group)[name]
    try:
        return entry.load()
    except Exception as error:
        raise ValueError(f"{name!r} of {_origin(entry)} cannot be loaded: {type(error).__name__}: {error}") from error


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name if entry.dist else 'a package'} ({entry.value})"
