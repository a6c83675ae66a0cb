"""An engine that smooths sequences of numbers, and a relation about the order of a batch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pytest_batchinv.relations import Comparison, Mutant, Relation, Runs
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects import NotRun, RowOutputs, Space, Span, Subject, SubjectInfo
from pytest_batchinv.subjects.base import Observer, observed

MODELS = ("steady", "first-row-counts-more")


class Smoothing(Subject):
    """``pytest --batch-invariant --batchinv-engine smoothing --batchinv-model steady``."""

    def __init__(self, *, model: str, device: str, dtype: str, attn: str, url: str | None) -> None:
        if model not in MODELS:
            raise ValueError(f"there is no model {model!r} to smooth with; use one of {', '.join(MODELS)}")
        self.model, self.device = model, device
        self.info = SubjectInfo(model, "smoothing", device, "fp32")
        self.space = Space(palette=tuple(Row(i, 3 + i) for i in range(9)), layouts=("right",), max_rows=40, max_length=64)

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """Each row is made from its identity alone; what is compared is what belongs to it, without its padding."""
        if why := self.space.holds(case):
            raise NotRun(why)
        rows = torch.zeros(len(case), case.width, device=self.device)
        for i, row in enumerate(case.rows):
            rows[i, : row.length] = torch.arange(row.length, device=self.device) / (row.id + 1)
        with observed(observer):
            smooth = self._smooth(rows)
        return RowOutputs(rows=[{"smoothed": smooth[i, : row.length].clone()} for i, row in enumerate(case.rows)])

    def spans(self, case: BatchShape) -> list[Span]:
        return [Span(i, 0, row.length) for i, row in enumerate(case.rows)]

    def _smooth(self, rows: Tensor) -> Tensor:
        smooth = rows.clone()
        smooth[:, 1:] = rows[:, 1:] * 0.75 + rows[:, :-1] * 0.25
        if self.model == "first-row-counts-more" and len(rows) > 1:
            smooth[0] = torch.nextafter(smooth[0], torch.full_like(smooth[0], torch.inf))
        return smooth


class Order(Relation):
    """A row keeps its bits where the batch stands in the opposite order."""

    letter = "O"
    words = "in the opposite order"
    meaning = "a row has other bits where the batch stands in the opposite order (relation O, order)"
    side_names = ("in this order", "in the opposite order")
    share = 10

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        turned = list(runs.run(case.with_rows(*reversed(case.rows))))
        yield Comparison(runs.run(case), RowOutputs(rows=[dict(row) for row in reversed(turned)]))

    def mutants(self) -> tuple[Mutant, ...]:
        return (
            Mutant(
                "the first row of a batch", lambda: Smoothing(model=MODELS[1], device="cpu", dtype="fp32", attn="", url=None)
            ),
        )
