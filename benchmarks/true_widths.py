"""Models of true widths in the mode: every relation, and generation; each test fails where a bit differs.

    python -m pytest benchmarks/true_widths.py --batch-invariant -n 8 --dist loadgroup --batchinv-report widths.json

A few layers of the widths of published models, on the GPU if there is one, in bf16, else tiny ones on the CPU, in fp32.
"""

import pytest
import torch

from pytest_batchinv import check_batch_invariant, check_negative_control
from pytest_batchinv.subjects.transformers import TransformersSubject
from pytest_batchinv.subjects.transformers.generation import Generation

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", "bf16") if ON_GPU else ("cpu", "fp32")
MODELS = (
    ("wide-qwen3-moe", "wide-gpt-oss", "wide-gemma", "wide-qwen3", "wide-llama", "wide-gpt2")
    if ON_GPU
    else ("tiny-qwen3", "tiny-gemma")
)
RELATIONS = ("RSI", "L", "C", "D", "G")

_loaded: dict[str, TransformersSubject] = {}
"""The last model of this process: one at a time is kept."""


def subject(model: str) -> TransformersSubject:
    if model not in _loaded:
        _loaded.clear()
        torch.cuda.empty_cache()
        _loaded[model] = TransformersSubject(model, device=DEVICE, dtype=DTYPE)
    return _loaded[model]


def of_models(*names: str, what: str):
    """A parameter for each model; one process has all of a model's that are not compiled."""
    return pytest.mark.parametrize(
        "model", [pytest.param(name, marks=pytest.mark.xdist_group(f"{name} {what}")) for name in names]
    )


@pytest.mark.batch_invariant
@of_models(*MODELS, what="compiled")
def test_compiled_code_has_the_bits_of_eager_code(model):
    check_batch_invariant(subject(model).in_compile_mode("default"), ["R", "I", "X"])


@pytest.mark.batch_invariant
@pytest.mark.parametrize("relations", RELATIONS)
@of_models(*MODELS, what="eager")
def test_a_row_has_the_same_bits(model, relations):
    check_batch_invariant(subject(model), list(relations))


@pytest.mark.batch_invariant
@of_models(*MODELS, what="eager")
def test_a_row_generates_the_same_alone_and_in_a_batch(model):
    check_batch_invariant(Generation(subject(model)), ["R", "I"])


@of_models(*MODELS, what="eager")
def test_stock_torch_is_caught(model):
    check_negative_control(subject(model))
