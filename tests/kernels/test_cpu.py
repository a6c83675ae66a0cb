"""The CPU kernels: right to the last bit or so, and the same bits for a row whatever surrounds it."""

import math
import shutil
import subprocess
import sys
from fractions import Fraction
from functools import partial
from itertools import product
from operator import mul

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv.kernels import cpu, reference
from pytest_batchinv.kernels.cpu import build

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INT_OF = {8: torch.int64, 4: torch.int32, 2: torch.int16}
ULPS = {torch.float64: 64, torch.float32: 1, torch.float16: 2, torch.bfloat16: 1}  # of the largest value in the result

dtypes = st.sampled_from(DTYPES)
sizes = st.integers(1, 70)
seeds = st.integers(0, 2**20)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    as_int = INT_OF[actual.element_size()]
    places = (actual.contiguous().view(as_int) != expected.contiguous().view(as_int)).nonzero()
    assert not len(places), f"{len(places)} of {actual.numel()} differ, the first at {places[0].tolist()}"


def close(actual, expected, factor=1.0):
    """Within a few ulps of the largest value."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.is_contiguous()
    assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    actual, wanted = actual[finite].double(), expected[finite].double()
    if wanted.numel():
        bound = factor * ULPS[expected.dtype] * torch.finfo(expected.dtype).eps * wanted.abs().max() + 1e-300
        assert (actual - wanted).abs().max() <= bound


def layouts(x):
    """x with the same values and other strides and alignment."""
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    sliced = torch.empty(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)[..., 1::2].copy_(x)
    return [x, x.transpose(-1, -2).contiguous().transpose(-1, -2), shifted, sliced, x.flip(0).contiguous().flip(0)]


# Each kernel of rows as a function of [rows, n_cols] that gives a tuple of tensors with one entry for each row.
def row_kernels(kernels, n_cols, dtype):
    weight, bias = randn(n_cols, dtype=dtype, seed=1), randn(n_cols, dtype=dtype, seed=2)
    b = randn(1, 33, n_cols, dtype=dtype, seed=3).transpose(1, 2)
    return {
        "sum": lambda x: (kernels.row_sum(x, dtype),),
        "mean": lambda x: (kernels.row_mean(x, dtype),),
        "mean_of_squares": lambda x: (kernels.row_mean_of_squares(x, reference.accumulator_dtype(dtype)),),
        "norm1": lambda x: (kernels.row_norm(x, 1.0, dtype),),
        "norm2": lambda x: (kernels.row_norm(x, 2.0, dtype),),
        "var_mean": lambda x: kernels.row_var_mean(x, 1.0, dtype),
        "logsumexp": lambda x: (kernels.row_logsumexp(x, dtype),),
        "softmax": lambda x: (kernels.row_softmax(x, False, dtype),),
        "log_softmax": lambda x: (kernels.row_softmax(x, True, dtype),),
        "cumsum": lambda x: (kernels.row_cumsum(x, dtype),),
        "layer_norm": lambda x: kernels.row_layer_norm(x, weight, bias, 1e-5),
        "layer_norm_plain": lambda x: kernels.row_layer_norm(x, None, None, 1e-5),
        "rms_norm": lambda x: kernels.row_rms_norm(x, weight, 1e-6),
        "gemm": lambda x: (kernels.gemm(x[None], b)[0],),
    }


ROW_KERNELS = tuple(row_kernels(reference, 1, torch.float32))


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROW_KERNELS)
@examples(12)
@given(dtype=dtypes, rows=st.integers(0, 40), n_cols=st.sampled_from([1, 2, 7, 8, 31, 32, 33, 100, 1024, 1025, 2500]))
def test_rows_equal_the_reference(name, dtype, rows, n_cols):
    x = randn(rows, n_cols, dtype=dtype)
    factor = 8 * math.sqrt(n_cols) if dtype == torch.float64 or name == "gemm" else 1
    for actual, expected in zip(
        row_kernels(cpu, n_cols, dtype)[name](x), row_kernels(reference, n_cols, dtype)[name](x), strict=True
    ):
        close(actual, expected, factor)


@examples(60)
@given(
    dtype=dtypes,
    shape=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 150), st.integers(0, 140)),
    alpha=st.sampled_from([1.0, 0.5, -3.0]),
    beta=st.sampled_from([None, 0.0, 1.0, 0.25]),
)
def test_gemm_equals_the_reference(dtype, shape, alpha, beta):
    B, M, K, N = shape
    a, b = randn(B, M, K, dtype=dtype), randn(B, K, N, dtype=dtype, seed=1)
    args = (None,) if beta is None else (randn(1, 1, N, dtype=dtype, seed=2).expand(B, M, N), alpha, beta)
    close(cpu.gemm(a, b, *args), reference.gemm(a, b, *args), factor=2)


@examples(30)
@given(dtype=dtypes, ends=st.lists(st.integers(0, 40), min_size=1, max_size=6).map(sorted), K=sizes, N=sizes)
def test_grouped_gemm_equals_the_reference_and_each_group_alone(dtype, ends, K, N):
    offs = torch.tensor(ends, dtype=torch.int32)
    a, b = randn(45, K, dtype=dtype), randn(len(ends), K, N, dtype=dtype, seed=1)
    out = cpu.grouped_gemm(a, b, offs)
    close(out, reference.grouped_gemm(a, b, offs), factor=2)
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        same_bits(out[start:end], cpu.gemm(a[None, start:end], b[None, group])[0])


@examples(30)
@given(
    dtype=dtypes,
    n=st.integers(0, 50),
    rows=st.integers(1, 9),
    cols=st.integers(0, 130),
    alpha=st.sampled_from([1.0, -0.3]),
)
def test_index_add_equals_the_reference(dtype, n, rows, cols, alpha):
    index = torch.randint(rows, (n,), generator=torch.Generator().manual_seed(n))
    x, source = randn(rows, cols, dtype=dtype), randn(n, cols, dtype=dtype, seed=1)
    close(cpu.index_add(x, index, source, alpha), reference.index_add(x, index, source, alpha), factor=2)


@st.composite
def attention_cases(draw):
    B, H_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    D, Dv, dtype = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(dtypes)
    q = randn(B, queries, H_kv * group, D, dtype=dtype).transpose(1, 2)
    k, v = randn(B, keys, H_kv, D, dtype=dtype, seed=1).transpose(1, 2), randn(B, H_kv, keys, Dv, dtype=dtype, seed=2)
    kind = draw(st.sampled_from(["none", "bool", "added"]))
    mask = randn(1, 1, queries, keys, dtype=dtype, seed=3).expand(B, q.shape[1], -1, -1)
    mask = {"none": None, "bool": mask > 0, "added": mask.masked_fill(mask > 1, -torch.inf)}[kind]
    return q, k, v, mask, draw(st.booleans()), draw(st.sampled_from([1.0, 0.25]))


@examples(60)
@given(attention_cases())
def test_attention_equals_the_reference(case):
    for actual, expected in zip(cpu.attention(*case), reference.attention(*case), strict=True):
        close(actual, expected, factor=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gemm_is_no_less_accurate_than_torch(dtype):
    for K in (64, 700, 4096):
        a, b = randn(1, 64, K, dtype=dtype) + 1, randn(1, K, 48, dtype=dtype, seed=1)
        exact = a.double() @ b.double()
        ours, stock = ((out.double() - exact).abs().mean() for out in (cpu.gemm(a, b), a @ b))
        assert ours <= 1.001 * stock


@pytest.mark.parametrize("K", [64, 700])
def test_gemm_float64_is_as_accurate_as_a_chain_can_be(K):
    """torch sums blocks, whose errors grow less: the price of one order, and far below what float64 models notice."""
    a, b = randn(1, 4, K, dtype=torch.float64), randn(1, K, 3, dtype=torch.float64, seed=1)
    exact = [[float(sum(map(mul, row, col))) for col in _fractions(b[0].t())] for row in _fractions(a[0])]
    error = (cpu.gemm(a, b)[0] - torch.tensor(exact, dtype=torch.float64)).abs().max()
    assert error <= math.sqrt(K) * torch.finfo(torch.float64).eps * (a.norm(dim=-1).max() * b.norm(dim=1).max())


def _fractions(x):
    return [[Fraction(value) for value in row] for row in x.tolist()]


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@examples(40)
@given(K=st.integers(3, 400), data=st.data())
def test_gemm_adds_k_ascending_in_one_chain(dtype, K, data):
    """huge at i and -huge at j swallow every 1 that is added before j: those behind j are the result."""
    i = data.draw(st.integers(0, K - 2))
    j = data.draw(st.integers(i + 1, K - 1))
    M, N = data.draw(st.sampled_from([1, 2, 3, 9])), data.draw(st.sampled_from([1, 17, 40]))
    a, huge = torch.ones(1, M, K, dtype=dtype), 2.0**62
    a[..., i], a[..., j] = huge, -huge
    expected = torch.full((1, M, N), float(K - 1 - j), dtype=torch.float64)
    same_bits(cpu.gemm(a, torch.ones(1, K, N, dtype=dtype)), expected.to(dtype))


@pytest.mark.parametrize("K", [5, 129, 300])
def test_gemm_float64_is_the_chain_of_fused_multiply_adds(K):
    a, b = randn(1, 3, K, dtype=torch.float64), randn(1, K, 21, dtype=torch.float64, seed=1)
    acc = torch.zeros(3, 21, dtype=torch.float64)
    for k in range(K):
        acc = _fma(a[0, :, k, None].expand(3, 21), b[0, k].expand(3, 21), acc)
    same_bits(cpu.gemm(a, b)[0], acc)


def _fma(x, y, z):
    """Rounded once: exact rational arithmetic."""
    triples = zip(*(t.flatten().tolist() for t in (x, y, z)), strict=True)
    exact = [Fraction(p) * Fraction(q) + Fraction(r) for p, q, r in triples]
    return torch.tensor([float(value) for value in exact], dtype=torch.float64).view(z.shape)


def test_gemm_float32_is_a_chain_in_float64_and_bfloat16_one_in_float32():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        a, b = randn(1, 9, 300, dtype=dtype), randn(1, 300, 37, dtype=dtype, seed=1)
        acc = torch.zeros(9, 37, dtype=wide)
        for k in range(300):  # the products are exact in wide, so this is the fused chain
            acc = acc + a[0, :, k, None].to(wide) * b[0, k].to(wide)
        same_bits(cpu.gemm(a, b)[0], acc.to(dtype))


@examples(30)
@given(n_cols=st.sampled_from([1, 31, 33, 64, 1025, 2500]), rows=st.integers(1, 4), seed=seeds)
def test_row_sum_goes_by_32_lanes_and_a_tree(n_cols, rows, seed):
    x, sizes_of_x = (randn(rows, n_cols, dtype=torch.float64, seed=seed + i) for i in range(2))
    x = x * 10.0**sizes_of_x
    lanes = torch.zeros(rows, 32, dtype=torch.float64)
    for start in range(0, n_cols, 32):
        part = x[:, start : start + 32]
        lanes[:, : part.shape[1]] += part
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    same_bits(cpu.row_sum(x, torch.float64), lanes[:, 0])


def test_cumsum_is_one_chain():
    x = randn(3, 1500, dtype=torch.float64)
    sums = [row[0].clone() for row in x]
    out = cpu.row_cumsum(x, torch.float64)
    for r, row in enumerate(x):
        for c in range(1, 1500):
            sums[r] = sums[r] + row[c]
            assert out[r, c] == sums[r]


@pytest.mark.parametrize("dtype", DTYPES)
def test_index_add_takes_contributions_ascending(dtype):
    source = torch.tensor([[1.0], [2.0**60], [1.0], [-(2.0**60)], [3.0]], dtype=torch.float64)
    source = (source / 2.0**46).to(dtype) if dtype == torch.float16 else source.to(dtype)
    expected = source[4:].clone()
    same_bits(cpu.index_add(torch.zeros(1, 1, dtype=dtype), torch.zeros(5, dtype=torch.int64), source, 1.0), expected)


# --- batch invariance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROW_KERNELS)
@examples(15)
@given(dtype=dtypes, rows=sizes, n_cols=st.sampled_from([1, 3, 17, 64, 100, 777, 1030]), seed=seeds)
def test_a_row_has_the_same_bits_in_any_batch_at_any_position(name, dtype, rows, n_cols, seed):
    x, kernel = randn(rows, n_cols, dtype=dtype, seed=seed), row_kernels(cpu, n_cols, dtype)[name]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    whole, shuffled = kernel(x), kernel(x[order])
    for r in {0, rows // 2, rows - 1, int(order[0])}:
        for part, alone in zip(whole, kernel(x[r : r + 1].clone()), strict=True):
            same_bits(part[r : r + 1], alone)
    for part, other in zip(whole, shuffled, strict=True):
        same_bits(part[order], other)


@pytest.mark.parametrize("name", ROW_KERNELS)
@examples(10)
@given(dtype=dtypes, rows=sizes, n_cols=st.sampled_from([1, 3, 17, 64, 300, 1030]), seed=seeds)
def test_strides_alignment_and_threads_change_no_bit(name, dtype, rows, n_cols, seed):
    x, kernel = randn(rows, n_cols, dtype=dtype, seed=seed), row_kernels(cpu, n_cols, dtype)[name]
    torch.set_num_threads(1)
    expected = kernel(x)
    for threads, layout in product((1, 2), layouts(x)):
        torch.set_num_threads(threads)
        for actual, wanted in zip(kernel(layout), expected, strict=True):
            same_bits(actual, wanted)


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_many_rows_have_the_bits_of_few_with_any_number_of_threads(name):
    x, kernel = randn(257, 1030), row_kernels(cpu, 1030, torch.float32)[name]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        parts = [kernel(x[:100]), kernel(x[100:101]), kernel(x[101:])]
        for whole, *pieces in zip(kernel(x), *parts, strict=True):
            same_bits(whole, torch.cat(pieces))


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_expanded_rows_have_the_bits_of_copies(name):
    for dtype in DTYPES:
        kernel, x = row_kernels(cpu, 50, dtype)[name], randn(1, 50, dtype=dtype)
        for actual, wanted in zip(kernel(x.expand(9, 50)), kernel(x.repeat(9, 1)), strict=True):
            same_bits(actual, wanted)


@examples(40)
@given(dtype=dtypes, M=st.sampled_from([1, 2, 3, 8, 9, 70, 130]), K=st.integers(1, 260), N=sizes, seed=seeds)
def test_gemm_strides_of_the_weight_and_threads_change_no_bit(dtype, M, K, N, seed):
    a, b = randn(1, M, K, dtype=dtype, seed=seed), randn(1, K, N, dtype=dtype, seed=seed + 1)
    bias = randn(1, 1, N, dtype=dtype, seed=seed + 2).expand(1, M, N)
    torch.set_num_threads(1)
    expected = cpu.gemm(a, b, bias, 0.3, 0.7)
    torch.set_num_threads(2)
    for weight in layouts(b):
        same_bits(cpu.gemm(a, weight, bias.contiguous(), 0.3, 0.7), expected)
    same_bits(cpu.gemm(a[:, M // 2 :], b, bias[:, M // 2 :], 0.3, 0.7), expected[:, M // 2 :])
    same_bits(cpu.gemm(a, b[:, :, N // 2 :], bias[:, :, N // 2 :], 0.3, 0.7), expected[:, :, N // 2 :])
    same_bits(cpu.gemm(a.expand(3, M, K), b.expand(3, K, N), bias.expand(3, M, N), 0.3, 0.7)[2:], expected)


@examples(30)
@given(dtype=dtypes, before=st.integers(0, 70), behind=st.integers(0, 70), K=st.integers(1, 200), M=st.integers(1, 10))
def test_gemm_zeros_before_and_behind_change_no_bit(dtype, before, behind, K, M):
    a, b = randn(1, M, K, dtype=dtype), randn(1, K, 20, dtype=dtype, seed=1)
    padded_a = torch.nn.functional.pad(a, (before, behind))
    padded_b = torch.cat([randn(1, before, 20, dtype=dtype), b, randn(1, behind, 20, dtype=dtype)], 1)
    same_bits(cpu.gemm(padded_a, padded_b), cpu.gemm(a, b))


@pytest.mark.parametrize("log", [False, True])
@examples(30)
@given(dtype=dtypes, before=st.integers(0, 70), behind=st.integers(0, 1200), n_cols=st.integers(1, 200), seed=seeds)
def test_softmax_masked_columns_change_no_bit(log, dtype, before, behind, n_cols, seed):
    x = randn(5, n_cols, dtype=dtype, seed=seed) * 4
    padded = torch.nn.functional.pad(x, (before, behind), value=-torch.inf)
    same_bits(cpu.row_softmax(padded, log, dtype)[:, before : before + n_cols], cpu.row_softmax(x, log, dtype))
    same_bits(cpu.row_logsumexp(padded, dtype), cpu.row_logsumexp(x, dtype))


@examples(30)
@given(before=st.integers(0, 70), behind=st.integers(0, 1200), n_cols=st.integers(1, 2000), seed=seeds)
def test_row_sum_zeros_before_and_behind_change_no_bit(before, behind, n_cols, seed):
    x = randn(9, n_cols, dtype=torch.float64, seed=seed)
    same_bits(cpu.row_sum(torch.nn.functional.pad(x, (before, behind)), x.dtype), cpu.row_sum(x, x.dtype))


@examples(40)
@given(dtype=dtypes, rows=st.integers(1, 20), n=st.integers(0, 60), cols=st.integers(1, 200), seed=seeds)
def test_index_add_columns_strides_and_threads_change_no_bit(dtype, rows, n, cols, seed):
    index = torch.randint(rows, (n,), generator=torch.Generator().manual_seed(seed))
    x, source = randn(rows, cols, dtype=dtype, seed=seed), randn(n, cols, dtype=dtype, seed=seed + 1)
    torch.set_num_threads(1)
    expected = cpu.index_add(x, index, source, 0.3)
    torch.set_num_threads(2)
    for layout, source_layout in zip(layouts(x), layouts(source), strict=True):
        same_bits(cpu.index_add(layout, index, source_layout, 0.3), expected)
    same_bits(cpu.index_add(x[:, cols // 2 :], index, source[:, cols // 2 :], 0.3), expected[:, cols // 2 :])
    mine = index == index[0] if n else index == 0
    only = cpu.index_add(x, index[mine], source[mine], 0.3)  # what lands elsewhere does not matter
    row = int(index[0]) if n else 0
    same_bits(only[row], expected[row])


# --- attention -------------------------------------------------------------------------------------------------------


@examples(25)
@given(dtype=dtypes, length=st.integers(1, 150), D=st.sampled_from([5, 16, 64]), group=st.integers(1, 2), seed=seeds)
def test_attention_decode_has_the_bits_of_prefill(dtype, length, D, group, seed):
    q = randn(1, 2 * group, length, D, dtype=dtype, seed=seed)
    k, v = randn(1, 2, length, D, dtype=dtype, seed=seed + 1), randn(1, 2, length, D, dtype=dtype, seed=seed + 2)
    out, lse = cpu.attention(q, k, v, None, True, 0.25)
    for i in {0, length // 2, length - 1}:
        one, one_lse = cpu.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], None, False, 0.25)
        same_bits(one, out[:, :, i : i + 1])
        same_bits(one_lse, lse[:, :, i : i + 1])


@pytest.mark.parametrize("garbage", [0.0, 1e3, torch.nan, torch.inf])
@examples(15)
@given(
    dtype=dtypes, queries=st.integers(1, 40), keys=st.integers(1, 80), before=st.integers(0, 40),
    behind=st.integers(0, 140), is_bool=st.booleans(), seed=seeds,
)  # fmt: skip
def test_attention_padding_on_either_side_changes_no_bit(garbage, dtype, queries, keys, before, behind, is_bool, seed):
    q = randn(1, 2, queries, 16, dtype=dtype, seed=seed)
    k, v = randn(1, 2, keys, 16, dtype=dtype, seed=seed + 1), randn(1, 2, keys, 8, dtype=dtype, seed=seed + 2)
    seen = randn(1, 1, queries, keys, seed=seed + 3).expand(1, 2, -1, -1) > -1
    pad = torch.nn.functional.pad
    padded_k, padded_v = (pad(x, (0, 0, before, behind), value=garbage) for x in (k, v))
    padded_seen = pad(seen, (before, behind), value=False)
    if not is_bool:
        seen, padded_seen = (torch.zeros(m.shape, dtype=dtype).masked_fill(~m, -torch.inf) for m in (seen, padded_seen))
    expected = cpu.attention(q, k, v, seen, False, 0.25)
    for actual, wanted in zip(cpu.attention(q, padded_k, padded_v, padded_seen, False, 0.25), expected, strict=True):
        same_bits(actual, wanted)


@examples(25)
@given(
    dtype=dtypes, B=st.integers(1, 6), H=st.integers(1, 3), queries=sizes, is_causal=st.booleans(), seed=seeds
)  # fmt: skip
def test_attention_batch_query_block_strides_and_threads_change_no_bit(dtype, B, H, queries, is_causal, seed):
    q, k, v = (randn(B, H, queries, 16, dtype=dtype, seed=seed + i) for i in range(3))
    torch.set_num_threads(1)
    expected = cpu.attention(q, k, v, None, is_causal, 0.3)
    torch.set_num_threads(2)
    for layout in zip(*(layouts(x) for x in (q, k, v)), strict=True):
        for actual, wanted in zip(cpu.attention(*layout, None, is_causal, 0.3), expected, strict=True):
            same_bits(actual, wanted)
    b, h, i = B - 1, H // 2, queries // 2
    visible = i + 1 if is_causal else queries
    alone = cpu.attention(
        *(x.clone() for x in (q[b:, h : h + 1, i : i + 1], k[b:, h : h + 1, :visible], v[b:, h : h + 1, :visible])),
        None, False, 0.3,
    )  # fmt: skip
    for actual, wanted in zip(alone, expected, strict=True):
        same_bits(actual, wanted[b:, h : h + 1, i : i + 1])


def test_attention_query_without_keys_gives_zero():
    q = randn(1, 1, 3, 4)
    mask = torch.tensor([[True, True], [False, False], [True, False]])[None, None]
    out, lse = cpu.attention(q, q[:, :, :2], torch.full((1, 1, 2, 4), torch.nan), mask, False, 1.0)
    assert (out[0, 0, 1] == 0).all() and lse[0, 0, 1] == -torch.inf
    assert out[0, 0, 0].isnan().all()


# --- pointwise -------------------------------------------------------------------------------------------------------

F = torch.nn.functional
STOCK = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "softplus": F.softplus,
    "log_sigmoid": F.logsigmoid,
    "mish": F.mish,
    "elu": torch.ops.aten.elu,
    "rsqrt": torch.rsqrt,
    "pow": torch.pow,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sin": torch.sin,
    "cos": torch.cos,
}


def each_dtype(test):
    """Runs the test for each dtype in one item: an item costs more than such a test."""

    def in_each(kind, params):
        for dtype in DTYPES:
            test(kind, params, dtype)

    in_each.__name__ = test.__name__
    return in_each


CALLS = [(kind, ()) for kind, names in cpu.KINDS.items() if not names]
CALLS += [("pow", (exponent,)) for exponent in (2.0, 3.0, 0.5, -0.5, 1.7, -1.0, 0.0)]
CALLS += [("softplus", (1.0, 20.0)), ("softplus", (2.0, 5.0)), ("elu", (1.0, 1.0, 1.0)), ("elu", (0.7, 1.1, 0.9))]


@pytest.mark.parametrize(("kind", "params"), CALLS)
@each_dtype
def test_pointwise_tail_has_the_bits_of_the_body(kind, params, dtype):
    x = randn(1100, dtype=dtype) * 5
    whole = cpu.pointwise(x, kind, params)
    for start, end in [(0, 1), (1, 8), (3, 36), (990, 1099), (7, 1024), (1023, 1026)]:
        same_bits(cpu.pointwise(x[start:end], kind, params), whole[start:end])
    same_bits(torch.stack([cpu.pointwise(one, kind, params) for one in x[:70]]), whole[:70])


@pytest.mark.parametrize(("kind", "params"), CALLS)
@each_dtype
def test_pointwise_is_no_less_accurate_than_torch(kind, params, dtype):
    x = torch.cat([randn(3000, dtype=dtype), 30 * randn(3000, dtype=dtype), randn(1000, dtype=dtype) / 1000])
    actual, expected = cpu.pointwise(x, kind, params), STOCK[kind](x, *params)
    exact = exactly(x.double(), kind, params)
    assert torch.equal(actual.isnan(), expected.isnan())
    if dtype == torch.float64:
        known = exact.isfinite() & (exact.abs() > 1e-300)
        assert ((actual - exact) / exact)[known].abs().max() < 1e-12
        return
    ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    compared = exact.isfinite() & actual.isfinite() & expected.isfinite()
    ours, theirs = (((out.double() - exact).abs() / ulp)[compared].max() for out in (actual, expected))
    assert ours <= max(float(theirs), 0.5) + 1e-3  # in eps, so 0.5 is one rounding


def exactly(x, kind, params):
    """In float64, without the cancellation in torch's formulas of gelu."""
    if kind == "gelu":
        return 0.5 * x * torch.erfc(-x * math.sqrt(0.5))
    if kind == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return STOCK[kind](x, *params)


