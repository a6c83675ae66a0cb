"""Where stock torch gives a row other bits: each test fails with its trace where it does, and passes where nothing was found.

    python -m pytest benchmarks/stock_torch.py --batch-invariant --batchinv-report stock.json --batchinv-report stock.html

Layers of the sizes of Qwen3 and Llama, models of true widths, and compiled code, on the GPU if there is one, else on the CPU.
The report is an example of what a trace shows; ``-k linear`` gives the map of the batch sizes at which products change.
"""

import pytest
import torch

from pytest_batchinv import assert_batch_invariant, check_batch_invariant
from pytest_batchinv.subjects.transformers import TransformersSubject

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

LINEAR = [(1024, 3072), (3072, 1024), (4096, 4096), (4096, 12288), (12288, 4096)] if ON_GPU else [(256, 64), (1024, 32)]
MODELS = (
    ["wide-qwen3", "wide-llama", "wide-gpt2", "wide-qwen3-moe"] if ON_GPU else ["tiny-qwen3", "tiny-gpt2", "tiny-qwen3-moe"]
)
COMPILE_MODES = ["default", "reduce-overhead"] if ON_GPU else ["default"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def on_device(module: torch.nn.Module, dtype: torch.dtype = DTYPE) -> torch.nn.Module:
    return module.to(DEVICE, dtype).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("n_in", "n_out"), LINEAR)
def test_linear(n_in, n_out, dtype):
    layer = on_device(torch.nn.Linear(n_in, n_out, bias=False), dtype)
    assert_batch_invariant(layer, torch.randn(512, n_in, device=DEVICE, dtype=dtype), relations=("R", "I"))


@pytest.mark.parametrize("model", MODELS)
def test_model(model):
    check_batch_invariant(
        TransformersSubject(model, device=DEVICE, dtype="bf16" if ON_GPU else "fp32", attn="sdpa"), ["R", "S", "I"]
    )


@pytest.mark.parametrize("compile_mode", COMPILE_MODES)
@pytest.mark.parametrize("relation", ["I", "X"])
def test_compiled_model(relation, compile_mode):
    model, dtype = ("wide-qwen3", "bf16") if ON_GPU else ("tiny-qwen3", "fp32")
    subject = TransformersSubject(model, device=DEVICE, dtype=dtype, attn="sdpa", compile_mode=compile_mode)
    check_batch_invariant(subject, [relation])


@pytest.mark.parametrize("compile_mode", COMPILE_MODES)
@pytest.mark.parametrize("relation", ["I", "X"])
def test_compiled_norm_and_gelu(relation, compile_mode):
    block = on_device(
        torch.nn.Sequential(torch.nn.LayerNorm(1000), torch.nn.Linear(1000, 1000), torch.nn.GELU(approximate="tanh"))
    )
    rows = torch.randn(128, 1000, device=DEVICE, dtype=DTYPE)
    assert_batch_invariant(block, rows, relations=(relation,), compile_mode=compile_mode)


def test_lstm():
    lstm = on_device(torch.nn.LSTM(256, 256, batch_first=True), torch.float32)
    assert_batch_invariant(lambda x: lstm(x)[0], torch.randn(64, 7, 256, device=DEVICE))


def test_fft():
    assert_batch_invariant(torch.fft.rfft, torch.randn(8, 65536, device=DEVICE))


def test_deviation_of_compiled_code():
    rows = torch.randn(64, 37, device=DEVICE)
    assert_batch_invariant(lambda x: x.std(1), rows, relations=("I",), compile_mode="default")
