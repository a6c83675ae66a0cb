"""Products by quantised weights: a row's bits are its own, or the call is refused because its scale is that of the batch."""

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import dynamic

from pytest_batchinv import assert_batch_invariant, batch_invariant_mode
from pytest_batchinv.coverage import samples
from pytest_batchinv.kernels.aten.common import Refused

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel",
    "ignore:The current implementation of the",
    "ignore:.*TypedStorage is deprecated",
)
SOURCES = ("int8_weights", "int4_weights", "int4_weights_of_dynamic_rows", "int8_rows_and_weights")


@pytest.mark.parametrize("source", SOURCES)
def test_a_row_with_a_scale_of_its_own_has_equal_bits_in_every_batch(source):
    (sample,) = samples.samples(f"also:{source}", "cpu", torch.float32)
    x = torch.randn(70, sample.args[0].shape[1], generator=torch.Generator().manual_seed(0))
    with batch_invariant_mode():
        record = assert_batch_invariant(sample.function, x, relations=("R", "S", "I"), max_examples=5)
    assert record.verdict == "equal"


def test_sums_of_integers_are_exact_where_they_are_largest():
    """So no order changes them. Instructions that add in 16 bits would saturate."""
    a, b = (torch.full(shape, -128, dtype=torch.int8) for shape in ((33, 512), (512, 24)))
    b[::2] = 127
    with batch_invariant_mode():
        for n in (17, 18, 33):
            assert torch.equal(torch._int_mm(a[:n], b).long(), a[:n].long() @ b.long())


MODULES = {
    "quantized::linear_dynamic": (lambda: dynamic.Linear(8, 8), (3, 8)),
    "quantized::conv1d_dynamic": (lambda: dynamic.Conv1d(4, 4, 3), (2, 4, 9)),
    "quantized::conv_transpose2d_dynamic": (lambda: dynamic.ConvTranspose2d(4, 4, 3), (2, 4, 9, 9)),
    "aten::quantized_lstm.input": (lambda: dynamic.LSTM(8, 8), (3, 2, 8)),
    "aten::quantized_gru.input": (lambda: dynamic.GRU(8, 8), (3, 2, 8)),
    "quantized::quantized_lstm_cell_dynamic": (lambda: dynamic.LSTMCell(8, 8), (3, 8)),
    "quantized::quantized_rnn_tanh_cell_dynamic": (lambda: dynamic.RNNCell(8, 8), (3, 8)),
}


@pytest.mark.parametrize("operator", MODULES)
def test_a_scale_of_the_whole_batch_is_refused(operator):
    make, shape = MODULES[operator]
    module, x = make(), torch.randn(shape)
    with batch_invariant_mode(), pytest.raises(Refused, match=f"{operator}: the scale of its integers is that of the whole"):
        module(x)
    module(x)  # outside, torch computes it


def test_dynamic_quantisation_of_a_model_and_of_a_tensor_is_refused():
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 16)), {nn.Linear})
    with batch_invariant_mode():
        with pytest.raises(Refused, match="give each row a scale of its own"):
            quantized(torch.randn(3, 64))
        with pytest.raises(Refused, match="give each row a scale of its own"):
            torch.quantize_per_tensor_dynamic(torch.randn(3, 64), torch.qint8, False)


def test_bad_input_raises_as_torch_does():
    x, weight, scales = torch.rand(3, 64), torch.zeros(48, 64, dtype=torch.int8), torch.rand(48)
    calls = (
        lambda: torch._weight_int8pack_mm(x[:, :63], weight, scales),
        lambda: torch._weight_int8pack_mm(x, weight.int(), scales),
        lambda: torch._weight_int8pack_mm(x, weight, scales[:47]),
        lambda: torch._int_mm(x, weight.t()),
        lambda: torch._int_mm(weight, weight),
    )
    for call in calls:
        with pytest.raises(RuntimeError) as of_torch:
            call()
        with batch_invariant_mode(), pytest.raises(RuntimeError) as of_the_mode:
            call()
        assert type(of_the_mode.value) is type(of_torch.value) is RuntimeError
