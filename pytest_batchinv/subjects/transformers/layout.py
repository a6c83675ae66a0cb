"""Lays the rows of a batch shape out as lines of cells: a token, the row it belongs to, and its position in that row.

Pure Python: the same on every machine, whatever the device's random numbers are.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain

from pytest_batchinv.shapes import BatchShape, Row

NO_ROW = -1
LOUD_SHARE = 0.75

Cell = tuple[int, int, int]  # token, row (NO_ROW: padding), position


@dataclass(frozen=True)
class Place:
    """Where a row stands: columns ``start`` to ``stop`` of a line."""

    line: int
    start: int
    stop: int


@dataclass(frozen=True)
class Sheet:
    """Lines of equal width, and the place of each row."""

    lines: tuple[tuple[Cell, ...], ...]
    places: tuple[Place, ...]

    @property
    def is_packed(self) -> bool:
        return len(self.places) > len(self.lines)

    def packing(self) -> tuple[list[list[int]], list[int]]:
        """Of a packed sheet: the columns of each row, -1 behind its end, and each column's cell in that matrix."""
        longest = max(place.stop - place.start for place in self.places)
        columns = [[*range(place.start, place.stop), *[-1] * (longest - place.stop + place.start)] for place in self.places]
        cells = [
            row * longest + position for row, place in enumerate(self.places) for position in range(place.stop - place.start)
        ]
        return columns, cells

    @property
    def tokens(self) -> list[list[int]]:
        return self._layer(0)

    @property
    def rows(self) -> list[list[int]]:
        return self._layer(1)

    @property
    def positions(self) -> list[list[int]]:
        return self._layer(2)

    def _layer(self, index: int) -> list[list[int]]:
        return [[cell[index] for cell in line] for line in self.lines]


def row_tokens(row: Row, vocabulary: int, loud: int) -> list[int]:
    """The row's tokens; they depend on the row alone, never on its batch. loud: the token with extreme activations."""
    draw = random.Random(f"{row.id} {row.length} {row.content} {vocabulary}")

    def quiet() -> int:
        token = draw.randrange(vocabulary - 1)
        return token if token < loud else token + 1

    if row.content == "repeated":
        return [quiet()] * row.length
    if row.content == "extreme":
        return [loud if draw.random() < LOUD_SHARE else quiet() for _ in range(row.length)]
    return [quiet() for _ in range(row.length)]


def row_cells(number: int, row: Row, vocabulary: int, loud: int) -> list[Cell]:
    """The row's tokens as cells of the row with this number in its batch."""
    return [(token, number, position) for position, token in enumerate(row_tokens(row, vocabulary, loud))]


def lay_out(shape: BatchShape, vocabulary: int, loud: int, pad: int = 0) -> Sheet:
    """Padded layouts: a line for each row. Packed: one line, the rows one behind the other."""
    rows = [row_cells(number, row, vocabulary, loud) for number, row in enumerate(shape.rows)]
    if shape.layout == "packed":
        starts = accumulate((len(row) for row in rows), initial=0)
        places = [Place(0, start, start + len(row)) for start, row in zip(starts, rows, strict=False)]
        return Sheet((tuple(chain(*rows)),), tuple(places))
    return pad_lines(rows, [shape.layout] * len(rows), shape.width, [pad] * len(rows))


def pad_lines(rows: list[list[Cell]], sides: Iterable[str], width: int, pads: Iterable[int]) -> Sheet:
    """A line for each row, filled up to the width with its pad token on its side, "left" or "right"."""
    lines, places = [], []
    for number, (row, side, pad) in enumerate(zip(rows, sides, pads, strict=True)):
        padding = [(pad, NO_ROW, 0)] * (width - len(row))
        start = len(padding) if side == "left" else 0
        lines.append(tuple(padding + row if side == "left" else row + padding))
        places.append(Place(number, start, start + len(row)))
    return Sheet(tuple(lines), tuple(places))
