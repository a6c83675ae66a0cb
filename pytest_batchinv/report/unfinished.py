"""A run that is killed half way: what its finished tests proved is kept while it runs, and the next run takes it up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pytest_batchinv.report import saved
from pytest_batchinv.report.compare import GOOD
from pytest_batchinv.report.json import settings_of, write_saved
from pytest_batchinv.report.record import SCHEMA, Record
from pytest_batchinv.report.results import Results
from pytest_batchinv.report.saved import Saved

SECONDS = 20
"""Between two writings: a run that is killed loses this much, and the tests that were running."""


def path_of(report: Path) -> Path:
    return report.with_suffix(".unfinished.json")


class Keeper:
    """Keeps the records of the tests that passed beside the report that is to come. Raises OSError."""

    def __init__(self, results: Results, report: Path) -> None:
        self._results, self._path = results, path_of(report)
        self._passed: set[str] = set()
        self._not_passed: set[str] = set()
        self._written = time.monotonic()

    def take(self, nodeid: str, outcome: str, when: str) -> None:
        """One phase of a test has ended. Its records are in the results with the last one."""
        if outcome != "passed":
            self._not_passed.add(nodeid)
        elif when == "teardown" and nodeid not in self._not_passed:
            self._passed.add(nodeid)
            if time.monotonic() - self._written >= SECONDS:
                self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        records = tuple(record for record in self._results.records if record.nodeid in self._passed)
        if records:
            settings, outcome = settings_of(self._results.settings), {"exit_status": None, **self._results.outcomes}
            kept = Saved(schema=SCHEMA, machine=self._results.machine, settings=settings, outcome=outcome, records=records)
            write_saved(kept, self._path)

    def end(self, is_complete: bool) -> str:
        """A run that was interrupted leaves the file. Returns a line that says so, "" where there is nothing to take up."""
        if is_complete:
            self._path.unlink(missing_ok=True)
            return ""
        self.write()
        return f"to go on: the same command and --batchinv-resume {self._path}" if self._path.exists() else ""


def read(path: Path, settings: Any) -> Saved:
    """The unfinished run. Raises ValueError where it is none, or was asked something else."""
    unfinished = saved.read(path)
    if unfinished.outcome.get("exit_status") is not None:
        raise ValueError(f"{path} is the report of a run that ended, and there is nothing to go on with; leave the option out.")
    asked: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settings_of(settings)))
    for name in sorted(asked.keys() | unfinished.settings.keys()):
        was, now = unfinished.settings.get(name), asked.get(name)
        if was != now:
            raise ValueError(f"{path} was made with {name} {was!r}, and this run has {now!r}: give the same options as before.")
    return unfinished


def proven(unfinished: Saved, receipt: Mapping[str, str]) -> dict[str, list[Record]]:
    """The records of each test that need not run again: all of them hold, and were made by what is here now.

    receipt: of this process. Patches are applied in the mode alone, and are told by the version of torch.
    """
    by_test: dict[str, list[Record]] = {}
    for record in unfinished.records:
        by_test.setdefault(record.nodeid, []).append(record)

    def is_proven(records: list[Record]) -> bool:
        here = {part: value for part, value in receipt.items() if part != "patches"}
        return all(
            record.verdict in GOOD and here == {part: value for part, value in record.receipt.items() if part != "patches"}
            for record in records
        )

    return {nodeid: records for nodeid, records in by_test.items() if is_proven(records)}
