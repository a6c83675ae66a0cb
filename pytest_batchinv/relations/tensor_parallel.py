"""T: the same batch on any number of ranks of tensor parallel, and on each rank; and a row alone and in the batch on each
number."""

from collections.abc import Iterator
from dataclasses import replace

from pytest_batchinv import context
from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import ranks as planted
from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs
from pytest_batchinv.search import strategies, sweep
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NoRanks, RowOutputs, Space, Subject
from pytest_batchinv.subjects.ranks import OverRanks

_CASES, _MOST_ROWS, _MOST_TOKENS = 8, 17, 1024


class TensorParallel(Relation):
    """Logprobs alone are promised: gradients are summed over ranks in other places."""

    letter = "T"
    words = WORDS["T"]
    meaning = "a row has other bits on another number of ranks, or in a batch there (relation T, tensor parallel)"
    side_names = ("on the first number of ranks", "on another number of ranks")
    share = 20

    def obstacle(self, subject: Subject) -> str:
        try:
            subject.over_ranks(context.current().ranks)
        except NoRanks as why:
            return str(why)
        return ""

    def subject_of(self, subject: Subject) -> OverRanks:
        return subject.over_ranks(context.current().ranks)

    def takes(self, case: BatchShape) -> str:
        return "a batch that is computed in steps is one of the relations L, C and D" if case.steps else ""

    def cases(self, space: Space) -> Cases:
        """Batches of few rows: each is computed on all numbers of ranks, and sent from one process to another."""
        small = replace(space, max_rows=min(space.max_rows, _MOST_ROWS), max_tokens=min(space.max_tokens, _MOST_TOKENS))
        return Cases(sweep.few_cases(small, _CASES), [], strategies.cases(small))

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        """First over ranks, then over batches: so that a difference is told apart from that of relation I."""
        subject = runs.subject
        assert isinstance(subject, OverRanks)
        in_batch = {}
        first, *others = subject.numbers
        for number in (first, *others):
            in_batch[number] = [runs.run_by(rank, case) for rank in subject.on(number)]
            expected = in_batch[first][0]
            for rank, outputs in enumerate(in_batch[number]):
                is_new = outputs is not expected and (rank == 0 or outputs is not in_batch[number][0])
                if is_new:
                    yield _named(_on(first), f"on rank {rank} of {number}", expected, outputs)
        for number, (outputs, *_) in in_batch.items():
            alone = runs.alone(case, subject.on(number)[0])
            yield _named(f"alone, {_on(number)}", f"in the batch, {_on(number)}", alone, outputs)

    def sides_of(self, output: str) -> tuple[str, str]:
        first, second = output.rpartition(": ")[2].split(" / ")
        return first, second

    def mutants(self) -> tuple[Mutant, ...]:
        return tuple(Mutant(name, make, in_mode=True) for name, make in planted.MUTANTS.items())


def _on(number: int) -> str:
    return f"on {number} rank{'s' * (number > 1)}"


def _named(first: str, second: str, *sides: RowOutputs) -> Comparison:
    """Outputs whose names say which ranks gave them: ``sides_of`` reads it."""
    expected, actual = (
        RowOutputs(rows=[{f"{name}: {first} / {second}": x for name, x in row.items()} for row in side]) for side in sides
    )
    return Comparison(expected, actual)
