"""What generate() of transformers gives: a row's tokens and logits, alone and in a batch padded on the left."""

import pytest
import torch

from pytest_batchinv import BatchVarianceError, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.mutants import models
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.transformers import TransformersSubject
from pytest_batchinv.subjects.transformers.generation import GUESSED, N_TOKENS, Generation, Sampling
from pytest_batchinv.subjects.transformers.layout import row_tokens

BATCH = BatchShape((Row(0, 5), Row(1, 1), Row(2, 33, "extreme"), Row(3, 17)))


def generation(model: str, dtype: str = "fp32") -> Generation:
    return Generation(TransformersSubject(model, device="cpu", dtype=dtype))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-llama", "tiny-gpt2", "tiny-gemma"])
def test_no_bit_and_no_token_differs_in_a_batch(model, dtype):
    with batch_invariant_mode():
        records = check_batch_invariant(generation(model, dtype), ("R", "I"), case=BATCH)
    assert [(record.verdict, record.mode) for record in records] == [("equal", "on")] * 2
    assert records[1].counts.compared_bytes > 4 * N_TOKENS * 499


def test_the_tokens_are_those_that_the_model_would_choose_one_by_one():
    subject = generation("tiny-llama")
    tokens = row_tokens(Row(0, 5), subject.subject.vocabulary, subject.subject.outlier)
    out = subject.run(BatchShape((Row(0, 5),)))[0]
    for token, logits in zip(out["tokens"].tolist(), out["logits"], strict=True):
        with torch.no_grad():
            expected = subject.subject.model(input_ids=torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        expected[subject.subject.model.config.eos_token_id] = -torch.inf  # no row ends before the others
        assert int(expected.argmax()) == token
        tokens = [*tokens, token]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_token_that_is_drawn_differs_in_a_batch(dtype):
    subject = Generation(TransformersSubject("tiny-llama", device="cpu", dtype=dtype), sampling=Sampling(temperature=2.0))
    assert subject.info.kind == "transformers sample"
    with batch_invariant_mode():
        records = check_batch_invariant(subject, ("R", "I"), case=BATCH)
        greedy, drawn = (each.run(BATCH)[0]["tokens"] for each in (generation("tiny-llama", dtype), subject))
    assert [record.verdict for record in records] == ["equal"] * 2
    assert not any("multinomial" in name for record in records for name in record.ops.unverified)
    assert not torch.equal(greedy, drawn)


def test_tokens_of_torchs_own_generator_would_differ(monkeypatch):
    """So the test above can fail: the same seed before each run gives a row other numbers in a batch."""

    def of_torch(scores, seeds, position, **options):
        torch.manual_seed(position)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    monkeypatch.setattr("pytest_batchinv.sampling.sample", of_torch)
    subject = Generation(TransformersSubject("tiny-llama", device="cpu", dtype="fp32"), sampling=Sampling())
    with batch_invariant_mode():
        together, alone = (subject.run(BatchShape(rows)) for rows in (BATCH.rows, BATCH.rows[2:3]))
    assert not torch.equal(together[2]["tokens"], alone[0]["tokens"])


def test_a_fault_that_follows_the_batch_is_caught():
    subject = generation("tiny-llama")
    with batch_invariant_mode(), models.planted(subject.subject.model, models.follows_the_batch_size):
        with pytest.raises(BatchVarianceError, match="relation I"):
            check_batch_invariant(subject, ("I",), case=BatchShape((*BATCH.rows, Row(4, 3))))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_that_were_guessed_and_verified_at_once_have_the_logits_of_a_batch_without_guesses(dtype):
    rows = (Row(0, 33, "repeated"), Row(1, 5), Row(2, 17, "repeated"))
    subject = Generation(TransformersSubject("tiny-llama", device="cpu", dtype=dtype), n_tokens=16, assisted=True)
    with batch_invariant_mode():
        records = check_batch_invariant(subject, ("R", "I"), case=BatchShape(rows))
        assert [record.verdict for record in records] == ["equal"] * 2
        subject.notes()
        subject.run(BatchShape(rows[:1]))
    (note,) = subject.notes()
    assert note.startswith("assisted decoding: 16 tokens of rows alone in ")
    assert int(note.split()[-2]) <= 16
    assert subject.notes() == ()


def test_assisted_sampling_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="assisted decoding is tested greedily"):
        Generation(TransformersSubject("tiny-llama", device="cpu", dtype="fp32"), sampling=Sampling(), assisted=True)


def test_a_fault_of_verified_tokens_is_caught():
    subject = Generation(TransformersSubject("tiny-llama", device="cpu", dtype="fp32"), assisted=True)
    fault = lambda hidden: hidden.roll(1, -1) if 1 < hidden.shape[1] <= 1 + GUESSED else hidden  # noqa: E731
    with batch_invariant_mode(), models.planted(subject.subject.model, fault):
        with pytest.raises(BatchVarianceError, match="relation I"):
            check_batch_invariant(subject, ("I",), case=BatchShape((Row(0, 33, "repeated"), Row(1, 9))))


def test_a_model_that_cannot_pad_on_the_left_is_refused_with_the_reason():
    subject = TransformersSubject("tiny-llama", device="cpu", dtype="fp32")
    subject.space = subject.space.__class__(subject.space.palette, layouts=("right",), left_out=("the left is left out: why.",))
    with pytest.raises(ValueError, match=r"cannot pad on the left, which generate\(\) asks for. the left is left out: why"):
        Generation(subject)
