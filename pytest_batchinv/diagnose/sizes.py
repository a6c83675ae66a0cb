"""Breakpoints: the batch sizes at which the failing row's bits change."""

from __future__ import annotations

import time
from collections.abc import Callable

from pytest_batchinv.report.record import Breakpoints
from pytest_batchinv.shapes import BOUNDARIES, BatchShape
from pytest_batchinv.subjects.base import Space

SECONDS = 5.0


def resized(case: BatchShape, position: int, n_rows: int) -> BatchShape:
    """The case with this many rows: the failing row keeps its position where it can, its neighbours stand in turn."""
    row, place = case.rows[position], min(position, n_rows - 1)
    others = [r for i, r in enumerate(case.rows) if i != position] or [row]
    neighbours = [others[i % len(others)] for i in range(n_rows - 1)]
    return case.with_rows(*neighbours[:place], row, *neighbours[place:])


def breakpoints(
    case: BatchShape,
    position: int,
    space: Space,
    differs_at: Callable[[BatchShape, int], bool],
    seconds: float = SECONDS,
) -> Breakpoints:
    """The sizes, from 1 to the largest that fits, at which the row differs from itself alone.

    Boundaries, the failing size and its neighbours are run; between two of them that disagree the change is bisected.
    differs_at: of a resized case and the row's position in it. Past ``seconds`` no further size is begun.
    """
    deadline, known = time.monotonic() + seconds, {len(case): True}

    def differs(n_rows: int) -> bool:
        if n_rows not in known:
            shape = resized(case, position, n_rows)
            known[n_rows] = differs_at(shape, min(position, n_rows - 1))
        return known[n_rows]

    fitting = [n for n in space.sizes() if space.fits(resized(case, position, n))]
    bound = max([*fitting, len(case)])
    around = {len(case) - 1, len(case) + 1, bound, *BOUNDARIES}
    for n_rows in sorted(around.intersection(fitting), key=lambda n: abs(n - len(case))):
        if time.monotonic() > deadline:
            break
        differs(n_rows)
    for low, high in zip(sorted(known), sorted(known)[1:], strict=False):
        while known[low] != known[high] and high - low > 1 and time.monotonic() < deadline:
            middle = (low + high) // 2
            low, high = (middle, high) if differs(middle) == known[low] else (low, middle)
    return Breakpoints(ranges(known), len(known), max(known))


def ranges(known: dict[int, bool]) -> tuple[tuple[int, int], ...]:
    """Ranges of sizes that differ: all between two tried neighbours that both differ."""
    runs: list[tuple[int, int]] = []
    before_differs = False
    for n_rows in sorted(known):
        if known[n_rows]:
            runs.append((runs.pop()[0], n_rows) if before_differs else (n_rows, n_rows))
        before_differs = known[n_rows]
    return tuple(runs)
