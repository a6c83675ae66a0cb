"""Mixture of experts: a token's bits follow from the token alone, whatever its order, its neighbours and the experts' load."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.compare import first_difference
from pytest_batchinv.kernels.aten import reductions
from pytest_batchinv.mode import stock_torch

HIDDEN, EXPERTS, TOP_K = 48, 8, 3
IMPLEMENTATIONS = {"eager": "aten::index_add_", "batched_mm": "aten::bmm", "grouped_mm": "aten::_grouped_mm"}
DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

seeds = st.integers(0, 2**20)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(params=DEVICES, scope="module")
def device(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def mode():
    with batch_invariant_mode() as mode, torch.no_grad():
        yield mode


def randn(*shape, seed, dtype, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def block(implementation, dtype, device, ties=False, expert_parallel=False):
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=24,
        experts_implementation=implementation,
    )  # fmt: skip
    made = Qwen3MoeSparseMoeBlock(config).eval()
    for i, parameter in enumerate(made.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=i, dtype=dtype, device="cpu") / 4)
    if ties:  # three pairs of experts and one triple have equal logits, for any token
        made.gate.weight.copy_(made.gate.weight[[0, 0, 1, 1, 2, 2, 0, 3]])
    made.experts._is_expert_parallel = expert_parallel
    return made.to(device, dtype)


def run(moe, tokens):
    return moe(tokens[None])[0]


def opposites(x, dim, first, second):
    """Two huge values that cancel: what is added between them is lost, so the result tells the order of the sum."""
    huge = 2.0**14 if x.dtype == torch.float16 else 2.0**62
    x.select(dim, first).fill_(huge)
    x.select(dim, second).fill_(-huge)


def same(actual, expected):
    assert first_difference(expected, actual) is None


# --- the block of a real model, by each way to compute the experts -------------------------------------------------------


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [*itertools.product(IMPLEMENTATIONS, DTYPES), ("eager", torch.float64), ("batched_mm", torch.float64)],
)
@examples(12)
@given(n=st.integers(1, 40), ties=st.booleans(), seed=seeds)
def test_a_token_has_the_same_bits_alone_in_any_order_and_with_any_neighbours(implementation, dtype, device, n, ties, seed):
    moe = block(implementation, dtype, device, ties)
    tokens = randn(n, HIDDEN, seed=seed, dtype=dtype, device=device)
    whole = run(moe, tokens)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    same(run(moe, tokens[order]), whole[order])
    for i in {0, n // 2, n - 1}:
        same(run(moe, tokens[i : i + 1].clone()), whole[i : i + 1])
    others = randn(n, HIDDEN, seed=seed + 1, dtype=dtype, device=device)
    others[n // 2] = tokens[n // 2]
    same(run(moe, others)[n // 2], whole[n // 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_and_crowded_experts_change_nothing(implementation, dtype, device):
    """One token's copies leave five experts empty and crowd three."""
    moe = block(implementation, dtype, device)
    tokens = randn(64, HIDDEN, seed=1, dtype=dtype, device=device)
    mixed, crowd = run(moe, tokens), run(moe, tokens[:1].expand(64, HIDDEN))
    for row in (0, 31, 63):
        same(crowd[row], mixed[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_of_nans_leaves_the_others_alone(implementation, device):
    moe = block(implementation, torch.float32, device)
    clean = randn(20, HIDDEN, seed=2, dtype=torch.float32, device=device)
    dirty = clean.clone()
    dirty[7] = torch.nan
    others = torch.arange(20) != 7
    same(run(moe, dirty)[others], run(moe, clean)[others])
    assert run(moe, dirty)[7].isnan().all()


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_tokens_of_other_ranks_experts_add_nothing(implementation, device):
    """Expert parallelism marks what another rank computes by an index behind the last expert, with a weight of 0."""
    moe = block(implementation, torch.float32, device, expert_parallel=True)
    tokens = randn(9, HIDDEN, seed=3, dtype=torch.float32, device=device)
    index = torch.randint(EXPERTS + 1, (9, TOP_K), generator=torch.Generator().manual_seed(0)).to(device)
    weights = torch.rand(9, TOP_K, generator=torch.Generator().manual_seed(1)).to(device).masked_fill(index == EXPERTS, 0)
    assert (index == EXPERTS).any()
    whole = moe.experts(tokens, index, weights)
    assert whole.isfinite().all()
    for i in range(9):
        same(moe.experts(tokens[i : i + 1], index[i : i + 1], weights[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize(("implementation", "overload"), IMPLEMENTATIONS.items())
def test_each_way_goes_through_the_table(mode, implementation, overload, device):
    before = mode.hits.get(overload, 0)
    run(block(implementation, torch.bfloat16, device), randn(5, HIDDEN, seed=0, dtype=torch.bfloat16, device=device))
    assert mode.hits.get(overload, 0) > before


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ways_give_stock_torchs_values(dtype, device):
    tokens = randn(30, HIDDEN, seed=4, dtype=dtype, device=device)
    with stock_torch():
        expected = run(block("eager", dtype, device), tokens)
    for implementation in IMPLEMENTATIONS:
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(run(block(implementation, dtype, device), tokens), expected, rtol=tolerance, atol=tolerance)


def test_stock_torch_is_caught_by_the_same_search():
    """Without the mode the bits of at least one way do follow the batch on a CPU, so the tests above can fail."""
    tokens = randn(40, HIDDEN, seed=5, dtype=torch.float32, device="cpu")
    with stock_torch():
        varies = [
            first_difference(run(moe, tokens), torch.cat([run(moe, token[None]) for token in tokens])) is not None
            for moe in (block(implementation, torch.float32, "cpu") for implementation in IMPLEMENTATIONS)
        ]
    assert any(varies)


# --- the router ----------------------------------------------------------------------------------------------------------


@st.composite
def scores(draw):
    """Rows with many ties, NaNs, infinities and zeros of both signs."""
    most = reductions._SORTED_UP_TO
    rows, n = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 8, 128, most, most + 1, 3000]))
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randint(-4, 5, (rows, n), generator=generator).double() / 2
    x *= torch.where(torch.rand(rows, n, generator=generator) < 0.5, 1.0, -1.0).double()  # -0.0
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40, 6e4, -6e4], dtype=torch.float64)
    places = torch.rand(rows, n, generator=generator) < draw(st.sampled_from([0.0, 0.05, 0.9]))
    x[places] = special[torch.randint(8, (int(places.sum()),), generator=generator)]
    return x.to(draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])))


