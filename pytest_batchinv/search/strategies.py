"""Hypothesis strategies of batch shapes, with weight on the sizes at which real systems have changed their bits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from hypothesis import strategies as st

from pytest_batchinv.shapes import BOUNDARIES, CONTENTS, LAYOUTS, MAX_ROWS, BatchShape, Row
from pytest_batchinv.subjects.base import Space

_WEIGHT = 3  # of a boundary, against 1 of any other size
_PALETTE = 5
_TOKEN_SHARES = (16, 8, 4, 1)
_PADDINGS = (0, 1, 3, 13, 16, 40)


@cache
def sizes(most: int) -> st.SearchStrategy[int]:
    """Integers from 1 to ``most``, boundaries a few times as often as others; shrinking to 1."""
    # One choice from one ascending list: with several branches a failure would shrink to a boundary only.
    return st.sampled_from([size for size in range(1, most + 1) for _ in range(_WEIGHT if size in BOUNDARIES else 1)])


@st.composite
def batch_shapes(
    draw: st.DrawFn,
    *,
    max_rows: int = MAX_ROWS,
    max_length: int = 300,
    max_tokens: int = 8192,
    layouts: Sequence[str] = LAYOUTS,
    contents: Sequence[str] = CONTENTS,
) -> BatchShape:
    """Batch shapes of up to ``max_rows`` rows and ``max_tokens`` tokens, padding included.

    A few distinct rows stand in any order, some of them repeated, so that each needs to be run alone only once.
    """
    n_rows = draw(sizes(min(max_rows, max_tokens)))
    longest = min(max_length, max_tokens // n_rows)
    row = st.builds(Row, id=st.integers(0, 7), length=sizes(longest), content=st.sampled_from(contents))
    palette = draw(st.lists(row, min_size=1, max_size=min(n_rows, _PALETTE), unique=True))
    return _laid_out(draw, palette, n_rows, layouts, max_tokens)


@st.composite
def cases(draw: st.DrawFn, space: Space) -> BatchShape:
    """Batches of rows of the space's palette: up to all of them, in any order, repeats allowed."""
    # The sweep has been at the boundaries: every size is as good as another.
    n_rows = draw(st.sampled_from(space.sizes()))
    # Most batches small, so that there are many: what follows the size of a product is at boundaries far below the largest.
    max_tokens = max(n_rows, space.max_tokens // draw(st.sampled_from(_TOKEN_SHARES)))
    fitting = [row for row in space.palette if row.length * n_rows <= max_tokens]
    palette = fitting or [Row(row.id) for row in space.palette]
    few = draw(st.sampled_from((1, 2, 3, 5, len(palette))))
    start = draw(st.integers(0, len(palette) - 1))
    chosen = [palette[(start + i) % len(palette)] for i in range(min(few, len(palette)))]
    return _laid_out(draw, chosen, n_rows, space.layouts, max_tokens if space.pool is None and not space.lays_out else 0)


def _laid_out(draw: st.DrawFn, palette: Sequence[Row], n_rows: int, layouts: Sequence[str], max_tokens: int) -> BatchShape:
    # The order is one choice, not one for each row: Hypothesis gives up on a long sequence of choices.
    order = draw(st.integers(0, 1 << 16))
    rows = random.Random(order).choices(palette, k=n_rows) if order else (list(palette) * n_rows)[:n_rows]
    layout = draw(st.sampled_from(layouts))
    room = 0 if layout == "packed" else max_tokens // n_rows - max(row.length for row in palette)
    extra_padding = max(0, min(room, draw(st.sampled_from(_PADDINGS)))) if max_tokens else 0
    return BatchShape(tuple(rows), layout, extra_padding)
