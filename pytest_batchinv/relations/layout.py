"""L: the same rows in another layout: padded on the left, on both sides, further, packed, before spare keys of a cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import msgspec
from hypothesis import strategies as st

from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import sequences as planted
from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs, Side
from pytest_batchinv.search import strategies, sweep
from pytest_batchinv.shapes import BatchShape, Steps
from pytest_batchinv.subjects.base import Space, Subject

_SIZES = (1, 2, 3, 5)
_OPPOSITE = (1, 7, 16)
_FIRST_POSITIONS = (1, 17, 100)
_SPARE = (1, 15, 64, 300)


class Layout(Relation):
    letter = "L"
    words = WORDS["L"]
    meaning = "a row has other bits in another layout of the same batch (relation L, layout)"
    side_names = ("padded on the right", "in this layout")
    share = 5

    def obstacle(self, subject: Subject) -> str:
        by_itself = subject.space.pool is not None or subject.space.lays_out
        return f"{subject.info.name} lays its rows out by itself, so there is no other layout to ask for" if by_itself else ""

    def cases(self, space: Space) -> Cases:
        return Cases(_swept(space), [], _drawn(space))

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        yield Comparison(runs.run(case.plain()), runs.run(case))

    def two_runs(self, runs: Runs, case: BatchShape, position: int) -> Iterator[tuple[Side, Side]]:
        yield Side(case.plain(), position), Side(case, position)

    def mutants(self) -> tuple[Mutant, ...]:
        return tuple(Mutant(name, make) for name, make in planted.LAYOUT.items())


def _swept(space: Space) -> list[BatchShape]:
    """With 1, 2, 3 and 5 rows each layout, and what can be done to it: further padding, padding on both sides, later positions,
    spare keys of a static cache. A packed batch has no padding and no cache. Nothing that is the plain batch itself."""
    cases = []
    for start, (n_rows, layout) in enumerate(itertools.product(_SIZES, space.layouts)):
        case = sweep.batch(space, n_rows, 3 * start, layout)
        cases.append(case)
        if layout != "packed":
            cases += [msgspec.structs.replace(case, extra_padding=columns) for columns in sweep.PADDINGS]
        if layout != "packed" and space.pads_both_sides:
            cases += [msgspec.structs.replace(case, opposite_padding=columns) for columns in _OPPOSITE]
        cases += [msgspec.structs.replace(case, first_position=first) for first in _FIRST_POSITIONS]
        if layout != "packed" and "static" in space.caches:
            cases += [case.in_steps(Steps(cache="static", spare=spare)) for spare in _SPARE]
    return [case for case in dict.fromkeys(cases) if case != case.plain() and space.fits(case) and not space.holds(case)]


@st.composite
def _drawn(draw: st.DrawFn, space: Space) -> BatchShape:
    few = replace(space, max_rows=min(space.max_rows, 17))
    case = draw(strategies.cases(few))
    changes: dict[str, object] = {}
    longest = max(row.length for row in case.rows)
    if space.max_position > longest:
        changes["first_position"] = draw(st.integers(0, min(200, space.max_position - longest)))
    if case.layout != "packed" and space.pads_both_sides:
        changes["opposite_padding"] = draw(st.integers(0, min(40, space.max_tokens // len(case) - case.width)))
    case = msgspec.structs.replace(case, **changes)
    room = min(300, space.max_keys - case.width)
    if case.layout != "packed" and "static" in space.caches and room >= 0 and draw(st.booleans()):
        return case.in_steps(Steps(cache="static", spare=draw(st.integers(0, room))))
    return case
