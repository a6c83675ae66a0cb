"""C: the whole at once, and in chunks with a cache: at every boundary, after a reused prefix, after what was rolled back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
from hypothesis import strategies as st

from pytest_batchinv.letters import WORDS
from pytest_batchinv.mutants import sequences as planted
from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs, Side
from pytest_batchinv.search import strategies, sweep
from pytest_batchinv.shapes import BatchShape, Steps
from pytest_batchinv.subjects.base import Space, Subject

_EVERY_BOUNDARY_UP_TO = 33
_EDGES = (1, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
_SIZES = (2, 3, 7, 16, 64)
_MOST_CHUNKS = 40


class Chunks(Relation):
    letter = "C"
    words = WORDS["C"]
    meaning = "a row has other bits where it is computed in chunks with a cache (relation C, chunked prefill)"
    side_names = ("all at once", "in chunks")
    share = 5

    def obstacle(self, subject: Subject) -> str:
        return no_cache(subject)

    def takes(self, case: BatchShape) -> str:
        return "" if case.steps else "the batch is computed at once, so there are no chunks to compare with it"

    def cases(self, space: Space) -> Cases:
        first = [*_long(space), *_batches(space), *_prefixes(space)]
        return Cases(fitting(first, space), [in_space(_every_boundary(space), space)], _drawn(space))

    def sides(self, runs: Runs, case: BatchShape) -> Iterator[Comparison]:
        yield Comparison(runs.run(case.at_once()), runs.run(case))

    def two_runs(self, runs: Runs, case: BatchShape, position: int) -> Iterator[tuple[Side, Side]]:
        yield Side(case.at_once(), position), Side(case, position)

    def mutants(self) -> tuple[Mutant, ...]:
        return tuple(Mutant(name, make) for name, make in planted.CHUNKS.items())


def no_cache(subject: Subject) -> str:
    """Why the subject cannot be asked to compute in steps; empty where it can."""
    if subject.space.caches:
        return ""
    return f"{subject.info.name} keeps no cache in which it could go on ({subject.info.kind}, {subject.info.compile_mode})"


def fitting(cases: list[BatchShape], space: Space) -> list[BatchShape]:
    return list(in_space(iter(dict.fromkeys(cases)), space))


def in_space(cases: Iterator[BatchShape], space: Space) -> Iterator[BatchShape]:
    return (case for case in cases if space.fits(case) and not space.holds(case))


def of_length(space: Space, length: int, n_rows: int = 1) -> BatchShape:
    """The first rows of the palette, all of this length, or of the longest that the subject takes in steps; fewer of them where
    not all have room."""
    length = min(length, space.max_length, space.max_tokens, space.max_keys)
    n_rows = max(1, min(n_rows, space.max_rows, space.max_tokens // length))
    return BatchShape(tuple(msgspec.structs.replace(row, length=length) for row in space.palette[:n_rows]))


def ends(start: int, size: int, width: int) -> tuple[int, ...]:
    """Steps of one size from this column on; the last one may be shorter."""
    return tuple(range(start, width, size))


def _long(space: Space) -> Iterator[BatchShape]:
    """One row of 300 tokens, cut at the edges of tiles, in every cache."""
    case = of_length(space, 300)
    for cache in space.caches:
        for boundary in _EDGES:
            if boundary < case.width:
                yield case.in_steps(Steps((boundary,), cache))


def _batches(space: Space) -> Iterator[BatchShape]:
    """Batches of 3 to 5 rows of several lengths, in chunks of one size, on either side of the padding, in every cache: 40
    chunks at most, where the palette has rows that are short enough."""
    layouts = [layout for layout in space.layouts if layout != "packed"]
    for start, size in enumerate(_SIZES):
        short = tuple(row for row in space.palette if row.length <= size * _MOST_CHUNKS)
        for layout in layouts:
            case = sweep.batch(replace(space, palette=short or space.palette[:1]), 3 + start % 3, 4 + start, layout)
            for cache in space.caches:
                yield case.in_steps(Steps(ends(size, size, case.width), cache))


def _prefixes(space: Space) -> Iterator[BatchShape]:
    """Up to three rows that reuse the keys of a prefix, with and without tokens that its cache has forgotten; and such chunks.
    In every cache that grows."""
    for n_tokens in (1, 2, 15, 16, 17, 32, 64, 128):
        case = of_length(space, 2 * n_tokens + 3, n_rows=3)
        if n_tokens < case.width:
            for cache in (cache for cache in space.caches if cache != "static"):
                yield case.in_steps(Steps((), cache, prefix=n_tokens))
                yield case.in_steps(Steps((), cache, prefix=n_tokens, rejected=3))
                yield case.in_steps(Steps((n_tokens,), cache, rejected=5))


def _every_boundary(space: Space) -> Iterator[BatchShape]:
    """One row, cut after each of its tokens but the last, in every cache."""
    case = of_length(space, _EVERY_BOUNDARY_UP_TO)
    for boundary in range(1, case.width):
        for cache in space.caches:
            yield case.in_steps(Steps((boundary,), cache))


@st.composite
def _drawn(draw: st.DrawFn, space: Space) -> BatchShape:
    case = draw(padded_cases(space))
    cuts = draw(st.sets(st.integers(1, max(1, case.width - 1)), max_size=6))
    cache = draw(st.sampled_from(space.caches))
    spare = draw(st.integers(0, min(70, space.max_keys - case.width))) if cache == "static" else 0
    rejected = draw(st.sampled_from((0, 0, 1, 4))) if forgets(space, cache) else 0
    return case.in_steps(Steps(tuple(sorted(cut for cut in cuts if cut < case.width)), cache, spare, rejected))


def padded_cases(space: Space, most_rows: int = 9) -> st.SearchStrategy[BatchShape]:
    """Batches of at most ``most_rows`` rows, which a cache has room for, none of them packed: each costs several forwards."""
    layouts = tuple(layout for layout in space.layouts if layout != "packed")
    few = replace(space, max_rows=min(space.max_rows, most_rows), layouts=layouts)

    def within_keys(case: BatchShape) -> BatchShape:
        beyond = max(0, case.width - space.max_keys)
        return msgspec.structs.replace(case, extra_padding=max(0, case.extra_padding - beyond))

    return strategies.cases(few).map(within_keys)


def forgets(space: Space, cache: str) -> bool:
    """Whether this cache of the subject can drop rejected tokens again."""
    return space.forgets and cache != "static"
