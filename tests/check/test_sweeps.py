"""What each relation's sweep holds, for any space: all that its docstring names, nothing that cannot be run, nothing twice."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from pytest_batchinv.relations import RELATIONS
from pytest_batchinv.search import sweep
from pytest_batchinv.shapes import BOUNDARIES, CACHES, CONTENTS, LAYOUTS, BatchShape, Row, Steps
from pytest_batchinv.subjects.base import RowOutputs, Space

IN_STEPS = ("C", "D")
CACHES_THAT_FORGET = ("dynamic", "sliding")
SEARCHING = settings(max_examples=5000, database=None, phases=(Phase.generate,), suppress_health_check=HealthCheck)


def rows_up_to(longest: int) -> st.SearchStrategy[tuple[Row, ...]]:
    """Palettes: rows of any length up to this one."""
    row = st.tuples(st.integers(1, longest), st.sampled_from(CONTENTS))
    return st.lists(row, min_size=1, max_size=12).map(lambda rows: tuple(Row(i, *row) for i, row in enumerate(rows)))


def at_least(least: int, most: int) -> st.SearchStrategy[int]:
    """A bound: often the least that there can be."""
    return st.just(least) | st.integers(least, least + 3) | st.integers(least, most)


@st.composite
def spaces(draw, *, without_bounds=False, shortest=1):
    """Spaces of models: all have the plain layout. without_bounds: of rows, tokens, positions and keys. shortest: of the rows'
    lengths."""
    longest = max(shortest, draw(st.sampled_from(BOUNDARIES) | st.integers(1, 400)))
    others = draw(st.sets(st.sampled_from(LAYOUTS[1:])))
    space = Space(
        palette=tuple(msgspec.structs.replace(row, length=max(shortest, row.length)) for row in draw(rows_up_to(longest))),
        layouts=("right", *sorted(others)),
        max_length=longest,
        max_position=draw(st.sampled_from((0, 1 << 20))),
        caches=tuple(sorted(draw(st.sets(st.sampled_from(CACHES))))),
        window=draw(st.just(0) | st.integers(1, 6) | st.integers(1, 420)),
        forgets=draw(st.booleans()),
    )
    if without_bounds:
        return space
    return replace(
        space,
        max_rows=draw(st.integers(1, 3) | st.integers(1, 40)),
        max_tokens=draw(at_least(longest, 2048)),
        max_position=draw(st.just(0) | at_least(longest, 600)),
        max_keys=draw(at_least(longest, 600)),
    )


@st.composite
def pools(draw):
    """Spaces of functions: of rows that are as long as the pool's, some of them alike."""
    lengths = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=12)))
    alike = tuple(map(str, lengths)) if draw(st.booleans()) else ()
    space = Space(tuple(Row(i) for i in range(len(lengths))), lengths, alike=alike)
    return replace(space, max_rows=draw(st.integers(1, 300)))


def with_caches(space: Space) -> bool:
    return bool(space.caches)


def first(letter: str, space: Space) -> list[BatchShape]:
    return RELATIONS[letter].cases(space).first


def padded_layouts(space: Space) -> list[str]:
    return [layout for layout in space.layouts if layout != "packed"]


def in_cache(cases: list[BatchShape], cache: str) -> list[BatchShape]:
    return [case for case in cases if case.steps.cache == cache]


def token_by_token(case: BatchShape) -> bool:
    """Whether each of its steps after the first computes one column."""
    ends = (*case.steps.ends, case.width)
    return all(b - a == 1 for a, b in itertools.pairwise(ends))


# --- all of them ------------------------------------------------------------------------------------------------------


def every_case(letter, space):
    cases = RELATIONS[letter].cases(space)
    assert len(set(cases.first)) == len(cases.first)
    return [*cases.first, *itertools.chain(*(itertools.islice(part, 500) for part in cases.then))]


@pytest.mark.parametrize("letter", RELATIONS)
@given(spaces())
def test_a_model_is_asked_for_nothing_that_it_cannot_run_and_for_nothing_twice(letter, space):
    if letter in IN_STEPS and not space.caches:
        return
    for case in every_case(letter, space):
        assert space.fits(case)
        assert not space.holds(case)


