"""The gradients of the Triton kernels against ``kernels/reference.py``, and that their bits follow a row alone.

Triton's interpreter is chosen before a kernel is defined, so the tests run in a process of their own. Chunks are shorter here
than on a GPU, so that short rows have several.
"""

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv.kernels import cuda, plans, reference
from pytest_batchinv.kernels.cuda import norm, rows

CHILD_ENVIRONMENT = {"TRITON_INTERPRET": "1"}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
few = settings(deadline=None, derandomize=True, max_examples=10)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    plans.forget_plans()
    yield
    plans.forget_plans()


@pytest.fixture
def short_chunks(monkeypatch):
    for module in (rows, norm):
        monkeypatch.setattr(module, "CHUNK", {tl.float32: 128, tl.float64: 128})
    monkeypatch.setattr(rows, "FOLDED_TO", tl.constexpr(64))
    monkeypatch.setattr(norm, "_WHOLE_UP_TO", 128)
    monkeypatch.setattr(norm, "_PART", 128)


def mixed(n_rows, n_cols, dtype):
    """Values of different sizes, so that another order rarely gives the same sum."""
    scale = torch.tensor([1e-2, 1.0, 20.0], dtype=torch.float64)[torch.randint(0, 3, (n_rows, n_cols))]
    return (scale * torch.randn(n_rows, n_cols, dtype=torch.float64)).to(dtype)


def assert_near(got, want):
    for x, y in zip(got, want, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous()
            atol = TOLERANCE[x.dtype] * max(1.0, float(y.double().abs().max()))
            torch.testing.assert_close(x, y, rtol=TOLERANCE[x.dtype], atol=atol)


def norm_inputs(n_rows, n_cols, dtype, is_layer_norm, has_weight=True):
    grad, x, weight = mixed(n_rows, n_cols, dtype), mixed(n_rows, n_cols, dtype), torch.randn(n_cols).to(dtype)
    if is_layer_norm:
        _, mean, rstd = reference.row_layer_norm(x, weight, None, 1e-5)
    else:
        mean, rstd = None, reference.row_rms_norm(x, weight, 1e-5)[1]
    return grad, x, mean, rstd, weight if has_weight else None


KINDS = pytest.mark.parametrize("is_layer_norm", [True, False], ids=["layer_norm", "rms_norm"])


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (19, 100), (9, 300)], ids=str)
def test_the_gradients_of_a_norm_are_those_of_the_reference(size, dtype, is_layer_norm, short_chunks):
    inputs = norm_inputs(*size, dtype, is_layer_norm)
    assert_near(cuda.row_norm_backward(*inputs), reference.row_norm_backward(*inputs))


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_gradient_that_is_not_wanted_is_none_and_changes_no_bit_of_the_others(wants):
    inputs = norm_inputs(17, 40, torch.float32, True)
    every, some = cuda.row_norm_backward(*inputs), cuda.row_norm_backward(*inputs, *wants)
    for wanted, x, y in zip(wants, every, some, strict=True):
        assert torch.equal(x, y) if wanted else y is None


@KINDS
def test_a_norm_without_weight_and_one_without_rows(is_layer_norm):
    inputs = norm_inputs(5, 40, torch.float32, is_layer_norm, has_weight=False)
    assert_near(cuda.row_norm_backward(*inputs), reference.row_norm_backward(*inputs))
    empty = [None if x is None else x[:0] for x in inputs]
    grad_x, of_weight, of_bias = cuda.row_norm_backward(*empty)
    assert grad_x.shape == (0, 40) and not of_weight.any() and not of_bias.any()


