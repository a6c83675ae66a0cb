"""Batch shapes as data."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_batchinv.shapes import CONTENTS, LAYOUTS, BatchShape, Row, as_ranges
from pytest_batchinv.strategies import batch_shapes

ROWS = (Row(3, 5), Row(0, 2, "extreme"), Row(3, 5))


@given(batch_shapes(), st.text("0123456789abcdef", max_size=12))
def test_json_there_and_back(shape, pool):
    shape = shape.from_pool(pool)
    assert BatchShape.from_json(shape.to_json()) == shape
    assert hash(BatchShape.from_json(shape.to_json())) == hash(shape)


def test_a_row_of_a_pool_is_written_as_its_number():
    assert BatchShape((Row(4), Row(0))).to_json() == '{"rows":[4,0]}'
    assert BatchShape.from_json('{"rows":[7,{"id":7}]}') == BatchShape((Row(7), Row(7)))


def test_the_form_with_every_field_is_read_too():
    text = '{"rows":[{"id":0,"length":5,"content":"random"}],"layout":"left","extra_padding":2}'
    assert BatchShape.from_json(text) == BatchShape((Row(0, 5),), "left", 2)


def test_width_and_tokens():
    padded, packed = BatchShape(ROWS, "left", extra_padding=2), BatchShape(ROWS, "packed")
    assert (len(padded), padded.width, padded.tokens) == (3, 7, 21)
    assert (len(packed), packed.width, packed.tokens) == (3, 12, 12)


def test_a_row_alone_has_no_padding_and_no_neighbours():
    assert BatchShape(ROWS, "left", extra_padding=9).alone(1) == BatchShape((ROWS[1],))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Row(-1), "a row's id is an integer from 0 on, not -1"),
        (lambda: Row(0, 0), "a row has at least 1 token, not 0"),
        (lambda: Row(0, 1, "loud"), f"one of {', '.join(CONTENTS)}, not 'loud'"),
        (lambda: BatchShape(()), "a batch has at least one row"),
        (lambda: BatchShape(ROWS, "top"), f"one of {', '.join(LAYOUTS)}, not 'top'"),
        (lambda: BatchShape(ROWS, extra_padding=-1), "extra_padding is 0 or more, not -1"),
    ],
)
def test_what_is_no_batch_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


BAD = ["", "{", "5", "[]", "null", "{}", '{"rows":5}', '{"rows":["a"]}', '{"rows":[{"id":"a"}]}']
BAD += ['{"rows":[{"id":0,"size":1}]}']


@pytest.mark.parametrize("text", [*BAD, '{"rows":[{"id":0}],"width":3}', '{"rows":[-1]}', '{"rows":[{"id":0,"length":0}]}'])
def test_what_is_no_shape_in_json_is_refused(text):
    with pytest.raises(ValueError, match="not a batch shape: .* It looks like|a row's id is") as caught:
        BatchShape.from_json(text)
    if "It looks like" in str(caught.value):
        example = str(caught.value).partition("It looks like ")[2]
        assert json.loads(BatchShape.from_json(example).to_json()) == json.loads(example)


@given(st.sets(st.integers(1, 400)))
def test_ranges_hold_the_numbers_and_no_others(sizes):
    told = as_ranges(sizes)
    read = set()
    for run in [] if told == "none" else told.split(", "):
        first, _, last = run.partition("-")
        read |= set(range(int(first), int(last or first) + 1))
    assert read == sizes
