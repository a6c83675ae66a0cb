"""Distances between rows."""

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import shape_of
from pytest_batchinv.kernels.aten.reductions import vector_norm

MOST_VALUES = 1 << 24
"""Differences that are held at a time."""


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """By :func:`cdist_forward` for every number of rows. torch takes a product for more than 25 rows."""
    if x1.dim() < 2 or x2.dim() < 2 or x1.shape[-1] != x2.shape[-1] or not p >= 0 or compute_mode not in (None, 0, 1, 2):
        raise RuntimeError(
            f"cdist: expected two matrices of rows of one length, p >= 0 and a compute_mode from 0 to 2, but got "
            f"{shape_of(x1)} and {shape_of(x2)}, {p} and {compute_mode}"
        )
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    first, second = (x.expand(*batch, *x.shape[-2:]).contiguous() for x in (x1, x2))
    return torch.ops.aten._cdist_forward(first, second, p, 2)


def cdist_forward(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """[*, P, M], [*, R, M] -> [*, P, R]: ``vector_norm`` of order p of each difference, which is rounded to the dtype."""
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    P, R, M = x1.shape[-2], x2.shape[-2], x1.shape[-1]
    out = x1.new_zeros(*batch, P, R)
    if not out.numel() or not M:
        return out
    step = max(1, MOST_VALUES // (out.numel() // P * M))
    for start in range(0, P, step):
        differences = x1[..., start : start + step, None, :] - x2[..., None, :, :]
        out[..., start : start + step, :] = vector_norm(differences, p, [-1])
    return out
