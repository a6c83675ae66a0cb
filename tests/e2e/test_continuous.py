"""Continuous batching of transformers: what generate_batch() gives of a row, alone and among others."""

import pytest
import torch

from pytest_batchinv import BatchVarianceError, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.mode import stock_torch
from pytest_batchinv.mutants import models
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.transformers import TransformersSubject, attention
from pytest_batchinv.subjects.transformers.continuous import TOKENS_AT_ONCE, ContinuousBatching
from pytest_batchinv.subjects.transformers.generation import Generation

BATCH = BatchShape((Row(0, 5), Row(1, 1), Row(2, 33, "extreme"), Row(3, 17), Row(4, TOKENS_AT_ONCE + 26)))


def continuous(model: str, dtype: str = "fp32", **words: str) -> ContinuousBatching:
    return ContinuousBatching(TransformersSubject(model, device="cpu", dtype=dtype, **words))


@pytest.mark.parametrize(("model", "dtype"), [("tiny-qwen3", "bf16"), ("tiny-gpt2", "fp32")])
def test_no_bit_and_no_token_differs_among_other_rows(model, dtype):
    with batch_invariant_mode():
        records = check_batch_invariant(continuous(model, dtype), ("R", "I"), case=BATCH)
    assert [(record.verdict, record.mode, record.ops.unverified) for record in records] == [("equal", "on", ())] * 2


def test_the_tokens_are_those_of_generate_with_a_cache_of_another_kind():
    with batch_invariant_mode():
        subject = continuous("tiny-qwen3")
        expected = Generation(subject.subject).run(BATCH).stacked["tokens"]
        found = subject.run(BATCH).stacked
    assert torch.equal(found["tokens"], expected)
    assert found["logprobs"].shape == expected.shape


def test_what_the_scheduler_made_of_the_batches_is_told_once():
    with batch_invariant_mode():
        subject = continuous("tiny-llama")
        subject.run(BATCH)
    (note,) = subject.notes()
    assert "forwards of up to 5 rows" in note
    assert " 0 with parts of prompts" not in note
    assert subject.notes() == ()


def test_stock_torch_is_caught():
    with stock_torch(), pytest.raises(BatchVarianceError, match="relation I"):
        check_batch_invariant(continuous("tiny-qwen3", attn="sdpa"), ("I",), case=BATCH)


def test_a_leak_between_the_rows_of_a_forward_is_caught():
    subject = continuous("tiny-llama")
    with batch_invariant_mode(), models.planted(subject.subject.model, models.leaks_the_mean_of_the_batch):
        with pytest.raises(BatchVarianceError, match="relation I"):
            check_batch_invariant(subject, ("I",), case=BATCH)


def test_the_model_has_its_own_attention_and_forward_again_after_a_run():
    with batch_invariant_mode():
        subject = continuous("tiny-llama")
        subject.run(BatchShape((Row(0, 3),)))
        model = subject.subject.model
        assert model.config._attn_implementation == attention.NAME
        assert "forward" not in vars(model)
        model(input_ids=torch.tensor([[1, 2]]))


def test_our_paged_attention_is_for_continuous_batching_alone():
    x = torch.zeros(1, 2, 3, 16)
    with pytest.raises(attention.Uncovered, match="is for continuous batching alone"):
        attention.paged_attention_forward(torch.nn.Module(), x, x, x, None)


def test_a_model_that_cannot_be_batched_so_is_refused_with_the_reason():
    subject = TransformersSubject("tiny-llama", device="cpu", dtype="fp32")
    subject.space = subject.space.__class__(subject.space.palette, layouts=("right",))
    with pytest.raises(ValueError, match=r"takes no packed rows, which generate_batch\(\) makes of a batch"):
        ContinuousBatching(subject)
