"""Operators as functions of rows, each with a pool of rows: small enough for a CPU, odd enough to find what varies."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

POOL = 70
WIDTHS = {"float32": 1023, "bfloat16": 1030}


@dataclass(frozen=True)
class Operator:
    """fn: from rows [n, K] to rows. The weights it closes over are seeded."""

    name: str
    fn: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return self.name


def operators(dtype: torch.dtype, device: str) -> list[Operator]:
    width = WIDTHS[str(dtype).removeprefix("torch.")]
    generator = torch.Generator().manual_seed(7)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div(shape[-1] ** 0.5).to(device, dtype)

    w, b, square = weight(77, width), weight(77), weight(2, 64, 64)
    gain = weight(width)

    def attend(x: Tensor) -> Tensor:
        # A copy: stock kernels of CUDA fault at addresses that are no multiple of 16 bytes.
        heads = x[:, :960].contiguous().view(-1, 2, 30, 16)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).flatten(1)

    return [
        Operator("linear", lambda x: F.linear(x, w, b)),
        Operator("matmul", lambda x: x @ w.t()),
        Operator("bmm", lambda x: torch.bmm(x[:, :128].reshape(-1, 2, 64).transpose(0, 1), square).transpose(0, 1)),
        Operator("softmax", lambda x: x.softmax(-1)),
        Operator("log_softmax", lambda x: x.log_softmax(-1)),
        Operator("mean", lambda x: x.mean(-1)),
        Operator("sum", lambda x: x.sum(-1)),
        Operator("var", lambda x: x.var(-1)),
        Operator("logsumexp", lambda x: x.logsumexp(-1)),
        Operator("norm", lambda x: x.norm(dim=-1)),
        Operator("cumsum", lambda x: x.cumsum(-1)),
        Operator("layer_norm", lambda x: F.layer_norm(x, (width,), gain)),
        Operator("group_norm", lambda x: F.group_norm(x[:, :960].view(-1, 8, 120), 4)),
        Operator("rms_norm", lambda x: F.rms_norm(x, (width,), gain)),
        Operator("attention", attend),
        Operator("silu", F.silu),
        Operator("gelu", F.gelu),
        Operator("rsqrt", lambda x: x.abs().rsqrt()),
    ]


def pool(dtype: torch.dtype, device: str) -> Tensor:
    width = WIDTHS[str(dtype).removeprefix("torch.")]
    return torch.randn(POOL, width, generator=torch.Generator().manual_seed(11)).to(device, dtype)
