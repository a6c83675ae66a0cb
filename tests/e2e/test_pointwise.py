"""Pointwise operators: a value's bits follow no place in memory and no thread, and compiled code gives those of eager code."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.compare import first_difference
from pytest_batchinv.kernels import table
from pytest_batchinv.kernels.aten import vectors

SIZE = 36_001  # two threads share it, and neither share is made of whole vectors
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)

special = torch.special
UNARY = {
    **{name: getattr(torch, name) for name in ("exp2", "sinh", "cosh", "atanh", "sgn", "angle", "digamma", "sqrt", "log2")},
    **{name: getattr(torch, name) for name in ("log10", "tan", "asin", "acos", "atan", "asinh", "acosh", "erfc", "erfinv")},
    **{name: getattr(torch, name) for name in ("sinc", "logit", "lgamma", "i0", "exp", "sigmoid", "rsqrt", "tanh")},
    **{f"special_{name}": getattr(special, name) for name in ("i0e", "i1", "i1e", "ndtri", "log_ndtr", "erfcx", "entr")},
    **{f"special_bessel_{name}": getattr(special, f"bessel_{name}") for name in ("j0", "j1", "y0", "y1")},
    **{name: getattr(F, name) for name in ("softshrink", "logsigmoid", "celu", "selu", "silu", "hardswish")},
    "special_airy_ai": special.airy_ai,
    "special_modified_bessel_k0": special.modified_bessel_k0,
    "special_spherical_bessel_j0": special.spherical_bessel_j0,
    "polygamma": partial(torch.polygamma, 1),
    "mvlgamma": lambda x: torch.mvlgamma(x + 2, 2),
    "round.decimals": lambda x: torch.round(x, decimals=2),
    "pow.Scalar": lambda x: torch.pow(1.7, x),
    "pow.Tensor_Scalar": lambda x: torch.pow(x, 1.7),
}
BINARY = {
    **{name: getattr(torch, name) for name in ("pow", "atan2", "logaddexp", "logaddexp2", "hypot", "igamma", "igammac")},
    **{name: getattr(torch, name) for name in ("xlogy", "ldexp", "remainder", "fmod", "floor_divide")},
    "linalg_cross": lambda x, y: torch.linalg.cross(x[: len(x) // 3 * 3].view(-1, 3), y[: len(y) // 3 * 3].view(-1, 3)),
    "special_xlog1py": special.xlog1py,
    "special_zeta": lambda x, y: special.zeta(x + 1.5, y),
    "lerp.Scalar": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, y, y, value=0.7),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, x + 1, value=0.7),
    "lerp.Tensor": lambda x, y: torch.lerp(x, y, x.sigmoid()),
    "binary_cross_entropy": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), reduction="none"),
    "binary_cross_entropy_with_logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none"),
    "mse_loss": lambda x, y: F.mse_loss(x, y, reduction="none"),
    "huber_loss": lambda x, y: F.huber_loss(x, y, reduction="none"),
    "soft_margin_loss": lambda x, y: F.soft_margin_loss(x, y, reduction="none"),
    "special_chebyshev_polynomial_t": lambda x, y: special.chebyshev_polynomial_t(x, y.ceil()),
}
FUNCTIONS = {**{name: (f, 1) for name, f in UNARY.items()}, **{name: (f, 2) for name, f in BINARY.items()}}
OF_COMPLEX = ("exp2", "sinh", "cosh", "atanh", "sgn", "angle", "exp", "sigmoid", "tanh", "rsqrt", "pow", "pow.Tensor_Scalar")


def positive(dtype, n, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    xs = [torch.randn(size, generator=generator, dtype=wide) for _ in range(n)]
    scale = torch.tensor([0.01, 1.0, 3.0]).repeat(size // 3 + 1)[:size]
    return [(x * scale if dtype.is_complex else x.abs() * scale + 1e-4).to(dtype) for x in xs]


def supported(function, xs):
    try:
        function(*(x[:2] for x in xs))
    except NotImplementedError as error:  # torch has no such kernel
        assert "not implemented for" in str(error)
        return False
    return True


def places():
    """Starts, sizes, offsets in memory, numbers of threads."""
    yield from ((start, n, offset, 1) for start, n in ((0, 1), (3, 7), (100, 255), (5, 257), (9, 1001)) for offset in (0, 1))
    yield from ((start, n, 1, 2) for start, n in ((0, SIZE), (7, SIZE - 9)))


def bits(x):
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def place_that_changes_bits(function, xs):
    torch.set_num_threads(1)
    expected = function(*xs)
    for start, n, offset, n_threads in places():
        torch.set_num_threads(n_threads)
        moved = [torch.empty(n + offset, dtype=x.dtype)[offset:].copy_(x[start : start + n]) for x in xs]
        if not torch.equal(bits(function(*moved)), bits(expected[start : start + n])):
            return start, n, offset, n_threads
    return None


aten = torch.ops.aten
BACKWARD = {
    **{f"{name}_backward": (getattr(aten, f"{name}_backward"), 2) for name in ("silu", "gelu", "mish", "sigmoid", "tanh")},
    **{f"{name}_backward": (getattr(aten, f"{name}_backward"), 2) for name in ("hardswish", "hardsigmoid", "logit")},
    "softplus_backward": (lambda grad, x: aten.softplus_backward(grad, x, 1.0, 20.0), 2),
    "elu_backward": (lambda grad, x: aten.elu_backward(grad, 1.0, 1.0, 1.0, False, x), 2),
    "log_sigmoid_backward": (lambda grad, x: aten.log_sigmoid_backward(grad, x, aten.log_sigmoid_forward(x)[1]), 2),
    "softshrink_backward": (lambda grad, x: aten.softshrink_backward(grad, x, 0.5), 2),
    "hardshrink_backward": (lambda grad, x: aten.hardshrink_backward(grad, x, 0.5), 2),
}
OF_THREE_VALUES = {"linalg_cross"}  # compared in compiled code alone, below
BY_PLACE = {name: entry for name, entry in (FUNCTIONS | BACKWARD).items() if name not in OF_THREE_VALUES}


@pytest.mark.parametrize("name", BY_PLACE)
def test_a_value_has_the_same_bits_wherever_it_lies(name, threads):
    function, n = BY_PLACE[name]
    dtypes = (*FLOATS, *COMPLEX) if name in OF_COMPLEX else FLOATS
    ran = 0
    for dtype in dtypes:
        xs = positive(dtype, n)
        with batch_invariant_mode():
            if supported(function, xs):
                ran += 1
                assert place_that_changes_bits(function, xs) is None, dtype
    assert ran


def test_stock_torch_changes_bits_at_such_places(threads):
    """Else the test above could not fail."""
    functions = [FUNCTIONS[name] for name in ("atanh", "sinh", "exp2", "atan2", "pow")]
    assert any(place_that_changes_bits(function, positive(torch.float32, n)) for function, n in functions)


FACTORS = {
    "add": (lambda x, y: torch.add(x, y, alpha=1.3), 2),
    "sub": (lambda x, y: torch.sub(x, y, alpha=1.3), 2),
    "add as it is": (torch.add, 2),
}
COMPILED = {
    "unary": (tuple(UNARY), torch.float32),
    "binary": (tuple(BINARY), torch.float32),
    "factors": (tuple(FACTORS), torch.float32),
    "binary in bf16": ((*BINARY, *FACTORS, "exp2", "sqrt", "logsigmoid", "softshrink"), torch.bfloat16),
}
DIVERGES = {"addcdiv": "Dynamo writes addcdiv with a value as a quotient, a product and a sum, each of them rounded"}


@pytest.mark.parametrize("group", COMPILED)
def test_compiled_code_gives_the_bits_of_eager_code(group):
    names, dtype = COMPILED[group]
    names = [name for name in names if name not in DIVERGES and (dtype == torch.float32 or not name.startswith("special"))]
    calls = [((FUNCTIONS | FACTORS)[name][0], positive(dtype, (FUNCTIONS | FACTORS)[name][1], 1021)) for name in names]
    with batch_invariant_mode():
        expected = [function(*xs) for function, xs in calls]
        torch._dynamo.reset()
        actual = torch.compile(lambda inputs: [f(*xs) for (f, _), xs in zip(calls, inputs, strict=True)])(
            [xs for _, xs in calls]
        )
    for name, e, a in zip(names, expected, actual, strict=True):
        assert first_difference(e, a) is None, name


@pytest.mark.parametrize("name", table.WHOLE_VECTORS)
def test_every_operator_of_whole_vectors_is_tested_here(name):
    assert {name, name.split(".")[0]} & BY_PLACE.keys()


LAYOUTS = {
    "no dim": lambda: (torch.tensor(2.5), torch.tensor(1.5)),
    "a number beside a row": lambda: (torch.tensor(2.5, dtype=torch.float64), torch.rand(300)),
    "broadcast": lambda: (torch.rand(3, 1, 5), torch.rand(4, 1)),
    "transposed": lambda: (torch.rand(30, 20).t(), torch.rand(30, 20).t()),
    "channels last": lambda: (torch.rand(2, 3, 8, 9).to(memory_format=torch.channels_last),) * 2,
    "strided": lambda: (torch.rand(50, 40)[:, ::2], torch.rand(50, 20)),
    "empty": lambda: (torch.rand(0, 3), torch.rand(3)),
    "two dtypes": lambda: (torch.rand(300).bfloat16(), torch.rand(300)),
    "integers": lambda: (torch.arange(1, 7), torch.arange(6)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["pow", "atan2"])
def test_any_layout_gives_torchs_values_shapes_and_dtypes(name, layout):
    function, xs = FUNCTIONS[name][0], LAYOUTS[layout]()
    expected = function(*xs)
    with batch_invariant_mode() as mode:
        actual = function(*xs)
        assert any(hit.startswith(f"aten::{name}") for hit in mode.hits)
        torch._dynamo.reset()
        compiled = torch.compile(function)(*xs)
    assert actual.dtype == expected.dtype and actual.stride() == compiled.stride()
    torch.testing.assert_close(actual, expected)
    assert first_difference(actual, compiled) is None


def test_powers_of_a_number_have_torchs_values_and_dtypes():
    for base in (2, 1.7, 2 + 1j):
        for dtype in (*FLOATS[:3], torch.int64, torch.complex64):
            exponents = torch.arange(1, 5).to(dtype)
            expected = torch.pow(base, exponents)
            with batch_invariant_mode():
                torch.testing.assert_close(torch.pow(base, exponents), expected)


def test_a_result_is_written_where_the_caller_wants_it():
    x = torch.rand(5, 7) + 0.1
    with batch_invariant_mode():
        expected = torch.atan2(x, x + 1)
        out, wide = torch.empty(0), torch.empty(5, 7, dtype=torch.float64)
        assert torch.atan2(x, x + 1, out=out) is out and first_difference(expected, out) is None
        assert torch.equal(torch.atan2(x, x + 1, out=wide).float(), expected)
        y = x.clone()
        assert y.atan2_(x + 1) is y and first_difference(expected, y) is None


def test_gradients_are_torchs():
    x = (torch.rand(40, dtype=torch.float64) / 2 + 0.1).requires_grad_()
    with batch_invariant_mode():
        for name in ("atanh", "sinh", "softshrink", "pow", "atan2", "logaddexp"):
            function, n = FUNCTIONS[name]
            assert torch.autograd.gradcheck(function, [x, x.detach().clone().requires_grad_()][:n])


@pytest.mark.parametrize("size", [1, 255, 256, 257, 32_768, 32_769, 65_537, 98_305])
def test_tails_are_those_of_the_shares_that_torch_gives_to_its_threads(size, threads):
    """A loop of torch's as the executor's function: a value that it takes as the tail of a share would be marked."""
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        assert not vectors.elementwise(_marked_tails, (torch.zeros(size),), {}).any()


def _marked_tails(x):
    """What ``at::parallel_for`` does: shares of equal size, and at the end of each what makes no whole vector of 32 values."""
    n_threads = min(torch.get_num_threads(), -(-len(x) // 32_768))
    share = -(-len(x) // n_threads)
    out = torch.zeros_like(x)
    for start in range(0, len(x), share):
        n = min(share, len(x) - start)
        out[start + n // 32 * 32 : start + n] = 1
    return out
