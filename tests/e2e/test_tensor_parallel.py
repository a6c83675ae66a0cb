"""The same bits on any number of ranks: row-parallel products, the setting of a model, and relation T on real models."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pytest_batchinv import (
    BatchShape,
    batch_invariant_mode,
    check_batch_invariant,
    check_negative_control,
    context,
)
from pytest_batchinv.kernels import operators
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.mode import ModeError, stock_torch
from pytest_batchinv.ranks import RankError, Start, World
from pytest_batchinv.subjects.base import NoRanks
from pytest_batchinv.subjects.ranks import OverRanks
from pytest_batchinv.subjects.transformers import TransformersSubject
from pytest_batchinv.tensor_parallel import rank_invariant

SUPPORT = Path(__file__).parents[1] / "support" / "ranks_of_models.py"
sys.path.insert(0, str(SUPPORT.parent))
from ranks_of_models import PLAN, bits, mlp, rows  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def randn(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the product -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 9),
    n=st.integers(1, 20),
    size=st.integers(1, 9),
    leaves=st.sampled_from([1, 2, 4, 8]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_the_branches_of_any_number_of_ranks_add_up_to_the_same_bits(m, n, size, leaves, dtype, seed):
    """Each rank computes the branch of its leaves, as a layer does; a view is as good as a copy."""
    operators.operators()
    ops = torch.ops.batchinv
    x, weight = randn(m, leaves * size, seed=seed, dtype=dtype), randn(n, leaves * size, seed=seed + 1, dtype=dtype)
    whole = ops.row_parallel(x, weight, leaves)
    assert whole.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for ranks in (n for n in (2, 4, 8) if n <= leaves):
        parts = zip(x.chunk(ranks, 1), weight.chunk(ranks, 1), strict=True)
        branches = [ops.row_parallel(a, b.clone() if ranks == 2 else b, leaves // ranks) for a, b in parts]
        assert bits(ops.tree_sum(torch.stack(branches))) == bits(whole), ranks
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-4)
    for row in range(m):  # and a row alone is the row of the batch
        assert bits(ops.row_parallel(x[row : row + 1], weight, leaves)[0]) == bits(whole[row])


def test_operands_that_do_not_fit_are_refused_in_a_sentence():
    operators.operators()
    x, weight = torch.ones(2, 12), torch.ones(3, 12)
    with pytest.raises(Refused, match="K of 12 cannot be cut into 8 equal leaves"):
        torch.ops.batchinv.row_parallel(x, weight, 8)
    for other in (weight.double(), weight[:, :8]):
        with pytest.raises(RuntimeError, match="one float dtype, one device and one K, but got 2x12"):
            torch.ops.batchinv.row_parallel(x, other, 4)


def test_nan_in_one_leaf_reaches_its_row_alone():
    operators.operators()
    x = torch.ones(3, 16)
    x[1, 9] = float("nan")
    assert torch.ops.batchinv.row_parallel(x, torch.ones(4, 16), 8).isnan().any(1).tolist() == [False, True, False]


# --- the setting -------------------------------------------------------------------------------------------------------


def test_the_setting_is_for_the_mode_and_leaves_the_model_as_it_was():
    model, x = mlp(torch.float32), rows(torch.float32)
    with pytest.raises(ModeError, match="enter batch_invariant_mode"), rank_invariant(model, plan=PLAN):
        pass
    stock = model(x)
    with batch_invariant_mode():
        plain = model(x)
        with rank_invariant(model, plan=PLAN) as names:
            tree = model(x)
            with stock_torch():
                assert bits(model(x)) == bits(stock)
        assert names == ["down"]
        assert bits(model(x)) == bits(plain)
    assert "forward" not in vars(model.down)
    assert bits(tree) != bits(plain), "the setting changes nothing, so that this test shows nothing"
    torch.testing.assert_close(tree, plain)


@pytest.mark.parametrize(
    ("model", "words", "sentence"),
    [
        (mlp(torch.float32), {"plan": PLAN, "leaves": 6}, "6 leaves are no power of two"),
        (nn.Sequential(nn.Linear(12, 3)), {"plan": {"0": "rowwise"}}, "K of 0 is 12, which cannot be cut into 8"),
        (mlp(torch.float32), {"plan": {"down": "packed_rowwise"}}, r"down.* 'packed_rowwise'"),
        (mlp(torch.float32), {"plan": {"act": "all_reduce"}}, r"act \(GELU\) has the style 'all_reduce', whose sum"),
        (mlp(torch.float32), {"plan": {"down.weight": "rowwise", "up": "moe_tp_experts"}}, "up .Linear. has no down_proj"),
    ],
)
def test_what_has_no_tree_is_refused_by_name(model, words, sentence):
    with batch_invariant_mode(), pytest.raises(Refused, match=sentence), rank_invariant(model, **words):
        pass
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_model_without_a_row_parallel_layer_is_an_error():
    with batch_invariant_mode(), pytest.raises(ValueError, match="Sequential has no row-parallel layer"):
        with rank_invariant(mlp(torch.float32)):
            pass


def test_torchs_own_styles_have_the_bits_of_one_rank_with_a_bias():
    world = World(2, Start(f"{SUPPORT}:torchs_own_styles"))
    try:
        for dtype in (torch.float32, torch.bfloat16):
            with batch_invariant_mode(), rank_invariant(mlp(dtype), plan=PLAN), torch.no_grad():
                pass
            model = mlp(dtype)
            with batch_invariant_mode(), torch.no_grad(), rank_invariant(model, plan=PLAN):
                one = bits(model(rows(dtype)))
            for layout in ("local", "dtensor"):
                for names, before, out, after in world.ask((str(dtype).removeprefix("torch."), layout)):
                    assert (names, out) == (["down"], one)
                    assert before == after  # what the setting replaced is back
    finally:
        world.close()


def test_gradients_flow_through_a_row_parallel_layer():
    world = World(2, Start(f"{SUPPORT}:gradients"))
    try:
        answers = world.ask(None)
    finally:
        world.close()
    model, x = mlp(torch.float32), rows(torch.float32).requires_grad_()
    model(x).square().sum().backward()
    for of_x, of_weight in answers:
        torch.testing.assert_close(torch.tensor(of_x), x.grad)
        torch.testing.assert_close(torch.tensor(of_weight), model.down.weight.grad)


# --- the relation ------------------------------------------------------------------------------------------------------


def subject(name, dtype="fp32"):
    return TransformersSubject(name, device="cpu", dtype=dtype)


def checked(model, numbers, examples=20):
    with context.surrounding(replace(context.current(), ranks=numbers)), batch_invariant_mode():
        (record,) = check_batch_invariant(model, ("T",), max_examples=examples)
        return record, check_negative_control(model, "T") if record.verdict == "equal" else None


def test_experts_in_16_bits_have_the_bits_of_one_rank_and_stock_torch_is_caught():
    """Built in the mode, as a test of the plugin builds it: what a model computes then must be the same in each process."""
    with batch_invariant_mode():
        model = subject("tiny-qwen3-moe-8-heads", "bf16")
    record, control = checked(model, (1, 2))
    assert (record.verdict, control.verdict) == ("equal", "caught")
    assert record.ops.unverified == record.ops.bypassed == ()
    assert record.hits["batchinv::grouped_product"] > 0
    assert record.notes[-1] == "tiny-qwen3-moe-8-heads: on 1, 2 ranks, 8 leaves"
    assert control.finding.sides == ("on 1 rank", "on rank 0 of 2")


@pytest.mark.parametrize(
    ("name", "numbers", "sentence"),
    [
        ("tiny-qwen3", (1, 4), "4 ranks cannot share the 2 key value heads of tiny-qwen3 evenly"),
        ("tiny-gpt2", (1, 2), "tiny-gpt2 has no tp_plan"),
    ],
)
def test_ranks_that_cannot_be_are_not_run_and_say_why(name, numbers, sentence):
    record, _ = checked(subject(name), numbers)
    assert record.verdict == "not_run"
    assert sentence in record.error


def test_ranks_that_do_not_divide_the_leaves_are_refused():
    model = subject("tiny-qwen3-8-heads")
    whole = OverRanks(model, (1, 2), leaves=1)
    with batch_invariant_mode(), pytest.raises(Refused, match="2 ranks do not divide 1 leaves"):
        whole.on(2)[0].run(BatchShape(model.space.palette[:1]))
    with pytest.raises(NoRanks, match="a loaded model, which other processes cannot load"):
        TransformersSubject(model.model).over_ranks((1, 2))


def test_a_rank_that_is_killed_is_an_error_with_a_sentence_and_the_next_run_starts_anew(monkeypatch):
    model = subject("tiny-qwen3")
    whole, case = model.over_ranks((1, 2)), BatchShape(model.space.palette[:2])
    with batch_invariant_mode():
        before = whole.on(2)[0].run(case)
        import os
        import signal

        os.kill(whole.world(2).processes[2], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 of 2 was ended by SIGKILL"):
            whole.on(2)[0].run(case)
        assert torch.equal(whole.on(2)[0].run(case)[1]["logprobs"], before[1]["logprobs"])
