"""Planted faults of kernels and models are caught in the mode, by the relation that is meant for them."""

import pytest
import torch

from pytest_batchinv import BatchVarianceError, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.mutants import kernels, models
from pytest_batchinv.subjects.rows import RowsSubject
from pytest_batchinv.subjects.transformers import TransformersSubject
from pytest_batchinv.suite.operators import subject as operator


@pytest.fixture(scope="module")
def tiny() -> TransformersSubject:
    return TransformersSubject("tiny-llama", device="cpu", dtype="fp32")


@pytest.mark.parametrize(
    "entry, name", [("_softmax", "softmax"), ("mean.dim", "mean"), ("layer_norm", "layer_norm"), ("linear", "linear")]
)
def test_a_kernel_whose_bits_follow_its_rows_is_caught_at_that_many_rows(entry, name):
    with kernels.scaled_from(entry, 21), batch_invariant_mode(), pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(operator(name, "fp32", "cpu"), ("R", "S", "I"), max_examples=5)
    assert caught.value.record.relation == "I"
    assert caught.value.finding.n_rows == 21
    assert caught.value.sizes == tuple(range(21, 301))


def test_a_model_is_caught_by_a_kernel_that_follows_its_rows(tiny):
    with kernels.scaled_from("linear", 40), batch_invariant_mode(), pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(tiny, ("I",), max_examples=5)
    assert caught.value.finding.case


@pytest.mark.parametrize("letter", models.PLANTED)
def test_a_fault_of_a_model_is_caught_by_its_relation_and_by_none_before_it(tiny, letter):
    before = ("R", "S", "I") if letter in "RSI" else (letter,)  # what breaks L, C or D breaks I, too: its batches have layouts
    with batch_invariant_mode(), models.planted(tiny.model, models.PLANTED[letter]()):
        with pytest.raises(BatchVarianceError) as caught:
            check_batch_invariant(tiny, before, max_examples=5)
    assert caught.value.record.relation == letter


def test_without_a_fault_the_same_checks_are_equal(tiny):
    with batch_invariant_mode():
        records = check_batch_invariant(tiny, ("R", "S", "I"), max_examples=5)
        records += check_batch_invariant(operator("softmax", "fp32", "cpu"), ("R", "S", "I"), max_examples=5)
    assert {record.verdict for record in records} == {"equal"}
    assert all(record.mode == "on" and not record.unclassified_ops for record in records)


def test_a_module_is_a_subject_like_a_function():
    head = torch.nn.Linear(64, 8)
    with batch_invariant_mode():
        (record,) = check_batch_invariant(RowsSubject(head, [torch.randn(20, 64)]), ("I",), max_examples=5)
    assert (record.subject.kind, record.subject.name, record.verdict) == ("module", "Linear", "equal")