@examples(80)
@given(x=scores(), largest=st.booleans(), data=st.data())
def test_topk_is_the_head_of_a_stable_sort(device, x, largest, data):
    x = x.to(device)
    k = data.draw(st.integers(0, x.shape[1]))
    # On the CPU: CUDA's sort puts a NaN with the sign bit set in front of -inf.
    indices = torch.sort(x.cpu(), dim=1, descending=largest, stable=True).indices.to(device)
    actual = torch.topk(x, k, 1, largest)
    assert torch.equal(actual.indices, indices[:, :k])
    assert torch.equal(actual.values.nan_to_num(nan=7.0), x.gather(1, actual.indices).nan_to_num(nan=7.0))
    across = torch.topk(x.t(), k, 0, largest)
    assert torch.equal(across.indices.t(), indices[:, :k])


@examples(30)
@given(n=st.sampled_from([8, 128, 3000]), rows=st.integers(1, 20), k=st.integers(1, 8), seed=seeds)
def test_ties_go_to_the_lower_expert_for_any_number_of_tokens(device, n, rows, k, seed):
    x = torch.randint(3, (rows, n), generator=torch.Generator().manual_seed(seed)).float().to(device)
    whole = torch.topk(x, k)
    for i in range(rows):
        row = x[i].tolist()
        best = [column for _, column in sorted((-value, column) for column, value in enumerate(row))][:k]
        assert whole.indices[i].tolist() == best == torch.topk(x[i], k).indices.tolist()


