"""Relations R and I of single operators, and the search that must catch stock torch on this machine."""

from collections import Counter

import pytest
import torch

from pytest_batchinv import gpu, records
from pytest_batchinv.check import BatchVarianceError, check_rows
from pytest_batchinv.mode import stock_torch
from pytest_batchinv.records import Record
from pytest_batchinv.suite.operators import operators, pool

EXAMPLES = 30


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture
def device(batchinv_settings) -> str:
    return gpu.resolve_device(batchinv_settings.device)


@pytest.mark.batch_invariant
def test_a_row_of_an_operator_has_the_same_bits_in_any_batch(dtype, device):
    found: list[Record] = []
    try:
        with records.collecting(found.append):
            for operator in operators(dtype, device):
                check_rows(f"{operator} {dtype}", operator.fn, [pool(dtype, device)], max_examples=EXAMPLES)
    finally:
        record = _summed(found, dtype, device)
        if record.verdict != "equal":  # the search ends at the first operator that differs: name it
            record.subject = found[-1].subject
        records.emit(record)


@pytest.mark.batch_invariant
def test_stock_operators_are_caught_by_the_same_search(dtype, device):
    caught: dict[str, BatchVarianceError] = {}
    found: list[Record] = []
    rows = pool(dtype, device)
    with records.collecting(found.append):
        with stock_torch():
            for operator in operators(dtype, device):
                try:
                    check_rows(f"stock {operator} {dtype}", operator.fn, [rows], max_examples=EXAMPLES)
                except BatchVarianceError as error:
                    caught[operator.name] = error
        control = _summed(found, dtype, device)
        # The same operators hold in the mode: what the search caught was stock torch, and not the search.
        for operator in operators(dtype, device):
            if operator.name in caught or not caught:
                check_rows(f"{operator} {dtype}", operator.fn, [rows], max_examples=EXAMPLES)
    control.relation, control.verdict = "N", "caught" if caught else "inconclusive"
    control.difference = {}
    control.notes = [f"stock {dtype} varies with the batch in: {', '.join(caught) or 'no operator that was tried'}"]
    records.emit(control)


def _summed(found: list[Record], dtype: torch.dtype, device: str) -> Record:
    """One record for all operators: sums, and the first difference."""
    differing = [record for record in found if record.verdict != "equal"]
    total = Record(
        subject=f"{len(found)} operators",
        relation="RI",
        verdict=differing[0].verdict if differing else "equal",
        engine="module",
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        machine=records.machine(),
    )
    for name in ("examples", "rows", "compared_bytes", "nan_rows", "seconds"):
        setattr(total, name, sum(getattr(record, name) for record in found))
    total.hits = dict(sum((Counter(record.hits) for record in found), Counter()))
    total.difference = differing[0].difference if differing else {}
    return total
