"""Recurrent layers by torch's own decompositions, which compiled code takes too, and cells: all of linear layers and gates.

What eager code takes instead follows the device and the size: oneDNN, cuDNN and fused cells, with sums in orders of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def decomposed(name: str) -> Callable[..., Any]:
    """torch's decomposition of this overload ("lstm.input")."""

    def run(*args: Any) -> Any:
        from torch._decomp import decomposition_table

        packet, _, overload = name.partition(".")
        return decomposition_table[getattr(getattr(torch.ops.aten, packet), overload)](*args)

    return run


def lstm_cell(input: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih=None, b_hh=None) -> tuple[Tensor, Tensor]:
    """input: [N, I], hx: two of [N, H] -> the next two."""
    hidden, cell = hx
    gates = F.linear(hidden, w_hh, b_hh) + F.linear(input, w_ih, b_ih)
    into, forget, new, out = gates.chunk(4, -1)
    cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


def gru_cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih=None, b_hh=None) -> Tensor:
    """input: [N, I], hx: [N, H] -> [N, H]."""
    reset, update, new = F.linear(input, w_ih, b_ih).chunk(3, -1)
    reset_h, update_h, new_h = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    candidate = (new + new_h * (reset_h + reset).sigmoid()).tanh()
    return (hx - candidate) * (update_h + update).sigmoid() + candidate
