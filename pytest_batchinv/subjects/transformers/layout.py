"""Lays the rows of a batch shape out as sequences of slots: a token, the row it belongs to, and its position in that row.

Pure Python: the same on every machine, whatever the device's random numbers are.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain

from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.base import Span

NO_ROW = -1
OUTLIER_SHARE = 0.75

Slot = tuple[int, int, int]  # token, row (NO_ROW: padding), position


@dataclass(frozen=True)
class BatchLayout:
    """Sequences of equal width, and the span of each row."""

    sequences: tuple[tuple[Slot, ...], ...]
    spans: tuple[Span, ...]

    @property
    def is_packed(self) -> bool:
        return len(self.spans) > len(self.sequences)

    def packing(self) -> tuple[list[list[int]], list[int]]:
        """For a packed layout: the columns of each row, -1 after its end, and each column's slot in that matrix.

        The matrix has two columns at least: torch.compile would make another graph for one.
        """
        longest = max(2, *(span.stop - span.start for span in self.spans))
        columns = [[*range(span.start, span.stop), *[-1] * (longest - span.stop + span.start)] for span in self.spans]
        slots = [row * longest + position for row, span in enumerate(self.spans) for position in range(span.stop - span.start)]
        return columns, slots

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
        return [[slot[index] for slot in sequence] for sequence in self.sequences]


@lru_cache(maxsize=512)
def row_tokens(row: Row, vocabulary: int, outlier: int) -> list[int]:
    """The row's tokens; they depend on the row alone, never on its batch. outlier: the token with extreme activations."""
    draw = random.Random(f"{row.id} {row.length} {row.content} {vocabulary}")

    def ordinary() -> int:
        token = draw.randrange(vocabulary - 1)
        return token if token < outlier else token + 1

    if row.content == "repeated":
        return [ordinary()] * row.length
    if row.content == "extreme":
        return [outlier if draw.random() < OUTLIER_SHARE else ordinary() for _ in range(row.length)]
    return [ordinary() for _ in range(row.length)]


def row_slots(number: int, row: Row, vocabulary: int, outlier: int, first_position: int = 0) -> list[Slot]:
    """The row's tokens as slots of the row with this number in its batch."""
    return [(token, number, position) for position, token in enumerate(row_tokens(row, vocabulary, outlier), first_position)]


def lay_out(shape: BatchShape, vocabulary: int, outlier: int, pad: int = 0) -> BatchLayout:
    """Padded layouts: a sequence for each row. Packed: one sequence, the rows one after the other."""
    rows = [row_slots(number, row, vocabulary, outlier, shape.first_position) for number, row in enumerate(shape.rows)]
    if shape.layout == "packed":
        starts = accumulate((len(row) for row in rows), initial=0)
        spans = [Span(0, start, start + len(row)) for start, row in zip(starts, rows, strict=False)]
        return BatchLayout((tuple(chain(*rows)),), tuple(spans))
    return padded(rows, shape.layout, shape.width, [pad] * len(rows), shape.opposite_padding)


def padded(rows: list[list[Slot]], side: str, width: int, pads: Iterable[int], opposite: int = 0) -> BatchLayout:
    """A sequence for each row, filled up to the width with its pad token on this side, "left" or "right".

    opposite: how many of the pad tokens stand on the other side.
    """
    sequences, spans = [], []
    for number, (row, pad) in enumerate(zip(rows, pads, strict=True)):
        padding = [(pad, NO_ROW, 0)] * (width - len(row))
        start = len(padding) - opposite if side == "left" else opposite
        sequences.append(tuple(padding[:start] + row + padding[start:]))
        spans.append(Span(number, start, start + len(row)))
    return BatchLayout(tuple(sequences), tuple(spans))
