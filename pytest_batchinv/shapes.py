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
CACHES = ("dynamic", "static", "sliding")
"""dynamic: grows, and keeps all keys; static: of one size from the start; sliding: grows, and keeps a window's keys alone."""
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


class Steps(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A batch that is computed in steps, each of the next columns, with a cache of keys and values between them.

    ends: the columns at which a step ends, ascending; the last step goes to the end of the batch. cache: one of ``CACHES``.
    spare: keys that a static cache holds beyond the batch's columns. rejected: after each step but the last, tokens of another
    continuation that are computed with it, and that the cache then forgets, as after speculation. prefix: columns whose keys
    and values come from caches that each row has filled alone, which "rejected" holds for, too. Raises ValueError.
    """

    ends: tuple[int, ...] = ()
    cache: str = "dynamic"
    spare: int = 0
    rejected: int = 0
    prefix: int = 0

    def __post_init__(self) -> None:
        _require(self.cache in CACHES, f"a cache is one of {', '.join(CACHES)}, not {self.cache!r}")
        starts = (self.prefix, *self.ends)
        ascending = all(a < b for a, b in zip(starts, self.ends, strict=False))
        _require(ascending and self.prefix >= 0, f"steps end in ascending order after the prefix, not {list(starts)}")
        _require(self.spare >= 0 and self.rejected >= 0, "spare and rejected are 0 or more")
        _require(not self.spare or self.cache == "static", f"only a static cache has spare keys, not a {self.cache} one")
        grows = self.cache != "static"
        _require(grows or not self.rejected, "a static cache cannot forget tokens, so none can be rejected")
        _require(grows or not self.prefix, "a static cache is of one batch, so it cannot take over a prefix")


class BatchShape(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A batch as data: rows in order, the layout that brings them together, and columns of padding after the longest.

    layout: "right" or "left" name the side of the padding; "packed" puts the rows one after the other, without padding.
    opposite_padding: columns of padding on the other side. first_position: of each row's first token. steps: how the columns
    are computed; None: all at once, without a cache. pool: digest of the pool that the rows were taken from, where a finding
    names one; a replay compares it. Raises ValueError.
    """

    rows: tuple[Row, ...]
    layout: str = "right"
    extra_padding: int = 0
    pool: str = ""
    opposite_padding: int = 0
    first_position: int = 0
    steps: Steps | None = None

    def __post_init__(self) -> None:
        _require(len(self.rows) > 0, "a batch has at least one row")
        _require(self.layout in LAYOUTS, f"a batch's layout is one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        for name in ("extra_padding", "opposite_padding", "first_position"):
            _require(getattr(self, name) >= 0, f"{name} is 0 or more, not {getattr(self, name)}")
        packed = self.layout == "packed"
        _require(not (packed and self.opposite_padding), "a packed batch has no padding, so none on the opposite side")
        _require(not (packed and self.steps), "a packed batch is computed at once, not in steps")
        if self.steps is not None:
            last = (self.steps.prefix, *self.steps.ends)[-1]
            _require(last < self.width, f"the last step computes nothing: it begins at column {last} of {self.width}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """Columns of the padded batch, or the tokens of the packed one."""
        if self.layout == "packed":
            return sum(row.length for row in self.rows)
        return max(row.length for row in self.rows) + self.extra_padding + self.opposite_padding

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass computes, padding included."""
        return self.width if self.layout == "packed" else self.width * len(self.rows)

    def alone(self, position: int) -> BatchShape:
        """The row at this position as a batch of its own, without padding; its positions are those that it has here."""
        return BatchShape((self.rows[position],), first_position=self.first_position)

    def plain(self) -> BatchShape:
        """The same rows at the same positions, padded on the right up to the longest, and computed at once."""
        return BatchShape(self.rows, first_position=self.first_position)

    def at_once(self) -> BatchShape:
        """The same batch, computed without a cache."""
        return msgspec.structs.replace(self, steps=None)

    def in_steps(self, steps: Steps) -> BatchShape:
        return msgspec.structs.replace(self, steps=steps)

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
            return cls(rows, *msgspec.structs.astuple(data)[1:])
        except msgspec.DecodeError as error:
            raise ValueError(
                f'not a batch shape: {error}. It looks like {{"rows":[0,{{"id":1,"length":5}}],"layout":"left"}}'
            ) from error


class _Written(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[int | Row]
    layout: str = "right"
    extra_padding: int = 0
    pool: str = ""
    opposite_padding: int = 0
    first_position: int = 0
    steps: Steps | None = None


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