@few
@given(n_cols=st.sampled_from([7, 130]), n_rows=st.integers(1, 20), row=st.integers(0, 19), seed=st.integers(0, 99))
def test_the_gradient_of_a_row_has_the_same_bits_alone_with_any_strides(n_cols, n_rows, row, seed):
    torch.manual_seed(seed)
    grad, x, mean, rstd, weight = norm_inputs(n_rows, n_cols, torch.float32, True)
    row %= n_rows
    in_batch = cuda.row_norm_backward(grad, x, mean, rstd, weight)[0]
    strided = torch.empty(1, 2 * n_cols)[:, ::2].copy_(x[row : row + 1])
    alone = cuda.row_norm_backward(
        grad[row : row + 1].clone(), strided, mean[row : row + 1].clone(), rstd[row : row + 1].clone(), weight
    )[0]
    assert torch.equal(in_batch[row], alone[0])
    for log in (False, True):
        y = reference.row_softmax(x, log, x.dtype)
        in_batch = cuda.row_softmax_backward(grad, y, log, x.dtype)
        alone = cuda.row_softmax_backward(grad[row : row + 1].clone(), y[row : row + 1].t().contiguous().t(), log, x.dtype)
        assert torch.equal(in_batch[row], alone[0])


def weight_gradient_in_the_written_order(grad, z):
    """Chains of eight rows, ascending; then neighbours of these, level by level. Every step rounded to float32."""
    n_groups = -(-len(grad) // 8)
    terms = torch.nn.functional.pad(grad * z, (0, 0, 0, 8 * n_groups - len(grad))).view(n_groups, 8, -1)
    sums = torch.zeros_like(terms[:, 0])
    for i in range(8):
        sums = sums + terms[:, i]
    sums = torch.nn.functional.pad(sums, (0, 0, 0, (1 << (n_groups - 1).bit_length()) - n_groups))
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    return sums[0]


@pytest.mark.parametrize("n_rows", [1, 8, 9, 70, 300])
def test_the_gradient_of_a_weight_is_summed_in_the_written_order(n_rows):
    grad, x, _, rstd, weight = norm_inputs(n_rows, 6, torch.float32, False)
    found = cuda.row_norm_backward(grad, x, None, rstd, weight)[1]
    assert torch.equal(found, weight_gradient_in_the_written_order(grad, x * rstd[:, None]))


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (19, 100), (3, 300)], ids=str)
def test_the_gradient_of_softmax_is_that_of_the_reference(size, dtype, log, short_chunks):
    grad, y = mixed(*size, dtype), reference.row_softmax(mixed(*size, dtype), log, dtype)
    found = cuda.row_softmax_backward(grad, y, log, dtype)
    assert_near([found], [reference.row_softmax_backward(grad, y, log, dtype)])


@pytest.mark.parametrize("dtype, n_terms", [(torch.float32, 33), (torch.bfloat16, 300), (torch.float32, 260)])
def test_sums_over_the_rows_have_the_bits_of_sums_of_the_transposed_matrix(dtype, n_terms, short_chunks):
    x = mixed(n_terms, 32, dtype)
    assert rows.lie_in_columns(plans.describe(x.t()))
    for kernel in (cuda.row_sum, cuda.row_mean):
        assert torch.equal(kernel(x.t(), dtype), kernel(x.t().contiguous(), dtype))
    assert torch.equal(cuda.row_sum(x.t(), torch.float32)[:3], cuda.row_sum(x.t()[:3], torch.float32))


# --- attention -------------------------------------------------------------------------------------------------------


def attention_inputs(B, H, Hkv, Sq, Skv, D, Dv=None, dtype=torch.float32, mask=None, is_causal=True):
    q, k, v = (randn(B, h, S, d, dtype=dtype) for h, S, d in ((H, Sq, D), (Hkv, Skv, D), (Hkv, Skv, Dv or D)))
    mask = None if mask is None else mask.expand(B, H, Sq, Skv)
    out, lse = reference.attention(q, k, v, mask, is_causal, 0.3)
    return randn(*out.shape, dtype=dtype), q, k, v, mask, out, lse, is_causal, 0.3


