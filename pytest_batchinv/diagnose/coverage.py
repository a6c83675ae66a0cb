"""Op coverage: how the mode vouches for each operator that ran in a subject's forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Literal

from torch._ops import OpOverload

from pytest_batchinv.diagnose.recorder import Call, Recorder
from pytest_batchinv.kernels import counters, overloads, scanned, table
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
    row_local, unverified, bypassed, devices = set(), set(), set(), set()
    for call in calls:
        name, device = call.overload.name(), call.device or "cpu"
        state = vouched(call.overload, call.name, device, call.dtype, scanned.scan_of(device))
        devices.add(device)
        if state == "covered":
            covered[name] += 1
            if (call.gives_floats or name in table.OF_VLLM) and not answered[name]:
                bypassed.add(name)
        elif state == "row-local":
            row_local.add(name)
        else:
            unverified.add(call.name)
    return OpCoverage(
        covered=dict(sorted(covered.items())),
        row_local=tuple(sorted(row_local - unverified)),
        unverified=tuple(sorted(unverified)),
        bypassed=tuple(sorted(bypassed)),
        not_scanned=" ".join(filter(None, map(scanned.what_is_missing, sorted(devices)))) if unverified else "",
    )


def vouched(
    overload: OpOverload, name: str, device: str, dtype: str, scan: scanned.Scan | None
) -> Literal["covered", "row-local"] | None:
    """How the mode vouches for an operator in this dtype, as the scan has it; None: it is unverified.

    An entry of the table whose rows the scan saw vary is not covered. name: of the operator's cell. dtype: "" for a call
    without floats: whole numbers are not rounded, so no order changes them.
    """
    state = None if scan is None else scan.state(name, dtype)
    if state == scanned.VARIES:
        return None
    # vLLM may be imported after a first check, so its operators are not among those that are remembered.
    of_vllm = device == "cpu" and overload.name() in table.OF_VLLM
    if of_vllm or overload.namespace == "batchinv" or overload in _covered(device == "cpu"):
        return "covered"
    if scanned.is_exact(overload, dtype) or scanned.computes_nothing(overload) or state in (scanned.ROW_LOCAL, scanned.COVERED):
        return "row-local"
    return None


@cache
def _covered(on_cpu: bool) -> frozenset[OpOverload]:
    """The table's overloads and their siblings. Pointwise entries are the CPU's alone."""
    of_the_cpu = (*table.POINTWISE, *table.WHOLE_VECTORS)
    names = (*table.BACKEND_KERNELS, *(of_the_cpu if on_cpu else ()))
    entries = [overload for name in names if (overload := overloads.overload_of(name)) is not None]
    siblings = (sibling.overload for overload in entries for sibling in overloads.siblings(overload))
    return frozenset((*entries, *siblings))
