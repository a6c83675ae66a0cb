"""Tokens drawn with a seed for each row: in eager and in compiled code, in the mode and outside it."""

import pytest
import torch

from pytest_batchinv import assert_batch_invariant, batch_invariant_mode
from pytest_batchinv.sampling import multinomial, sample

LOGITS, SEEDS = torch.randn(19, 300, generator=torch.Generator().manual_seed(0)), torch.arange(19) * 3


def drawn(logits, seeds):
    return sample(logits * 1.5, seeds, 7, temperature=0.8, top_k=40, top_p=0.9)


def drawn_of_weights(logits, seeds):
    return multinomial((logits * 1.5).abs(), seeds, torch.full_like(seeds, 7))


@pytest.mark.parametrize("function", [drawn, drawn_of_weights])
def test_a_token_is_the_same_in_eager_and_compiled_code_and_outside_the_mode(function):
    outside = function(LOGITS, SEEDS)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    with batch_invariant_mode() as mode:
        inside, of_compiled = function(LOGITS, SEEDS), compiled(LOGITS, SEEDS)
        assert mode.hits.get("batchinv::sample", 0) + mode.hits.get("batchinv::multinomial", 0) == 2
        assert torch.equal(compiled(LOGITS[:3], SEEDS[:3]), of_compiled[:3])
    assert torch.equal(outside, inside) and torch.equal(inside, of_compiled)


def test_drawing_holds_every_relation_of_a_function():
    with batch_invariant_mode():
        record = assert_batch_invariant(drawn, LOGITS, SEEDS, relations=("R", "S", "I"), max_examples=5)
    assert record.verdict == "equal" and record.ops.unverified == ()


def test_draws_of_torchs_own_generator_are_named():
    def drawn_by_torch(logits):
        torch.manual_seed(0)
        return logits.softmax(-1).multinomial(1)

    with batch_invariant_mode():
        record = assert_batch_invariant(drawn_by_torch, LOGITS, relations=("R",), max_examples=1)
    assert record.ops.unverified == ("aten::multinomial",)
