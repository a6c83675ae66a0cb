"""Relations R, S, I and X of a causal language model, and its negative control."""

import pytest

from pytest_batchinv import check_batch_invariant, check_negative_control


@pytest.mark.batch_invariant
@pytest.mark.compile_mode("eager", "default", "dynamic", "reduce-overhead")
def test_a_row_has_the_same_bits_alone_in_any_batch_and_in_eager_code(batchinv_engine, batchinv_settings):
    left_out = "NG"
    relations = [relation for relation in batchinv_settings.relations if relation not in left_out]
    check_batch_invariant(batchinv_engine, relations)


@pytest.mark.batch_invariant
def test_stock_torch_is_caught_by_the_same_search(batchinv_engine, batchinv_settings):
    if "N" not in batchinv_settings.relations:
        pytest.skip("relation N, the negative control, was not asked for")
    control = check_negative_control(batchinv_engine)
    if control.finding is not None:  # where stock torch was caught, the mode holds
        check_batch_invariant(batchinv_engine, "I", case=control.finding.batch)
