"""Batch shapes as data."""

import json

import pytest

from pytest_batchinv.shapes import CONTENTS, LAYOUTS, BatchShape, Row

ROWS = (Row(3, 5), Row(0, 2, "extreme"), Row(3, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_there_and_back(layout):
    shape = BatchShape(ROWS, layout, extra_padding=2)
    assert BatchShape.from_json(shape.to_json()) == shape
    assert hash(BatchShape.from_json(shape.to_json())) == hash(shape)


def test_json_may_leave_out_what_has_a_default():
    assert BatchShape.from_json('{"rows":[{"id":7}]}') == BatchShape((Row(7),))


def test_width_and_tokens():
    padded, packed = BatchShape(ROWS, "left", extra_padding=2), BatchShape(ROWS, "packed")
    assert (len(padded), padded.width, padded.tokens) == (3, 7, 21)
    assert (len(packed), packed.width, packed.tokens) == (3, 12, 12)


def test_a_row_alone_has_no_padding_and_no_neighbours():
    alone = BatchShape(ROWS, "left", extra_padding=9).alone(1)
    assert alone == BatchShape((ROWS[1],))
    assert alone.tokens == ROWS[1].length


def test_other_rows_keep_the_layout():
    assert BatchShape(ROWS, "left", 4).with_rows(Row(1)) == BatchShape((Row(1),), "left", 4)


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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "5",
        "[]",
        "null",
        "{}",
        '{"rows":5}',
        '{"rows":[5]}',
        '{"rows":[{"id":"a"}]}',
        '{"rows":[{"id":0,"size":1}]}',
    ]
    + ['{"rows":[{"id":0}],"width":3}'],
)
def test_what_is_no_shape_in_json_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="not a batch shape: .* It looks like") as caught:
        BatchShape.from_json(text)
    example = str(caught.value).partition("It looks like ")[2]
    assert BatchShape.from_json(example).to_json() == json.dumps(json.loads(example), separators=(",", ":"))
