"""Convolutions of 1 to 3 dims, transposed, grouped, dilated: torch's values, equal bits in any batch, and in compiled code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.compare import first_difference
from pytest_batchinv.kernels.aten import convolution

MODULES = {
    "1-d": (lambda: torch.nn.Conv1d(6, 4, 3, padding=1), (6, 11)),
    "a patch embedding": (lambda: torch.nn.Conv2d(3, 16, 4, 4), (3, 12, 16)),
    "2-d": (lambda: torch.nn.Conv2d(6, 8, 3, 2, 1), (6, 9, 12)),
    "depthwise": (lambda: torch.nn.Conv2d(6, 6, 7, padding=3, groups=6), (6, 9, 12)),
    "same, reflected": (lambda: torch.nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), (6, 9, 12)),
    "3-d, dilated, grouped": (lambda: torch.nn.Conv3d(4, 6, 2, dilation=2, groups=2), (4, 5, 6, 7)),
    "transposed": (lambda: torch.nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2), (6, 5, 6)),
}


@st.composite
def calls(draw):
    """Shapes of input and weight, and the other arguments, with which torch gives a result."""
    n_dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    several = lambda *values: draw(st.lists(st.sampled_from(values), min_size=n_dims, max_size=n_dims))  # noqa: E731
    channels, out_channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    taps, stride, dilation, padding = several(1, 2, 3), several(1, 2, 3), several(1, 2), several(0, 1, 2)
    transposed = draw(st.booleans())
    extra = [draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for s, d in zip(stride, dilation, strict=True)]
    weight = (channels, out_channels // groups) if transposed else (out_channels, channels // groups)
    sizes = (draw(st.integers(0, 3)), channels, *several(5, 6, 8))
    return sizes, (*weight, *taps), draw(st.booleans()), (stride, padding, dilation, transposed, extra, groups)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(call=calls())
def test_convolutions_have_torchs_values(call):
    sizes, weight, has_bias, options = call
    x, w = torch.randn(sizes, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)
    bias = torch.randn(weight[1] * options[-1] if options[3] else weight[0], dtype=torch.float64) if has_bias else None
    expected = torch.convolution(x, w, bias, *options)
    with batch_invariant_mode() as mode:
        actual = torch.convolution(x, w, bias, *options)
        assert mode.hits == {"aten::convolution": 1}
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODULES)
def test_a_rows_bits_are_those_of_the_row_alone_in_any_layout_and_in_compiled_code(name, dtype):
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module, x = make().to(dtype).requires_grad_(False), torch.randn(9, *shape).to(dtype)
    with batch_invariant_mode():
        alone = torch.cat([module(row[None]) for row in x])
        for n in (2, 5, 9):
            assert first_difference(alone[:n], module(x[:n])) is None
        if len(shape) == 3:
            assert first_difference(alone, module(x.to(memory_format=torch.channels_last))) is None
        torch._dynamo.reset()
        assert first_difference(alone, torch.compile(module, fullgraph=True)(x)) is None


def test_a_batch_whose_matrix_would_be_too_large_is_taken_in_parts_with_the_same_bits(monkeypatch):
    x, w, b = torch.randn(7, 3, 9, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
    with batch_invariant_mode():
        whole = F.conv2d(x, w, b)
        monkeypatch.setattr(convolution, "MOST_VALUES", 2 * 49 * 27)
        assert first_difference(whole, F.conv2d(x, w, b)) is None


def test_a_convolution_is_no_less_accurate_than_torchs():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(4, 32, 12, 12).to(dtype), torch.randn(8, 32, 3, 3).to(dtype)
        exact = F.conv2d(x.double(), w.double())
        with batch_invariant_mode():
            ours = (F.conv2d(x, w).double() - exact).abs().max()
        assert ours <= (F.conv2d(x, w).double() - exact).abs().max()


@pytest.mark.parametrize(
    ("sizes", "weight", "options", "sentence"),
    [
        ((1, 3, 2, 2), (4, 3, 3, 3), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1), "longer than the padded input"),
        ((1, 3, 5, 5), (4, 2, 3, 3), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1), "does not fit"),
        ((1, 3, 5, 5), (4, 3, 3, 3), ([0, 1], [0, 0], [1, 1], False, [0, 0], 1), "must be positive"),
        ((1, 3, 5, 5), (3, 4, 3, 3), ([1, 1], [0, 0], [1, 1], True, [1, 0], 1), "must be smaller than stride"),
        ((1, 3, 5), (4, 3, 3, 3, 3), ([1, 1, 1], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1), "needs an input of as many"),
    ],
)
def test_a_convolution_that_fits_nothing_raises_as_torch_does(sizes, weight, options, sentence):
    x, w = torch.randn(sizes), torch.randn(weight)
    with pytest.raises(RuntimeError):
        torch.convolution(x, w, None, *options)
    with batch_invariant_mode(), pytest.raises(RuntimeError, match=sentence):
        torch.convolution(x, w, None, *options)