def randn(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def visible(S, begin, end):
    """The mask of a row of ``end - begin`` tokens with padding before and after it, causal."""
    mask = torch.zeros(S, S, dtype=torch.bool)
    mask[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    return mask


ATTENTIONS = {
    "causal": ((1, 2, 1, 40, 40, 16), {}),
    "grouped heads, of odd dims": ((2, 4, 2, 33, 33, 20, 12), {}),
    "other keys": ((1, 2, 2, 5, 50, 16), {"is_causal": False}),
    "left padding": ((1, 2, 1, 40, 40, 16), {"mask": visible(40, 7, 40), "is_causal": False}),
    "a mask with holes": ((1, 2, 1, 40, 40, 16), {"mask": torch.arange(1600).view(40, 40) % 3 > 0, "is_causal": False}),
    "a mask of keys, and causal": ((1, 2, 1, 40, 40, 16), {"mask": torch.arange(40)[None] < 30}),
}


@pytest.mark.parametrize(("sizes", "options"), ATTENTIONS.values(), ids=ATTENTIONS)
def test_the_gradients_of_attention_are_those_of_the_reference(sizes, options):
    inputs = attention_inputs(*sizes, **options)
    assert_near(cuda.attention_backward(*inputs), reference.attention_backward(*inputs))


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_a_gradient_of_attention_that_is_not_wanted_is_none_and_changes_no_bit_of_the_others(wants):
    inputs = attention_inputs(1, 2, 1, 40, 40, 16)
    every, some = cuda.attention_backward(*inputs), cuda.attention_backward(*inputs, *wants)
    for wanted, x, y in zip((wants[0], wants[1], wants[1]), every, some, strict=True):
        assert torch.equal(x, y) if wanted else y is None


def test_the_gradients_of_attention_of_16_bits_are_near_the_references():
    inputs = attention_inputs(1, 2, 1, 70, 70, 16, dtype=torch.float16)
    for found, wanted in zip(cuda.attention_backward(*inputs), reference.attention_backward(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("before", "after"), [(0, 9), (7, 0), (13, 21)])
def test_padding_and_neighbours_change_no_bit_of_the_gradients_of_attention(before, after):
    """The queries of the padding have no gradient; keys of the padding are hidden, whatever they hold."""
    length = 37
    grad, q, k, v, _, out, lse, *how = attention_inputs(1, 2, 1, length, length, 16)
    alone = cuda.attention_backward(grad, q, k, v, None, out, lse, *how)

    def padded(x, filled):
        x = torch.nn.functional.pad(x, (0, 0, before, after)) if x.dim() == 4 else torch.nn.functional.pad(x, (before, after))
        beside = torch.randn(x.shape) if filled else torch.zeros(x.shape)
        both = torch.cat([beside, x])
        if filled:
            both[1, :, :before], both[1, :, before + length :] = 3.0, -5.0
        return both

    mask = torch.stack(
        [
            visible(before + length + after, 0, before + length + after),
            visible(before + length + after, before, before + length),
        ]
    )
    batch = [padded(x, filled) for x, filled in ((grad, False), (q, True), (k, True), (v, True), (out, False))]
    lse = torch.cat(
        [torch.zeros(1, 2, before + length + after), torch.nn.functional.pad(lse, (before, after), value=-torch.inf)]
    )
    mask = mask[:, None].expand(2, 2, -1, -1)
    in_batch = cuda.attention_backward(*batch[:4], mask, batch[4], lse, False, 0.3)
    for x, y in zip(in_batch, alone, strict=True):
        assert torch.equal(x[1:, :, before : before + length], y)
        assert not x[1, :, :before].any() and not x[1, :, before + length :].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_reaches_no_other_row(value):
    grad, x, mean, rstd, weight = norm_inputs(9, 40, torch.float32, True)
    y = reference.row_softmax(x, False, x.dtype)
    bad = grad.clone()
    bad[4, 3] = value
    others = [i for i in range(9) if i != 4]
    for kernel in (
        lambda g: cuda.row_norm_backward(g, x, mean, rstd, weight)[0],
        lambda g: cuda.row_softmax_backward(g, y, False, x.dtype),
    ):
        assert torch.equal(kernel(bad)[others], kernel(grad)[others])
        assert not kernel(bad)[4].isfinite().all()
