"""Tokens drawn with a seed for each row, by the kernels of the CPU and, under Triton's interpreter, by those of CUDA."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv.kernels import cuda, sampling
from pytest_batchinv.sampling import multinomial, sample

CHILD_ENVIRONMENT = {"TRITON_INTERPRET": "1"}

few = settings(deadline=None, derandomize=True, max_examples=25)
seeds_of_rows = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9)


@pytest.fixture
def kernels_of_cuda(monkeypatch):
    monkeypatch.setattr(sampling, "kernels_of_device", lambda device: cuda)


def philox(key, counter):
    """Philox4x32-10 of Python's integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        x, y = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = y >> 32 ^ c1 ^ k0, y & 0xFFFFFFFF, x >> 32 ^ c3 ^ k1, x & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def uniform(seed, position):
    words = philox([seed % 2**32, (seed >> 32) % 2**32], [position % 2**32, (position >> 32) % 2**32, 0, 0])
    return ((words[0] << 20) + (words[1] >> 12)) / 2**52


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # of Random123, by the authors of Philox: key, counter, words
    ([0, 0], [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES, ONES], [ONES] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0xA4093822, 0x299F31D0],
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("key, counter, words", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(key, counter, words):
    got = sampling.philox(*([torch.tensor(word) for word in given] for given in (key, counter)))
    assert [int(word) for word in got] == words == philox(key, counter)


@few
@given(seeds_of_rows, st.integers(-(2**63), 2**63 - 1))
def test_a_rows_number_is_that_of_its_seed_and_position_alone(seeds, position):
    got = sampling.uniform(torch.tensor(seeds), torch.full((len(seeds),), position))
    assert got.tolist() == [uniform(seed, position) for seed in seeds]
    assert bool(((got >= 0) & (got < 1)).all())


@few
@given(st.data())
def test_the_token_is_the_first_whose_running_sum_is_above_the_number(data):
    """On a CPU: one chain, ascending, in float64; which is Python's own."""
    weight = st.sampled_from([0.0, 1e-300, 0.1, 1.0, 3.0, 1e8])
    rows = data.draw(st.lists(st.lists(weight, min_size=7, max_size=7).filter(any), min_size=1, max_size=5))
    seeds = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=len(rows), max_size=len(rows)))
    tokens = multinomial(torch.tensor(rows, dtype=torch.float64), torch.tensor(seeds), 5).tolist()
    for row, seed, token in zip(rows, seeds, tokens, strict=True):
        sums = list(itertools.accumulate(row))
        assert token == next(i for i, total in enumerate(sums) if total > uniform(seed, 5) * sums[-1])
        assert row[token] > 0


OPTIONS = [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.5, "temperature": 1.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_a_row_draws_the_same_token_alone_and_in_any_batch(dtype, options):
    check_every_batch(17, 1000, dtype, options)


def test_a_row_draws_the_same_token_in_any_batch_on_a_gpu(kernels_of_cuda):
    check_every_batch(5, 40, torch.float32, OPTIONS[-1])


def check_every_batch(n_rows, n_cols, dtype, options):
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(n_rows, n_cols, generator=generator)).to(dtype)
    seeds, positions = torch.arange(n_rows) * 7919 - 50, torch.arange(n_rows) % 4
    alone = torch.cat([sample(logits[[i]], seeds[[i]], positions[[i]], **options) for i in range(n_rows)])
    assert len(set(alone.tolist())) > 3
    for batch in (torch.arange(n_rows).flip(0), torch.tensor([2, 2, 4])):
        assert torch.equal(sample(logits[batch], seeds[batch], positions[batch], **options), alone[batch])
        strided = logits[batch].t().contiguous().t()
        assert torch.equal(sample(strided, seeds[batch], positions[batch], **options), alone[batch])


