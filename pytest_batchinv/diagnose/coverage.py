"""Op coverage: how the mode vouches for each operator that ran in a subject's forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

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
    row_local, unverified, bypassed = set(), set(), set()
    for call in calls:
        name, on_cpu = call.overload.name(), call.device == "cpu"
        if call.overload.namespace == "batchinv" or call.overload in _covered(on_cpu):
            covered[name] += 1
            if call.gives_floats and not answered[name]:
                bypassed.add(name)
        elif rowlocal.is_row_local(call.overload):
            row_local.add(name)
        else:
            unverified.add(name)
    return OpCoverage(
        covered=dict(sorted(covered.items())),
        row_local=tuple(sorted(row_local)),
        unverified=tuple(sorted(unverified)),
        bypassed=tuple(sorted(bypassed)),
    )


@cache
def _covered(on_cpu: bool) -> frozenset[OpOverload]:
    """The table's overloads and their siblings. Pointwise entries are the CPU's alone."""
    names = (*table.BACKEND_KERNELS, *table.POINTWISE, *table.WHOLE_VECTORS) if on_cpu else tuple(table.BACKEND_KERNELS)
    entries = [overload for name in names if (overload := overloads.overload_of(name)) is not None]
    siblings = (sibling.overload for overload in entries for sibling in overloads.siblings(overload))
    return frozenset((*entries, *siblings))
