"""What a run found so far: its records and the outcomes of its tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_batchinv.report.record import Record

if TYPE_CHECKING:
    from pytest_batchinv.plugin.settings import Settings


@dataclass
class Results:
    """What has come in so far. outcomes: tests by passed, failed, skipped, error; all tests of the run count."""

    settings: Settings
    records: list[Record] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    exit_status: int | None = None

    @property
    def machine(self) -> dict[str, str]:
        return self.records[0].machine if self.records else {}
