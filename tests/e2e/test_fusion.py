"""Rewrites of compiled graphs: they happen where they are meant to, and change no bit."""

import pytest
import torch
from pytest_batchinv.kernels import doors
from torch import Tensor

from pytest_batchinv import batch_invariant_mode

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
FUSED = "batchinv::mean_of_squares"


def llama_norm(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma_norm(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def product_norm(x: Tensor) -> Tensor:
    """The squares are needed elsewhere too."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = wide * wide
    return squares.mean((-2, -1)) + squares[:, 0, 0]


def narrow_mean(x: Tensor) -> Tensor:
    """Squares rounded to the dtype of x."""
    return (x * x).mean(-1)


def mean_of_products(x: Tensor) -> Tensor:
    return (x * x.flip(0)).mean(-1)


def run(function, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """What eager and compiled code give, and whether the latter is fused."""
    with batch_invariant_mode() as mode:
        eager = function(x)
        compiled = torch.compile(function, fullgraph=True)(x)
        return eager, compiled, FUSED in mode.hits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [llama_norm, gemma_norm, product_norm])
def test_a_fused_mean_of_squares_has_the_bits_of_eager_code(norm, dtype):
    torch.manual_seed(0)
    eager, compiled, fused = run(norm, torch.randn(3, 5, 301, dtype=torch.float64).to(dtype))
    assert fused
    assert torch.equal(eager, compiled)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [(narrow_mean, torch.bfloat16), (narrow_mean, torch.float16), (mean_of_products, torch.float32)],
)
def test_what_is_no_mean_of_squares_in_the_accumulators_dtype_is_left_as_it_is(function, dtype):
    torch.manual_seed(0)
    eager, compiled, fused = run(function, torch.randn(3, 301).to(dtype))
    assert not fused
    assert torch.equal(eager, compiled)


def test_mean_of_squares_is_an_operator_that_torch_accepts():
    doors.operators()
    for dim, keepdim in ((None, False), ([1], True), ([0, 2], False)):
        torch.library.opcheck(torch.ops.batchinv.mean_of_squares, (torch.randn(2, 3, 4).bfloat16(), dim, keepdim))
