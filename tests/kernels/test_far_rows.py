"""Rows keep their bits and values beside NaN and infinity, 2^31 elements apart, with a bias that beta leaves out."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.kernels import table
from pytest_batchinv.kernels.aten import products
from pytest_batchinv.mode import stock_torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
WIDTH = 40


@pytest.fixture(params=DEVICES, scope="module")
def device(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def the_mode():
    with batch_invariant_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_into_another_dtype_are_products_in_that_dtype(dtype):
    a, b = (torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16) for seed in range(2))
    bias = torch.ones(3, dtype=dtype)
    assert torch.equal(products.mm_dtype(a[0], b[0], torch.float32), a[0].float() @ b[0].float())
    assert torch.equal(
        products.addmm_dtype(bias, a[0], b[0], torch.float32), torch.addmm(bias.float(), a[0].float(), b[0].float())
    )
    assert torch.equal(products.bmm_dtype(a, b, torch.float32), a.float() @ b.float())
    expected = torch.baddbmm(bias.float(), a.float(), b.float())
    assert torch.equal(products.baddbmm_dtype(bias, a, b, torch.float32), expected)


def row_functions(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Functions of [rows, WIDTH] whose results have one entry a row."""

    def randn(*shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)

    weight, bias, scale = randn(24, WIDTH, seed=1), randn(24, seed=2), randn(WIDTH, seed=3)
    experts = randn(2, WIDTH, 24, seed=4)

    def grouped(x):
        ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32, device=device)
        return torch.nn.functional.grouped_mm(x.contiguous(), experts, offs=ends)

    def attention(x):
        q, k, v = x.unflatten(1, (1, 5, 8)), x.flip(1).unflatten(1, (1, 5, 8)), x.roll(3, 1).unflatten(1, (1, 5, 8))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def index_added(x):
        places = torch.arange(len(x), device=device).flip(0)
        return torch.index_add(x.flip(0), 0, places, x, alpha=2).flip(0)

    F, aten_ops = torch.nn.functional, torch.ops.aten
    functions = {
        "mm": lambda x: x @ weight.t(),
        "addmm": lambda x: torch.addmm(bias, x, weight.t(), beta=2, alpha=0.5),
        "_addmm_activation": lambda x: torch._addmm_activation(bias, x, weight.t(), use_gelu=True),
        "linear": lambda x: F.linear(x, weight, bias),
        "bmm": lambda x: torch.bmm(x[:, None], weight.t().expand(len(x), -1, -1)),
        "bmm with a shared left operand": lambda x: torch.bmm(weight.expand(len(x), -1, -1), x[:, :, None]),
        "baddbmm": lambda x: torch.baddbmm(bias.expand(len(x), 1, 24), x[:, None], weight.t().expand(len(x), -1, -1)),
        "mv": lambda x: torch.mv(x, scale),
        "addmv": lambda x: torch.addmv(bias[:1], x, scale),
        "_grouped_mm": grouped,
        "convolution": lambda x: F.conv1d(x[:, None], weight[:4, None, :3], bias[:4], padding=1),
        "sum": lambda x: x.sum(1),
        "mean": lambda x: x.mean(1),
        "var_mean": lambda x: torch.var_mean(x, 1),
        "std_mean": lambda x: torch.std_mean(x, 1),
        "logsumexp": lambda x: torch.logsumexp(x, 1),
        "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, 3, 1),
        "norm": lambda x: aten_ops.norm.ScalarOpt_dim(x, 2, [1]),
        "cumsum": lambda x: x.cumsum(1),
        "_softmax": lambda x: x.softmax(1),
        "_log_softmax": lambda x: x.log_softmax(1),
        "topk": lambda x: torch.topk(x, 5),
        "native_layer_norm": lambda x: F.layer_norm(x, (WIDTH,), scale, scale),
        "native_group_norm": lambda x: F.group_norm(x.unflatten(1, (8, 5)), 2),
        "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), scale),
        "scaled_dot_product_attention": attention,
        "index_add": index_added,
        "scatter_add": lambda x: torch.scatter_add(x, 1, torch.arange(WIDTH, device=device).flip(0).expand(len(x), -1), x),
    }
    pointwise = {"softplus": F.softplus, "gelu": F.gelu, "mish": F.mish, "silu": F.silu, "elu": F.elu}
    for name in table.POINTWISE:
        functions[name] = pointwise.get(name) or getattr(torch, name.split(".")[0])
    functions["pow.Tensor_Scalar"] = lambda x: torch.pow(x, 1.7)
    return functions