@pytest.mark.parametrize("letter", ["R", "S", "I", "G"])
@given(pools())
def test_a_function_is_asked_for_nothing_that_it_cannot_run_and_for_nothing_twice(letter, space):
    for case in every_case(letter, space):
        assert space.fits(case)
        assert not space.holds(case)


@pytest.mark.parametrize("most, letter", [(17, "L"), (9, "C"), (5, "D"), (17, "S"), (17, "T")])
@given(spaces().filter(with_caches), st.data())
def test_drawn_cases_fit_and_have_few_rows_where_each_takes_several_forwards(most, letter, space, data):
    if letter == "S" and space.max_rows < 2:
        return
    case = data.draw(RELATIONS[letter].cases(space).drawn)
    assert space.fits(case)
    assert len(case) <= most
    assert not space.holds(case)


@pytest.mark.parametrize("letter", IN_STEPS)
@pytest.mark.parametrize("max_keys, padding", [(1 << 20, 40), (20, 10)])
def test_drawn_batches_in_steps_are_padded_as_far_as_the_cache_has_room(letter, max_keys, padding):
    rows = tuple(Row(i, 10) for i in range(3))
    space = Space(rows, max_length=10, max_tokens=2048, max_keys=max_keys, caches=("dynamic",))
    drawn = RELATIONS[letter].cases(space).drawn
    find(drawn, lambda case: case.extra_padding == padding, settings=SEARCHING)


@given(spaces(without_bounds=True), st.data())
def test_batches_over_ranks_have_few_tokens(space, data):
    cases = RELATIONS["T"].cases(space)
    assert all(case.tokens <= 1024 for case in [*cases.first, data.draw(cases.drawn)])


# --- I ----------------------------------------------------------------------------------------------------------------


