"""Detection power: what a check makes of a planted fault."""

from __future__ import annotations

import time
from typing import NamedTuple

from pytest_batchinv import BatchVarianceError, check_batch_invariant
from pytest_batchinv.mutants.faults import Fault
from pytest_batchinv.report.record import Record
from pytest_batchinv.subjects.rows import RowsSubject

SEED = 0


class Power(NamedTuple):
    """What the check made of one fault. located: operator and line are named. convicted: a causal run said that it causes."""

    caught_by: str
    located: bool
    convicted: bool
    batches: int
    seconds: float


def power(fault: Fault, seed: int = SEED) -> Power:
    fn, pool = fault.make()
    started = time.perf_counter()
    try:
        check_batch_invariant(RowsSubject(fn, [pool], compile_mode=fault.compile_mode), fault.relations, seed=seed)
    except BatchVarianceError as error:
        record = error.record
        convicted = _cause_effect(record) == "causes"
        return Power(record.relation, is_located(fault, record), convicted, record.counts.examples, _since(started))
    return Power("", False, False, 0, _since(started))


def is_located(fault: Fault, record: Record) -> bool:
    """Whether the trace names the fault's operator and line; where the sides call other operators, the line."""
    trace = record.finding.trace if record.finding else None
    if trace is None:
        return False
    if fault.control_flow:
        named = [op for op in trace.ops if op.badge == "one side"]
        return bool(trace.control_flow) and any(op.line.endswith("# planted") for op in named)
    if trace.cause is None:
        return False
    op = trace.ops[trace.cause.op]
    if op.made_of:
        operators, *lines = op.made_of
        return fault.op in operators.split(", ") and any(line.endswith("# planted") for line in lines)
    return op.overload == fault.op and op.line.endswith("# planted")


def _cause_effect(record: Record) -> str:
    cause = record.finding.trace.cause if record.finding and record.finding.trace else None
    return cause.effect if cause else ""


def _since(started: float) -> float:
    return time.perf_counter() - started
