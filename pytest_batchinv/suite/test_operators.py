"""Relations R and I of single operators, and the search that must catch stock torch on this machine."""

import pytest

from pytest_batchinv import gpu, records
from pytest_batchinv.check import BatchVarianceError, check_rows
from pytest_batchinv.mode import stock_torch

EXAMPLES = 30


@pytest.fixture
def model() -> str:
    return "operators"


@pytest.fixture(params=["float32", "bfloat16"])
def subjects(request, batchinv_settings):
    import torch

    from pytest_batchinv.suite.operators import operators, pool

    device, dtype = gpu.resolve_device(batchinv_settings.device), getattr(torch, request.param)
    return operators(dtype, device), pool(dtype, device)


@pytest.mark.batch_invariant
def test_a_row_of_an_operator_has_the_same_bits_in_any_batch(subjects):
    operators, pool = subjects
    for operator in operators:
        check_rows(f"{operator} {pool.dtype}", operator.fn, [pool], max_examples=EXAMPLES)


@pytest.mark.batch_invariant
def test_stock_operators_are_caught_by_the_same_search(subjects):
    operators, pool = subjects
    caught = {}
    with stock_torch(), records.collecting(lambda record: None):
        for operator in operators:
            try:
                check_rows(f"stock {operator} {pool.dtype}", operator.fn, [pool], max_examples=EXAMPLES)
            except BatchVarianceError as error:
                caught[operator.name] = error
    record = records.Record(
        subject=f"operators {pool.dtype}", relation="N", verdict="caught" if caught else "inconclusive", engine="module"
    )
    record.device = str(pool.device)
    record.examples = len(operators)
    record.notes = [
        f"stock {name}: bits change at batch sizes {', '.join(map(str, error.sizes)) or 'of the found batch only'}"
        for name, error in caught.items()
    ]
    records.emit(record)
    # In the mode the same operators hold, so this test ran the table too.
    for operator in operators:
        if operator.name in caught:
            check_rows(f"{operator} {pool.dtype}", operator.fn, [pool], max_examples=EXAMPLES)
