"""Complex numbers in the mode: torch's results, and the same bits for a row alone and in a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.kernels.complex_parts import magnitude

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.complex64, torch.complex128]
N_COLS = 67
FUNCTIONS = {
    "mm": lambda x, w: torch.mm(x, w),
    "mm of a conjugate": lambda x, w: torch.mm(x.conj(), w.mH.mT),
    "addmm": lambda x, w: torch.addmm(w[0], x, w, alpha=2 - 1j, beta=0.5j),
    "bmm": lambda x, w: torch.bmm(x[:, None], w.expand(len(x), -1, -1)),
    "linear": lambda x, w: F.linear(x, w, w[0]),
    "mv": lambda x, w: torch.mv(x, w[0]),
    "conv1d": lambda x, w: F.conv1d(x[:, None], w[:2, None, :3]),
    "sum": lambda x, w: x.sum(-1),
    "mean": lambda x, w: x.mean(-1),
    "cumsum": lambda x, w: x.cumsum(-1),
    "var": lambda x, w: x.var(-1),
    "std_mean": lambda x, w: torch.stack(torch.std_mean(x, -1)),
    **{f"norm {p}": lambda x, w, p=p: torch.linalg.vector_norm(x, p, -1) for p in (0, 1, 2, 3, float("inf"))},
    "index_add": lambda x, w: x.index_add(1, torch.zeros(5, dtype=torch.int64, device=x.device), x[:, 3:8], alpha=2j),
    "scatter_add": lambda x, w: x.scatter_add(1, torch.zeros_like(x, dtype=torch.int64), x * 2),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
on_each_device = pytest.mark.parametrize("device", DEVICES)


def operands(n_rows, dtype, device):
    torch.manual_seed(0)
    return torch.randn(n_rows, N_COLS, dtype=dtype).to(device), torch.randn(N_COLS, N_COLS, dtype=dtype).to(device)


@each_function
@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_complex_functions_give_torchs_results(function, dtype, device):
    x, w = operands(9, dtype, device)
    want = function(x, w)
    with batch_invariant_mode():
        got = function(x, w)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=100 * eps, atol=100 * eps * want.abs().max().item())


@each_function
@on_each_device
def test_complex_rows_have_the_same_bits_alone_and_in_a_batch(function, device):
    """Also where their neighbours are NaN or infinite."""
    x, w = operands(33, torch.complex64, device)
    noise = torch.tensor([torch.nan, torch.inf], device=device)
    with batch_invariant_mode():
        whole = function(x, w)
        rows = -1 if function is FUNCTIONS["std_mean"] else 0
        for row in (0, 7, 32):
            assert torch.equal(function(x[row : row + 1], w).select(rows, 0), whole.select(rows, row))
        x[5] = torch.complex(*noise)
        others = [row for row in range(33) if row != 5]
        where = torch.tensor(others, device=device)
        assert torch.equal(function(x, w).index_select(rows, where), whole.index_select(rows, where))


def test_complex_products_are_differentiable_and_the_same_in_compiled_code():
    x, w = operands(5, torch.complex64, "cpu")
    x.requires_grad_()
    with batch_invariant_mode():
        eager, compiled = (call(x, w) for call in (lambda x, w: (x @ w).sum(-1), torch.compile(lambda x, w: (x @ w).sum(-1))))
        assert torch.equal(eager, compiled)
        eager.abs().sum().backward()
    got, x.grad = x.grad, None
    (x @ w).sum(-1).abs().sum().backward()
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize(("M", "K", "N"), [(4, 3, 0), (0, 3, 2), (4, 0, 2), (0, 0, 0)])
@pytest.mark.parametrize(
    "product", [torch.matmul, lambda a, b: torch.bmm(a[None], b[None]), torch.addmm], ids=["matmul", "bmm", "addmm"]
)
def test_complex_products_with_an_empty_side_have_torchs_results_and_gradients(product, M, K, N):
    def results():
        operands = [torch.ones(shape, dtype=torch.complex64, requires_grad=True) for shape in ((M, K), (K, N))]
        if product is torch.addmm:
            operands.insert(0, torch.ones(M, N, dtype=torch.complex64, requires_grad=True))
        out = product(*operands)
        return out, *torch.autograd.grad(out.abs().sum(), operands)

    want = results()
    with batch_invariant_mode():
        got = results()
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@settings(deadline=None)
@given(*[st.lists(st.floats(width=64), min_size=40, max_size=40)] * 2)
def test_magnitudes_are_near_torchs_and_follow_no_place_in_a_vector(re, im):
    x = torch.complex(torch.tensor(re, dtype=torch.float64), torch.tensor(im, dtype=torch.float64))
    got, want = magnitude(x), x.abs()
    torch.testing.assert_close(got, want, rtol=1e-15, atol=1e-320, equal_nan=True)
    for place in range(0, 40, 7):
        assert torch.equal(magnitude(x[place : place + 1]).nan_to_num(nan=-1), got[place : place + 1].nan_to_num(nan=-1))
