"""Properties of a test case in JUnit's file: what its checks found, in words that a CI server can show and search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pytest_batchinv.report import message
from pytest_batchinv.report.record import Record

Property = tuple[str, object]


def properties(records: Iterable[Record]) -> list[Property]:
    """batchinv.subject and what was said of it, for each subject of a test in the order of its checks."""
    by_subject: dict[object, list[Record]] = {}
    for record in records:
        by_subject.setdefault(record.subject, []).append(record)
    return [line for group in by_subject.values() for line in _of_one(group)]


def _of_one(records: list[Record]) -> Iterator[Property]:
    yield "batchinv.subject", message.subject_words(records[0].subject)
    for record in records:
        kind = "control" if record.control else "relation"
        yield f"batchinv.{kind}.{record.relation}", record.verdict
        yield f"batchinv.{kind}.{record.relation}.batches", record.counts.examples
        if record.finding is not None and not record.control:
            yield f"batchinv.{kind}.{record.relation}.replay", record.finding.replay
    yield "batchinv.mode", ", ".join(dict.fromkeys(record.mode for record in records))
    if fingerprints := ", ".join(dict.fromkeys(record.fingerprint for record in records if record.fingerprint)):
        yield "batchinv.fingerprint", fingerprints
