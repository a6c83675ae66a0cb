"""Functions of ragged rows: whatever the rows are, ``collate`` makes a batch of them, and each row is compared with itself."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pytest_batchinv import BatchVarianceError, assert_batch_invariant, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.mutants.rows import one_ulp_up
from pytest_batchinv.shapes import of_rows
from pytest_batchinv.subjects.rows import RowsSubject
from pytest_batchinv.subjects.transformers.weights import build_preset

LENGTHS = (3, 5, 3, 8, 1, 5)
WORDS = "a bb ccc dddd a ccc bb a dddd bb ccc a".split()
TEXTS = [" ".join(WORDS[i : i + length]) for i, length in enumerate(LENGTHS)]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """As a tokenizer does: the names are those of the function's arguments."""
    width = max(map(len, rows))
    return {
        "ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


KINDS = {
    "strings": (TEXTS, lambda texts: padded([[len(word) for word in text.split()] for text in texts])),
    "lists": ([list(range(1, length + 1)) for length in LENGTHS], padded),
    "dicts": ([{"ids": list(range(length))} for length in LENGTHS], lambda rows: padded([row["ids"] for row in rows])),
    "arrays": ([np.arange(length) for length in LENGTHS], lambda rows: padded([row.tolist() for row in rows])),
}


def halves(ids: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[seen.bool()] * 0.5 for row, seen in zip(ids, mask, strict=True)]


def halves_by_width(ids: Tensor, mask: Tensor) -> list[Tensor]:
    return [one_ulp_up(row) if ids.shape[1] >= 8 else row for row in halves(ids, mask)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_collated_and_compared_row_by_row(kind):
    rows, collate = KINDS[kind]
    for relation in ("R", "S", "I"):
        record = assert_batch_invariant(halves, rows, collate=collate, relations=(relation,), max_examples=10)
        assert record.verdict == "equal"
        assert record.compared_something
    with pytest.raises(BatchVarianceError, match="relation I") as caught:
        assert_batch_invariant(halves_by_width, rows, collate=collate, max_examples=10)
    assert 3 in {row.id for row in caught.value.shape.rows}  # the one of 8 tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_pool_is_named_by_its_content_of_whatever_kind(kind):
    rows, collate = KINDS[kind]
    digests = {RowsSubject(halves, [pool], collate=collate).digest() for pool in (rows, list(rows), rows[::-1], rows[:-1])}
    assert len(digests) == 3


def test_neighbours_are_replaced_by_rows_of_as_many_tokens_and_not_of_as_many_characters():
    """Else another width would be taken for a leak: rounding may follow it."""
    texts = ["a a a", "ccc a", "bb bb", "dddd"]
    assert {len(text) for text in texts} == {5, 4}
    subject = RowsSubject(halves_by_width, [texts], collate=KINDS["strings"][1])
    assert subject.space.alike[1] == subject.space.alike[2] != subject.space.alike[0]
    assert subject.space.pool == (3, 2, 2, 1)
    (record,) = check_batch_invariant(subject, ("S",), max_examples=10)
    assert record.verdict == "equal"


def test_several_ragged_inputs_are_alike_where_all_of_them_are():
    one, other = [torch.ones(2), torch.ones(2)], [torch.ones(3), torch.ones(4)]

    def collate(a, b):
        return torch.nn.utils.rnn.pad_sequence(a, batch_first=True), torch.nn.utils.rnn.pad_sequence(b, batch_first=True)

    subject = RowsSubject(lambda a, b: [x[:2] for x in a], [one, other], collate=collate)
    (record,) = check_batch_invariant(subject, ("S",))
    assert "no two rows of the pool have the same shapes" in record.error


def test_a_tokenizer_and_a_model_in_the_mode():
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "a", "bb", "ccc", "dddd"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    model = build_preset("tiny-llama", "cpu", torch.float32)

    @torch.no_grad()
    def logits(input_ids, attention_mask, token_type_ids=None):
        out = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return [row[seen.bool()] for row, seen in zip(out, attention_mask, strict=True)]

    with batch_invariant_mode():
        record = assert_batch_invariant(
            logits,
            TEXTS,
            collate=lambda texts: fast(texts, padding=True, return_tensors="pt"),
            relations=("I",),
            case=of_rows([0, 3, 1, 4, 3, 2, 5]),
        )
    assert (record.verdict, record.mode) == ("equal", "on")


def test_rows_that_are_no_tensors_have_no_gradients_and_the_record_says_so():
    rows, collate = KINDS["lists"]
    record = assert_batch_invariant(halves, rows, collate=collate, relations=("G",))
    assert record.verdict == "not_run"
    assert "no gradient of a row" in record.error
