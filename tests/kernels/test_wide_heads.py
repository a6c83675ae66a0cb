"""Attention with head dims up to 512: torch's values, equal rows, and a refusal beyond."""

import pytest
import torch
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.compare import first_difference
from pytest_batchinv.kernels import reference
from pytest_batchinv.kernels.aten import attention
from pytest_batchinv.kernels.aten.common import Refused

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])


def operands(dtype, rows=5, head_dim=512):
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, heads, 19, head_dim) for heads in (4, 2, 2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@DTYPES
def test_heads_of_512_have_torchs_values_and_equal_rows(dtype):
    q, k, v = operands(dtype)
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    with batch_invariant_mode():
        whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        alone = [
            F.scaled_dot_product_attention(*(x[i : i + 1] for x in (q, k, v)), is_causal=True, enable_gqa=True)
            for i in range(5)
        ]
    torch.testing.assert_close(whole, exact.to(dtype))
    assert first_difference(torch.cat(alone), whole) is None


@DTYPES
@pytest.mark.parametrize("form", ["causal", "mask", "added mask", "soft cap and sinks", "nothing to see"])
def test_the_form_by_operators_follows_the_contract_and_keeps_rows(dtype, form):
    q, k, v = operands(dtype)
    mask, soft_cap, sinks = None, None, None
    if form == "mask":
        mask = torch.rand(5, 1, 19, 19) > 0.3
    elif form == "added mask":
        mask = torch.randn(5, 1, 19, 19).to(dtype)
    elif form == "soft cap and sinks":
        soft_cap, sinks = 5.0, torch.randn(4).to(dtype)
    elif form == "nothing to see":
        mask = torch.zeros(5, 1, 19, 19, dtype=torch.bool)
    full = None if mask is None else mask.expand(5, 4, 19, 19)
    options = (form == "causal", 0.05, soft_cap, sinks, True)
    out, lse = attention._by_operators(q, k, v, full, *options)
    expected = reference.attention(q, k, v, full, form == "causal", 0.05, soft_cap=soft_cap, sinks=sinks)
    torch.testing.assert_close((out, lse), expected)
    for i in range(5):
        row = attention._by_operators(*(x[i : i + 1] for x in (q, k, v)), None if full is None else full[i : i + 1], *options)
        assert first_difference(row[0], out[i : i + 1]) is None and first_difference(row[1], lse[i : i + 1]) is None


def test_keys_hidden_behind_the_others_change_no_bit():
    q, k, v = operands(torch.float32)
    mask = (torch.arange(19) < 11).expand(5, 4, 19, 19)
    out, _ = attention._by_operators(q, k, v, mask, False, 0.05, None, None, True)
    short, _ = attention._by_operators(q, k[:, :, :11], v[:, :, :11], None, False, 0.05, None, None, True)
    assert first_difference(short, out) is None


def test_larger_heads_are_refused():
    q, k, v = operands(torch.float32, 1, 520)
    with batch_invariant_mode(), pytest.raises(Refused, match="head dims up to 512, not 520"):
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