def bits(result: Any) -> list[torch.Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    of_size = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return [x.detach().contiguous().view(of_size[x.element_size()]) for x in tensors]


ROW_FUNCTIONS = tuple(row_functions("cpu", torch.float32))


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_nan_and_infinity_in_one_row_leave_the_bits_of_the_others(name, device):
    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(
        rows=st.integers(2, 70),
        seed=st.integers(0, 999),
        bad=st.sampled_from([math.nan, math.inf, -math.inf]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    def search(rows, seed, bad, dtype):
        function = row_functions(device, dtype)[name]
        clean = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        dirty, row = clean.clone(), seed % rows
        dirty[row, seed % WIDTH :: 7] = bad
        others = torch.arange(rows, device=device) != row
        for a, e in zip(bits(function(dirty)), bits(function(clean)), strict=True):
            assert torch.equal(a[others], e[others])

    search()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bias_that_beta_leaves_out_is_not_read(bad, device):
    a, b = torch.randn(2, 3, 4, device=device), torch.randn(2, 4, 5, device=device)
    bias = torch.full((3, 5), bad, device=device)
    assert torch.equal(torch.addmm(bias, a[0], b[0], beta=0), a[0] @ b[0])
    assert torch.equal(torch.baddbmm(bias.expand(2, 3, 5), a, b, beta=0), a @ b)
    assert torch.addbmm(bias, a, b, beta=0).isfinite().all()
    assert torch.addmv(bias[0, :3], a[0], b[0, :, 0], beta=0).isfinite().all()


def many_operators(x, weight, bias):
    y = torch.addmm(bias, x, weight, beta=0)
    return (
        y, x.softmax(1), x.sum(0), x.mean(), x.cumsum(1), torch.var(x, 1), torch.topk(x, 2).values,
        torch.nn.functional.layer_norm(x, (x.shape[1],)), torch.nn.functional.silu(x), (x[:, :0] @ weight[:0]),
    )  # fmt: skip


def flat(result: Any) -> list[torch.Tensor]:
    return [y for x in result for y in (x if isinstance(x, tuple) else (x,))]


@pytest.mark.parametrize("rows", [3, 0])
def test_compiled_code_gives_torchs_result_for_odd_input(rows, device):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((rows, 7), (7, 5)))
    x[1:2, 2] = math.nan
    x[2:3, 4] = -math.inf
    bias = torch.full((5,), math.nan, device=device)
    eager = flat(many_operators(x, weight, bias))
    compiled = flat(torch.compile(many_operators)(x, weight, bias))
    with stock_torch():
        stock = flat(many_operators(x, weight, bias))
    for a, c, e in zip(eager, compiled, stock, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert torch.equal(bits(a)[0], bits(c)[0])


FAR = 2**31 + 256


@pytest.fixture(scope="module")
def far_apart(device):
    """Two rows, 2^31 + 256 elements apart. The memory between them (4 GiB) is never touched, so a CPU does not provide it."""
    memory = torch.empty(FAR + WIDTH, dtype=torch.bfloat16, device=device)
    rows = memory.as_strided((2, WIDTH), (FAR, 1))
    rows.copy_(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)))
    return rows


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_rows_2_31_elements_apart_have_the_bits_of_neighbours(name, device, far_apart):
    function = row_functions(device, torch.bfloat16)[name]
    for a, e in zip(bits(function(far_apart)), bits(function(far_apart.contiguous())), strict=True):
        assert torch.equal(a, e)


def test_columns_2_31_elements_apart_have_the_bits_of_neighbours(device, far_apart):
    x, near = far_apart.t(), far_apart.t().contiguous()
    for function in (torch.mm, torch.Tensor.matmul):
        assert torch.equal(bits(function(near.t(), x))[0], bits(function(near.t(), near))[0])
    for function in (lambda y: y.sum(1), lambda y: y.softmax(1), lambda y: y.cumsum(1), lambda y: y.logsumexp(1)):
        assert torch.equal(bits(function(x))[0], bits(function(near))[0])


def test_a_sum_of_more_than_2_31_values(device):
    x = torch.ones((), device=device).expand(FAR)
    assert x.sum().item() == FAR and x.mean().item() == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="input and result of 4 GiB each: too much for a CPU machine's 20 s")
@pytest.mark.parametrize("function", [lambda x: x.softmax(1), lambda x: x @ torch.eye(512).to(x), lambda x: x.cumsum(1)])
def test_the_last_of_more_than_2_31_elements(function):
    rows = FAR // 512 + 1
    x = torch.randn(rows // 1024 + 1, 512, device="cuda", dtype=torch.bfloat16).repeat(1024, 1)[-rows:]
    assert x.numel() > 2**31
    whole = function(x)
    assert torch.equal(bits(whole[-3:])[0], bits(function(x[-3:].clone()))[0])
