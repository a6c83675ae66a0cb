"""Layers and functions that torch computes in orders that follow the batch: torch's values, equal rows, equal compiled code."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.compare import first_difference
from pytest_batchinv.kernels.aten.common import Refused

torch.manual_seed(0)
IMAGES, SEQUENCES, VECTORS = torch.randn(33, 6, 9, 8), torch.randn(33, 7, 16), torch.randn(33, 40)
POINTS, A, B = torch.randn(10, 40), torch.randn(40, 30), torch.randn(30, 20)
BAGS = torch.randint(0, 40, (33, 9))


def evaluated(module):
    return module.eval().requires_grad_(False)


def batch_norm():
    module = evaluated(nn.BatchNorm2d(6))
    for value in (module.running_mean, module.weight, module.bias):
        value.normal_()
    module.running_var.uniform_(0.5, 2)
    return module


def recurrent(kind):
    module = evaluated(kind(16, 12, num_layers=2, batch_first=True, bidirectional=True))
    return lambda x: module(x)[0]


def cell(kind):
    module = evaluated(kind(16, 12))
    return lambda x: module(x[:, 0])


def packed(x):
    lengths = torch.full((len(x),), 7)
    out = PACKED(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0]
    return nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0]


LSTM_CELL = cell(nn.LSTMCell)
PACKED = evaluated(nn.LSTM(16, 12, batch_first=True))
FUNCTIONS = {
    "batch norm": (batch_norm(), IMAGES),
    "instance norm": (evaluated(nn.InstanceNorm2d(6, affine=True)), IMAGES),
    "linear interpolation": (lambda x: F.interpolate(x.flatten(2), scale_factor=1.7, mode="linear"), IMAGES),
    "bilinear interpolation": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), IMAGES),
    "bicubic interpolation": (lambda x: F.interpolate(x, (11, 13), mode="bicubic"), IMAGES),
    "grid_sample": (lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1) / 3, align_corners=False), IMAGES),
    "fold": (lambda x: F.fold(x.flatten(1)[:, :288].view(-1, 48, 6), (3, 4), (2, 2)), IMAGES),
    "adaptive pooling": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), IMAGES),
    "average pooling": (lambda x: F.avg_pool2d(x, 3, 2, 1), IMAGES),
    "prod": (lambda x: x.prod(-1), VECTORS),
    "cumprod": (lambda x: x.cumprod(-1), VECTORS),
    "logcumsumexp": (lambda x: x.logcumsumexp(-1), VECTORS),
    "nansum": (lambda x: x.log().nansum(-1), VECTORS),
    "bags, summed": (lambda x: F.embedding_bag(x, POINTS.repeat(4, 1), mode="sum", padding_idx=3), BAGS),
    "bags, averaged": (lambda x: F.embedding_bag(x, POINTS.repeat(4, 1)), BAGS),
    "bags, weighed": (
        lambda x: F.embedding_bag(x, POINTS.repeat(4, 1), mode="sum", per_sample_weights=x / 7),
        BAGS,
    ),
    "fft": (lambda x: torch.view_as_real(torch.fft.fft(torch.complex(x, x.flip(1)))), VECTORS),
    "rfft": (lambda x: torch.view_as_real(torch.fft.rfft(x, norm="ortho")), VECTORS),
    "irfft": (lambda x: torch.fft.irfft(torch.complex(x, x.flip(1))), VECTORS),
    "rfft2": (lambda x: torch.view_as_real(torch.fft.rfft2(x)), IMAGES),
    **{f"cdist {p}": (lambda x, p=p: torch.cdist(x, POINTS, p), VECTORS) for p in (0.0, 1.0, 2.0, 3.0, float("inf"))},
    "multi_dot": (lambda x: torch.linalg.multi_dot([x, A, B]), VECTORS),
    "chain_matmul": (lambda x: torch.chain_matmul(x, A, B), VECTORS),
    **{kind.__name__: (recurrent(kind), SEQUENCES) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    "an LSTM cell": (lambda x: LSTM_CELL(x)[0], SEQUENCES),
    "a GRU cell": (cell(nn.GRUCell), SEQUENCES),
    "a packed LSTM": (packed, SEQUENCES),
}


@pytest.fixture(autouse=True)
def _torchs_own_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.chain_matmul is deprecated")
        yield


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_has_torchs_values_and_equal_bits_in_every_batch(name):
    function, rows = FUNCTIONS[name]
    expected = function(rows)
    with batch_invariant_mode():
        whole = function(rows)
        alone = torch.cat([function(rows[i : i + 1]) for i in range(3)])
        few = function(rows[:9])
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert first_difference(alone, whole[:3]) is None
    assert first_difference(few, whole[:9]) is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Dynamo, where it breaks a graph
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_code_has_the_bits_of_eager_code(dtype):
    # Dynamo breaks the graph at recurrent layers, and calls them as they are; Inductor warns of complex numbers.
    names = [name for name in FUNCTIONS if not name.startswith(("bags", "a packed", "LSTM", "GRU", "RNN"))]
    modules = {name for name in names if isinstance(FUNCTIONS[name][0], nn.Module)}
    of_images = {name for name in names if FUNCTIONS[name][1] is IMAGES and name != "rfft2"}
    names = [name for name in names if dtype == torch.float32 or name in modules | of_images]
    inputs = [FUNCTIONS[name][1][:5].to(dtype) for name in names]
    functions = [FUNCTIONS[name][0] for name in names]
    with batch_invariant_mode():
        expected = [f(x) for f, x in zip(functions, inputs, strict=True)]
        torch._dynamo.reset()
        actual = torch.compile(lambda xs: [f(x) for f, x in zip(functions, xs, strict=True)])(inputs)
    for name, e, a in zip(names, expected, actual, strict=True):
        assert first_difference(e, a) is None, name


GRADIENTS = {
    "rfft": lambda x: torch.view_as_real(torch.fft.rfft(x)),
    "irfft": lambda x: torch.fft.irfft(torch.complex(x, x)),
    "prod": lambda x: x.prod(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "nansum": lambda x: x.nansum(-1),
    "cdist": lambda x: torch.cdist(x, POINTS[:4, :5].double()),
    "batch norm": lambda x: F.batch_norm(x[:, :, None], None, None, training=True),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_function(name):
    with batch_invariant_mode():
        assert torch.autograd.gradcheck(GRADIENTS[name], [torch.randn(3, 5, dtype=torch.float64).requires_grad_()])


def test_what_torch_decomposes_early_is_back_after_the_mode():
    key, bilinear = torch._C.DispatchKey.Autograd, torch.ops.aten.upsample_bilinear2d.vec
    before = dict(bilinear.py_kernels)
    assert key in before
    with batch_invariant_mode():
        assert key not in bilinear.py_kernels
    assert bilinear.py_kernels == before


def test_products_of_several_are_written_where_the_caller_wants_them():
    with batch_invariant_mode():
        expected, out = torch.linalg.multi_dot([VECTORS, A, B]), torch.empty(0)
        assert torch.linalg.multi_dot([VECTORS, A, B], out=out) is out and first_difference(expected, out) is None
        with pytest.raises(RuntimeError, match="expected out tensor to have dtype"):
            torch.linalg.multi_dot([VECTORS, A, B], out=torch.empty(0, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="vectors only at the two ends"):
            torch.linalg.multi_dot([VECTORS, A[0], B])


@pytest.mark.filterwarnings("ignore:Using torch.cross without specifying the dim")
@pytest.mark.parametrize("writes", [False, True])
def test_a_cross_product_whose_dim_would_follow_the_number_of_rows_is_refused(writes):
    def cross(*args, **kwargs):
        return torch.cross(*args, **kwargs, **({"out": torch.empty(0)} if writes else {}))

    x, y = torch.randn(2, 3, 3)
    with batch_invariant_mode():
        with pytest.raises(Refused, match="torch.cross of 3x3 without dim"):
            cross(x, y)
        with pytest.raises(RuntimeError, match="no dimension of size 3"):
            cross(x[:2, :2], y[:2, :2])
        assert torch.equal(cross(x, y, dim=1), torch.linalg.cross(x, y))
        assert torch.equal(cross(x[:2], y[:2]), torch.linalg.cross(x[:2], y[:2]))


@pytest.mark.parametrize("n", [1, 2, 5, 8, 37, 64, 75, 400])
def test_fourier_transforms_of_any_length_are_no_less_accurate_than_torchs(n):
    x = torch.randn(5, n)
    calls = {
        "fft": torch.complex(x, x.flip(1)),
        "ifft": torch.complex(x, x.flip(1)),
        "rfft": x,
        **({"irfft": torch.complex(x, x.flip(1))} if n > 1 else {}),
    }
    for name, values in calls.items():
        transform = getattr(torch.fft, name)
        exact, stock = transform(values.to(torch.complex128 if values.is_complex() else torch.float64)), transform(values)
        with batch_invariant_mode():
            ours = transform(values)
        assert ours.dtype == stock.dtype
        assert (ours - exact).abs().max() <= (stock - exact).abs().max() * 1.01 + 1e-9, name


def test_a_transform_without_factors_is_refused_where_its_matrix_would_be_too_large():
    with batch_invariant_mode(), pytest.raises(Refused, match="pad the 8191 values"):
        torch.fft.rfft(torch.ones(2, 8191))


def test_training_keeps_the_running_statistics_of_torch():
    ours, torchs = nn.BatchNorm2d(6, momentum=0.3), nn.BatchNorm2d(6, momentum=0.3)
    expected = torchs(IMAGES)
    with batch_invariant_mode():
        actual = ours(IMAGES)
    for a, e in ((actual, expected), (ours.running_mean, torchs.running_mean), (ours.running_var, torchs.running_var)):
        torch.testing.assert_close(a, e)


def test_complex_products_of_many_have_torchs_values():
    x = torch.randn(5, 7, dtype=torch.complex64)
    expected = x.prod(-1), x.cumprod(-1)
    with batch_invariant_mode():
        torch.testing.assert_close((x.prod(-1), x.cumprod(-1)), expected)


def test_products_by_packed_weights_are_refused_with_the_reason():
    x, w = torch.randn(5, 64), torch.randn(16, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 16)), {nn.Linear})
    calls = {
        "quantized::linear_dynamic: the scale of its integers": lambda: quantized(x),
        "mkldnn::_linear_pointwise: oneDNN chooses": lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        "aten::mkldnn_linear: oneDNN chooses": lambda: torch.ops.aten.mkldnn_linear(x.to_mkldnn(), w.to_mkldnn(), None),
        "aten::native_batch_norm: call torch.nn.functional.batch_norm": lambda: torch.native_batch_norm(
            IMAGES, None, None, None, None, True, 0.1, 1e-5
        ),
    }
    for sentence, call in calls.items():
        with batch_invariant_mode(), pytest.raises(Refused, match=sentence):
            call()
        call()  # outside, torch computes it
