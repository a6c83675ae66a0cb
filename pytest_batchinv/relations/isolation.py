"""S: the same shapes, other content in the neighbours. Equal even in stock torch: a difference is a leak, not rounding."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs, Side
from pytest_batchinv.search import strategies, sweep
from pytest_batchinv.shapes import BatchShape, Row, chosen_evenly
from pytest_batchinv.subjects.base import RowOutputs, Space, Subject

_CASES = 6
_MOST_ROWS = {"pool": 65, "model": 17}


class Isolation(Relation):
    letter = "S"
    words = WORDS["S"]
    meaning = "a row's bits follow the content of its neighbours, whose shapes are the same (relation S, isolation)"
    side_names = ("beside these neighbours", "beside neighbours of other content")
    share = 10

    def obstacle(self, subject: Subject) -> str:
        space = subject.space
        if space.max_rows < 2:
            return "a batch of one row has no neighbours"
        if not space.shapes_follow_length:
            return "rows of one length need not have the same shapes here, so no neighbour can be replaced by another one"
        if space.pool is not None and all(_other(row, space, 0) == row for row in space.palette):
            return "no two rows of the pool have the same shapes, so no neighbour can be replaced by another one"
        return ""

    def cases(self, space: Space) -> Cases:
        """Batches of few rows: a case costs a run for each bit of a position, twice."""
        most = min(space.max_rows, _MOST_ROWS["model" if space.pool is None else "pool"])
        small = replace(space, max_rows=most, max_tokens=min(space.max_tokens, 64 * most))
        several = [case for case in sweep.boundary_cases(small) if len(case) > 1]
        drawn = strategies.cases(small).filter(lambda case: len(case) > 1)
        return Cases(chosen_evenly(several, _CASES), [], drawn)

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        """For each bit of a position, those with it keep their rows while the others are replaced, and the other way round.

        Any two positions differ in a bit, so each row is kept once while each of its neighbours is another.
        """
        expected = runs.run(case)
        for other, kept in _with_other_neighbours(case, runs.subject.space):
            actual = runs.run(other)
            yield Comparison(_at(expected, kept), _at(actual, kept), kept)

    def two_runs(self, runs: Runs, case: BatchShape, position: int) -> Iterator[tuple[Side, Side]]:
        for other, kept in _with_other_neighbours(case, runs.subject.space):
            if position in kept:
                yield Side(case, position), Side(other, position)

    def mutants(self) -> tuple[Mutant, ...]:
        return (
            Mutant.of_rows("scaled by the largest of the batch", planted.scaled_by_the_largest),
            Mutant.of_rows("reads the row before it", planted.reads_the_row_before),
            Mutant.of_rows("follows the last row", planted.follows_the_last_row),
        )


def _with_other_neighbours(case: BatchShape, space: Space) -> Iterator[tuple[BatchShape, tuple[int, ...]]]:
    """The case with other rows at some positions, and the positions that kept theirs."""
    for bit in range((len(case) - 1).bit_length()):
        for value in (0, 1):
            kept = tuple(p for p in range(len(case)) if p >> bit & 1 == value)
            rows = [row if p in kept else _other(row, space, p) for p, row in enumerate(case.rows)]
            if tuple(rows) != case.rows:
                yield case.with_rows(*rows), kept


def _other(row: Row, space: Space, position: int) -> Row:
    """A row of the same shapes and other content: of the pool, or made up, of another magnitude. The row itself where the pool
    has none. position: of the row that it replaces, so that equal rows become different ones."""
    if space.pool is None:
        return Row(row.id + 1000 + position, row.length, "random" if row.content == "extreme" else "extreme")
    shapes = space.alike or space.pool
    others = [i for i, other in enumerate(shapes) if other == shapes[row.id] and i != row.id]
    return Row(random.Random(f"{row.id} {position}").choice(others)) if others else row


def _at(outputs: RowOutputs, positions: tuple[int, ...]) -> RowOutputs:
    if outputs.stacked is not None:
        return RowOutputs({name: tensor[list(positions)] for name, tensor in outputs.stacked.items()})
    return RowOutputs(rows=[outputs.rows[p] for p in positions])
