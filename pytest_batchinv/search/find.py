"""Looks for a case that breaks a relation: the sweep, then Hypothesis, then the smallest case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.database import ExampleDatabase

from pytest_batchinv import context
from pytest_batchinv.compare import RowDifference
from pytest_batchinv.report.record import Skipped
from pytest_batchinv.search import shrink, sweep
from pytest_batchinv.search.runs import SubjectRuns
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NotRun

if TYPE_CHECKING:
    from pytest_batchinv.relations.base import Relation


class Broken(NamedTuple):
    """A case in which the relation does not hold, and the first row that shows it."""

    case: BatchShape
    found: RowDifference


@dataclass
class Search:
    """One relation on one subject. max_examples: drawn cases, of which the relation takes its share.

    broken: what was found, from the moment on at which it was; whatever ends the search after that does not hide it.
    """

    relation: Relation
    runs: SubjectRuns
    max_examples: int
    seed: int | None = None

    def __post_init__(self) -> None:
        self.coverage = sweep.Coverage(self.runs.subject.space)
        self.broken: Broken | None = None

    def replay(self, case: BatchShape) -> None:
        """The case alone, as it is. Raises NotRun where the subject or the relation has no such case."""
        if why := self.runs.subject.space.holds(case) or self.relation.takes(case):
            raise NotRun(why)
        self.broken = self._check(case)

    def find(self) -> None:
        """Looks for a case that breaks the relation, and for the smallest one then."""
        cases = self.relation.cases(self.runs.subject.space)
        swept = self._first_broken("sweep", cases.first, len(cases.first))
        swept = swept or self._first_broken("sweep", sweep.in_turn(cases.then, sweep.SECONDS), 0)
        self.broken = swept
        if swept is None:
            self._draw(cases.drawn)
        if self.broken is not None:
            self.broken = self._smallest(self.broken)

    def _first_broken(self, phase: str, cases: Iterable[BatchShape], total: int) -> Broken | None:
        for number, case in enumerate(cases):
            self._tell(phase, number, total)
            if (broken := self._check(case)) is not None:
                return broken
        return None

    def _check(self, case: BatchShape) -> Broken | None:
        stats = self.runs.stats
        try:
            found = self._difference(case)
        except NotRun as reason:
            stats.skipped.append(Skipped(case.to_json(), str(reason)))
            return None
        stats.examples += 1
        stats.rows += len(case)
        self.coverage.add(case)
        self.runs.forget_most()
        return None if found is None else Broken(case, found)

    def _difference(self, case: BatchShape) -> RowDifference | None:
        for comparison in self.relation.sides(self.runs, case):
            if (found := self.runs.compare(comparison)) is not None:
                return found
        return None

    def _draw(self, strategy: hypothesis.strategies.SearchStrategy[BatchShape]) -> None:
        """Hypothesis' own profile decides on database and derandomisation: in CI it draws the same cases every time."""
        examples = max(1, self.max_examples // self.relation.share)
        profile = hypothesis.settings()
        before = self.runs.stats.examples

        @hypothesis.settings(
            profile,
            max_examples=examples,
            deadline=None,
            # Not Phase.shrink: ``shrink`` makes what the sweep and what Hypothesis found small in the same way.
            phases=(Phase.reuse, Phase.generate),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
            database=_database_of(profile.database, self._key()) if self.seed is None else None,
        )
        @hypothesis.given(strategy)
        def example(case: BatchShape) -> None:
            self._tell("drawn", self.runs.stats.examples - before, examples)
            if (broken := self._check(case)) is not None:
                self.broken = self.broken or broken
                raise _Found

        try:
            (example if self.seed is None else hypothesis.seed(self.seed)(example))()
        except Exception:  # _Found; or what Hypothesis says of a noisy subject, which was equal when it ran the case again
            if self.broken is None:
                raise

    def _key(self) -> str:
        info = self.runs.subject.info
        return "/".join((self.relation.letter, info.kind, info.name, info.dtype, info.attention, info.compile_mode))

    def _smallest(self, broken: Broken) -> Broken:
        found = {broken.case: broken.found}

        def fails(case: BatchShape) -> bool:
            if not self.runs.subject.space.fits(case) or self.runs.subject.space.holds(case):
                return False
            try:
                difference = self._difference(case)
            except Exception:  # of a case that nobody asked for: it is no smaller form of what was found
                return False
            if difference is not None and difference.difference.kind == broken.found.difference.kind:
                found[case] = difference
            return case in found

        smallest = shrink.smallest(broken.case, fails)
        return Broken(smallest, found[smallest])

    def _tell(self, phase: str, done: int, total: int) -> None:
        stats, info = self.runs.stats, self.runs.subject.info
        context.current().progress(
            context.Progress(info.name, self.relation.letter, phase, done, total, stats.rows, stats.seconds)
        )


class _Found(Exception):
    """Tells Hypothesis that the case it has drawn fails."""


class _KeyedDatabase(ExampleDatabase):
    """One entry for each subject and relation: Hypothesis' own key is the source of the test, the same for all of them."""

    def __init__(self, stock: ExampleDatabase, key: str) -> None:
        super().__init__()
        self._stock, self._suffix = stock, key.encode()

    def fetch(self, key: bytes) -> Iterator[bytes]:
        yield from self._stock.fetch(key + self._suffix)

    def save(self, key: bytes, value: bytes) -> None:
        self._stock.save(key + self._suffix, value)

    def delete(self, key: bytes, value: bytes) -> None:
        self._stock.delete(key + self._suffix, value)


def _database_of(stock: ExampleDatabase | None, key: str) -> ExampleDatabase | None:
    return None if stock is None else _KeyedDatabase(stock, key)
