"""Batch shapes: which rows stand in a batch, in which order and layout. Pure data, JSON in and JSON out; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

BOUNDARIES = (
    1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 21, 28, 31, 32, 33, 35, 42, 45, 48, 49, 63, 64, 65, 80, 96, 100, 112,
    127, 128, 129, 144, 160, 192, 255, 256, 257, 288, 300,
)  # fmt: skip
"""Tile edges and their neighbours, multiples of 7 and of 16, and sizes known from bug reports (9, 45, 65, 100, 257)."""

CONTENTS = ("random", "repeated", "extreme")
LAYOUTS = ("right", "left", "packed")
MAX_ROWS = 300


class Row(msgspec.Struct, frozen=True, order=True, omit_defaults=True, forbid_unknown_fields=True):
    """One logical sequence, known by identity: equal rows have equal content wherever they stand.

    id: seeds the content, or is the index in a pool of rows. length: tokens (1 for the rows of a function). content: one of
    ``CONTENTS``; "extreme" rows hold activations about a thousand times larger than the others. Raises ValueError.
    """

    id: int
    length: int = 1
    content: str = "random"

    def __post_init__(self) -> None:
        _require(self.id >= 0, f"a row's id is an integer from 0 on, not {self.id}")
        _require(self.length >= 1, f"a row has at least 1 token, not {self.length}")
        _require(self.content in CONTENTS, f"a row's content is one of {', '.join(CONTENTS)}, not {self.content!r}")


class BatchShape(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A batch as data: rows in order, the layout that brings them together, and columns of padding after the longest.

    layout: "right" or "left" name the side of the padding; "packed" puts the rows one after the other, without padding.
    pool: digest of the pool that the rows were taken from, where a finding names one; a replay compares it. Raises ValueError.
    """

    rows: tuple[Row, ...]
    layout: str = "right"
    extra_padding: int = 0
    pool: str = ""

    def __post_init__(self) -> None:
        _require(len(self.rows) > 0, "a batch has at least one row")
        _require(self.layout in LAYOUTS, f"a batch's layout is one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        _require(self.extra_padding >= 0, f"extra_padding is 0 or more, not {self.extra_padding}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """Columns of the padded batch, or the tokens of the packed one."""
        if self.layout == "packed":
            return sum(row.length for row in self.rows)
        return max(row.length for row in self.rows) + self.extra_padding

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass computes, padding included."""
        return self.width if self.layout == "packed" else self.width * len(self.rows)

    def alone(self, position: int) -> BatchShape:
        """The row at this position as a batch of its own, without padding."""
        return BatchShape((self.rows[position],))

    def with_rows(self, *rows: Row) -> BatchShape:
        return msgspec.structs.replace(self, rows=rows)

    def from_pool(self, digest: str) -> BatchShape:
        return msgspec.structs.replace(self, pool=digest)

    def to_json(self) -> str:
        """One line of JSON. A row of length 1 and random content is written as its id alone."""
        plain = msgspec.to_builtins(self)
        plain["rows"] = [row["id"] if row.keys() == {"id"} else row for row in plain["rows"]]
        return msgspec.json.encode(plain).decode()

    @classmethod
    def from_json(cls, text: str) -> BatchShape:
        """The batch shape that ``to_json`` wrote. Raises ValueError, with what is wrong, on anything else."""
        try:
            data = msgspec.json.decode(text, type=_Written)
            rows = tuple(Row(row) if isinstance(row, int) else row for row in data.rows)
            return cls(rows, data.layout, data.extra_padding, data.pool)
        except msgspec.DecodeError as error:
            raise ValueError(
                f'not a batch shape: {error}. It looks like {{"rows":[0,{{"id":1,"length":5}}],"layout":"left"}}'
            ) from error


class _Written(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[int | Row]
    layout: str = "right"
    extra_padding: int = 0
    pool: str = ""


def of_rows(ids: Iterable[int]) -> BatchShape:
    """The batch of these rows of a pool, for a function of rows."""
    return BatchShape(tuple(Row(i) for i in ids))


def as_ranges(sizes: Iterable[int]) -> str:
    """Whole numbers in short: "2-9, 33"."""
    runs: list[list[int]] = []
    for size in sorted(sizes):
        if runs and runs[-1][-1] == size - 1:
            runs[-1].append(size)
        else:
            runs.append([size])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def chosen_evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, spread over all of them, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
