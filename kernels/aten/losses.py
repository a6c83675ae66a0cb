"""The negative log likelihood: values are picked, and summed as the only row of a matrix."""

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import shape_of
from pytest_batchinv.kernels.aten.reductions import sum_all
from pytest_batchinv.kernels.reference import accumulator_dtype

_NONE, _MEAN = 0, 1


def nll_loss_forward(self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int):
    """self: [N, C] or [C]; target: int64 [N] or [] -> the loss, and the sum of the weights of what is not ignored."""
    if self.dim() not in (1, 2) or target.dim() != self.dim() - 1 or self.shape[:-1] != target.shape:
        raise RuntimeError(f"nll_loss: expected [N, C] and [N], or [C] and [], but got {shape_of(self)} and {shape_of(target)}")
    return _nll(self, target, weight, reduction, ignore_index)


def nll_loss2d_forward(self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int):
    """self: [N, C, H, W]; target: int64 [N, H, W]."""
    if self.dim() != 4 or target.dim() != 3 or (self.shape[0], *self.shape[2:]) != target.shape:
        raise RuntimeError(f"nll_loss2d: expected [N, C, H, W] and [N, H, W], but got {shape_of(self)} and {shape_of(target)}")
    return _nll(self.movedim(1, -1), target, weight, reduction, ignore_index)


def _nll(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    classes = x.shape[-1]
    if weight is not None and weight.numel() != classes:
        raise RuntimeError(f"nll_loss: expected a weight for each of {classes} classes, but got {shape_of(weight)}")
    target, ignored = target.long(), target == ignore_index
    if x.device.type == "cpu" and not bool((ignored | (target >= 0) & (target < classes)).all()):
        raise IndexError(f"nll_loss: a target is out of bounds: targets are from 0 to {classes - 1}, or {ignore_index}")
    place = torch.where(ignored, 0, target)
    picked = -x.gather(-1, place[..., None])[..., 0]
    scale = None if weight is None else weight[place]
    losses = torch.where(ignored, 0, picked if scale is None else picked * scale)
    if reduction == _NONE:
        return losses, x.new_zeros(())
    wide = accumulator_dtype(x.dtype)
    total_weight = sum_all(torch.where(ignored, 0, torch.ones_like(picked) if scale is None else scale), dtype=wide)
    loss = sum_all(losses, dtype=wide)
    return (loss / total_weight if reduction == _MEAN else loss).to(x.dtype), total_weight.to(x.dtype)