def chi_square(tokens, probabilities):
    """The statistic, and the number of columns that can be drawn. No other column was."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    can_be = probabilities > 0
    assert not counts[~can_be].any()
    expected = len(tokens) * probabilities[can_be] / probabilities.sum()
    return float(((counts[can_be] - expected) ** 2 / expected).sum()), int(can_be.sum())


def test_the_tokens_have_the_distribution():
    """4000 rows. The statistic of chi square is below that which it is above once in 1000 times."""
    p = torch.tensor([0.05, 0.0, 0.3, 0.25, 0.25, 0.1, 0.05], dtype=torch.float64)
    rows, seeds, positions = p.expand(4000, 7), torch.arange(4000) // 40, torch.arange(4000) % 40
    kept = {
        "all": (multinomial(3 * rows, seeds, positions), p),
        "top_k": (sample(rows.log(), seeds, positions, top_k=2), torch.tensor([0, 0, 0.3, 0.25, 0, 0, 0])),
        "top_p": (sample(rows.log(), seeds, positions, top_p=0.7), torch.tensor([0, 0, 0.3, 0.25, 0.25, 0, 0])),
        "both": (sample(rows.log(), seeds, positions, top_k=3, top_p=0.6), torch.tensor([0, 0, 0.3, 0.25, 0, 0, 0])),
        "temperature": (sample(rows.log(), seeds, positions, temperature=0.5), p**2),
    }
    quantiles = {1: 10.83, 2: 13.82, 5: 20.52}  # of chi square at 0.999, by its degrees of freedom
    for name, (tokens, probabilities) in kept.items():
        statistic, n_columns = chi_square(tokens, probabilities)
        assert statistic < quantiles[n_columns - 1], name


def test_of_equal_logits_the_lower_index_is_kept():
    seeds = torch.arange(64)
    equal, two = torch.zeros(64, 9), torch.tensor([1.0, 0, 1, 0, 1]).repeat(64, 1)
    assert set(sample(equal, seeds, top_k=3).tolist()) == {0, 1, 2}
    assert set(sample(equal, seeds, top_p=0.4).tolist()) == {0, 1, 2, 3}  # the sum before column 3 is 3 / 9
    assert set(sample(two, seeds, top_k=2).tolist()) == {0, 2}
    assert set(sample(two, seeds, top_k=99).tolist()) == {0, 1, 2, 3, 4}


def test_one_token_is_always_kept():
    check_one_token()


def test_one_token_is_always_kept_on_a_gpu(kernels_of_cuda):
    check_one_token()


def check_one_token():
    logits = torch.tensor([[0.0, 5.0, -math.inf], [-math.inf, -math.inf, 1.0]])
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}):
        assert sample(logits, torch.tensor([1, 2]), **options).tolist() == [1, 2]
    assert multinomial(torch.tensor([[0.0, 5e-324, 0.0]], dtype=torch.float64), torch.tensor([3])).tolist() == [1]
    assert multinomial(torch.rand(0, 5), torch.arange(0)).tolist() == []


@pytest.mark.parametrize("sums", [[1.0, 1.9, 2.0, 2.0], [1.0, 1.0, 1.2, 2.0]])
def test_a_column_of_zero_is_not_drawn_where_rounding_moved_the_running_sum(monkeypatch, sums):
    """As a tree of sums may: column 1 of the first, the last of the second."""
    of_these = SimpleNamespace(row_cumsum=lambda x, dtype: torch.tensor([sums] * len(x), dtype=dtype))
    monkeypatch.setattr(sampling, "kernels_of_device", lambda device: of_these)
    assert set(multinomial(torch.tensor([1.0, 0, 1, 0]).repeat(64, 1), torch.arange(64)).tolist()) == {0, 2}


SEED = torch.arange(2)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: multinomial(torch.tensor([[0.5, -0.1], [1, 1]]), SEED), "one is negative or NaN"),
        (lambda: multinomial(torch.tensor([[0.5, math.nan], [1, 1]]), SEED), "one is negative or NaN"),
        (lambda: multinomial(torch.tensor([[0.5, math.inf], [1, 1]]), SEED), "a sum that is 0 or infinite"),
        (lambda: multinomial(torch.tensor([[0.0, 0.0], [1, 1]]), SEED), "a sum that is 0 or infinite"),
        (lambda: multinomial(torch.rand(2, 3), torch.arange(3)), "one seed of int64 for each of 2 rows, but got 3 of"),
        (lambda: multinomial(torch.rand(2, 3), SEED.int()), "one seed of int64 for each of 2 rows, but got 2 of torch.int32"),
        (lambda: multinomial(torch.rand(2, 3), SEED, torch.arange(1)), "one position of int64 for each of 2 rows"),
        (lambda: sampling.multinomial(torch.rand(2, 3), SEED.to("meta"), SEED), "each seed on cpu, but got them on meta"),
        (lambda: multinomial(torch.rand(3), SEED), r"expected \[rows, tokens\], but got 3"),
        (lambda: multinomial(torch.ones(2, 3, dtype=torch.int64), SEED), "but got torch.int64"),
        (lambda: multinomial(torch.rand(2, 0), SEED), "rows without a column"),
        (lambda: sample(torch.tensor([[0.5, math.nan], [1, 1]]), SEED), "one is NaN or"),
        (lambda: sample(torch.tensor([[0.5, math.inf], [1, 1]]), SEED), "one is NaN or"),
        (lambda: sample(torch.full((2, 3), -math.inf), SEED), "all -inf"),
        (lambda: sample(torch.rand(2, 3), SEED, temperature=0), "a temperature is above 0 and finite, not 0"),
        (lambda: sample(torch.rand(2, 3), SEED, temperature=math.nan), "not nan"),
        (lambda: sample(torch.rand(2, 3), SEED, top_k=0), "top_k is 1 or more, not 0"),
        (lambda: sample(torch.rand(2, 3), SEED, top_p=1.5), "top_p is above 0 and at most 1, not 1.5"),
        (lambda: sample(torch.rand(2, 3), SEED, top_p=0.0), "top_p is above 0 and at most 1, not 0.0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=f"^sampling: .*{sentence}"):
        call()
