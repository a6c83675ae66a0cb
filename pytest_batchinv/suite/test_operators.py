"""Relations R, S, I and G of single operators, and the search that must catch stock torch on this machine."""

import pytest

from pytest_batchinv import check_batch_invariant, check_negative_control, context, gpu
from pytest_batchinv.report.record import Record
from pytest_batchinv.suite.operators import subject

EXAMPLES = 30
CONTROLS = ("linear", "rsqrt", "sum", "bmm", "softmax", "rms_norm")
"""Their stock kernels vary on one device or another: products on CPUs in fp32, rsqrt on CPUs in bf16, sums on GPUs."""


@pytest.fixture
def device(batchinv_settings) -> str:
    return gpu.resolve_device(batchinv_settings.device)


@pytest.mark.batch_invariant
def test_a_row_of_an_operator_has_the_same_bits_in_any_batch(operator, dtype, device, batchinv_settings):
    relations = [relation for relation in batchinv_settings.relations if relation in "RSIG"]
    if not relations:
        pytest.skip("none of the relations R, S, I and G was asked for")
    check_batch_invariant(subject(operator, dtype, device), relations, max_examples=EXAMPLES)


@pytest.mark.batch_invariant
def test_stock_torch_is_caught_by_the_same_search_of_operators(dtype, device, batchinv_settings):
    """One operator of a dtype is enough to show that the search catches something here: it ends at the first one caught."""
    if "N" not in batchinv_settings.relations:
        pytest.skip("relation N, the negative control, was not asked for")
    found: list[Record] = []
    with context.collecting(found.append):
        any(
            check_negative_control(subject(name, dtype, device), max_examples=EXAMPLES).verdict == "caught" for name in CONTROLS
        )
    context.current().emit(found[-1])