@pytest.mark.parametrize(("kind", "params"), CALLS)
@each_dtype
def test_pointwise_special_values_are_torchs(kind, params, dtype):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0], dtype=dtype)
    actual, expected = cpu.pointwise(x, kind, params), STOCK[kind](x, *params)
    if kind == "pow" and dtype == torch.float16:
        return  # torch takes the root by std::pow here, and by sqrt for the other dtypes
    if kind.startswith("gelu"):  # torch's own vector body and tail disagree at inf
        actual, expected = actual[x != torch.inf], expected[x != torch.inf]
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert torch.equal(actual.signbit()[actual == 0], expected.signbit()[actual == 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_keeps_dense_strides_and_reads_any(dtype):
    x = randn(6, 10, 14, dtype=dtype)
    whole = cpu.pointwise(x, "silu")
    for view in (x, x.permute(2, 0, 1), x[:, 1::2], x[:, :, 3:], x[:1].expand(5, -1, -1), x[0, 0, 0], x[:0]):
        out = cpu.pointwise(view, "silu")
        assert out.stride() == torch.empty_like(view).stride()
        same_bits(out, cpu.pointwise(view.contiguous(), "silu"))
    same_bits(cpu.pointwise(x.permute(2, 0, 1), "silu"), whole.permute(2, 0, 1))


def test_exp_is_good_for_float64_softmax():
    x = torch.linspace(-300, 300, 3001, dtype=torch.float64)
    pairs = torch.stack([x, torch.zeros_like(x)], 1)
    actual, expected = cpu.row_softmax(pairs, False, x.dtype), torch.softmax(pairs, 1)
    assert ((actual - expected) / expected).abs().max() <= 4 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_survive_the_way_to_float64_and_back(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x[~x.isnan()]
    same_bits(cpu.row_cumsum(x[:, None], dtype)[x != 0, 0], x[x != 0])
    same_bits(cpu.row_cumsum(x[:, None], torch.float64)[:, 0] + 0.0, x.double() + 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_once_not_by_way_of_float32(dtype):
    """A double just above the middle between two neighbours, so close that float32 would take it for the middle."""
    low = torch.tensor(1.0, dtype=dtype)
    high = torch.nextafter(low, torch.tensor(2.0, dtype=dtype))
    middle = (low.double() + high.double()) / 2
    x = torch.stack([middle - 2.0**-40, middle, middle + 2.0**-40])[:, None]
    same_bits(cpu.row_sum(x, dtype), torch.stack([low, low, high]))
    same_bits(cpu.row_sum(-x, dtype), torch.stack([-low, -low, -high]))


# --- odd input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n_cols"), [(0, 0), (0, 5), (4, 0)])
def test_empty_sizes_give_what_the_reference_gives(dtype, rows, n_cols):
    x = torch.empty(rows, n_cols, dtype=dtype)
    for name, kernel in row_kernels(cpu, n_cols, dtype).items():
        if n_cols or not name.endswith("layer_norm"):
            for actual, expected in zip(kernel(x), row_kernels(reference, n_cols, dtype)[name](x), strict=True):
                torch.testing.assert_close(actual, expected, equal_nan=True)
    for shape in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        assert cpu.pointwise(torch.empty(shape, dtype=dtype), "silu").shape == shape


@pytest.mark.parametrize("name", ROW_KERNELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(name, bad, dtype):
    kernel, clean = row_kernels(cpu, 45, dtype)[name], randn(19, 45, dtype=dtype)
    dirty = clean.clone()
    dirty[7, 11] = bad
    others = torch.arange(19) != 7
    for actual, expected in zip(kernel(dirty), kernel(clean), strict=True):
        same_bits(actual[others], expected[others])
    if math.isnan(bad):
        assert all(part[7].isnan().any() for part in kernel(dirty))


def test_logsumexp_of_nan_is_nan_beside_infinity_too():
    x = torch.tensor([[torch.inf, torch.nan], [torch.nan, torch.inf], [torch.inf, 1.0], [-torch.inf, -torch.inf]])
    torch.testing.assert_close(cpu.row_logsumexp(x, x.dtype), torch.logsumexp(x, 1), equal_nan=True)


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_a_row_of_nans_has_the_same_nans_in_any_batch(name):
    for dtype in DTYPES:
        kernel, x = row_kernels(cpu, 45, dtype)[name], randn(9, 45, dtype=dtype)
        x[4, 3], x[4, 9], x[4, 20] = torch.inf, -torch.inf, torch.nan
        for whole, alone in zip(kernel(x), kernel(x[4:5]), strict=True):
            same_bits(whole[4:5], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nan_is_the_same_nan(dtype):
    canonical = torch.tensor([torch.nan], dtype=dtype)
    as_int = INT_OF[canonical.element_size()]
    negative = torch.tensor([-torch.inf], dtype=dtype).view(as_int) + 7  # the sign, and a payload
    same_bits(cpu.pointwise(negative.view(dtype), "silu"), canonical)
    same_bits(cpu.row_cumsum(negative.view(dtype)[None], dtype)[0], canonical)
    same_bits(cpu.gemm(negative.view(dtype)[None, None], canonical[None, None])[0, 0], canonical)


def test_gemm_does_not_read_the_bias_when_beta_is_zero():
    a, b = randn(1, 3, 4), randn(1, 4, 5)
    same_bits(cpu.gemm(a, b, torch.full((1, 3, 5), torch.nan), 2.0, 0.0), cpu.gemm(a, b, None, 2.0))


def test_wrong_input_is_refused_in_a_sentence():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="gemm needs a of shape"):
        cpu.gemm(x[None], x[None])
    with pytest.raises(ValueError, match="every index in"):
        cpu.index_add(x, torch.tensor([2]), x[:1], 1.0)
    with pytest.raises(ValueError, match="offs that ascend"):
        cpu.grouped_gemm(x, torch.ones(1, 3, 3), torch.tensor([3], dtype=torch.int32))
    with pytest.raises(TypeError, match="not torch.int64"):
        cpu.row_sum(x.long(), torch.float32)
    with pytest.raises(ValueError, match="does not know"):
        cpu.pointwise(x, "no such kind")
    with pytest.raises(ValueError, match="pow needs the params"):
        cpu.pointwise(x, "pow")


# --- the build -------------------------------------------------------------------------------------------------------

COPYING_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then exit; fi
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for libraries, and a compiler that copies the library that is built already."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COPYING_COMPILER.format(library=build.build()))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("BATCHINV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_library_is_built_once_into_the_cache_folder(cache, monkeypatch):
    library = build.build()
    assert [library] == list(cache.iterdir())
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.build() == library


@pytest.mark.parametrize("source", sorted(path.name for path in build.FOLDER.iterdir() if path.suffix in (".h", ".cpp")))
def test_a_change_of_any_source_builds_another_library(source, cache, monkeypatch, tmp_path):
    library = build.build()
    folder = shutil.copytree(build.FOLDER, tmp_path / "sources")
    with open(folder / source, "a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(build, "FOLDER", folder)
    assert build.build() != library


def test_a_missing_compiler_is_told_in_a_sentence(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"need a C\+\+17 compiler, and none of no-such-compiler was found\."):
        build.build()


def test_a_failed_compilation_is_told_in_a_sentence(cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="The CPU kernels could not be compiled with `false`"):
        build.build()
    assert not list(cache.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_the_library_shares_the_openmp_runtime_of_torch():
    code = (
        "import torch; from pytest_batchinv.kernels import cpu; cpu.row_sum(torch.ones(300, 300), torch.float32); "
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split('/')[-1]}))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout == "1\n"


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_cols", [1, 37, 2500])
def test_gradients_of_rows_are_those_of_the_reference_and_follow_the_row_alone(dtype, n_cols):
    grad, x, weight = (torch.randn(size, dtype=torch.float64).to(dtype) for size in ((9, n_cols), (9, n_cols), n_cols))
    _, mean, rstd = reference.row_layer_norm(x, weight, None, 1e-5)
    y = reference.row_softmax(x, False, dtype)
    calls = {
        "row_norm_backward": [(grad, x, mean, rstd, weight), (grad, x, None, rstd, None)],
        "row_softmax_backward": [(grad, y, False, dtype), (grad, y.log(), True, dtype)],
    }
    for name, of_name in calls.items():
        for args in of_name:
            found, wanted = getattr(cpu, name)(*args), getattr(reference, name)(*args)
            alone = getattr(cpu, name)(
                *(a[4:5] if isinstance(a, torch.Tensor) and len(a) == 9 and a is not weight else a for a in args)
            )
            if isinstance(found, torch.Tensor):
                found, wanted, alone = (found,), (wanted,), (alone,)
            for a, w in zip(found, wanted, strict=True):
                assert a.dtype == w.dtype
                torch.testing.assert_close(a, w)
            assert torch.equal(found[0][4:5], alone[0])


def test_the_gradient_of_a_weight_is_one_chain_over_the_rows_whatever_the_threads():
    grad, x, rstd = torch.randn(300, 700), torch.randn(300, 700), torch.rand(300)
    chain = torch.zeros(700, dtype=torch.float64)
    for g, z in zip(grad.double(), x.double() * rstd.double()[:, None], strict=True):
        chain = chain + g * z
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert torch.equal(cpu.row_norm_backward(grad, x, None, rstd, None)[1], chain.float())
    finally:
        torch.set_num_threads(threads)
