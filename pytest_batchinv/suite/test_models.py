"""Relations R, I and X of a causal language model, and its negative control."""

import pytest

from pytest_batchinv.check import check_engine, check_negative_control
from pytest_batchinv.shapes import BatchShape


@pytest.mark.batch_invariant
@pytest.mark.compile_mode("eager", "default", "dynamic", "reduce-overhead")
def test_a_row_has_the_same_bits_alone_in_any_batch_and_in_eager_code(batchinv_engine, batchinv_settings):
    check_engine(
        batchinv_engine,
        relations=[relation for relation in batchinv_settings.relations if relation != "N"],
        max_examples=batchinv_settings.max_examples,
        shape=batchinv_settings.shape,
    )


@pytest.mark.batch_invariant
def test_stock_torch_is_caught_by_the_same_search(batchinv_engine, batchinv_settings):
    if "N" not in batchinv_settings.relations:
        pytest.skip("relation N, the negative control, was not asked for")
    control = check_negative_control(batchinv_engine, max_examples=batchinv_settings.max_examples)
    caught = control.difference.get("shape")
    check_engine(batchinv_engine, relations=["I"], shape=BatchShape.from_json(caught) if caught else None)
