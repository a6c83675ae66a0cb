"""Hypothesis strategies of batch shapes, with weight on the sizes at which real systems have changed their bits."""

import random
from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

from pytest_batchinv.shapes import BOUNDARIES, CONTENTS, LAYOUTS, BatchShape, Row

_WEIGHT = 12  # of a boundary, against 1 of any other size

SWEPT_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
SWEPT_POSITIONS = (0, 15, 31, -1)


def sizes(most: int) -> st.SearchStrategy[int]:
    """Integers from 1 to ``most``: mostly boundaries, shrinking to 1."""
    # One choice from one ascending list: with several branches a failure would shrink to a boundary only.
    return st.sampled_from([size for size in range(1, most + 1) for _ in range(_WEIGHT if size in BOUNDARIES else 1)])


@st.composite
def batch_shapes(
    draw: st.DrawFn,
    *,
    max_rows: int = 300,
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
    palette = draw(st.lists(row, min_size=1, max_size=min(n_rows, 5), unique=True))
    layout = draw(st.sampled_from(layouts))
    room = 0 if layout == "packed" else min(40, max_tokens // n_rows - max(row.length for row in palette))
    extra_padding = min(room, draw(st.sampled_from((0, 1, 3, 13, 16, 40))))
    # The order is one choice, not one for each row: Hypothesis gives up on shrinking a long sequence of choices.
    order = draw(st.integers(0, 1 << 16))
    rows = random.Random(order).choices(palette, k=n_rows) if order else (palette * n_rows)[:n_rows]
    return BatchShape(tuple(rows), layout, extra_padding)


def sweep(layouts: Sequence[str], max_length: int, max_tokens: int) -> Iterator[BatchShape]:
    """Every small batch size, with the row of interest first, last, at 15 and at 31, in every layout. Not random."""
    row = Row(0, min(13, max_length))
    others = (1, 5, 16, 17, 31, 33)
    for n_rows in SWEPT_SIZES:
        for position in sorted({p % n_rows for p in SWEPT_POSITIONS if -n_rows <= p < n_rows}):
            neighbours = [Row(1 + i % 5, min(others[i % len(others)], max_length)) for i in range(n_rows - 1)]
            rows = (*neighbours[:position], row, *neighbours[position:])
            for layout in layouts:
                shape = BatchShape(rows, layout)
                if shape.tokens <= max_tokens:
                    yield shape


def row_choices(pool: int, max_rows: int) -> st.SearchStrategy[list[int]]:
    """Which rows of a pool stand in a batch, and in which order: lists of indices, repeats allowed, shrinking to few."""
    return sizes(max_rows).flatmap(lambda n_rows: st.lists(st.integers(0, pool - 1), min_size=n_rows, max_size=n_rows))
