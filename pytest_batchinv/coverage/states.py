"""States: what several calls of a cell come to, and the silent ones among the samples."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable

import msgspec

from pytest_batchinv.kernels import overloads, scanned
from pytest_batchinv.kernels.scanned import COVERED, NO_ROWS, RAISES, REFUSED, ROW_LOCAL, STATES, VARIES

_WORST_FIRST = (VARIES, ROW_LOCAL, COVERED, REFUSED, RAISES, NO_ROWS)
"""One call that varies decides. One with rows says more than one without: the others raised, or had none to compare."""


class Cell(msgspec.Struct, frozen=True):
    """What one call of an overload showed in one dtype. direction: f forward, b backward. source: the sample it is from."""

    operator: str
    dtype: str
    direction: str
    state: str
    why: str
    source: str


class Function(msgspec.Struct, frozen=True):
    """What a whole sample showed, as a function of its rows. operators: (name, dtype) of each that ran in its forward."""

    source: str
    dtype: str
    state: str
    why: str
    operators: tuple[tuple[str, str], ...]


class Found(msgspec.Struct, forbid_unknown_fields=True):
    """All that a scan, or a part of it, found.

    not_run: sources that gave no sample, or ended the process, and why. seen: calls that need no measuring any more (operator,
    dtype, signature). done: the sources that are through.
    """

    cells: list[Cell] = []
    functions: list[Function] = []
    not_run: list[tuple[str, str, str]] = []
    seen: list[tuple[str, str, str]] = []
    done: list[str] = []

    def without(self, sources: Iterable[str]) -> Found:
        """All but what these sources gave."""
        dropped = set(sources)
        return Found(
            cells=[cell for cell in self.cells if cell.source not in dropped],
            functions=[function for function in self.functions if function.source not in dropped],
            not_run=[entry for entry in self.not_run if entry[0] not in dropped],
            done=[source for source in self.done if source not in dropped],
        )

    def add(self, other: Found) -> None:
        self.cells += other.cells
        self.functions += other.functions
        self.not_run += other.not_run
        self.seen += other.seen
        self.done += other.done


def merged(cells: Iterable[Cell]) -> dict[str, dict[str, str]]:
    """operator -> state -> dtypes, of all calls of each cell.

    In-place and ``.out`` forms run the kernel of the functional one, and are measured more briefly: where that varies, they do.
    """
    by_cell: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        by_cell[cell.operator, cell.dtype].add(cell.state)
    for (operator, dtype), states_seen in list(by_cell.items()):
        if VARIES in states_seen:
            for form in _forms(operator):
                if (form, dtype) in by_cell:
                    by_cell[form, dtype].add(VARIES)
    out: dict[str, dict[str, str]] = {}
    for name in sorted({name for name, _ in by_cell}):
        states = {dtype: _worst(seen) for (operator, dtype), seen in by_cell.items() if operator == name}
        out[name] = {
            state: " ".join(sorted(dtype for dtype, worst in states.items() if worst == state))
            for state in STATES
            if state in states.values()
        }
    return out


@functools.cache
def _forms(operator: str) -> tuple[str, ...]:
    try:
        overload = scanned.overload_named(operator)
    except AttributeError:  # of a library that is not loaded here
        return ()
    ending = operator.removeprefix(overload.name())
    return tuple(sibling.overload.name() + ending for sibling in overloads.siblings(overload))


def _worst(states: set[str]) -> str:
    return next(state for state in _WORST_FIRST if state in states)
