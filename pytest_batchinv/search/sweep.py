"""The covering sweep: what is cheap to cover is covered before any randomness, and what was covered is said.

Sizes: every batch size. Positions: every row at each small position, and last. Pairs: every row right after every other, in
few batches, by a de Bruijn sequence of order 2. Repeats: every row two and three times. A part of it always runs (the
boundaries of sizes in every layout); the rest takes turns until it is complete or the time is out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pytest_batchinv.shapes import BatchShape, Row, as_ranges, chosen_evenly
from pytest_batchinv.subjects.base import Space

SECONDS = 3.0
"""For what does not always run. A cheap function needs less for all of it."""
SMALL_POSITIONS = 32
IN_EVERY_LAYOUT = 65
PADDINGS = (1, 3, 13, 16, 40)


def boundary_cases(space: Space) -> list[BatchShape]:
    """Every boundary of the batch size, up to 65 in every layout, then in one in turn; and columns of padding."""
    cases, layouts = [], itertools.cycle(space.layouts)
    for n_rows in space.boundaries():
        chosen = space.layouts if n_rows <= IN_EVERY_LAYOUT else (next(layouts),)
        cases += [batch(space, n_rows, start, layout) for start, layout in enumerate(chosen)]
    padded = [layout for layout in space.layouts if layout != "packed" and space.pool is None and not space.lays_out]
    for columns, layout, n_rows in itertools.product(PADDINGS, padded, (1, 3)):
        cases.append(BatchShape(batch(space, n_rows, columns, layout).rows, layout, columns))
    return [case for case in dict.fromkeys(cases) if space.fits(case)]


def few_cases(space: Space, count: int) -> list[BatchShape]:
    """A few of the boundary cases, spread over all of them."""
    return chosen_evenly(boundary_cases(space), count)


def covering(space: Space) -> list[Iterator[BatchShape]]:
    """What takes turns: sizes, positions, pairs, repeats, each as far as the space has room."""
    return [filter(space.fits, part) for part in (_sizes(space), _repeats(space), _positions(space), _pairs(space))]


def batch(space: Space, n_rows: int, start: int, layout: str) -> BatchShape:
    """The rows of the palette in turn, from ``start`` on; of models only those whose length leaves room for all."""
    rows = _rows_that_fit(space, n_rows)
    return BatchShape(tuple(rows[(start + i) % len(rows)] for i in range(n_rows)), layout)


def _rows_that_fit(space: Space, n_rows: int) -> Sequence[Row]:
    if space.pool is not None:
        return space.palette
    rows = [row for row in space.palette if row.length * n_rows <= space.max_tokens]
    return rows or [Row(i) for i in range(len(space.palette))]


def _sizes(space: Space) -> Iterator[BatchShape]:
    layouts = itertools.cycle(space.layouts)
    for n_rows in space.sizes():
        yield batch(space, n_rows, 7 * n_rows, next(layouts))


def _repeats(space: Space) -> Iterator[BatchShape]:
    for times in (2, 3):
        for row in space.palette:
            yield BatchShape((row,) * times)


def _positions(space: Space) -> Iterator[BatchShape]:
    """Rotations: in the k-th, row k + i stands at position i."""
    n_rows = min(max(SMALL_POSITIONS, len(space.palette)), _most_rows(space))
    layouts = itertools.cycle(space.layouts)
    for start in range(len(space.palette)):
        rows = [space.palette[(start + i) % len(space.palette)] for i in range(n_rows)]
        yield BatchShape(tuple(rows), next(layouts))


def _pairs(space: Space) -> Iterator[BatchShape]:
    """A de Bruijn sequence in batches that overlap by one row: no pair falls between two of them."""
    most = _most_rows(space)
    if most < 2:
        return
    layouts = itertools.cycle(space.layouts)
    sequence = (space.palette[i] for i in de_bruijn(len(space.palette)))
    rows = list(itertools.islice(sequence, most))
    while len(rows) > 1:
        yield BatchShape(tuple(rows), next(layouts))
        rows = [rows[-1], *itertools.islice(sequence, most - 1)]


def _most_rows(space: Space) -> int:
    """Rows of a batch of any rows of the palette."""
    return max(1, min(space.max_rows, space.max_tokens // max(row.length for row in space.palette)))


def de_bruijn(n: int) -> Iterator[int]:
    """A sequence of n * n + 1 symbols in which each ordered pair of the n symbols, equal ones too, stands once.

    It joins the Lyndon words of length 1 and 2 in ascending order (Fredricksen and Maiorana, 1978).
    """
    for i in range(n):
        yield i
        for j in range(i + 1, n):
            yield i
            yield j
    yield 0


@dataclass
class Coverage:
    """What the cases that ran have covered, counted from the cases themselves."""

    space: Space
    sizes: set[int] = field(default_factory=set)
    positions: set[tuple[int, Row]] = field(default_factory=set)
    pairs: set[tuple[Row, Row]] = field(default_factory=set)
    repeats: set[Row] = field(default_factory=set)
    layouts: set[str] = field(default_factory=set)

    def add(self, case: BatchShape) -> None:
        rows = case.rows
        self.sizes.add(len(rows))
        self.layouts.add(case.layout)
        self.positions.update(enumerate(rows[:SMALL_POSITIONS]))
        self.pairs.update(itertools.pairwise(rows))
        if 1 < len(rows) <= 3 and len(set(rows)) == 1:
            self.repeats.add(rows[0])

    def words(self) -> tuple[str, ...]:
        """ "all sizes 1-300", "40 x 32 of 40 x 32 positions", "1,560 of 1,560 pairs", and so on."""
        palette, sizes = set(self.space.palette), self.space.sizes()
        n, positions = len(palette), min(SMALL_POSITIONS, self.space.max_rows)
        covered = len(self.sizes.intersection(sizes))
        if covered == len(sizes):
            told = f"all sizes 1-{len(sizes)}"
        else:
            told = f"{covered} of {len(sizes)} sizes ({as_ranges(self.sizes)})"
        at = sum(row in palette for _, row in self.positions)
        pairs = sum(a != b and a in palette and b in palette for a, b in self.pairs)
        words = [told, f"{at:,} of {n} x {positions} positions", f"{pairs:,} of {n * (n - 1):,} pairs"]
        words.append(f"{len(self.repeats & palette)} of {n} rows repeated")
        if len(self.space.layouts) > 1:
            words.append(f"layouts {', '.join(layout for layout in self.space.layouts if layout in self.layouts)}")
        return tuple(words)


def in_turn(parts: Sequence[Iterator[BatchShape]], seconds: float) -> Iterator[BatchShape]:
    """A case of each part in turn, until all are at their end or the time is out."""
    deadline, waiting = time.monotonic() + seconds, list(parts)
    while waiting:
        for part in list(waiting):
            if time.monotonic() > deadline:
                return
            case = next(part, None)
            if case is None:
                waiting.remove(part)
            else:
                yield case
