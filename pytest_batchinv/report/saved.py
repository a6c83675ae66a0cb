"""The saved form of a run: what a JSON report holds, how it is read again, and how several become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pytest_batchinv.report.record import SCHEMA, Record

READABLE = (2, 3)
"""Schemas that are read truly. 3 added the trace of a finding, which a record of 2 has not; nothing changed its meaning."""

_TOO_OLD = "records of schema 1 call a check that crashed or was refused equal, so nothing can be told from them"


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run of pytest, of those that were merged: where, with which settings, with what outcome."""

    machine: dict[str, str] = {}
    settings: dict[str, Any] = {}
    outcome: dict[str, int | None] = {}


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON report.

    machine: of the first record; of a merged report what all runs have in common, so read it from each record. settings: the
    options, without the reports that were asked for. outcome: exit_status, and tests by passed, failed, skipped, error.
    merged: the runs that were put together, none in the report of one run.
    """

    schema: int
    machine: dict[str, str] = {}
    settings: dict[str, Any] = {}
    outcome: dict[str, int | None] = {}
    records: tuple[Record, ...] = ()
    merged: tuple[Run, ...] = ()


class _Head(msgspec.Struct):
    schema: int
    records: msgspec.Raw


def read(path: Path) -> Saved:
    """A saved report. Raises ValueError with a sentence for a file that is none, or of a schema that cannot be read truly."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        head = msgspec.json.decode(text, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no record of a run: {error}. Give a file that --batchinv-report wrote.") from None
    _refuse_other_schemas(path, head.schema)
    try:
        saved = msgspec.json.decode(text, type=Saved)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no record of schema {head.schema}: {error}. Run the tests again to write it.") from None
    for record in saved.records:
        _refuse_other_schemas(path, record.schema)
        _refuse_contradictions(path, record)
    return saved


def _refuse_contradictions(path: Path, record: Record) -> None:
    """No run writes a verdict of equal bits beside a difference that it found."""
    if record.finding is not None and record.verdict in ("equal", "inconclusive"):
        raise ValueError(
            f"{path} contradicts itself: the record of {record.nodeid} says {record.verdict!r} and holds a finding, so it was "
            "changed after it was written. Run the tests again to write it."
        )


def _refuse_other_schemas(path: Path, schema: int) -> None:
    if schema in READABLE:
        return
    known = " and ".join(map(str, READABLE))
    if schema > max(READABLE):
        raise ValueError(f"{path} has schema {schema}, and this version reads {known}. Update pytest-batchinv.")
    why = _TOO_OLD if schema == 1 else "there is no such schema"
    raise ValueError(f"{path} has schema {schema}, and this version reads {known}: {why}. Run the tests again to write it.")


def merge(saved: Mapping[str, Saved]) -> Saved:
    """Reports of several hosts or runs as one, by name. Raises ValueError where two hold the same record."""
    holders: dict[bytes, str] = {}
    for name, one in saved.items():
        for record in one.records:
            first = holders.setdefault(msgspec.json.encode(record), name)
            if first != name:
                raise ValueError(f"{first} and {name} hold the same record of {record.nodeid}: give each run once.")
    runs = [run for one in saved.values() for run in one.merged or [_run(one)]]
    return Saved(
        schema=SCHEMA,
        machine=_in_common([run.machine for run in runs]),
        settings=_in_common([run.settings for run in runs]),
        outcome=_outcome([run.outcome for run in runs]),
        records=tuple(record for one in saved.values() for record in one.records),
        merged=tuple(runs),
    )


def _run(saved: Saved) -> Run:
    return Run(machine=saved.machine, settings=saved.settings, outcome=saved.outcome)


def _in_common(dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *rest = dicts
    return {name: value for name, value in first.items() if all(name in other and other[name] == value for other in rest)}


def _outcome(outcomes: Sequence[Mapping[str, int | None]]) -> dict[str, int | None]:
    """Counts are summed. The exit status is 0 where all are; None, of a run that did not end, is worse than any number."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts.update({name: number or 0 for name, number in outcome.items() if name != "exit_status"})
    statuses = [outcome.get("exit_status") for outcome in outcomes]
    known = [status for status in statuses if status is not None]
    return {"exit_status": max(known) if len(known) == len(statuses) else None, **counts}
