"""Batch shapes by Hypothesis: within their bounds, with weight on the boundaries, and small once they have shrunk."""

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pytest_batchinv.shapes import CONTENTS, LAYOUTS, BatchShape, Row
from pytest_batchinv.strategies import BOUNDARIES, SWEPT_SIZES, batch_shapes, row_choices, sizes, sweep

SEARCH = hypothesis.settings(max_examples=2000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
FEW = hypothesis.settings(SEARCH, max_examples=40)


def smallest(strategy, fails):
    return hypothesis.find(strategy, fails, settings=SEARCH)


@FEW
@given(st.data())
def test_rows_lengths_and_tokens_stay_within_their_bounds(data):
    bounds = {
        "max_rows": data.draw(st.integers(1, 70)),
        "max_length": data.draw(st.integers(1, 70)),
        "max_tokens": data.draw(st.integers(1, 500)),
    }
    layouts = data.draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, unique=True))
    contents = data.draw(st.lists(st.sampled_from(CONTENTS), min_size=1, unique=True))
    shape = data.draw(batch_shapes(**bounds, layouts=layouts, contents=contents))
    assert 1 <= len(shape) <= bounds["max_rows"]
    assert max(row.length for row in shape.rows) <= bounds["max_length"]
    assert shape.tokens <= bounds["max_tokens"]
    assert shape.layout in layouts
    assert {row.content for row in shape.rows} <= set(contents)
    assert BatchShape.from_json(shape.to_json()) == shape


@FEW
@given(batch_shapes())
def test_a_batch_has_few_distinct_rows_so_that_each_is_run_alone_only_once(shape):
    assert len(set(shape.rows)) <= 5


@FEW
@given(st.integers(1, 400).flatmap(lambda most: st.tuples(st.just(most), sizes(most))))
def test_sizes_run_from_1_to_the_most(drawn):
    most, size = drawn
    assert 1 <= size <= most


def test_most_sizes_are_boundaries_and_any_other_size_is_drawn_too():
    drawn = []

    @hypothesis.settings(SEARCH, max_examples=300)
    @given(sizes(300), st.integers())
    def draw(size, _):  # with the integer no example comes twice, which Hypothesis would leave out
        drawn.append(size)

    draw()
    on_boundaries = sum(size in BOUNDARIES for size in drawn)
    assert len(drawn) / 2 < on_boundaries < len(drawn)


@FEW
@given(st.integers(1, 9), st.integers(1, 70), st.data())
def test_choices_of_rows_stay_within_the_pool(pool, most, data):
    rows = data.draw(row_choices(pool, most))
    assert 1 <= len(rows) <= most
    assert set(rows) <= set(range(pool))


# --- what a failure shrinks to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [2, 9, 10, 16, 18, 45, 66])
def test_a_failure_from_a_batch_size_on_shrinks_to_that_many_rows_of_length_1(n_rows):
    found = smallest(batch_shapes(max_tokens=2048), lambda shape: len(shape) >= n_rows)
    assert found == BatchShape((Row(0, 1),) * n_rows)


@pytest.mark.parametrize("n_rows", [2, 9, 10, 16, 18, 45, 66])
def test_a_failure_from_a_number_of_chosen_rows_on_shrinks_to_that_many_times_row_0(n_rows):
    assert smallest(row_choices(10, 300), lambda rows: len(rows) >= n_rows) == [0] * n_rows


@pytest.mark.parametrize("length", [2, 20, 45])
def test_a_failure_from_a_row_length_on_shrinks_to_one_row_of_that_length(length):
    found = smallest(batch_shapes(), lambda shape: max(row.length for row in shape.rows) >= length)
    assert found == BatchShape((Row(0, length),))


def test_a_failure_at_one_position_shrinks_to_a_batch_that_ends_there():
    found = smallest(batch_shapes(), lambda shape: len(shape) > 31 and shape.rows[31].content == "extreme")
    assert len(found) == 32
    assert {row.length for row in found.rows} == {1}


def test_a_failure_of_one_layout_keeps_the_layout_and_nothing_else():
    found = smallest(batch_shapes(), lambda shape: shape.layout == "packed" and len(shape) >= 2)
    assert found == BatchShape((Row(0, 1),) * 2, "packed")


# --- the sweep --------------------------------------------------------------------------------------------------------

SWEPT = tuple(sweep(LAYOUTS, max_length=300, max_tokens=2048))


def test_the_sweep_is_the_same_every_time():
    assert tuple(sweep(LAYOUTS, max_length=300, max_tokens=2048)) == SWEPT
    assert len(set(SWEPT)) == len(SWEPT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_rows", SWEPT_SIZES)
def test_the_sweep_holds_every_size_with_the_row_of_interest_first_last_at_15_and_at_31(n_rows, layout):
    positions = {shape.rows.index(Row(0, 13)) for shape in SWEPT if (len(shape), shape.layout) == (n_rows, layout)}
    assert positions == {position for position in (0, 15, 31, n_rows - 1) if position < n_rows}


def test_the_swept_sizes_hold_the_small_ones_that_broke_real_systems():
    assert {1, 2, 8, 9, 15, 16, 17, 31, 32, 33} <= set(SWEPT_SIZES)


def test_the_row_of_interest_stands_in_every_batch_of_the_sweep_once():
    assert all(shape.rows.count(Row(0, 13)) == 1 for shape in SWEPT)


def test_the_sweep_holds_a_row_of_one_token_which_alone_is_a_matrix_with_one_row():
    assert any(row.length == 1 for shape in SWEPT for row in shape.rows)
    (alone,) = {shape.alone(i) for shape in SWEPT for i, row in enumerate(shape.rows) if row == Row(1, 1)}
    assert alone.tokens == 1


def test_the_sweep_starts_with_the_smallest_batches():
    lengths = [len(shape) for shape in SWEPT]
    assert lengths == sorted(lengths)
    assert lengths[0] == 1


@pytest.mark.parametrize(("max_length", "max_tokens"), [(1, 2048), (7, 40), (300, 100)])
def test_the_sweep_stays_within_the_bounds_of_the_engine(max_length, max_tokens):
    shapes = list(sweep(("left", "packed"), max_length, max_tokens))
    assert shapes
    assert {shape.layout for shape in shapes} == {"left", "packed"}
    assert all(row.length <= max_length for shape in shapes for row in shape.rows)
    assert all(shape.tokens <= max_tokens for shape in shapes)
