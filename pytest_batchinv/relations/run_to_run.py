"""R: the same batch twice."""

from collections.abc import Iterator

from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.relations.base import Comparison, Mutant, Relation, Runs, Side
from pytest_batchinv.shapes import BatchShape


class RunToRun(Relation):
    letter = "R"
    words = WORDS["R"]
    meaning = "the same batch gave other bits when it was run again (relation R, run to run)"
    side_names = ("the first run", "the second run")
    share = 10

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        yield Comparison(runs.run(case), runs.run(case))

    def two_runs(self, runs: Runs, case: BatchShape, position: int) -> Iterator[tuple[Side, Side]]:
        yield Side(case, position), Side(case, position)

    def mutants(self) -> tuple[Mutant, ...]:
        return (Mutant.of_rows("noise", planted.noise), Mutant.of_rows("noise in batches only", planted.noise_in_batches))
