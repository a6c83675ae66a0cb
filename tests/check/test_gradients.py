"""Relation G: gradients of rows and of weights, of functions, modules and models."""

import pytest
import torch
from torch.nn import functional as F

from pytest_batchinv import BatchVarianceError, assert_batch_invariant, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.check import check_negative_control
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.search import sweep
from pytest_batchinv.shapes import BatchShape, Row, of_rows
from pytest_batchinv.subjects.rows import RowsSubject
from pytest_batchinv.subjects.transformers import TransformersSubject


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sweep, "SECONDS", 0.5)


def rows_of(fn, *inputs, case=None, **options):
    subject = RowsSubject(fn, inputs, **options).with_gradients()
    return subject.run(case or of_rows(range(3)))


def test_the_gradient_of_a_row_is_that_of_its_own_loss_and_the_weights_have_the_sum_over_the_rows():
    head, x = torch.nn.Linear(8, 5), torch.randn(3, 8)
    found = rows_of(head, x)
    cotangent = (torch.arange(5, dtype=torch.float64) * 0.6180339887498949).frac().mul(2).sub(1).float()
    torch.testing.assert_close(found.stacked["the gradient"], (cotangent @ head.weight).expand(3, 8))
    weight, bias = found.shared["the gradient of weight"], found.shared["the gradient of bias"]
    torch.testing.assert_close(weight, cotangent[:, None] * x.sum(0))
    torch.testing.assert_close(bias, 3 * cotangent)


def test_stock_torch_is_caught_and_the_operator_of_the_backward_is_named():
    head, x = torch.nn.Linear(1024, 32), torch.randn(40, 1024)
    assert check_negative_control(RowsSubject(head, [x]), "G").verdict == "caught"
    with pytest.raises(BatchVarianceError, match=r"aten::mm: a gradient has other bits.*\(relation G, gradients\)"):
        assert_batch_invariant(head, x, relations=("G",))


@pytest.mark.parametrize("compile_mode", ["eager", "dynamic"])
def test_in_the_mode_the_gradients_of_a_linear_layer_are_equal(compile_mode):
    head, x = torch.nn.Linear(64, 16), torch.randn(20, 64)
    with batch_invariant_mode():
        record = assert_batch_invariant(head, x, relations=("G",), compile_mode=compile_mode, max_examples=10)
    assert (record.relation, record.verdict) == ("G", "equal")
    assert record.ops is not None and "aten::mm" in record.ops.covered


def test_a_function_that_writes_to_its_input_and_one_that_ignores_it_have_gradients():
    assert assert_batch_invariant(lambda x: x.mul_(2), planted.pool(), relations=("G",)).verdict == "equal"
    found = rows_of(lambda x, y: x * 2, torch.randn(3, 4), torch.randn(3, 4))
    assert not found.stacked["the gradient of input 1"].any()


def test_ragged_rows_have_gradients_of_their_own_length():
    pool = [torch.randn(length) for length in (3, 5, 1)]

    def padded(rows):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])

    def silu(x, lengths):
        return [F.silu(row[:length]) for row, length in zip(x, lengths, strict=True)]

    found = rows_of(silu, pool, collate=padded, case=of_rows([1, 0, 1]))
    assert [row["the gradient"].shape for row in found] == [(5,), (3,), (5,)]
    record = assert_batch_invariant(
        lambda x, n: [row[:k] * 2 for row, k in zip(x, n, strict=True)], pool, collate=padded, relations=("G",), max_examples=5
    )
    assert record.verdict == "equal"


def test_what_has_no_gradient_is_not_run_and_says_why():
    (record,) = check_batch_invariant(RowsSubject(lambda x: x + 1, [planted.pool().long()]), ("G",))
    assert (record.verdict, record.error) == (
        "not_run",
        "NotRun: no input is a tensor of floats, so there is no gradient of a row",
    )
    with pytest.raises(Exception, match="no output of .* has a gradient"):
        check_batch_invariant(RowsSubject(lambda x: x.argmax(-1), [planted.pool()], name="argmax"), ("G",))


def test_a_model_has_the_gradients_of_its_embeddings_by_row_and_of_its_weights():
    model = TransformersSubject("tiny-llama", device="cpu", dtype="fp32")
    case = BatchShape((Row(0, 5, "random"), Row(1, 9, "random")))
    with batch_invariant_mode():
        found = model.with_gradients().run(case)
        records = check_batch_invariant(model, ("G",), case=case)
    assert [row["the gradient of its embeddings"].shape[0] for row in found] == [5, 9]
    assert all(row["the gradient of its embeddings"].any() for row in found)
    assert len(found.shared) == len(list(model.model.parameters()))
    assert [record.verdict for record in records] == ["equal"]
