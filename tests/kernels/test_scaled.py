"""Products of scaled 8-bit floats: values, the order of the sums, a row alone and in any batch, what is refused and how."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pytest_batchinv import assert_batch_invariant, batch_invariant_mode, check_negative_control
from pytest_batchinv.compare import first_difference
from pytest_batchinv.kernels import cpu, reference
from pytest_batchinv.kernels.aten import scaled
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.mode import stock_torch
from pytest_batchinv.subjects.rows import RowsSubject

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
RECIPES = ("rows", "blocks of a row", "blocks of 128 by 128")
MIXES = ((E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2))

seeds = st.integers(0, 2**20)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def _mode():
    with batch_invariant_mode(), torch.no_grad():
        yield


def blocks(size):
    return -(-size // 128)


def operands(M, N, K, recipe="rows", dtypes=(E4M3, E4M3), seed=0):
    """a [M, K], b [K, N] and their scales as torch's first version takes them."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(M, K, generator=generator).to(dtypes[0])
    b = torch.randn(N, K, generator=generator).to(dtypes[1]).t()
    shapes = {
        "rows": ((M, 1), (1, N)),
        "blocks of a row": ((M, blocks(K)), (blocks(K), N)),
        "blocks of 128 by 128": ((M, blocks(K)), (blocks(K), blocks(N))),
    }[recipe]
    return a, b, *(torch.rand(shape, generator=generator).add_(0.1) for shape in shapes)


def strided(x, kind):
    """The same values with other strides."""
    if kind == "transposed":
        return x.t().contiguous().t()
    if kind == "stepped":
        return torch.cat([x, x], 1).view(x.shape[0], 2, x.shape[1]).mT.contiguous()[..., 1]
    return x


# --- values and the order of the sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("out_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("size", [(1, 16, 16), (33, 70, 300), (130, 64, 2048)], ids=str)
def test_a_product_is_no_less_accurate_than_torchs_own(size, out_dtype, dtypes):
    a, b, scale_a, scale_b = operands(*size, dtypes=dtypes)
    exact = (a.double() @ b.double()) * (scale_a.double() * scale_b.double())

    def error():
        got = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=out_dtype).double()
        return ((got - exact).square().mean() / exact.square().mean()).sqrt()

    mine = error()
    with stock_torch():
        assert mine <= error() * 1.001  # the roundings of the result are most of it, and the same but for a few
    assert mine < 2 * torch.finfo(out_dtype).eps


def by_hand(a, b, scale_a, scale_b, bias):
    """The order of the contract, one rounding of float32 at a time: products of 8-bit floats are exact in float32."""
    a, b, scale_a, scale_b = (x.float().numpy() for x in (a, b, scale_a, scale_b))
    groups, acc = scale_a.shape[1], np.zeros((a.shape[0], b.shape[1]), np.float32)
    if scale_b.shape[1] != b.shape[1]:
        scale_b = scale_b.repeat(128, 1)[:, : b.shape[1]]
    for start in range(0, a.shape[1], 128):
        part, group = np.zeros_like(acc), start // 128
        for k in range(start, min(start + 128, a.shape[1])):
            part = part + a[:, k, None] * b[None, k]
        if groups > 1:
            part = part * (scale_a[:, group, None] * scale_b[None, group])
        acc = acc + part
    acc = acc * (scale_a * scale_b) if groups == 1 else acc
    return torch.from_numpy(acc) + bias


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [(3, 5, 128), (7, 130, 300), (2, 3, 1000)], ids=str)
def test_each_128_terms_are_one_sum_and_these_are_added_in_order(size, recipe):
    a, b, scale_a, scale_b = operands(*size, recipe)
    bias = torch.randn(size[1])
    for out_dtype in (FP32, BF16, FP16):
        got = torch._scaled_mm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
        assert first_difference(got, by_hand(a, b, scale_a, scale_b, bias).to(out_dtype)) is None


