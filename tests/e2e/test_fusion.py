"""Rewrites of compiled graphs: they happen where they are meant to, and change no bit."""

import pytest
import torch
from torch import Tensor

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.kernels import operators

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
FUSED = "batchinv::mean_of_squares"
CHOSEN = "batchinv::chosen_logprobs"


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
    operators.operators()
    for dim, keepdim in ((None, False), ([1], True), ([0, 2], False)):
        torch.library.opcheck(torch.ops.batchinv.mean_of_squares, (torch.randn(2, 3, 4).bfloat16(), dim, keepdim))


def chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def chosen_by_dtype(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(2, tokens[..., None].expand(-1, -1, 3)) * 2


def chosen_as_they_are(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(2).gather(-1, tokens[..., None])


def nll(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.nll_loss(logits.log_softmax(-1).flatten(0, 1), tokens.flatten(), reduction="none")


def also_used_elsewhere(logits: Tensor, tokens: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, tokens[..., None]) + logprobs.amax(-1, keepdim=True)


def of_other_rows(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[:1, :2, None])


def along_another_dim(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(-1, tokens[..., None])


def run_chosen(function, dtype, dynamic: bool | None = None) -> tuple[Tensor, Tensor, bool]:
    torch.manual_seed(0)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    logits, tokens = torch.randn(3, 5, 301).to(dtype), torch.randint(0, 301, (3, 5))
    with batch_invariant_mode() as mode:
        return function(logits, tokens), compiled(logits, tokens), CHOSEN in mode.hits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [chosen, chosen_by_dtype, chosen_as_they_are])
def test_fused_chosen_logprobs_have_the_bits_of_eager_code(function, dtype):
    for dynamic in (None, True):
        eager, compiled, fused = run_chosen(function, dtype, dynamic)
        assert fused
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("function", [also_used_elsewhere, of_other_rows, along_another_dim])
def test_logprobs_that_are_not_chosen_by_row_are_left_as_they_are(function):
    eager, compiled, fused = run_chosen(function, torch.float32)
    assert not fused
    assert torch.equal(eager, compiled)


def test_the_losses_of_tokens_have_the_bits_of_eager_code():
    eager, compiled, _ = run_chosen(nll, torch.float32)
    assert torch.equal(eager, compiled)


def test_chosen_logprobs_is_an_operator_that_torch_accepts():
    operators.operators()
    logits, index = torch.randn(2, 3, 40).bfloat16(), torch.randint(0, 40, (2, 3, 5))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.batchinv.chosen_logprobs, (logits, index, dtype))
