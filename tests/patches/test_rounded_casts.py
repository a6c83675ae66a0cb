"""bf16 and fp16 on the CPU: compiled code has eager code's bits where its setting is obeyed, and everywhere with the patch."""

import pytest
import torch

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.patches.registry import applied

pytestmark = pytest.mark.usefixtures("cold")
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def rounds_in_between(x, y):
    return ((x + y) * x - y) * 3


def agrees_with_eager_code(dtype) -> bool:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, y = torch.randn(7, 100).to(dtype), torch.randn(7, 100).to(dtype)
    return torch.equal(torch.compile(rounds_in_between, fullgraph=True)(x, y), rounds_in_between(x, y))


@LOW
def test_the_setting_has_no_effect_exactly_where_the_gate_is_open(dtype, needed):
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert agrees_with_eager_code(dtype) == (not needed("rounded_casts"))


@LOW
def test_with_the_patch_the_bits_are_eager_codes_and_after_it_the_method_is_the_same_object(dtype):
    from torch._inductor.codegen.cpp import CppKernel

    before = vars(CppKernel)["cache_dtype_convert"]
    with applied("inductor"), torch._inductor.config.patch(emulate_precision_casts=True):
        assert agrees_with_eager_code(dtype)
    assert vars(CppKernel)["cache_dtype_convert"] is before


def test_without_the_setting_the_patch_changes_nothing():
    with applied("inductor"):
        assert not agrees_with_eager_code(torch.bfloat16)


@LOW
def test_in_the_mode_the_bits_are_eager_codes(dtype):
    with batch_invariant_mode():
        assert agrees_with_eager_code(dtype)