def test_a_sum_over_k_that_cancels_shows_where_the_blocks_end():
    """2^16 and -2^16 in different blocks: what is added to one of them there is rounded, and within its block it is not."""
    a, b = torch.zeros(1, 256), torch.ones(256, 1)
    a[0, [0, 1, 128]] = torch.tensor([256.0, 2.0**-8, -256.0])
    b[[0, 1, 128], 0] = torch.tensor([256.0, 2.0**-8, 256.0])
    one = torch.ones(1, 1)
    assert cpu.scaled_gemm(a.to(E4M3), b.to(E4M3), one, one, None, FP32).item() == 0
    a[0, [0, 1, 128]] = torch.tensor([256.0, -256.0, 2.0**-8])
    b[[0, 1, 128], 0] = torch.tensor([256.0, 256.0, 2.0**-8])
    assert cpu.scaled_gemm(a.to(E4M3), b.to(E4M3), one, one, None, FP32).item() == 2.0**-16


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_kernels_are_near_the_reference(recipe):
    for size in ((1, 1, 1), (5, 129, 130), (130, 33, 257)):
        *four, bias = *operands(*size, recipe), torch.randn(size[1])
        got, want = (kernels.scaled_gemm(*four, bias, FP32) for kernels in (cpu, reference))
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_result_in_8_bits_is_the_float32_one_rounded_once_and_the_largest_number_beyond_it(dtype):
    a, b, scale_a, scale_b = operands(20, 16, 300)
    scale_a[3] = torch.finfo(dtype).max
    wide = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=FP32)
    got = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype)
    most = torch.finfo(dtype).max
    assert (wide[3].abs() > most).any()
    assert torch.equal(got.view(torch.uint8), wide.clamp(-most, most).to(dtype).view(torch.uint8))
    if dtype == E4M3:  # a's own dtype is what no out_dtype means
        assert torch.equal(torch._scaled_mm(a, b, scale_a, scale_b).view(torch.uint8), got.view(torch.uint8))


# --- a row alone and in any batch ----------------------------------------------------------------------------------------


