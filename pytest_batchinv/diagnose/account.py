"""The account of what was found: the finding, with what explains it. A diagnosis that fails says so, and changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from pytest_batchinv import context
from pytest_batchinv.compare import first_row_that_differs
from pytest_batchinv.diagnose import culprits, diverging, sizes
from pytest_batchinv.relations.base import Relation, Side
from pytest_batchinv.report.record import Breakpoints, Finding, Section, Trace
from pytest_batchinv.search.runs import SubjectRuns
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NotRun, RowOutputs

T = TypeVar("T")

if TYPE_CHECKING:
    from pytest_batchinv.search.find import Broken


def bare(broken: Broken, relation: Relation, runs: SubjectRuns) -> Finding:
    """The finding, without any diagnosis."""
    difference, case = broken.found.difference, broken.case.from_pool(runs.subject.digest())
    return Finding(
        case=case.to_json(),
        position=broken.found.position,
        n_rows=len(case),
        row=msgspec.json.encode(case.rows[broken.found.position]).decode(),
        output=broken.found.output,
        sides=relation.sides_of(broken.found.output),
        replay=context.current().replay(runs.subject.info, case),
        **msgspec.structs.asdict(difference),
    )


def explained(finding: Finding, broken: Broken, relation: Relation, runs: SubjectRuns) -> Finding:
    """The finding with what the relation's ``diagnoses`` say of it."""
    sections: list[Section] = []
    found: Breakpoints | None = None
    if "sizes" in relation.diagnoses:
        found = _guarded("sizes", sections, lambda: _breakpoints(broken, runs))
    if "operators" in relation.diagnoses:
        ops = _guarded("operators", sections, lambda: diverging.diverging_ops(runs.subject, broken.case))
        if ops is not None:
            named = ", ".join(ops) or "none"
            sections.append(Section("operators", (f"compiled alone, other bits than in eager code: {named}",)))
    if runs.subject.info.elsewhere:
        traced = None
        sections.append(Section("trace", ("another process computes, so no operator of it is seen here",)))
    else:
        traced = _guarded("trace", sections, lambda: _trace(broken, relation, runs))
    return msgspec.structs.replace(finding, breakpoints=found, trace=traced, sections=tuple(sections))


def _guarded(title: str, sections: list[Section], diagnose: Callable[[], T]) -> T | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's profiler, say: they are not the test's, whose filter may raise them
            return diagnose()
    except Exception as error:
        sections.append(Section(title, (f"could not be told: {type(error).__name__}: {error}",)))
        return None


def _trace(broken: Broken, relation: Relation, runs: SubjectRuns) -> Trace | None:
    case, position = broken.case, broken.found.position
    if "code" in relation.diagnoses:
        from pytest_batchinv.diagnose import crossed  # loads Inductor, which eager code has no need of

        return crossed.trace(runs.subject, Side(case, position))
    return culprits.trace(relation, runs, case, position)


def _breakpoints(broken: Broken, runs: SubjectRuns) -> Breakpoints:
    def differs_at(case: BatchShape, position: int) -> bool:
        try:
            outputs = runs.run(case)
        except NotRun:
            return False
        expected = runs.alone(case.alone(position))
        return first_row_that_differs(expected, RowOutputs(rows=[dict(outputs[position])])) is not None

    return sizes.breakpoints(broken.case, broken.found.position, runs.subject.space, differs_at)
