"""Sums at the places that an index names, and sums of the rows that it names, in the order of the index."""

import math

import torch
from torch import Tensor

from pytest_batchinv.kernels import stock
from pytest_batchinv.kernels.aten.common import Refused, factor, kernel_set, shape_of, too_few_dims, wrap_dim
from pytest_batchinv.kernels.reference import accumulator_dtype


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
    places, values = flat_places("scatter_add", self, dim, index, src)
    if not index.numel():
        return self.clone(memory_format=torch.contiguous_format)
    out = kernel_set(self).index_add(self.reshape(-1, 1), places, values[:, None], 1.0)
    return out.view(self.shape)


def flat_places(name: str, self: Tensor, dim: int, index: Tensor, src: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the flat tensor, and the values for them, both as vectors. A place out of range is -1 on CUDA."""
    if self.device != src.device or self.device != index.device:
        raise RuntimeError(f"{name}: expected self, index and src on one device")
    dim = wrap_dim(self, dim)
    if self.dtype != src.dtype:
        raise RuntimeError(f"{name}: expected self and src of one dtype, but got {self.dtype} and {src.dtype}")
    if not index.numel():
        return index.reshape(-1), src.reshape(-1)
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{name}: expected an index of int64 or int32, but got {index.dtype}")
    self, index, src = (x[None] if x.dim() == 0 else x for x in (self, index, src))
    n_dims = self.dim()
    if index.dim() != n_dims or src.dim() != n_dims:
        raise RuntimeError(f"{name}: ranks differ: {shape_of(self)}, index {shape_of(index)}, src {shape_of(src)}")
    if any(index.shape[d] > src.shape[d] or d != dim and index.shape[d] > self.shape[d] for d in range(n_dims)):
        raise RuntimeError(f"{name}: an index of {shape_of(index)} is larger than self {shape_of(self)} or src {shape_of(src)}")
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
    return place.reshape(-1), src.reshape(-1)


def index_put(self: Tensor, indices, values: Tensor, accumulate: bool = False, unsafe: bool = False) -> Tensor:
    """Adds the values at the places that ``self[indices]`` names, in the order of the flat index. Only with accumulate."""
    indices = _indices_by_dim(self, indices)
    dims = [d for d, index in enumerate(indices) if index is not None]
    if self.dtype != values.dtype or self.device != values.device:
        raise RuntimeError(
            f"index_put: expected values in {self.dtype} on {self.device}, not {values.dtype} on {values.device}"
        )
    if not dims:
        return self + values.expand(self.shape)
    rest = [d for d in range(self.dim()) if d not in dims]
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0  # where the index's dims are in the result
    chosen = torch.broadcast_shapes(*(indices[d].shape for d in dims))
    kept = [self.shape[d] for d in rest]
    values = values.expand(*kept[:first], *chosen, *kept[first:])
    values = values.permute(*range(first, first + len(chosen)), *range(first), *range(first + len(chosen), values.dim()))
    place = _place_in_rows(self, indices, dims).expand(chosen)
    sizes, n_cols = [self.shape[d] for d in dims], math.prod(kept)
    rows = self.permute(*dims, *rest).reshape(math.prod(sizes), n_cols)
    out = kernel_set(self).index_add(rows, place.reshape(-1), values.reshape(place.numel(), n_cols), 1.0)
    out = out.view(*sizes, *kept).permute(*[(dims + rest).index(d) for d in range(self.dim())])
    return out.contiguous()


def _indices_by_dim(x: Tensor, indices) -> list[Tensor | None]:
    """One index for each dim, None where all is taken; a mask of several dims becomes as many indices."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            if index.shape != x.shape[len(found) : len(found) + index.dim()]:
                raise IndexError(f"index_put: a mask of {shape_of(index)} does not fit {shape_of(x)} at dim {len(found)}")
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    if len(found) > x.dim():
        raise IndexError(f"index_put: too many indices, {len(found)} for {shape_of(x)}")
    return found


def _place_in_rows(x: Tensor, indices: list[Tensor | None], dims: list[int]) -> Tensor:
    """The row of ``x.permute(dims + rest)`` that each index names. One out of range is -1 on CUDA: a check would wait."""
    place, in_range, stride = torch.zeros((), dtype=torch.int64, device=x.device), None, 1
    for d in reversed(dims):
        size, index = x.shape[d], indices[d].to(x.device, torch.int64)
        index = torch.where(index < 0, index + size, index)
        inside = (index >= 0) & (index < size)
        if x.device.type == "cpu" and not bool(inside.all()):
            raise IndexError(f"index_put: an index is out of range for dimension {d} of size {size}")
        place, stride = place + index * stride, stride * size
        in_range = inside if in_range is None else in_range & inside
    return place.where(in_range, -1)


def embedding_dense_backward(
    grad_output: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
):
    """The gradients of each row of the table, added in the order of the indices. The padding's go to a row that is dropped."""
    if scale_grad_by_freq:
        raise Refused("batch-invariant mode covers the gradient of embedding without scale_grad_by_freq.")
    index = _checked(indices.reshape(-1).long(), num_weights, IndexError)
    n_cols = grad_output.shape[-1]
    index = torch.where(index == padding_idx, num_weights, index) if padding_idx >= 0 else index
    table = grad_output.new_zeros(()).expand(num_weights + (padding_idx >= 0), n_cols)  # of one value, which is not read again
    rows = grad_output.reshape(index.numel(), n_cols)
    return kernel_set(grad_output).index_add(table, index, rows, 1.0)[:num_weights]


def embedding_bag(
    weight,
    indices,
    offsets,
    scale_grad_by_freq=False,
    mode=0,
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=-1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each bag's sum as ``index_add`` has it, in the order of its indices; a mean is divided after it; rounded once.

    torch's own kernel gives maxima, which no order changes, and what is there of each index and bag beside the result.
    """
    options = (scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx)
    device, keys = ("CUDA" if weight.is_cuda else "CPU"), torch._C.DispatchKey
    kernel = stock.kernel_of("aten::_embedding_bag", device)
    out, *others = kernel(torch._C.DispatchKeySet(getattr(keys, device)), weight, indices, offsets, *options)
    if mode == _MAX:
        return out, *others
    places = torch.arange(indices.shape[0], device=indices.device)
    bags = torch.bucketize(places, offsets.to(places.dtype), right=True) - 1
    padding = padding_idx + weight.shape[0] if padding_idx < -1 else padding_idx
    if padding >= 0:
        kept = indices != padding
        places, bags = places[kept], bags[kept]
    wide = accumulator_dtype(weight.dtype)
    rows = weight.index_select(0, indices[places].long()).to(wide)
    rows = rows if per_sample_weights is None else rows * per_sample_weights[places].to(wide)[:, None]
    sums = kernel_set(weight).index_add(rows.new_zeros(out.shape), bags, rows, 1.0)
    if mode == _MEAN:
        sums = sums / torch.bincount(bags, minlength=out.shape[0]).clamp(min=1).to(wide)[:, None]
    return sums.to(out.dtype), *others


_MEAN, _MAX = 1, 2


def _checked(index: Tensor, size: int, error: type[Exception]) -> Tensor:
    """Raises for an index out of range on the CPU. On CUDA the kernel asserts it: a check here would wait for the GPU."""
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise error(f"index out of range: indices must be from 0 to {size - 1}")
    return index
