"""Makes a failing case small: fewer rows, then simpler ones, as long as it fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from pytest_batchinv.shapes import LAYOUTS, BatchShape, Row, Steps

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
    yield from _with_rows(case, [Row(0)] * len(case))
    for rows in without_blocks(case.rows):
        yield from _with_rows(case, rows)
    yield from _computed_simpler(case)
    for layout, padding in ((LAYOUTS[0], 0), (case.layout, 0), (LAYOUTS[0], case.extra_padding)):
        if (LAYOUTS.index(layout), padding) < (LAYOUTS.index(case.layout), case.extra_padding):
            yield from _changed(case, layout=layout, extra_padding=padding)
    for position, row in enumerate(case.rows):
        for simple in _simpler_rows(row, case.steps):
            if (simple.length, simple.content != "random", simple.id) < (row.length, row.content != "random", row.id):
                yield from _with_rows(case, [*case.rows[:position], simple, *case.rows[position + 1 :]])


def _simpler_rows(row: Row, steps: Steps | None) -> Iterator[Row]:
    """Of one token, or where there are steps of one token after the last of them."""
    shortest = 1 if steps is None else (steps.prefix, *steps.ends)[-1] + 1
    yield from (Row(0, shortest), Row(row.id, shortest), Row(row.id, shortest, row.content))
    yield from (Row(0, row.length), Row(row.id, row.length))


def _computed_simpler(case: BatchShape) -> Iterator[BatchShape]:
    """Without a cache, with fewer steps, a plainer cache, less padding, positions from 0 on."""
    for name, plain in (("steps", None), ("opposite_padding", 0), ("first_position", 0)):
        if getattr(case, name):
            yield from _changed(case, **{name: plain})
    if case.steps is None:
        return
    for ends in ([], *without_blocks(case.steps.ends)):
        yield from _changed(case, steps=msgspec.structs.replace(case.steps, ends=tuple(ends)))
    for name in ("spare", "rejected", "prefix", "cache"):
        if getattr(case.steps, name) != (plain := getattr(Steps(), name)):
            with contextlib.suppress(ValueError):  # a dynamic cache, say, has no spare keys
                yield from _changed(case, steps=msgspec.structs.replace(case.steps, **{name: plain}))


def _with_rows(case: BatchShape, rows: Sequence[Row]) -> Iterator[BatchShape]:
    return _changed(case, rows=tuple(rows))


def _changed(case: BatchShape, **changes: object) -> Iterator[BatchShape]:
    """The case so changed; none where there is no such case: rows that end before the last step begins, say."""
    with contextlib.suppress(ValueError):
        yield msgspec.structs.replace(case, **changes)


def without_blocks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Without a block of rows: large blocks first, the last ones first."""
    block = len(rows) // 2
    while block:
        for start in range(len(rows) - block, -1, -block):
            yield [*rows[:start], *rows[start + block :]]
        block //= 2
