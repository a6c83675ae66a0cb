"""Batch shapes: which rows stand in a batch, in which order and layout. Pure data, JSON in and JSON out; no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

BOUNDARIES = (
    1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 21, 28, 31, 32, 33, 35, 42, 45, 48, 49, 63, 64, 65, 80, 96, 100, 112,
    127, 128, 129, 144, 160, 192, 255, 256, 257, 288, 300,
)  # fmt: skip
"""Tile edges and their neighbours, multiples of 7 and of 16, and sizes known from bug reports (9, 45, 65, 100, 257)."""

TRIED_SIZES = tuple(size for size in BOUNDARIES if size <= 65)
"""Batch sizes at which a row that differed is looked at again, to tell where its bits change."""

CONTENTS = ("random", "repeated", "extreme")
LAYOUTS = ("right", "left", "packed")


@dataclass(frozen=True, order=True)
class Row:
    """One logical sequence, known by identity: equal rows have equal content wherever they stand.

    id: seeds the content. length: tokens (1 for the rows of a function). content: one of ``CONTENTS``; "extreme" rows
    hold activations about a thousand times larger than the others.
    """

    id: int
    length: int = 1
    content: str = "random"

    def __post_init__(self) -> None:
        _require(self.id >= 0, f"a row's id is an integer from 0 on, not {self.id}")
        _require(self.length >= 1, f"a row has at least 1 token, not {self.length}")
        _require(self.content in CONTENTS, f"a row's content is one of {', '.join(CONTENTS)}, not {self.content!r}")


@dataclass(frozen=True)
class BatchShape:
    """A batch as data: rows in order, the layout that brings them together, and columns of padding behind the longest.

    layout: "right" or "left" name the side of the padding; "packed" puts the rows one behind the other, without padding.
    """

    rows: tuple[Row, ...]
    layout: str = "right"
    extra_padding: int = 0

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

    def alone(self, position: int) -> "BatchShape":
        """The row at this position as a batch of its own, without padding."""
        return BatchShape((self.rows[position],))

    def with_rows(self, *rows: Row) -> "BatchShape":
        return replace(self, rows=rows)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "BatchShape":
        """The batch shape that ``to_json`` wrote. Raises ValueError, with what is wrong, on anything else."""
        try:
            data = json.loads(text)
            rows = tuple(Row(**row) for row in data.pop("rows"))
            return cls(rows=rows, **data)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"not a batch shape: {error}. It looks like "
                f'{{"rows":[{{"id":0,"length":5,"content":"random"}}],"layout":"right","extra_padding":0}}'
            ) from error


def as_ranges(sizes: Sequence[int], tried: Sequence[int]) -> str:
    """Sizes in short: "2-9, 33" where every tried size from 2 to 9 is among them, and 33."""
    runs: list[list[int]] = []
    for before, size in zip((None, *tried), tried, strict=False):
        if size in sizes and runs and runs[-1][-1] == before:
            runs[-1].append(size)
        elif size in sizes:
            runs.append([size])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
