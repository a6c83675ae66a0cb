"""D: the whole at once, and decoded: token by token, or several at once as speculation verifies them, with every cache."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st

from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import sequences as planted
from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs, Side
from pytest_batchinv.relations.chunks import ends, fitting, forgets, no_cache, of_length, padded_cases
from pytest_batchinv.search import sweep
from pytest_batchinv.shapes import BatchShape, Steps
from pytest_batchinv.subjects.base import Space, Subject

_MOST_STEPS = 70
_PREFILLS = (1, 5, 16, 63)
_VERIFIED = (2, 3, 4, 5, 8)
"""Tokens that a verification computes at once: one more than were proposed."""


class Decode(Relation):
    letter = "D"
    words = WORDS["D"]
    meaning = "a row has other bits where it is decoded than where it is computed at once (relation D, decode)"
    side_names = ("all at once", "decoded")
    share = 10

    def obstacle(self, subject: Subject) -> str:
        return no_cache(subject)

    def takes(self, case: BatchShape) -> str:
        return "" if case.steps else "the batch is computed at once, so nothing of it is decoded"

    def cases(self, space: Space) -> Cases:
        return Cases(fitting([*_token_by_token(space), *_past_the_window(space), *_verified(space)], space), [], _drawn(space))

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        yield Comparison(runs.run(case.at_once()), runs.run(case))

    def two_runs(self, runs: Runs, case: BatchShape, position: int) -> Iterator[tuple[Side, Side]]:
        yield Side(case.at_once(), position), Side(case, position)

    def mutants(self) -> tuple[Mutant, ...]:
        return tuple(Mutant(name, make) for name, make in planted.DECODE.items())


def _token_by_token(space: Space) -> Iterator[BatchShape]:
    """In every cache one row of 33 tokens from its first token on; and batches of 2 to 5 rows after a prefill, for at most 70
    steps, on either side of the padding."""
    layouts = [layout for layout in space.layouts if layout != "packed"]
    for cache in space.caches:
        alone = of_length(space, 33)
        yield alone.in_steps(Steps(ends(1, 1, alone.width), cache))
        for start, prefill in enumerate(_PREFILLS):
            case = sweep.batch(space, 2 + start, 5 * start, layouts[start % len(layouts)])
            if prefill < case.width:
                yield case.in_steps(Steps(ends(prefill, 1, min(case.width, prefill + _MOST_STEPS)), cache))


def _past_the_window(space: Space) -> Iterator[BatchShape]:
    """A row that is longer than the sliding window, decoded over its edge: from 5 tokens before it to 8 after it, as far as the
    subject takes so many. In every cache."""
    case = of_length(space, space.window + 9)
    if 0 < space.window < case.width:
        for cache in space.caches:
            yield case.in_steps(Steps(ends(max(1, space.window - 5), 1, case.width), cache))


def _verified(space: Space) -> Iterator[BatchShape]:
    """Rows, one to five of them, of which several tokens are computed at once: all of them right, or all but the first one
    rejected."""
    for cache in space.caches:
        for start, n_tokens in enumerate(_VERIFIED):
            case = of_length(space, 9 + 4 * n_tokens, n_rows=1 + start)
            yield case.in_steps(Steps(ends(3, n_tokens, case.width), cache))
            if forgets(space, cache):
                yield case.in_steps(Steps(ends(3, 1, case.width), cache, rejected=n_tokens - 1))


@st.composite
def _drawn(draw: st.DrawFn, space: Space) -> BatchShape:
    case = draw(padded_cases(space, most_rows=5))
    cache = draw(st.sampled_from(space.caches))
    n_tokens = draw(st.sampled_from((1, 1, 2, 4)))
    prefill = draw(st.integers(1, max(1, case.width - 1)))
    rejected = draw(st.integers(0, 4)) if forgets(space, cache) else 0
    stop = min(case.width, prefill + n_tokens * _MOST_STEPS)
    return case.in_steps(Steps(ends(prefill, n_tokens, stop), cache, rejected=rejected))
