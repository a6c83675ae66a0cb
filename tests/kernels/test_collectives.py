"""Sums over ranks have one order, a fixed tree over the ranks' indices, in every call that adds over ranks, on gloo."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.kernels import collectives, cpu, reference
from pytest_batchinv.ranks import RankError, Start, World

SUPPORT = Path(__file__).parents[1] / "support" / "ranks_of_collectives.py"
sys.path.insert(0, str(SUPPORT.parent))
from ranks_of_collectives import DTYPES, bits, part  # noqa: E402

WIDE = 8


def tree(parts):
    """The sum as the docstring has it, written apart from the kernels."""
    if len(parts) == 1:
        return parts[0]
    width = 1
    while width < len(parts):
        width *= 2
    left, right = parts[: width // 2], parts[width // 2 :]
    return tree(left) + tree(right)


def expected(size, dtype, n, op="SUM"):
    parts = [part(rank, dtype, n) for rank in range(size)]
    if op in ("MAX", "MIN"):
        return bits(torch.stack(parts).amax(0) if op == "MAX" else torch.stack(parts).amin(0))
    if size == 1:
        return bits(parts[0])
    if dtype in ("bf16", "fp16"):
        total = tree([x.float() for x in parts])
        return bits((total / size if op == "AVG" else total).to(DTYPES[dtype]))
    if dtype == "c64":  # real and imaginary parts, each on its own: torch's complex addition multiplies by an alpha
        return bits(torch.view_as_complex(tree([torch.view_as_real(x) for x in parts])))
    total = tree(parts)
    return bits(total / size if op == "AVG" else total)


@pytest.fixture(scope="module")
def world():
    world = World(WIDE, Start(f"{SUPPORT}:calls"))
    yield world
    world.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64", "c64"])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_sum_over_ranks_is_one_tree_over_their_indices_whatever_the_algorithm(world, size, dtype):
    for n in (1, 7, 64):
        for extra_bytes in (1 << 40, -1):  # one shot, two shots
            answers = world.ask(("all_reduce", size, dtype, n, "SUM", extra_bytes))
            for rank in range(size):
                assert answers[rank] == (expected(size, dtype, n), ["c10d::allreduce_"]), (rank, n, extra_bytes)


CALLS = (
    *("all_reduce_async", "all_reduce_of_a_view", "functional_all_reduce", "coalesced", "reduce_to_everyone"),
    *("reduce_scatter", "reduce_scatter_of_a_list", "functional_reduce_scatter", "all_reduce_compiled"),
)
ON_THE_WHOLE_WORLD = ("dtensor_all_reduce", "dtensor_reduce_scatter")


@pytest.mark.parametrize("name", (*CALLS, *ON_THE_WHOLE_WORLD))
def test_every_call_that_adds_over_ranks_has_that_order(world, name):
    size = WIDE if name in ON_THE_WHOLE_WORLD else 2 if name == "all_reduce_compiled" else 4
    for dtype in ("fp32", "bf16"):
        for found, operators in world.ask((name, size, dtype, 64, "SUM", None))[:size]:
            assert found == expected(size, dtype, 64), dtype
            assert operators, "no collective of the mode was called"


def test_the_gradients_that_ddp_sums_from_cpp_are_the_same_on_all_ranks(world):
    first, second, *_ = world.ask(("gradients_of_ddp", 2, "fp32", 64, "SUM", None))
    assert first == second
    assert first[1] == ["c10d::allreduce_"]


def test_an_average_is_that_sum_divided_and_what_no_order_changes_is_torchs_own(world):
    assert (
        world.ask(("all_reduce", 3, "bf16", 64, "AVG", None))[:3]
        == [(expected(3, "bf16", 64, "AVG"), ["c10d::allreduce_"])] * 3
    )
    for dtype, op in (("int", "SUM"), ("fp32", "MAX"), ("bf16", "MIN")):
        assert world.ask(("all_reduce", 4, dtype, 64, op, None))[:4] == [(expected(4, dtype, 64, op), [])] * 4
    assert world.ask(("all_reduce", 1, "fp32", 64, "SUM", None))[0] == (expected(1, "fp32", 64), [])


def test_what_has_no_order_of_its_own_is_refused_on_every_rank(world):
    with pytest.raises(RankError, match=r"raised Refused: .* adds over ranks \(SUM, AVG\) .* with PRODUCT of floats") as error:
        world.ask(("all_reduce", WIDE, "fp32", 8, "PRODUCT", None))
    assert error.value.kind == "Refused"
    assert world.is_alive


def test_nan_in_one_ranks_part_is_nan_in_the_sum_at_that_place_alone():
    parts = torch.arange(12.0).view(4, 3)
    parts[2, 1] = float("nan")
    assert collectives.tree_sum(parts, torch.float32).isnan().tolist() == [False, True, False]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 16), st.integers(0, 300), st.sampled_from(["fp32", "bf16", "fp16", "fp64"]), st.booleans())
def test_the_sum_of_a_power_of_two_of_parts_is_the_sum_of_the_sums_of_its_halves(n_parts, n, dtype, rounds):
    parts = torch.stack([part(r, dtype, n) for r in range(n_parts)])
    wide = reference.accumulator_dtype(parts.dtype)
    out_dtype = parts.dtype if rounds else wide
    found = cpu.tree_sum(parts, out_dtype)
    assert bits(found) == bits(tree([x.to(wide) for x in parts]).to(out_dtype))
    if n_parts in (2, 4, 8, 16):
        halves = torch.stack([cpu.tree_sum(half, wide) for half in parts.chunk(2)])
        assert bits(cpu.tree_sum(halves, out_dtype)) == bits(found)


def test_a_backend_that_gives_no_work_has_nothing_to_wait_for(monkeypatch):
    """As NCCL does for a call that is not asynchronous."""

    class Work:
        @staticmethod
        def unbox(boxed):
            return boxed

    monkeypatch.setattr(torch.distributed, "Work", Work)
    collectives._wait(None)


def test_the_dispatchers_entries_are_torchs_own_again_after_the_mode():
    def registered():
        return {name: torch._C._dispatch_dump(f"c10d::{name}") for name in collectives.COLLECTIVES}

    before = registered()
    with batch_invariant_mode():
        assert registered() != before
    assert registered() == before
