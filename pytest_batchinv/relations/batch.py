"""I: a row alone and in any batch: its size, its composition, the row's position."""

from collections.abc import Iterator

from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs, Side
from pytest_batchinv.search import strategies, sweep
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import Space


class Batch(Relation):
    letter = "I"
    words = WORDS["I"]
    meaning = "a row has other bits in a batch than alone (relation I, batch size, composition and position)"
    side_names = ("alone", "in the batch")
    diagnoses = ("sizes",)

    def takes(self, case: BatchShape) -> str:
        return "a batch that is computed in steps is one of the relations L, C and D" if case.steps else ""

    def cases(self, space: Space) -> Cases:
        return Cases(sweep.boundary_cases(space), sweep.covering(space), strategies.cases(space))

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        yield Comparison(runs.alone(case), runs.run(case))

    def two_runs(self, runs: Runs, case: BatchShape, position: int) -> Iterator[tuple[Side, Side]]:
        yield Side(case.alone(position), 0), Side(case, position)

    def mutants(self) -> tuple[Mutant, ...]:
        return tuple(Mutant.of_rows(name, make) for name, make in planted.BATCH.items())
