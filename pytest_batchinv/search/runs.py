"""A subject's outputs while it is checked: rows alone are remembered, and what is compared is counted."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from pytest_batchinv.compare import RowDifference, first_row_that_differs
from pytest_batchinv.report.record import Counts, Skipped
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.base import RowOutputs, Subject

if TYPE_CHECKING:
    from pytest_batchinv.relations.base import Comparison

ALONE_BYTES = 2 << 30


@dataclass
class Stats:
    """What one check of one relation has run and compared so far."""

    examples: int = 0
    rows: int = 0
    compared_bytes: int = 0
    nan_rows: int = 0
    forwards: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def counts(self) -> Counts:
        return Counts(self.examples, self.rows, self.compared_bytes, self.nan_rows, self.forwards, self.seconds)


class _Alone(NamedTuple):
    """One row's outputs alone. kind: equal for rows whose outputs can be stacked."""

    outputs: RowOutputs
    kind: str


_Key = tuple[Subject, Row, int]


class SubjectRuns:
    """Runs of one subject for the check of one relation.

    last: the case that ran last, for the account of an error.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.stats = Stats()
        self.last: BatchShape | None = None
        self._eager = subject.in_eager_mode()
        self._alone: OrderedDict[_Key, _Alone] = OrderedDict()
        self._alone_bytes = 0

    def run(self, case: BatchShape) -> RowOutputs:
        return self._run(self.subject, case)

    def run_eager(self, case: BatchShape) -> RowOutputs:
        return self._run(self._eager, case)

    def run_by(self, subject: Subject, case: BatchShape) -> RowOutputs:
        """What another subject of the same space gives."""
        return self._run(subject, case)

    def alone(self, case: BatchShape, by: Subject | None = None) -> RowOutputs:
        """Each row of the case as a batch of its own; a row is run once and remembered. by: another subject than this one."""
        subject = by or self.subject
        keys = [(subject, row, case.first_position) for row in case.rows]
        for key in dict.fromkeys(keys):
            if key in self._alone:
                self._alone.move_to_end(key)
            else:
                self._remember(key, self._run(subject, case.alone(keys.index(key))))
        return _joined([self._alone[key] for key in keys])

    def compare(self, comparison: Comparison) -> RowDifference | None:
        expected, actual, positions = comparison
        self.stats.compared_bytes += expected.nbytes
        self.stats.nan_rows += _nan_rows(expected)
        found = first_row_that_differs(expected, actual)
        if found is None or positions is None:
            return found
        return found._replace(position=positions[found.position])

    def _run(self, subject: Subject, case: BatchShape) -> RowOutputs:
        self.last = case
        self.stats.forwards += 1
        return subject.run(case)

    def _remember(self, key: _Key, outputs: RowOutputs) -> None:
        outputs = RowOutputs(outputs.stacked, outputs.rows)  # what is shared is of no use to a batch
        self._alone[key] = _Alone(outputs, _kind(outputs))
        self._alone_bytes += outputs.nbytes

    def forget_most(self) -> None:
        """Between two cases: the rows alone that were not asked for lately, past ``ALONE_BYTES``."""
        while self._alone_bytes > ALONE_BYTES and len(self._alone) > 1:
            self._alone_bytes -= self._alone.popitem(last=False)[1].outputs.nbytes


def _joined(alone: list[_Alone]) -> RowOutputs:
    """Batches of one row each as one batch: stacked where all rows have outputs of one shape and dtype."""
    if alone[0].kind and len({row.kind for row in alone}) == 1:
        parts = [row.outputs.stacked or {} for row in alone]
        return RowOutputs({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return RowOutputs(rows=[dict(row.outputs[0]) for row in alone])


def _kind(outputs: RowOutputs) -> str:
    """Names, shapes and dtypes of outputs that can be stacked; empty for others."""
    if outputs.stacked is None or any(t.is_quantized for t in outputs.stacked.values()):
        return ""
    return sys.intern(" ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in outputs.stacked.items()))


def _nan_rows(outputs: RowOutputs) -> int:
    if outputs.stacked is not None:
        rows = [_nan_by_row(t) for t in outputs.stacked.values() if t.is_floating_point() or t.is_complex()]
        return int(torch.stack(rows).any(0).sum()) if rows else 0
    return sum(any(_has_nan(t) for t in row.values()) for row in outputs.rows)


def _nan_by_row(x: torch.Tensor) -> torch.Tensor:
    if x.element_size() == 1:  # torch compares no floats of 8 bits
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    is_nan = x != x
    return is_nan.flatten(1).any(1) if x.dim() > 1 else is_nan


def _has_nan(x: torch.Tensor) -> bool:
    return (x.is_floating_point() or x.is_complex()) and x.element_size() > 1 and bool((x != x).any())
