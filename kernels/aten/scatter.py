"""Sums at the places that an index names, in the order of the index."""

import math

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import factor, kernel_set, shape_of, too_few_dims, wrap_dim


def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    dim = wrap_dim(self, dim)
    if index.dim() > 1:
        raise IndexError(f"index_add: expected a vector as index, but got {shape_of(index)}")
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"index_add: expected an index of int64 or int32, but got {index.dtype}")
    if self.dtype != source.dtype or self.device != source.device or self.device != index.device:
        raise RuntimeError("index_add: expected self and source of one dtype, and self, source and index on one device")
    if source.dim() == 0 and dim == 0 and index.numel() != 1:
        raise too_few_dims("index_add", source)
    if self.dim() == 0:
        if source.dim():
            raise RuntimeError(f"index_add: one value is added to one, but got {shape_of(source)}")
        return index_add(self[None], 0, index, source[None], alpha=alpha)[0]
    if source.shape != self.shape[:dim] + (index.numel(),) + self.shape[dim + 1 :]:
        raise RuntimeError(f"index_add: {shape_of(source)} added at {index.numel()} places does not fit {shape_of(self)}")
    moved, index = self.movedim(dim, 0), _checked(index.reshape(-1).long(), self.shape[dim], IndexError)
    n_cols = math.prod(moved.shape[1:])
    rows, sources = moved.reshape(moved.shape[0], n_cols), source.movedim(dim, 0).reshape(index.shape[0], n_cols)
    out = kernel_set(self).index_add(rows, index, sources, factor(alpha, self))
    return out.view(moved.shape).movedim(0, dim).contiguous()


def scatter_add(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """Adds each value, as a row of one column, at its place in the flat tensor, in the order of the flat index."""
    if self.device != src.device or self.device != index.device:
        raise RuntimeError("scatter_add: expected self, index and src on one device")
    dim = wrap_dim(self, dim)
    if self.dtype != src.dtype:
        raise RuntimeError(f"scatter_add: expected self and src of one dtype, but got {self.dtype} and {src.dtype}")
    if not index.numel():
        return self.clone(memory_format=torch.contiguous_format)
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"scatter_add: expected an index of int64 or int32, but got {index.dtype}")
    shape = self.shape
    self, index, src = (x[None] if x.dim() == 0 else x for x in (self, index, src))
    n_dims = self.dim()
    if index.dim() != n_dims or src.dim() != n_dims:
        raise RuntimeError(f"scatter_add: ranks differ: {shape_of(self)}, index {shape_of(index)}, src {shape_of(src)}")
    if any(index.shape[d] > src.shape[d] or d != dim and index.shape[d] > self.shape[d] for d in range(n_dims)):
        raise RuntimeError(
            f"scatter_add: an index of {shape_of(index)} is larger than self {shape_of(self)} or src {shape_of(src)}"
        )
    index = _checked(index.long(), self.shape[dim], RuntimeError)
    in_range = (index >= 0) & (index < self.shape[dim])
    src = src[tuple(slice(size) for size in index.shape)]
    strides = [math.prod(self.shape[d + 1 :]) for d in range(n_dims)]
    place = index * strides[dim]
    for d in range(n_dims):
        if d != dim:
            steps = torch.arange(index.shape[d], device=index.device) * strides[d]
            place = place + steps.view([-1 if i == d else 1 for i in range(n_dims)])
    place = place.where(in_range, -1)  # an index out of range is one in the flat tensor, too, and not another row's
    out = kernel_set(self).index_add(self.reshape(-1, 1), place.reshape(-1), src.reshape(-1, 1), 1.0)
    return out.view(shape)


def _checked(index: Tensor, size: int, error: type[Exception]) -> Tensor:
    """Raises for an index out of range on the CPU. On CUDA the kernel asserts it: a check here would wait for the GPU."""
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise error(f"index out of range: indices must be from 0 to {size - 1}")
    return index
