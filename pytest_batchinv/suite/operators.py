"""Operators as functions of rows, each with a pool of rows: small enough for a CPU, odd enough to find what varies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pytest_batchinv.subjects.rows import RowsSubject

POOL = 70
WIDTHS = {torch.float32: 1023, torch.bfloat16: 1030}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def subject(operator: str, dtype: str, device: str) -> RowsSubject:
    """One operator over its pool. Raises KeyError for an operator that is not in ``names.OPERATORS``."""
    wanted = _DTYPES[dtype]
    rows = torch.randn(POOL, WIDTHS[wanted], generator=torch.Generator().manual_seed(11)).to(device, wanted)
    return RowsSubject(functions(wanted, device)[operator], [rows], name=operator)


def functions(dtype: torch.dtype, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """From rows [n, K] to rows. The weights that they close over are seeded."""
    width = WIDTHS[dtype]
    generator = torch.Generator().manual_seed(7)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div(shape[-1] ** 0.5).to(device, dtype)

    w, b, square = weight(77, width), weight(77), weight(2, 64, 64)
    gain = weight(width)

    def attend(x: Tensor) -> Tensor:
        # A copy: stock kernels of CUDA fault at addresses that are no multiple of 16 bytes.
        heads = x[:, :960].contiguous().view(-1, 2, 30, 16)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).flatten(1)

    return {
        "linear": lambda x: F.linear(x, w, b),
        "matmul": lambda x: x @ w.t(),
        "bmm": lambda x: torch.bmm(x[:, :128].reshape(-1, 2, 64).transpose(0, 1), square).transpose(0, 1),
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "mean": lambda x: x.mean(-1),
        "sum": lambda x: x.sum(-1),
        "var": lambda x: x.var(-1),
        "logsumexp": lambda x: x.logsumexp(-1),
        "norm": lambda x: x.norm(dim=-1),
        "cumsum": lambda x: x.cumsum(-1),
        "layer_norm": lambda x: F.layer_norm(x, (width,), gain),
        "group_norm": lambda x: F.group_norm(x[:, :960].view(-1, 8, 120), 4),
        "rms_norm": lambda x: F.rms_norm(x, (width,), gain),
        "attention": attend,
        "silu": F.silu,
        "gelu": F.gelu,
        "rsqrt": lambda x: x.abs().rsqrt(),
    }
