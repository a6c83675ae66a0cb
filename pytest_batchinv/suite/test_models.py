"""Relations R, S, I, L, C, D, G, T and X of a causal language model, and its negative control."""

import pytest

from pytest_batchinv import check_batch_invariant, check_negative_control


@pytest.mark.batch_invariant
@pytest.mark.compile_mode("eager", "default", "dynamic", "reduce-overhead")
def test_a_row_has_the_same_bits_alone_in_any_batch_and_in_eager_code(batchinv_engine, batchinv_settings):
    _check(batchinv_engine, batchinv_settings, "RSIX")


@pytest.mark.batch_invariant
def test_a_row_has_the_same_bits_in_any_layout(batchinv_engine, batchinv_settings):
    _check(batchinv_engine, batchinv_settings, "L")


@pytest.mark.batch_invariant
def test_a_row_has_the_same_bits_at_once_and_in_chunks(batchinv_engine, batchinv_settings):
    _check(batchinv_engine, batchinv_settings, "C")


@pytest.mark.batch_invariant
def test_a_row_has_the_same_bits_at_once_and_decoded(batchinv_engine, batchinv_settings):
    _check(batchinv_engine, batchinv_settings, "D")


@pytest.mark.batch_invariant
def test_a_row_has_the_same_gradient_alone_and_in_any_batch(batchinv_engine, batchinv_settings):
    """In eager code alone: the backward of each new shape would be compiled, for minutes."""
    _check(batchinv_engine, batchinv_settings, "G")


@pytest.mark.batch_invariant
def test_a_row_has_the_same_bits_on_any_number_of_ranks(batchinv_engine, batchinv_settings):
    """And the same search must catch stock torch, while the ranks are there."""
    _check(batchinv_engine, batchinv_settings, "T")
    if "N" in batchinv_settings.relations:
        check_negative_control(batchinv_engine, "T")


@pytest.mark.batch_invariant
def test_stock_torch_is_caught_by_the_same_search(batchinv_engine, batchinv_settings):
    if "N" not in batchinv_settings.relations:
        pytest.skip("relation N, the negative control, was not asked for")
    if batchinv_engine.info.elsewhere:
        pytest.skip("another process computes, where stock_torch() changes nothing")
    control = check_negative_control(batchinv_engine)
    if control.finding is not None:  # where stock torch was caught, the mode holds
        check_batch_invariant(batchinv_engine, "I", case=control.finding.batch)


def _check(engine, settings, letters: str) -> None:
    relations = [relation for relation in settings.relations if relation in letters]
    if not relations:
        pytest.skip(f"none of the relations {', '.join(letters)} was asked for")
    records = check_batch_invariant(engine, relations)
    if all(record.verdict == "not_run" for record in records):
        pytest.skip("; ".join(record.error for record in records))
