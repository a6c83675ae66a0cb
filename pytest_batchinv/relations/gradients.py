"""G: the gradient of a row's input, alone and in any batch; and of weights, run to run."""

from collections.abc import Iterator

from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import gradients as planted
from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs, Side
from pytest_batchinv.search import strategies, sweep
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NoGradients, RowOutputs, Space, Subject


class Gradients(Relation):
    """The loss of a batch is the sum of its rows' losses: a row's input gradient is its own, a weight's is the batch's."""

    letter = "G"
    words = WORDS["G"]
    meaning = "a gradient has other bits in a batch than alone, or when the batch is run again (relation G, gradients)"
    side_names = ("alone, or the first run", "in the batch, or the second run")
    share = 10
    diagnoses = ("sizes",)

    def obstacle(self, subject: Subject) -> str:
        try:
            subject.with_gradients()
        except NoGradients as why:
            return str(why)
        return ""

    def subject_of(self, subject: Subject) -> Subject:
        return subject.with_gradients()

    def takes(self, case: BatchShape) -> str:
        return "a batch that is computed in steps with a cache has no gradients" if case.steps else ""

    def cases(self, space: Space) -> Cases:
        """Functions of rows at every boundary; models, whose backward takes longer, at some."""
        if space.pool is None:
            return super().cases(space)
        return Cases(sweep.boundary_cases(space), [], strategies.cases(space))

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        in_batch = runs.run(case)
        yield Comparison(runs.alone(case), in_batch)
        if in_batch.shared:
            yield Comparison(RowOutputs(rows=[in_batch.shared]), RowOutputs(rows=[runs.run(case).shared]))

    def two_runs(self, runs: Runs, case: BatchShape, position: int) -> Iterator[tuple[Side, Side]]:
        yield Side(case.alone(position), 0), Side(case, position)

    def mutants(self) -> tuple[Mutant, ...]:
        return tuple(Mutant.of_rows(name, make) for name, make in planted.GRADIENTS.items())
