"""Reductions at places that an index names more than once: a row's bits are its own, forward and backward, compiled too."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.compare import first_difference

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce.. is in beta", "ignore:The reduce argument of torch.scatter")
REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
generator = torch.Generator().manual_seed(0)
X = torch.randn(9, 20, generator=generator, dtype=torch.float64)
INDEX = torch.randint(0, 12, (9, 150), generator=generator)
INDEX[3] = 5  # all of a row at one place, so that others have fewer there
SOURCE = torch.randn(9, 150, generator=generator, dtype=torch.float64).exp2()
BATCHES = ([4], [3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 4, 4, 3])


def scattered(x, index, source, reduce, include_self):
    return x.scatter_reduce(1, index, source, reduce, include_self=include_self)


def of_slices(x, index, source, reduce, include_self):
    """One index for all rows, each of which is a column of what is reduced."""
    if reduce == "sum":
        return x.t().index_add(0, INDEX[0], source.t()).t()
    return x.t().index_reduce(0, INDEX[0], source.t(), reduce, include_self=include_self).t()


def with_gradients(function):
    def run(x, index, source, *options):
        x, source = (t.clone().requires_grad_() for t in (x, source))
        out = function(x, index, source, *options)
        return torch.cat([out, *torch.autograd.grad((out * out).sum(), [x, source])], 1).detach()

    return run


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("function", [scattered, of_slices, with_gradients(scattered)], ids=["scatter", "index", "gradients"])
def test_a_row_has_torchs_values_and_equal_bits_in_every_batch(function, reduce, include_self):
    expected = function(X, INDEX, SOURCE, reduce, include_self)
    for dtype in FLOATS if function is scattered else FLOATS[:1]:
        x, source = X.to(dtype), SOURCE.to(dtype)
        with batch_invariant_mode():
            whole = function(x, INDEX, source, reduce, include_self)
            for rows in BATCHES:
                part = function(x[rows], INDEX[rows], source[rows], reduce, include_self)
                assert first_difference(whole[rows], part) is None
        if dtype in (torch.float32, torch.float64) and reduce != "prod":
            torch.testing.assert_close(whole.double(), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=23), st.booleans())
def test_a_product_is_that_of_a_tree_over_the_places_own_values(index, include_self):
    values = (torch.arange(len(index)) * 0.37 - 1.1).double().sin() + 1.5
    start = torch.tensor([0.3, 1.7, -2.1, 0.9], dtype=torch.float64)
    with batch_invariant_mode():
        got = start.scatter_reduce(0, torch.tensor(index), values, "prod", include_self=include_self)
    for place, (was, product) in enumerate(zip(start.tolist(), got.tolist(), strict=True)):
        own = [value for at, value in zip(index, values.tolist(), strict=True) if at == place]
        while len(own) > 1:
            pairs = [own[i : i + 2] for i in range(0, len(own), 2)]
            own = [pair[0] * pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
        assert product == (was if not own else own[0] * was if include_self else own[0])


def test_an_extreme_that_is_zero_has_no_sign():
    """Else it would be that of the zero that comes last."""
    zeros = torch.tensor([0.0, -0.0])
    with batch_invariant_mode():
        for reduce, include_self in itertools.product(("amax", "amin"), (True, False)):
            for values in (zeros, zeros.flip(0)):
                start, places = torch.full((2,), -0.0), torch.zeros(2, dtype=torch.int64)
                out = start.scatter_reduce(0, places, values, reduce, include_self=include_self)
                assert out.tolist() == [0.0, 0.0] and out.signbit().tolist() == [False, True]


def test_compiled_code_and_older_forms_have_the_bits_of_eager_code():
    x, source = X.float(), SOURCE.float()
    compiled = torch.compile(lambda x, source: [scattered(x, INDEX, source, reduce, True) for reduce in REDUCTIONS])
    with batch_invariant_mode():
        eager = [scattered(x, INDEX, source, reduce, True) for reduce in REDUCTIONS]
        for one, other in zip(eager, compiled(x, source), strict=True):
            assert first_difference(one, other) is None
        assert first_difference(x.scatter(1, INDEX, source, reduce="add"), eager[0]) is None
        assert first_difference(x.scatter(1, INDEX, source, reduce="multiply"), eager[1]) is None
        halves = torch.full_like(source, 0.5)
        assert first_difference(x.scatter(1, INDEX, 0.5, reduce="multiply"), scattered(x, INDEX, halves, "prod", True)) is None


def test_bad_input_raises_as_torch_does():
    x, places = torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.int64)
    calls = (
        (lambda: x.scatter_reduce(1, places, x, "median"), "reduce argument must be either sum, prod, mean, amax or amin"),
        (lambda: x.scatter_reduce(1, places + 4, x, "prod"), "index out of range|out of bounds"),
        (lambda: x.scatter_reduce(1, places, x.double(), "mean"), "dtype"),
        (lambda: x.index_reduce(0, places[0], x, "sum"), "reduce argument must be either prod, mean, amax or amin"),
        (lambda: x.index_reduce(0, places[0], x, "prod"), "fit|size"),
        (lambda: x.scatter(1, places, x, reduce="amax"), "reduce argument must be either add or multiply"),
    )
    for call, sentence in calls:
        with pytest.raises((RuntimeError, IndexError)):
            call()
        with batch_invariant_mode(), pytest.raises((RuntimeError, IndexError), match=sentence):
            call()