@examples(60)
@given(
    M=st.integers(1, 150),
    N=st.sampled_from([1, 3, 16, 33, 128, 130]),
    K=st.sampled_from([1, 16, 100, 128, 129, 400]),
    recipe=st.sampled_from(RECIPES),
    dtypes=st.sampled_from(MIXES),
    out_dtype=st.sampled_from([FP32, BF16, FP16, E4M3]),
    layouts=st.tuples(*[st.sampled_from(["rows", "transposed", "stepped"])] * 3),
    threads=st.sampled_from([1, 2]),
    seed=seeds,
    data=st.data(),
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(M, N, K, recipe, dtypes, out_dtype, layouts, threads, seed, data):
    a, b, scale_a, scale_b = operands(M, N, K, recipe, dtypes, seed)
    bias = data.draw(st.sampled_from([None, torch.linspace(-2, 2, N), torch.linspace(-2, 2, N).to(BF16)]))
    chosen = data.draw(st.lists(st.integers(0, M - 1), min_size=1, max_size=8))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        in_batch = torch._scaled_mm(
            strided(a, layouts[0]), strided(b, layouts[1]), strided(scale_a, layouts[2]), scale_b, bias, out_dtype=out_dtype
        )
    finally:
        torch.set_num_threads(before)
    several = torch._scaled_mm(a[chosen], b, scale_a[chosen], scale_b, bias, out_dtype=out_dtype)
    assert torch.equal(several.view(torch.uint8), in_batch[chosen].contiguous().view(torch.uint8))
    for row in chosen[:3]:
        alone = torch._scaled_mm(a[row : row + 1], b, scale_a[row : row + 1], scale_b, bias, out_dtype=out_dtype)
        assert torch.equal(alone.view(torch.uint8), in_batch[row : row + 1].view(torch.uint8))


def rows_and_layer(dtype=BF16):
    """A pool of rows, and a linear layer whose rows are scaled each by its own largest value."""
    torch.manual_seed(0)
    weight = torch.randn(48, 200)
    scale_b = (weight.abs().amax(1, keepdim=True) / 448).t().contiguous()
    b = (weight / scale_b.t()).to(E4M3).t()

    def layer(x):
        scale_a = x.abs().amax(1, keepdim=True) / 448
        return torch._scaled_mm((x / scale_a).to(E4M3), b, scale_a, scale_b, out_dtype=dtype)

    return torch.randn(40, 200), layer


def test_a_layer_with_a_scale_for_each_row_holds_i_and_stock_torch_does_not():
    rows, layer = rows_and_layer(FP32)
    assert assert_batch_invariant(layer, rows, relations=("R", "S", "I"), max_examples=20).verdict == "equal"
    with stock_torch():
        assert check_negative_control(RowsSubject(layer, [rows]), "I").verdict == "caught"


class Float8Linear(torch.autograd.Function):
    """As trainers in 8 bits have it: three products, each with scales of rows and columns."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return product(grad, weight), product(grad.t(), x)


def product(a, b):
    scale_a = a.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
    scale_b = b.abs().amax(0, keepdim=True).float().clamp(min=1e-12) / 448
    a, b = (a / scale_a).to(E4M3), (b / scale_b).to(E4M3)
    return torch._scaled_mm(a, b.t().contiguous().t(), scale_a.contiguous(), scale_b.contiguous(), out_dtype=torch.float32)


def test_a_linear_layer_in_8_bits_holds_i_and_g():
    torch.manual_seed(0)
    rows, weight = torch.randn(24, 96), torch.randn(48, 96)
    with torch.enable_grad():
        record = assert_batch_invariant(
            lambda x: Float8Linear.apply(x, weight).tanh(), rows, relations=("I", "G"), max_examples=15
        )
    assert (record.relation, record.verdict) == ("G", "equal")
    assert record.ops.covered["aten::_scaled_mm"] and not record.ops.bypassed


def test_gradients_of_its_weights_are_the_same_again():
    torch.manual_seed(0)
    x, weight = torch.randn(24, 96), torch.randn(48, 96).requires_grad_()
    with torch.enable_grad():
        grads = [torch.autograd.grad(Float8Linear.apply(x, weight).square().sum(), weight)[0] for _ in range(2)]
    assert first_difference(*grads) is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_and_infinity_reach_no_other_row(recipe):
    a, b, scale_a, scale_b = operands(20, 33, 300, recipe, (E5M2, E4M3))
    want = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=BF16)
    bad = a.clone()
    bad[7, 3], bad[9, 200], scale_a[11, 0] = float("nan"), float("inf"), float("nan")
    got = torch._scaled_mm(bad, b, scale_a, scale_b, out_dtype=BF16)
    assert got[7].isnan().all() and not got[9].isfinite().any() and got[11].isnan().all()
    assert len(got[[7, 11]].view(torch.int16).unique()) == 1  # one NaN, wherever it stands
    others = [row for row in range(20) if row not in (7, 9, 11)]
    assert first_difference(got[others], want[others]) is None


@pytest.mark.parametrize("size", [(0, 4, 20), (3, 0, 20), (3, 4, 0), (0, 0, 0)], ids=str)
def test_products_of_nothing_give_what_torch_gives(size):
    a, b, scale_a, scale_b = operands(*size)
    bias = torch.ones(size[1], dtype=BF16)
    for added in (None, bias):
        got = torch._scaled_mm(a, b, scale_a, scale_b, added, out_dtype=BF16)
        with stock_torch():
            want = torch._scaled_mm(a, b, scale_a, scale_b, added, out_dtype=BF16)
        assert first_difference(got, want) is None
        assert got.shape == (size[0], size[1])


def test_fast_accumulation_changes_no_bit():
    a, b, scale_a, scale_b = operands(5, 32, 300)
    slow, fast = (torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=FP32, use_fast_accum=fast) for fast in (False, True))
    assert first_difference(slow, fast) is None


def test_one_row_may_have_one_scale_and_has_the_bits_of_a_row_of_its_own():
    a, b, scale_a, _ = operands(1, 32, 300)
    one = torch.tensor(0.7)
    want = torch._scaled_mm(a, b, scale_a, one.expand(1, 32).contiguous(), out_dtype=BF16)
    assert first_difference(torch._scaled_mm(a, b, scale_a, one, out_dtype=BF16), want) is None
    tensor_wise = F.ScalingType.TensorWise
    assert first_difference(F.scaled_mm(a, b, scale_a, tensor_wise, one, tensor_wise), want) is None


# --- the second version ---------------------------------------------------------------------------------------------------


def outer_major(x):
    return x.t().contiguous().t()


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_versions_give_the_same_bits(recipe):
    a, b, scale_a, scale_b = operands(9, 256, 640, recipe)
    want = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=BF16)
    kinds = F.ScalingType
    padded = torch.cat([scale_b, torch.full((3, scale_b.shape[1]), torch.nan)])  # what torch wants behind the last block of K
    calls = {
        "rows": (scale_a, kinds.RowWise, scale_b, kinds.RowWise),
        "blocks of a row": (outer_major(scale_a), kinds.BlockWise1x128, outer_major(scale_b.t()), kinds.BlockWise1x128),
        "blocks of 128 by 128": (outer_major(scale_a), kinds.BlockWise1x128, outer_major(padded), kinds.BlockWise128x128),
    }
    assert first_difference(F.scaled_mm(a, b, *calls[recipe]), want) is None


def test_a_row_has_the_same_bits_whether_its_scales_are_of_rows_or_of_the_one_block():
    """A K of up to 128 is one block: then the shapes of both recipes may be the same."""
    a, b, scale_a, scale_b = operands(9, 64, 128)
    kinds = F.ScalingType
    of_rows = F.scaled_mm(a, b, scale_a, kinds.RowWise, scale_b, kinds.RowWise)
    of_blocks = F.scaled_mm(a, b, scale_a, kinds.BlockWise1x128, scale_b.t(), kinds.BlockWise1x128)
    assert first_difference(of_rows, of_blocks) is None


@pytest.mark.parametrize("out_dtype", [None, FP32, BF16])
def test_out_takes_the_dtype_that_it_is_given_or_gives_it(out_dtype):
    a, b, scale_a, scale_b = operands(5, 32, 300)
    dtype = out_dtype or FP32
    want = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype)
    by_place = torch._scaled_mm(a, b, scale_a, scale_b, None, None, out_dtype, out=torch.empty(0, dtype=dtype))
    by_name = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=out_dtype, out=torch.empty(5, 32, dtype=dtype))
    second = torch._scaled_mm_v2(a, b, [scale_a], [1], [], [scale_b], [1], [], None, out_dtype, out=torch.empty(0, dtype=dtype))
    for got in (by_place, by_name, second):
        assert first_difference(got, want) is None


# --- what is wrong, and what is refused -----------------------------------------------------------------------------------

A, B, SA, SB = operands(8, 32, 256)
ONE = torch.tensor(1.0)
WRONG = {
    "a vector": (lambda: torch._scaled_mm(A[0], B, ONE, ONE), RuntimeError),
    "another K": (lambda: torch._scaled_mm(A[:, :48], B, SA, SB), RuntimeError),
    "operands in bf16": (lambda: torch._scaled_mm(A.to(BF16), B.to(BF16), SA, SB), ValueError),
    "one operand in bf16": (lambda: torch._scaled_mm(A, B.to(BF16), SA, SB), ValueError),
    "scales in fp64": (lambda: torch._scaled_mm(A, B, SA.double(), SB.double()), ValueError),
    "a scale too few": (lambda: torch._scaled_mm(A, B, SA[:7], SB), ValueError),
    "a column's scale too few": (lambda: torch._scaled_mm(A, B, SA, SB[:, :31]), ValueError),
    "scales as vectors": (lambda: torch._scaled_mm(A, B, SA[:, 0], SB[0]), ValueError),
    "scales of rows and one scale": (lambda: torch._scaled_mm(A, B, SA, ONE), ValueError),
    "scales of K and of all of it": (lambda: torch._scaled_mm(A, B, SA.expand(8, 2).contiguous(), SB), ValueError),
    "a bias too short": (lambda: torch._scaled_mm(A, B, SA, SB, bias=torch.ones(31)), RuntimeError),
    "two scales of the result": (lambda: torch._scaled_mm(A, B, SA, SB, scale_result=torch.ones(2)), RuntimeError),
    "version 2, a vector": (lambda: v2(A[0], B), ValueError),
    "version 2, another K": (lambda: v2(A[:, :48], B), ValueError),
    "version 2, in bf16": (lambda: v2(A.to(BF16), B), ValueError),
    "version 2, a scale too few": (lambda: v2(A, B, scale_a=[SA[:7]]), ValueError),
    "version 2, a column's scale too few": (lambda: v2(A, B, scale_b=[SB[:, :31]]), ValueError),
    "version 2, scales in fp64": (lambda: v2(A, B, scale_a=[SA.double()]), ValueError),
    "version 2, two scales": (lambda: v2(A, B, scale_a=[SA, SA]), ValueError),
    "version 2, no scale": (lambda: v2(A, B, scale_a=[], scale_b=[], recipe_a=[], recipe_b=[]), ValueError),
    "version 2, a recipe that is none": (lambda: v2(A, B, recipe_a=[99]), ValueError),
    "version 2, two recipes that do not go together": (lambda: v2(A, B, recipe_b=[0], scale_b=[ONE]), ValueError),
    "version 2, a bias too short": (lambda: v2(A, B, bias=torch.ones(31)), ValueError),
    "version 2, other dims of K": (lambda: v2(A, B, contraction_dim=[0, 1]), ValueError),
    "version 2, one dim of K": (lambda: v2(A, B, contraction_dim=[1]), ValueError),
}


def v2(a, b, **changed):
    given = {
        "scale_a": [SA], "recipe_a": [1], "swizzle_a": [], "scale_b": [SB], "recipe_b": [1], "swizzle_b": [],
        "bias": None, "out_dtype": BF16, "contraction_dim": [],
    } | changed  # fmt: skip
    return torch._scaled_mm_v2(a, b, *given.values())


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_raises_what_torch_raises(name):
    call, error = WRONG[name]
    with pytest.raises(error) as raised:
        call()
    assert not isinstance(raised.value, Refused)
    assert raised.value.args[0].startswith(("_scaled_mm", "shape"))
    with stock_torch(), pytest.raises(error):
        call()


@pytest.mark.parametrize("recipe", RECIPES)
@examples(60)
@given(data=st.data())
def test_scales_of_a_wrong_shape_never_reach_a_kernel(recipe, data):
    a, b, scale_a, scale_b = operands(5, 130, 300, recipe)
    scales, which = [scale_a, scale_b], data.draw(st.integers(0, 1))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 130, 131]), max_size=3))
    scales[which] = torch.ones(shape)
    allowed = {(5, 1), (5, 3)} if which == 0 else {(1, 130), (3, 130), (3, 2)}
    groups = scales[0].shape[-1:] == scales[1].shape[:1]
    if tuple(shape) in allowed and groups:
        torch._scaled_mm(a, b, *scales, out_dtype=BF16)
    else:
        with pytest.raises((ValueError, Refused)):
            torch._scaled_mm(a, b, *scales, out_dtype=BF16)


REFUSED = {
    "one scale for several rows": (lambda: torch._scaled_mm(A, B, ONE, ONE, out_dtype=BF16), "expand"),
    "one scale for several rows, version 2": (
        lambda: v2(A, B, scale_a=[ONE], recipe_a=[0], scale_b=[ONE], recipe_b=[0]), "expand",
    ),
    "a scale for 128 rows": (lambda: torch._scaled_mm(A, B, torch.ones(1, 2), torch.ones(2, 32)), "128 rows"),
    "a scale for 128 rows, version 2": (
        lambda: v2(A, B, scale_a=[torch.ones(4, 1)], recipe_a=[5], scale_b=[torch.ones(32, 2)], recipe_b=[4]), "128 rows",
    ),
    "MX": (
        lambda: v2(A, B, scale_a=[torch.ones(512).to(torch.float8_e8m0fnu)], recipe_a=[3]), "of MX or NVFP4",
    ),
    "swizzled scales": (lambda: v2(A, B, swizzle_a=[1]), "swizzled"),
    "the scale of a result in 8 bits": (lambda: torch._scaled_mm(A, B, SA, SB, scale_result=ONE), "leave it out"),
    "8 bits of other GPUs": (lambda: torch._scaled_mm(A.float().to(torch.float8_e4m3fnuz), B, SA, SB), "e4m3fnuz"),
    "a result in float64": (lambda: torch._scaled_mm(A, B, SA, SB, out_dtype=torch.float64), "not torch.float64"),
    "a bias in float64": (lambda: torch._scaled_mm(A, B, SA, SB, bias=torch.ones(32).double(), out_dtype=BF16), "a bias in"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_with_a_sentence(name):
    call, words = REFUSED[name]
    with pytest.raises(Refused, match=words):
        call()


def test_the_way_out_of_the_refusal_gives_the_value_of_one_scale():
    constant, of_weights = torch.tensor(0.3), torch.tensor(0.7)
    got = torch._scaled_mm(A, B, constant.expand(8, 1).contiguous(), of_weights.expand(1, 32).contiguous(), out_dtype=FP32)
    with stock_torch():
        want = torch._scaled_mm(A, B, constant, of_weights, out_dtype=FP32)
    torch.testing.assert_close(got, want)


def test_the_scale_of_a_result_of_more_bits_is_ignored_as_torch_ignores_it():
    plain = torch._scaled_mm(A, B, SA, SB, out_dtype=BF16)
    assert first_difference(torch._scaled_mm(A, B, SA, SB, scale_result=ONE * 2, out_dtype=BF16), plain) is None


class OnAGPU:
    """As much of a tensor as the checks of devices read."""

    device, is_cuda = torch.device("cuda", 0), True


def test_gpus_without_products_of_8_bits_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(Refused, match=r"8\.9 and more"):
        scaled._check_device("_scaled_mm", OnAGPU(), OnAGPU())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    scaled._check_device("_scaled_mm", OnAGPU(), OnAGPU())
    with pytest.raises(RuntimeError, match="on one device"):
        scaled._check_device("_scaled_mm", OnAGPU(), torch.ones(1))


# --- groups: torch has none of them on a CPU, and the mode offers what torch does; its operator for compiled code has them ---


def grouped(*args, **options):
    return torch.ops.batchinv._scaled_grouped_mm(*args, **options)


def ends(draw_sizes):
    return torch.tensor(draw_sizes).cumsum(0).to(torch.int32)


@examples(40)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    N=st.sampled_from([16, 48]),
    K=st.sampled_from([16, 400]),
    seed=seeds,
)
def test_a_row_of_a_group_has_the_bits_of_the_row_alone(sizes, N, K, seed):
    T, G = sum(sizes), len(sizes)
    a, _, scale_a, _ = operands(T, N, K, seed=seed)
    b = torch.randn(G, N, K, generator=torch.Generator().manual_seed(seed)).to(E4M3).mT
    scale_b = torch.rand(G, N) + 0.1
    got = grouped(a, b, scale_a[:, 0], scale_b, ends(sizes))
    assert got.dtype == BF16 and got.shape == (T, N)
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    for row in range(0, T, max(1, T // 5)):
        group = groups[row]
        alone = torch._scaled_mm(a[row : row + 1], b[group], scale_a[row : row + 1], scale_b[group, None], out_dtype=BF16)
        assert first_difference(got[row : row + 1], alone) is None
    kinds = [scaled._ROW_WISE]
    again = torch.ops.batchinv._scaled_grouped_mm_v2(a, b, [scale_a[:, 0]], kinds, [], [scale_b], kinds, [], ends(sizes))
    assert first_difference(again, got) is None


def test_matrices_of_a_batch_have_the_bits_of_each_alone():
    a = torch.randn(3, 20, 320).to(E4M3)
    b, scale_a, scale_b = torch.randn(3, 48, 320).to(E4M3).mT, torch.rand(3, 20), torch.rand(3, 48)
    got = grouped(a, b, scale_a, scale_b)
    for i in range(3):
        alone = torch._scaled_mm(a[i], b[i], scale_a[i][:, None], scale_b[i][None], out_dtype=BF16)
        assert first_difference(got[i], alone) is None


def test_groups_of_columns_have_the_bits_of_each_product_alone():
    a, scale_a = torch.randn(3, 20, 320).to(E4M3), torch.rand(3, 20)
    b, scale_b = torch.randn(64, 320).to(E4M3).t(), torch.rand(64)
    offs = torch.tensor([16, 16, 48], dtype=torch.int32)
    got = grouped(a, b, scale_a, scale_b, offs)
    assert got.shape == (20, 64) and got.is_contiguous() and (got[:, 48:] == 0).all()
    for i, (start, end) in enumerate(((0, 16), (16, 16), (16, 48))):
        alone = torch._scaled_mm(a[i], b[:, start:end], scale_a[i][:, None], scale_b[None, start:end], out_dtype=BF16)
        assert first_difference(got[:, start:end].contiguous(), alone) is None


def test_groups_of_the_summed_dim_have_the_bits_of_each_product_alone():
    """Gradients of experts' weights: blocks of 128 count from the group's first row, wherever that is."""
    a, b = torch.randn(48, 464).to(E4M3), torch.randn(32, 464).to(E4M3).t()
    scale_a, scale_b = torch.rand(3 * 48), torch.rand(3 * 32)
    offs = torch.tensor([37, 37, 400], dtype=torch.int32)
    got = grouped(a, b, scale_a, scale_b, offs)
    for i, (start, end) in enumerate(((0, 37), (37, 37), (37, 400))):
        scales = scale_a.view(3, 48)[i][:, None], scale_b.view(3, 32)[i][None]
        alone = torch._scaled_mm(a[:, start:end], b[start:end], *scales, out_dtype=BF16)
        assert first_difference(got[i], alone) is None


GROUPED = {"a": torch.ones(32, 64).to(E4M3), "b": torch.ones(2, 48, 64).to(E4M3).mT, "scale_a": torch.ones(32),
           "scale_b": torch.ones(2, 48), "offs": ends([16, 16])}  # fmt: skip
WRONG_GROUPS = {
    "a vector": ({"a": GROUPED["a"][0]}, ValueError),
    "another K": ({"a": GROUPED["a"][:, :48]}, ValueError),
    "in bf16": ({"a": GROUPED["a"].to(BF16)}, ValueError),
    "in e5m2": ({"b": GROUPED["b"].float().to(E5M2)}, ValueError),
    "a K that is no multiple of 16": ({"a": GROUPED["a"][:, :60], "b": GROUPED["b"][:, :60]}, ValueError),
    "no ends": ({"offs": None}, ValueError),
    "ends in int64": ({"offs": GROUPED["offs"].long()}, ValueError),
    "an end too few": ({"offs": GROUPED["offs"][:1]}, RuntimeError),
    "ends that descend": ({"offs": torch.tensor([20, 4], dtype=torch.int32)}, ValueError),
    "ends beyond the rows": ({"offs": torch.tensor([20, 40], dtype=torch.int32)}, ValueError),
    "a bias": ({"bias": torch.ones(48)}, ValueError),
    "a result in fp32": ({"out_dtype": FP32}, ValueError),
    "a scale of the result": ({"scale_result": ONE}, ValueError),
    "scales in fp64": ({"scale_a": torch.ones(32).double()}, ValueError),
    "a scale too few": ({"scale_a": torch.ones(31)}, RuntimeError),
    "a column's scale too few": ({"scale_b": torch.ones(2, 47)}, RuntimeError),
    "scales of MX": ({"scale_a": torch.ones(32, 2).to(torch.float8_e8m0fnu)}, Refused),
}


@pytest.mark.parametrize("name", WRONG_GROUPS)
def test_a_wrong_argument_of_groups_raises(name):
    changed, error = WRONG_GROUPS[name]
    given = GROUPED | changed
    first = [given.pop(each) for each in ("a", "b", "scale_a", "scale_b")]
    with pytest.raises(error):
        grouped(*first, **given)


# --- compiled code --------------------------------------------------------------------------------------------------------


def by_version_2(a, b, scale_a, scale_b):
    kind = F.ScalingType.RowWise
    return F.scaled_mm(a, b, scale_a, kind, scale_b, kind)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda *given: torch._scaled_mm(*given, out_dtype=BF16).float().relu(), "_scaled_mm"),
        (lambda *given: by_version_2(*given).float().relu(), "_scaled_mm_v2"),
    ],
    ids=["version 1", "version 2"],
)
def test_compiled_code_has_the_bits_of_eager_code(function, name):
    torch._dynamo.reset()
    compiled = torch.compile(function)
    with batch_invariant_mode() as mode:
        for M in (1, 5, 17, 40):
            given = operands(M, 48, 304)
            assert first_difference(compiled(*given), function(*given)) is None
        assert mode.hits[f"batchinv::{name}"] == 4


def test_compiled_groups_have_the_bits_of_eager_code():
    torch._dynamo.reset()
    given = GROUPED["a"], GROUPED["b"], GROUPED["scale_a"], GROUPED["scale_b"], GROUPED["offs"]
    compiled = torch.compile(lambda *given: torch._scaled_grouped_mm(*given).float() + 1)
    assert first_difference(compiled(*given), grouped(*given).float() + 1) is None
