"""Planted faults of what runs sequences in layouts and steps: a subject that computes exactly, but for the fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from pytest_batchinv.mutants.rows import one_ulp_up
from pytest_batchinv.shapes import CACHES, LAYOUTS, BatchShape, Row
from pytest_batchinv.subjects.base import NoGradients, Observer, RowOutputs, Space, Span, Subject, SubjectInfo, observed

WINDOW = 24


class Forward(NamedTuple):
    """One forward of a row in its batch. start, stop: its columns; column: that of the row's first token; n_keys: with those
    of a cache and its spare ones."""

    case: BatchShape
    start: int
    stop: int
    column: int
    n_keys: int

    @property
    def n_queries(self) -> int:
        return self.stop - self.start


Fault = Callable[[Forward], bool]
"""Whether what this forward gives has other bits."""


class Sequences(Subject):
    """Sums of the tokens so far, which are whole numbers, so that their order changes nothing."""

    info = SubjectInfo("sums of tokens", "sequences", "cpu", "fp32")

    def __init__(self, fault: Fault = lambda forward: False) -> None:
        self.fault = fault
        lengths = (1, 13, 5, 17, 33, 64, 100, 300)
        self.space = Space(
            palette=tuple(Row(i, length) for i, length in enumerate(lengths)),
            layouts=LAYOUTS,
            max_rows=17,
            max_length=300,
            max_tokens=4096,
            max_position=1024,
            caches=CACHES,
            window=WINDOW,
        )

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        with observed(observer):
            return RowOutputs(
                rows=[{"sums": self._row(case, row, span)} for row, span in zip(case.rows, self.spans(case), strict=True)]
            )

    def spans(self, case: BatchShape) -> list[Span]:
        spans, column = [], 0
        for number, row in enumerate(case.rows):
            if case.layout == "packed":
                spans.append(Span(0, column, column + row.length))
                column += row.length
            else:
                left = case.layout == "left"
                start = case.width - row.length - case.opposite_padding if left else case.opposite_padding
                spans.append(Span(number, start, start + row.length))
        return spans

    def in_eager_mode(self) -> Sequences:
        return self

    def with_gradients(self) -> Subject:
        raise NoGradients("sums of whole numbers have no gradients")

    def digest(self) -> str:
        return ""

    def _row(self, case: BatchShape, row: Row, span: Span) -> torch.Tensor:
        tokens = torch.arange(row.length) * 7 % 31 + row.id + case.first_position
        sums = tokens.cumsum(0).float() + 0.5
        for forward in _forwards(case, span.start):
            if self.fault(forward):
                first, last = (max(0, column - span.start) for column in (forward.start, forward.stop))
                sums = one_ulp_up(sums, slice(first, last))
        return sums


def _forwards(case: BatchShape, column: int) -> Iterator[Forward]:
    steps = case.steps
    if steps is None:
        yield Forward(case, 0, case.width, column, case.width)
        return
    starts = (*(0,) * bool(steps.prefix), steps.prefix, *steps.ends)
    stops = (*(steps.prefix,) * bool(steps.prefix), *steps.ends, case.width)
    for start, stop in zip(starts, stops, strict=True):
        yield Forward(case, start, stop, column, case.width + steps.spare if steps.cache == "static" else stop)


def _made(fault: Fault) -> Callable[[], Sequences]:
    return lambda: Sequences(fault)


LAYOUT: dict[str, Callable[[], Sequences]] = {
    "16 columns of padding before the row": _made(lambda f: f.column >= 16 and f.case.layout == "left"),
    "another row before it in its sequence": _made(lambda f: f.column > 0 and f.case.layout == "packed"),
    "padding on both sides": _made(lambda f: f.column > 0 and f.case.layout == "right"),
    "40 columns of padding after the row": _made(lambda f: f.case.extra_padding >= 40),
    "more keys than columns": _made(lambda f: f.n_keys >= f.case.width + 64),
    "positions that do not begin at 0, with padding before them": _made(lambda f: f.case.first_position > 16 and f.column > 0),
}
CHUNKS: dict[str, Callable[[], Sequences]] = {
    "a chunk from column 31 on": _made(lambda f: f.start == 31),
    "a chunk from column 256 on": _made(lambda f: f.start == 256),
    "a chunk of 7 columns": _made(lambda f: f.start > 0 and f.n_queries == 7),
    "a chunk after a prefix of 64 tokens": _made(lambda f: f.case.steps is not None and f.case.steps.prefix == f.start == 64),
    "a chunk after rejected tokens": _made(lambda f: f.start > 0 and f.case.steps is not None and f.case.steps.rejected > 0),
    "a chunk after a static cache": _made(lambda f: f.start > 0 and f.n_keys > f.stop),
}
DECODE: dict[str, Callable[[], Sequences]] = {
    "one query": _made(lambda f: f.start > 0 and f.n_queries == 1),
    "one query of 5 rows": _made(lambda f: f.n_queries == 1 and len(f.case) == 5),
    "one query from key 32 on": _made(lambda f: f.n_queries == 1 and f.start >= 32),
    "one query behind the window of a sliding cache": _made(
        lambda f: f.n_queries == 1 and f.start > WINDOW and f.case.steps is not None and f.case.steps.cache == "sliding"
    ),
    "5 queries at once": _made(lambda f: f.start > 0 and f.n_queries == 5),
    "one query after rejected tokens": _made(
        lambda f: f.start > 0 and f.n_queries == 1 and f.case.steps is not None and f.case.steps.rejected > 0
    ),
}