def most_rows_of_any_kind(space: Space) -> int:
    return min(space.max_rows, space.max_tokens // max(row.length for row in space.palette))


@given(spaces() | pools())
def test_every_size_repeat_position_and_pair_is_swept_within_the_bounds_and_each_layout_in_turn(space):
    sizes, repeats, positions, pairs = map(list, sweep.covering(space))
    most, palette = most_rows_of_any_kind(space), space.palette
    assert [len(case) for case in sizes] == list(space.sizes())
    assert set(repeats) == {case for times in (2, 3) for row in palette if space.fits(case := BatchShape((row,) * times))}
    stood = {at for case in positions for at in enumerate(case.rows)}
    assert stood >= {(position, row) for position in range(min(sweep.SMALL_POSITIONS, most)) for row in palette}
    beside = [pair for case in pairs for pair in itertools.pairwise(case.rows)]
    assert sorted(beside) == (sorted(itertools.product(palette, repeat=2)) if most > 1 else [])
    for part in (sizes, positions, pairs):
        assert [case.layout for case in part] == list(itertools.islice(itertools.cycle(space.layouts), len(part)))


@given(spaces() | pools())
def test_the_rows_of_a_size_are_all_those_that_leave_room_for_as_many(space):
    for case in next(iter(sweep.covering(space))):
        n_rows = len(case)
        fitting = [row for row in space.palette if row.length * n_rows <= space.max_tokens]
        if fitting:
            assert set(case.rows) <= set(fitting)
            assert len(set(case.rows)) == min(n_rows, len(fitting))
        else:
            assert all(row.length == 1 for row in case.rows)


@given(spaces() | spaces(without_bounds=True) | pools())
def test_every_boundary_is_always_run_small_ones_in_every_layout_and_others_in_one_in_turn(space):
    plain = [case for case in sweep.boundary_cases(space) if not case.extra_padding]
    ran = {n_rows: [case.layout for case in plain if len(case) == n_rows] for n_rows in space.boundaries()}
    assert len(plain) == sum(map(len, ran.values()))
    small = [layouts for n_rows, layouts in ran.items() if n_rows <= 65]
    assert all(set(layouts) == set(space.layouts) for layouts in small)
    others = [layouts for n_rows, layouts in ran.items() if n_rows > 65]
    assert others == [[layout] for layout in itertools.islice(itertools.cycle(space.layouts), len(others))]


@given(spaces(without_bounds=True), st.booleans())
def test_padding_is_always_run_of_one_and_three_rows_on_either_side_where_it_can_be_asked_for(space, lays_out):
    padded = [case for case in sweep.boundary_cases(replace(space, lays_out=lays_out)) if case.extra_padding]
    asked = itertools.product(sweep.PADDINGS, [] if lays_out else padded_layouts(space), (1, 3))
    assert sorted((case.extra_padding, case.layout, len(case)) for case in padded) == sorted(asked)


@given(pools())
def test_a_function_is_asked_for_no_padding(space):
    assert not any(case.extra_padding for case in sweep.boundary_cases(space))


@given(st.lists(st.lists(st.integers(1), max_size=5), max_size=4))
def test_parts_of_a_sweep_take_turns_until_all_are_at_their_end(parts):
    turns = [case for turn in itertools.zip_longest(*parts) for case in turn if case is not None]
    assert list(sweep.in_turn([iter(part) for part in parts], 1000.0)) == turns
    assert list(sweep.in_turn([iter(part) for part in parts], -1.0)) == []


def test_a_sweep_says_what_of_the_palette_it_has_covered_and_counts_nothing_else():
    rows = tuple(Row(i) for i in range(4))
    coverage = sweep.Coverage(Space(rows, layouts=("right", "packed"), max_rows=4))
    assert coverage.words() == (
        "0 of 4 sizes (none)", "0 of 4 x 4 positions", "0 of 12 pairs", "0 of 4 rows repeated", "layouts ",
    )  # fmt: skip
    for ids in ((3,), (0, 1), (1, 1), (2, 2, 2), (0, 9), (9, 9)):
        coverage.add(BatchShape(tuple(Row(i) for i in ids), "packed"))
    assert coverage.words() == (
        "3 of 4 sizes (1-3)", "7 of 4 x 4 positions", "1 of 12 pairs", "2 of 4 rows repeated", "layouts packed",
    )  # fmt: skip


# --- L ----------------------------------------------------------------------------------------------------------------


@given(spaces())
def test_every_layout_is_swept_and_none_is_the_plain_one(space):
    cases = first("L", space)
    assert all(case != case.plain() for case in cases)
    assert {case.layout for case in cases} >= set(space.layouts) - {"right"}


@given(spaces(without_bounds=True))
def test_every_layout_is_swept_with_1_2_3_and_5_rows_and_all_that_can_be_done_to_it(space):
    cases = first("L", space)
    for n_rows, layout in itertools.product((1, 2, 3, 5), space.layouts):
        here = [case for case in cases if len(case) == n_rows and case.layout == layout]
        padded = layout != "packed"
        assert {case.extra_padding for case in here if case.extra_padding} == (set(sweep.PADDINGS) if padded else set())
        both = padded and "left" in space.layouts
        assert {case.opposite_padding for case in here if case.opposite_padding} == ({1, 7, 16} if both else set())
        later = {case.first_position for case in here if case.first_position}
        assert later == ({1, 17, 100} if space.max_position and layout != "right" else set())
        spare = {case.steps for case in here if case.steps}
        static = padded and "static" in space.caches
        assert spare == ({Steps(cache="static", spare=keys) for keys in (1, 15, 64, 300)} if static else set())


# --- C ----------------------------------------------------------------------------------------------------------------


@given(spaces().filter(with_caches))
def test_one_row_is_cut_at_every_boundary_and_a_long_one_at_the_edges_of_tiles_in_every_cache(space):
    cases = RELATIONS["C"].cases(space)
    longest = min(space.max_length, space.max_tokens, space.max_keys)
    swept = [case for part in cases.then for case in part]
    for cache in space.caches:
        cut = {case.steps.ends: case.width for case in in_cache(swept, cache)}
        assert cut == {(boundary,): min(33, longest) for boundary in range(1, min(33, longest))}
        long = [case for case in in_cache(cases.first, cache) if len(case) == 1 and case.width == min(300, longest)]
        cut = {case.steps.ends for case in long}
        edges = (1, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
        assert cut >= {(edge,) for edge in edges if edge < min(300, longest)}
    assert all(len(case) == 1 for case in swept)


@given(spaces(without_bounds=True).filter(with_caches), st.sampled_from((2, 3, 7, 16, 64)))
def test_batches_are_cut_into_equal_chunks_on_either_side_of_the_padding_in_every_cache(space, size):
    cases = [case for case in first("C", space) if not case.steps.prefix and not case.steps.rejected and len(case) > 1]
    assert {len(case) for case in cases} <= {3, 4, 5}
    for layout, cache in itertools.product(padded_layouts(space), space.caches):
        here = [case for case in in_cache(cases, cache) if case.layout == layout]
        cut = [case for case in here if case.steps.ends == tuple(range(size, case.width, size))]
        assert cut
        if min(row.length for row in space.palette) <= size * 40:
            assert min(len(case.steps.ends) + 1 for case in cut) <= 40


@given(spaces().filter(with_caches), st.sampled_from((1, 2, 15, 16, 17, 32, 64, 128)))
def test_every_cache_that_grows_gets_prefix_hits_and_rejected_tokens_after_them_and_after_a_chunk(space, n_tokens):
    longest = min(space.max_length, space.max_tokens, space.max_keys)
    cases = first("C", space)
    for cache in {*space.caches} - {"static"}:
        here = in_cache(cases, cache)
        hits = [case for case in here if case.steps.prefix == n_tokens]
        forgets = [case for case in here if case.steps.rejected and case.steps.ends == (n_tokens,) and not case.steps.prefix]
        if n_tokens >= longest:
            assert not hits
            continue
        assert any(case.steps.rejected == 0 for case in hits)
        assert any(case.steps.rejected > 0 for case in hits) == space.forgets
        assert bool(forgets) == space.forgets


@given(spaces(without_bounds=True).filter(with_caches))
def test_a_prefix_is_taken_over_by_as_many_as_three_rows(space):
    hits = [case for case in first("C", space) if case.steps.prefix]
    assert all(len(case) == min(3, len(space.palette)) for case in hits)


# --- D ----------------------------------------------------------------------------------------------------------------


@given(spaces().filter(with_caches))
def test_one_row_is_decoded_from_its_first_token_on_in_every_cache(space):
    longest = min(space.max_length, space.max_tokens, space.max_keys)
    for cache in space.caches:
        widths = [
            case.width
            for case in in_cache(first("D", space), cache)
            if len(case) == 1 and case.steps.ends == tuple(range(1, case.width))
        ]
        assert min(33, longest) in widths


@given(spaces(without_bounds=True, shortest=65).filter(with_caches))
def test_batches_are_decoded_after_prefills_on_either_side_of_the_padding_in_every_cache(space):
    for cache in space.caches:
        cases = [
            case
            for case in in_cache(first("D", space), cache)
            if len(case) > 1 and not case.steps.rejected and all(b - a == 1 for a, b in itertools.pairwise(case.steps.ends))
        ]
        assert {len(case) for case in cases} <= set(range(1, 6))
        assert {case.layout for case in cases} == set(padded_layouts(space))
        decoded = {case.steps.ends[0]: (case.steps.ends[-1], case.width) for case in cases}
        for prefill in (1, 5, 16, 63):
            last, width = decoded[prefill]
            assert last == min(width, prefill + 70) - 1


@given(spaces().filter(with_caches))
def test_every_cache_is_decoded_over_the_edge_of_the_window(space):
    longest = min(space.max_length, space.max_tokens, space.max_keys)
    if not 0 < space.window < longest:
        return
    over_the_edge = range(max(1, space.window - 5), min(space.window + 9, longest))
    for cache in space.caches:
        assert any(set(over_the_edge) <= set(case.steps.ends) for case in in_cache(first("D", space), cache) if len(case) == 1)


@given(spaces(without_bounds=True, shortest=4).filter(with_caches))
def test_every_cache_verifies_2_to_8_tokens_at_once_all_right_or_all_but_one_rejected(space):
    for cache in space.caches:
        cases = in_cache(first("D", space), cache)
        steps = {tuple(b - a for a, b in itertools.pairwise(case.steps.ends)) for case in cases if not case.steps.rejected}
        if space.max_length >= 12:
            assert {sizes[0] for sizes in steps if len(set(sizes)) == 1} >= {2, 3, 4, 5, 8}
        rejected = [case for case in cases if case.steps.rejected]
        forgets = cache in CACHES_THAT_FORGET and space.forgets
        assert {1 + case.steps.rejected for case in rejected} == ({2, 3, 4, 5, 8} if forgets else set())
        assert all(token_by_token(case) for case in rejected)
        if forgets:
            assert {len(case) for case in rejected} == set(range(1, 1 + min(5, len(space.palette))))


# --- S, G -------------------------------------------------------------------------------------------------------------


def n_rows_of(cases):
    return [len(case) for case in cases]


def most_in_isolation(space: Space) -> int:
    return min(17 if space.pool is None else 65, space.max_rows)


@given(spaces() | spaces(without_bounds=True) | pools())
def test_isolation_is_asked_of_a_few_small_batches_that_have_neighbours(space):
    cases, most = first("S", space), most_in_isolation(space)
    sizes = n_rows_of(cases)
    assert len(sizes) <= 6
    assert all(case.tokens <= 64 * most for case in cases)
    several = [size for size in space.boundaries() if 2 <= size <= most]
    assert min(sizes, default=None) == min(several, default=None)
    if space.pool is None:
        assert set(sizes) <= set(several)
    else:
        assert max(sizes, default=None) == max(several, default=None)


@pytest.mark.parametrize("space", [Space((Row(0, 5), Row(1, 9)), max_length=9), Space((Row(0), Row(1)), (1, 1))])
@pytest.mark.parametrize("max_rows", [2, 16])
def test_isolation_is_asked_of_drawn_batches_down_to_two_rows(space, max_rows):
    drawn = RELATIONS["S"].cases(replace(space, max_rows=max_rows)).drawn
    find(drawn, lambda case: len(case) == 2, settings=SEARCHING)


@pytest.mark.parametrize("kind", [spaces, pools])
@given(st.data())
def test_each_neighbour_is_replaced_once_by_a_row_of_the_same_shapes_and_other_content(kind, data):
    space = data.draw(kind())
    if min(space.max_rows, space.max_tokens) < 2:
        return
    case = data.draw(RELATIONS["S"].cases(space).drawn)
    assert 2 <= len(case) <= most_in_isolation(space)
    assert case.tokens <= 64 * most_in_isolation(space)

    def run(shape):
        return RowOutputs(rows=[{"stood": (shape, position)} for position in range(len(shape))])

    runs = SimpleNamespace(subject=SimpleNamespace(space=space), run=run)
    comparisons = [*RELATIONS["S"].sides(runs, case)]
    assert comparisons == [*RELATIONS["S"].sides(runs, case)]  # a finding is replayed with the same neighbours
    replaced = set()
    for expected, actual, kept in comparisons:
        assert [row["stood"] for row in expected] == [(case, position) for position in kept]
        others = {row["stood"][0] for row in actual}
        (other,) = others
        assert [row["stood"][1] for row in actual] == list(kept)
        assert other.with_rows(*case.rows) == case
        assert not space.holds(other)
        for position, (row, instead) in enumerate(zip(case.rows, other.rows, strict=True)):
            assert instead == row if position in kept else alike(space, row, instead)
            replaced |= {(beside, position) for beside in kept if instead != row}
        if space.pool is None:  # equal neighbours become different ones
            pairs = [pair for p, pair in enumerate(zip(case.rows, other.rows, strict=True)) if p not in kept]
            assert len(set(pairs)) == len(pairs)
    everywhere = set(itertools.permutations(range(len(case)), 2))
    assert replaced == {(p, q) for p, q in everywhere if space.pool is None or has_others(space, case.rows[q])}


def shapes_of(space: Space, row: Row) -> object:
    return (space.alike or space.pool)[row.id]


def has_others(space: Space, row: Row) -> bool:
    return any(shapes_of(space, other) == shapes_of(space, row) for other in space.palette if other != row)


def alike(space: Space, row: Row, instead: Row) -> bool:
    """Of a model a row that is made up, of another magnitude; of a pool another one of its rows, where there is one."""
    if space.pool is not None:
        return shapes_of(space, row) == shapes_of(space, instead) and (instead != row) == has_others(space, row)
    magnitudes = [one.content == "extreme" for one in (row, instead)]
    return row.length == instead.length and instead not in space.palette and magnitudes[0] != magnitudes[1]


@given(pools())
def test_gradients_of_a_function_are_swept_at_every_boundary(space):
    assert set(n_rows_of(first("G", space))) == set(space.boundaries())


@given(spaces())
def test_gradients_of_a_model_are_swept_with_a_few_of_the_boundaries(space):
    cases = first("G", space)
    assert 1 <= len(cases) <= 12
    assert min(n_rows_of(cases)) == 1
