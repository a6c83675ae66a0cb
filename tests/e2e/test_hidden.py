"""Encoders and encoder-decoders: the last hidden states of a row, alone and in a batch."""

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, T5Config, T5Model

from pytest_batchinv import BatchVarianceError, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.mutants import models
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.transformers import TransformersSubject

BATCH = BatchShape((Row(0, 5), Row(1, 1), Row(2, 33, "extreme"), Row(3, 17), Row(4, 8, "repeated")))
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 499}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=514)),
    "t5": lambda: T5Model(T5Config(vocab_size=499, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        folders[name] = str(tmp_path_factory.mktemp(name))
        make().eval().save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_of_the_hidden_states_differs_in_a_batch(saved, name, dtype):
    subject = TransformersSubject(saved[name], device="cpu", dtype=dtype, hidden=True)
    assert "right" in subject.space.layouts
    with batch_invariant_mode():
        records = check_batch_invariant(subject, ("R", "S", "I"), case=BATCH)
        records += check_batch_invariant(subject, ("L",), case=BatchShape(BATCH.rows, "right", 13))
    assert {record.verdict for record in records} == {"equal"}
    assert subject.run(BATCH)[2]["hidden states"].shape == (33, 64)


def test_hidden_states_are_those_of_the_model(saved):
    subject = TransformersSubject(saved["bert"], device="cpu", dtype="fp32", hidden=True)
    seen = []
    handle = subject.model.register_forward_pre_hook(lambda _, args, words: seen.append(words["input_ids"]), with_kwargs=True)
    (row,) = subject.run(BatchShape((Row(2, 9),)))
    handle.remove()
    with torch.no_grad():
        expected = subject.model(input_ids=seen[0]).last_hidden_state[0]
    torch.testing.assert_close(row["hidden states"], expected, rtol=0, atol=1e-5)


def test_a_fault_that_follows_the_batch_is_caught(saved):
    subject = TransformersSubject(saved["bert"], device="cpu", dtype="fp32", hidden=True)
    with batch_invariant_mode(), models.planted(subject.model, models.follows_the_batch_size):
        with pytest.raises(BatchVarianceError, match="relation I"):
            check_batch_invariant(subject, ("I",), case=BATCH)


def test_what_hidden_states_have_not_is_not_asked_and_presets_are_refused(saved):
    subject = TransformersSubject(saved["t5"], device="cpu", dtype="fp32", hidden=True)
    records = check_batch_invariant(subject, ("C", "D", "G"))
    assert [record.verdict for record in records] == ["not_run"] * 3
    with pytest.raises(ValueError, match="the presets are causal language models, and 'tiny-llama' is one"):
        TransformersSubject("tiny-llama", device="cpu", dtype="fp32", hidden=True)