# --- the grouped product, and the sum over a token's experts -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@examples(20)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), K=st.sampled_from([8, 64, 136]), seed=seeds)
def test_a_groups_number_of_rows_changes_no_bit(dtype, device, counts, K, seed):
    weights = randn(len(counts), K, 24, seed=seed, dtype=dtype, device=device)
    rows = randn(sum(counts), K, seed=seed + 1, dtype=dtype, device=device)
    weights[:, [1, K // 2]] = 1.0
    opposites(rows, 1, 1, K // 2)
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    out = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    group_of = [group for group, count in enumerate(counts) for _ in range(count)]
    for i in {0, len(group_of) // 2, len(group_of) - 1} if group_of else ():
        alone = torch.tensor([int(g >= group_of[i]) for g in range(len(counts))], dtype=torch.int32, device=device)
        same(torch.nn.functional.grouped_mm(rows[i : i + 1], weights, offs=alone), out[i : i + 1])
        same(rows[i : i + 1] @ weights[group_of[i]], out[i : i + 1])
        same(torch.bmm(rows[i : i + 1, None], weights[group_of[i]][None])[0], out[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_columns_have_the_bits_of_their_own_products(dtype, device):
    a, b = randn(3, 5, 16, seed=0, dtype=dtype, device=device), randn(16, 24, seed=1, dtype=dtype, device=device)
    out = torch.nn.functional.grouped_mm(a, b, offs=torch.tensor([8, 8, 24], dtype=torch.int32, device=device))
    same(out[:, :8].contiguous(), a[0] @ b[:, :8])
    same(out[:, 8:].contiguous(), a[2] @ b[:, 8:])


@pytest.mark.parametrize("dtype", DTYPES)
@examples(15)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=seeds)
def test_groups_of_the_summed_dimension_follow_their_own_rows_wherever_they_begin(dtype, device, counts, seed):
    a, b = (randn(sum(counts) + 3, n, seed=seed + n, dtype=dtype, device=device) for n in (16, 24))
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    out = torch.nn.functional.grouped_mm(a.t(), b, offs=ends)
    start = 0
    for group, end in enumerate(ends.tolist()):
        same(a[start:end].t() @ b[start:end], out[group])
        start = end


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_token_is_its_own_and_those_of_experts_follow_the_order_of_the_tokens(implementation, dtype, device):
    moe = block(implementation, dtype, device)
    tokens = randn(23, HIDDEN, seed=1, dtype=dtype, device=device)

    def gradients(x):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            out = run(moe, x)
            return torch.autograd.grad(out, [x, *moe.parameters()], out.detach().cos())

    of_tokens, *of_weights = gradients(tokens)
    for i in (0, 11, 22):
        same(gradients(tokens[i : i + 1])[0], of_tokens[i : i + 1])
    again = gradients(tokens)[1:]
    for one, other in zip(of_weights, again, strict=True):
        same(one, other)
    assert all(g.abs().sum() > 0 for g in of_weights)
    with stock_torch():
        for mine, stock in zip((of_tokens, *of_weights), gradients(tokens), strict=True):
            scale = float(stock.double().abs().max())
            torch.testing.assert_close(mine, stock, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 4e-2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_train(implementation, device):
    moe = block(implementation, torch.float32, device).train()
    tokens, wanted = (randn(40, HIDDEN, seed=i, dtype=torch.float32, device=device) for i in (1, 2))
    optimizer = torch.optim.AdamW(moe.parameters(), lr=3e-3, foreach=True)
    losses = []
    with torch.enable_grad():
        for _ in range(30):
            loss = (run(moe, tokens) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moe.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@examples(15)
@given(n=st.integers(1, 60), k=st.integers(1, 8), seed=seeds)
def test_the_sum_over_a_tokens_experts_is_its_own(dtype, device, n, k, seed):
    parts = randn(n, k, HIDDEN, seed=seed, dtype=dtype, device=device)
    if k > 2:
        opposites(parts, 1, 0, k - 2)
    whole = parts.sum(dim=1)
    same(parts[n // 2 :].sum(dim=1), whole[n // 2 :])
    token = torch.arange(n, device=device).repeat_interleave(k)
    added = torch.zeros(n, HIDDEN, dtype=dtype, device=device).index_add_(0, token, parts.flatten(0, 1))
    alone = torch.zeros(1, HIDDEN, dtype=dtype, device=device).index_add_(0, token[:k] * 0, parts[n // 2])
    same(added[n // 2], alone[0])
