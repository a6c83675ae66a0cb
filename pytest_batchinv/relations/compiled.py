"""X: eager code against the subject's compile mode."""

from collections.abc import Iterator

from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.relations.base import Comparison, Mutant, Relation, Runs
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import Subject


class Compiled(Relation):
    letter = "X"
    words = WORDS["X"]
    meaning = "compiled code gives other bits than eager code (relation X)"
    side_names = ("eager code", "compiled code")
    share = 10
    diagnoses = ("operators", "code")

    def applies(self, subject: Subject) -> bool:
        return subject.info.compile_mode != "eager"

    def obstacle(self, subject: Subject) -> str:
        same = subject.in_eager_mode().info.compile_mode != "eager"
        return "what was compiled is not known, so there is no eager code to compare with" if same else ""

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        yield Comparison(runs.run_eager(case), runs.run(case))

    def mutants(self) -> tuple[Mutant, ...]:
        return (Mutant.of_rows("rounds only where it is not compiled", planted.other_bits_when_compiled, "default"),)
