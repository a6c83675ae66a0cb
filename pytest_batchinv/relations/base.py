"""What a relation is: one promise about bits, with the cases that test it and the two sides that must be equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from hypothesis import strategies as st

from pytest_batchinv.search import strategies, sweep
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import RowOutputs, Space, Subject
from pytest_batchinv.subjects.rows import RowsSubject


class Runs(Protocol):
    """A subject's outputs, as the sides of a relation ask for them."""

    subject: Subject

    def run(self, case: BatchShape) -> RowOutputs: ...

    def run_eager(self, case: BatchShape) -> RowOutputs: ...

    def run_by(self, subject: Subject, case: BatchShape) -> RowOutputs:
        """What another subject of the same space gives."""
        ...

    def alone(self, case: BatchShape, by: Subject | None = None) -> RowOutputs:
        """Each row of the case run as a batch of its own; a row is run once and remembered.

        by: another subject than ``subject``.
        """
        ...


class Side(NamedTuple):
    """One of the two runs that should have given a row the same bits: the batch, and where in it the row stands."""

    case: BatchShape
    position: int


class Comparison(NamedTuple):
    """Two outputs that must be equal. positions: where in the case their rows stand; None: all of them, in order."""

    expected: RowOutputs
    actual: RowOutputs
    positions: tuple[int, ...] | None = None


class Cases(NamedTuple):
    """first: cases that always run, in this order. then: parts that take turns while there is time. drawn: by Hypothesis."""

    first: list[BatchShape]
    then: list[Iterator[BatchShape]]
    drawn: st.SearchStrategy[BatchShape]


@dataclass(frozen=True)
class Mutant:
    """A planted fault that the relation must catch, in a subject that ``make()`` gives. in_mode: it is in what the mode
    does."""

    name: str
    make: Callable[[], Subject]
    in_mode: bool = False

    @classmethod
    def of_rows(cls, name: str, make: Callable[[], tuple[Callable[..., Any], Any]], compile_mode: str | None = None) -> Mutant:
        """``make()`` gives a function of rows and its pool."""

        def subject() -> Subject:
            fn, pool = make()
            return RowsSubject(fn, [pool], compile_mode=compile_mode)

        return cls(name, subject)


class Relation:
    """One promise. share: of the drawn examples that were asked for, this relation takes one in ``share``."""

    letter: ClassVar[str]
    words: ClassVar[str]
    meaning: ClassVar[str]
    side_names: ClassVar[tuple[str, str]]
    share: ClassVar[int] = 1
    diagnoses: ClassVar[tuple[str, ...]] = ()
    """What explains a finding: "sizes" (at which batch sizes the bits change), "operators" (which diverge once compiled),
    "code" (a trace of compiled code beside eager code, not of two runs)."""

    def applies(self, subject: Subject) -> bool:
        """False where there is nothing to compare: the relation is left out without a record."""
        return True

    def obstacle(self, subject: Subject) -> str:
        """Why the subject cannot be asked, as a sentence; empty where it can. The record says so."""
        return ""

    def subject_of(self, subject: Subject) -> Subject:
        """What is run: the subject itself, or another one of the same space. Asked for where there is no obstacle."""
        return subject

    def takes(self, case: BatchShape) -> str:
        """Why this case, which is to be replayed, is none of the relation's, as a sentence; empty where it is one."""
        return ""

    def cases(self, space: Space) -> Cases:
        return Cases(sweep.few_cases(space, 12), [], strategies.cases(space))

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        raise NotImplementedError

    def sides_of(self, output: str) -> tuple[str, str]:
        """What the two sides of a difference in this output are."""
        return self.side_names

    def two_runs(self, runs: Runs, case: BatchShape, position: int) -> Iterator[tuple[Side, Side]]:
        """Pairs of runs of eager code, in one of which the row at this position of the case has other bits: for a trace.

        None at all where the sides are no two runs of eager code, each of one forward.
        """
        return iter(())

    def mutants(self) -> tuple[Mutant, ...]:
        raise NotImplementedError
