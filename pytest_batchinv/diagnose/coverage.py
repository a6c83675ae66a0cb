"""Op coverage: how the mode vouches for each operator that ran in a subject's forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch._ops import OpOverload

from pytest_batchinv.diagnose.recorder import Call, Recorder
from pytest_batchinv.kernels import counters, overloads, rowlocal, table
from pytest_batchinv.report.record import OpCoverage
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NotRun, Subject


def op_coverage(subject: Subject, cases: Iterable[BatchShape]) -> OpCoverage:
    """Runs eager code of the subject on these cases, in the mode, and sorts what it called.

    Raises what the subject raises, but for NotRun: such a case is left out.
    """
    eager = subject.in_eager_mode()
    calls: list[Call] = []
    answered: Counter[str] = Counter()
    for case in cases:
        recorder = Recorder()
        try:
            with counters.counting_apart() as hits:
                eager.run(case, recorder)
        except NotRun:
            continue
        calls += recorder.calls
        answered.update(hits)
    return sort_calls(calls, answered)


def sort_calls(calls: Iterable[Call], answered: Counter[str]) -> OpCoverage:
    """answered: calls by overload that reached the table."""
    covered: Counter[str] = Counter()
    row_local, unverified = set(), set()
    for call in calls:
        name = call.overload.name()
        if _is_covered(call.overload):
            covered[name] += 1
        elif rowlocal.is_row_local(call.overload, call.on_cpu_floats):
            row_local.add(name)
        else:
            unverified.add(name)
    floats = {call.overload.name() for call in calls if call.on_cpu_floats}
    return OpCoverage(
        covered=dict(sorted(covered.items())),
        row_local=tuple(sorted(row_local)),
        unverified=tuple(sorted(unverified)),
        bypassed=tuple(sorted(name for name in covered if name in floats and not answered[name])),
    )


def _is_covered(overload: OpOverload) -> bool:
    return overload.namespace == "batchinv" or overload in _covered()


def _covered() -> set[OpOverload]:
    names = (*table.LEAVES, *table.POINTWISE)
    entries = [overload for name in names if (overload := overloads.overload_of(name)) is not None]
    return {*entries, *(sibling.overload for overload in entries for sibling in overloads.siblings(overload))}
