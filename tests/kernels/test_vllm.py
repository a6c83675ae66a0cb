"""Operators of vLLM's CPU build: right, the same bits in any batch and chunk, and refused where they are not the known ones.

They are defined here with vLLM's schemas; the kernels behind them are the table's.
"""

from collections import Counter

import pytest
import torch

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.diagnose.coverage import sort_calls
from pytest_batchinv.diagnose.recorder import Call, Recorder
from pytest_batchinv.kernels import reference, table, vllm
from pytest_batchinv.kernels.aten.common import Refused

N_BLOCKS, BLOCK, HKV, H, D = 40, 32, 2, 4, 32
CACHE, ATTEND = "_C::cpu_attn_reshape_and_cache", "_C::cpu_attention_with_kv_cache"


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def operators():
    """vLLM's operators without vLLM. Gives what defines them, with the schemas that are handed in."""
    library = torch.library.Library("_C", "FRAGMENT")

    def defined(schemas=vllm.SCHEMAS):
        for name, arguments in schemas.items():
            library.define(f"{name.removeprefix('_C::')}({arguments}")
        return torch.ops._C

    yield defined
    library._destroy()


class Requests:
    """Sequences of keys and values that share a paged cache, as vLLM's block tables have them."""

    def __init__(self, lengths, dtype=torch.float32):
        self.lengths, self.dtype = lengths, dtype
        self.keys = [randn(n, HKV, D, dtype=dtype, seed=i) for i, n in enumerate(lengths)]
        self.values = [randn(n, HKV, D, dtype=dtype, seed=100 + i) for i, n in enumerate(lengths)]
        self.queries = [randn(n, H, D, dtype=dtype, seed=200 + i) for i, n in enumerate(lengths)]
        blocks = torch.randperm(N_BLOCKS, generator=torch.Generator().manual_seed(7)).int()
        most = max(-(-n // BLOCK) for n in lengths)
        self.tables = blocks[: len(lengths) * most].view(len(lengths), most)
        self.caches = [torch.full((N_BLOCKS, HKV, BLOCK, D), torch.nan, dtype=dtype) for _ in range(2)]

    def step(self, ops, chunks, **options):
        """Computes the columns ``chunks[i]`` of each request i in one batch; the outputs of each."""
        slots, keys, values, queries, starts, seen = [], [], [], [], [0], []
        for i, columns in chunks.items():
            places = torch.arange(columns.start, columns.stop)
            slots.append(self.tables[i][places // BLOCK] * BLOCK + places % BLOCK)
            for whole, parts in ((self.keys, keys), (self.values, values), (self.queries, queries)):
                parts.append(whole[i][columns])
            starts.append(starts[-1] + columns.stop - columns.start)
            seen.append(columns.stop)
        slots.append(torch.tensor([-1]))  # padding: written nowhere
        padded = [torch.cat([*parts, parts[0][:1]]) for parts in (keys, values)]
        ops.cpu_attn_reshape_and_cache(*padded, *self.caches, torch.cat(slots), "vec")
        out = torch.empty(starts[-1], H, D, dtype=self.dtype)
        given = {"alibi_slopes": None, "sliding_window_size": -1, "softcap": 0.0, "s_aux": None, **options}
        ops.cpu_attention_with_kv_cache(
            torch.cat(queries),
            *self.caches,
            out,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(seen, dtype=torch.int32),
            D**-0.5,
            True,
            given["alibi_slopes"],
            given["sliding_window_size"],
            self.tables[list(chunks)],
            given["softcap"],
            torch.empty(0),
            given["s_aux"],
            given.get("dynamic_causal"),
            kv_cache_dtype=given.get("kv_cache_dtype", "auto"),
        )
        return {i: out[starts[n] : starts[n + 1]] for n, i in enumerate(chunks)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("options", ({}, {"sliding_window_size": 5}, {"softcap": 3.0}), ids=str)
def test_a_request_attends_to_its_own_pages_alike_alone_in_a_batch_and_in_chunks(operators, dtype, options):
    lengths = (1, 33, 70, 32)
    ops = operators()
    with batch_invariant_mode() as mode:
        whole = Requests(lengths, dtype).step(ops, {i: slice(0, n) for i, n in enumerate(lengths)}, **options)
        alone = Requests(lengths, dtype)
        chunked = Requests(lengths, dtype)
        for i, n in enumerate(lengths):
            assert torch.equal(alone.step(ops, {i: slice(0, n)}, **options)[i], whole[i])
        first = chunked.step(ops, {1: slice(0, 31), 2: slice(0, 64)}, **options)
        second = chunked.step(ops, {2: slice(64, 70), 0: slice(0, 1), 1: slice(31, 32)}, **options)
        third = chunked.step(ops, {1: slice(32, 33)}, **options)
        assert torch.equal(torch.cat((first[1], second[1], third[1])), whole[1])
        assert torch.equal(torch.cat((first[2], second[2])), whole[2])
        assert mode.hits[ATTEND] == mode.hits[CACHE] == 8
    window = {"window": options.get("sliding_window_size"), "soft_cap": options.get("softcap")}
    for i in range(len(lengths)):
        q, k, v = (x[i].transpose(0, 1)[None] for x in (alone.queries, alone.keys, alone.values))
        expected, _ = reference.attention(q, k, v, None, True, D**-0.5, **window)
        torch.testing.assert_close(whole[i], expected[0].transpose(0, 1))


@pytest.mark.parametrize("is_neox", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rotation_is_the_formula_in_place_and_passes_the_other_dims(operators, is_neox, dtype):
    ops = operators()
    positions, rotary = torch.tensor([0, 5, 9]), 16
    angles = randn(10, rotary // 2)
    cache = torch.cat((angles.cos(), angles.sin()), 1).to(dtype)
    query, key = randn(3, H * D, dtype=dtype, seed=1), randn(3, HKV, D, dtype=dtype, seed=2)
    before = [query.clone().view(3, H, D), key.clone()]
    with batch_invariant_mode() as mode:
        ops.rotary_embedding(positions, query, key, D, cache, is_neox)
        ops.rotary_embedding(positions, query.clone(), None, D, cache, is_neox)
        assert mode.hits["_C::rotary_embedding"] == 2
    cos, sin = (part[:, None] for part in cache.double()[positions].chunk(2, 1))
    for was, now in zip(before, (query.view(3, H, D), key), strict=True):
        first, second = (slice(0, 8), slice(8, 16)) if is_neox else (slice(0, 16, 2), slice(1, 16, 2))
        x1, x2 = was.double()[..., first], was.double()[..., second]
        torch.testing.assert_close(now[..., first], (x1 * cos - x2 * sin).to(dtype))
        torch.testing.assert_close(now[..., second], (x2 * cos + x1 * sin).to(dtype))
        assert torch.equal(now[..., rotary:], was[..., rotary:])


def test_the_first_of_equal_largest_logits_is_taken(operators):
    ops = operators()
    with batch_invariant_mode():
        assert ops.greedy_argmax(torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 2.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "options, sentence",
    (
        ({"alibi_slopes": torch.ones(H)}, "ALiBi"),
        ({"dynamic_causal": torch.ones(1, dtype=torch.bool)}, "causal one by one"),
        ({"kv_cache_dtype": "fp8"}, "in fp8; use auto"),
    ),
)
def test_what_the_kernels_do_not_compute_is_refused(operators, options, sentence):
    ops = operators()
    with batch_invariant_mode(), pytest.raises(Refused, match=sentence):
        Requests((3,)).step(ops, {0: slice(0, 3)}, **options)


def test_an_operator_with_other_arguments_than_the_known_ones_is_refused(operators):
    ops = operators({"_C::greedy_argmax": "Tensor logits, int k=1) -> Tensor"})
    with batch_invariant_mode(), pytest.raises(Refused, match=r"does not cover _C::greedy_argmax: it is .*int k=1"):
        ops.greedy_argmax(torch.ones(1, 2))


def test_every_operator_of_vllm_in_the_table_has_its_schema():
    assert table.OF_VLLM.keys() == vllm.SCHEMAS.keys()


@pytest.fixture
def library():
    """Defines operators of this namespace."""
    made = []

    def define(namespace, schema, function, key):
        made.append(torch.library.Library(namespace, "FRAGMENT"))
        made[-1].define(schema)
        made[-1].impl(schema.partition("(")[0], function, key)

    yield define
    for each in made:
        each._destroy()


def recorded(call):
    recorder = Recorder()
    with batch_invariant_mode(), torch.inference_mode(), recorder:
        call(torch.ones(2, 2), torch.ones(2, 2))
    return {call.overload.name() for call in recorder.calls} - {"aten::ones"}


def test_under_inference_mode_a_composite_is_recorded_as_what_it_is_made_of():
    assert recorded(torch.nn.functional.linear) >= {"aten::mm"}
    assert not recorded(torch.nn.functional.linear) & {"aten::linear"}


def test_what_vllms_wrappers_call_is_recorded_in_their_stead(library):
    def wrapped(x, y):
        y.copy_(torch.mm(x, x))

    library("vllm", "unified_kv_cache_update(Tensor x, Tensor(a!) y) -> ()", wrapped, "CPU")
    assert recorded(lambda x, y: torch.ops.vllm.unified_kv_cache_update(x, y)) == {"aten::mm", "aten::copy_"}


def test_a_composite_of_another_library_is_recorded_as_itself(library):
    library("batchinv_test", "product(Tensor x, Tensor y) -> Tensor", torch.mm, "CompositeImplicitAutograd")
    assert recorded(lambda x, y: torch.ops.batchinv_test.product(x, y)) == {"batchinv_test::product"}


@pytest.mark.parametrize("checked_before", [False, True])
def test_an_operator_of_vllm_that_ran_past_the_table_is_named(operators, checked_before):
    if checked_before:  # without vLLM in the process
        sort_calls([Call(torch.ops.aten.mm.default, "cpu", "mm", "fp32")], Counter())
    calls = [Call(operators().cpu_attention_with_kv_cache.default, "cpu", ATTEND, "fp32")]
    assert sort_calls(calls, Counter({ATTEND: 1})).bypassed == ()
    assert sort_calls(calls, Counter()).bypassed == (ATTEND,)
