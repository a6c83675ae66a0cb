"""Makes a failing case small: fewer rows, then simpler ones, as long as it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from pytest_batchinv.shapes import LAYOUTS, BatchShape, Row

SECONDS = 20.0


def smallest(case: BatchShape, fails: Callable[[BatchShape], bool], seconds: float = SECONDS) -> BatchShape:
    """Takes the first simpler case that fails too, until there is none or the time is out."""
    deadline, tried = time.monotonic() + seconds, {case}
    while True:
        for simpler in _simpler(case):
            if simpler in tried:
                continue
            if time.monotonic() > deadline:
                return case
            tried.add(simpler)
            if fails(simpler):
                case = simpler
                break
        else:
            return case


def _simpler(case: BatchShape) -> Iterator[BatchShape]:
    # Equal rows first: without any block of them, what is left is one case for each length of the block.
    yield case.with_rows(*[Row(0)] * len(case))
    for rows in without_blocks(case.rows):
        yield case.with_rows(*rows)
    for simple in (BatchShape(case.rows), BatchShape(case.rows, case.layout)):
        rank = (LAYOUTS.index(simple.layout), simple.extra_padding)
        if rank < (LAYOUTS.index(case.layout), case.extra_padding):
            yield simple
    for position, row in enumerate(case.rows):
        for simple in (Row(0), Row(row.id), Row(row.id, 1, row.content), Row(row.id, row.length)):
            if (simple.length, simple.content != "random", simple.id) < (row.length, row.content != "random", row.id):
                yield case.with_rows(*case.rows[:position], simple, *case.rows[position + 1 :])


def without_blocks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Without a block of rows: large blocks first, the last ones first."""
    block = len(rows) // 2
    while block:
        for start in range(len(rows) - block, -1, -block):
            yield [*rows[:start], *rows[start + block :]]
        block //= 2
