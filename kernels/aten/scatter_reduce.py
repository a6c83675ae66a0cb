"""Reductions at the places that an index names, with duplicates: sums, products, means, maxima and minima, in one order."""

import torch
from torch import Tensor

from pytest_batchinv.kernels import stock
from pytest_batchinv.kernels.aten.common import kernel_set, shape_of, too_few_dims, wrap_dim
from pytest_batchinv.kernels.aten.scatter import flat_places
from pytest_batchinv.kernels.reference import accumulator_dtype

_KEYS = torch._C.DispatchKey


def scatter_reduce(self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Tensor:
    """Each place is ``self``, if it is included, and then the values that are named for it, in the order of the flat index.

    sum: as ``index_add``. mean: that sum in the accumulator's dtype, divided by the number of values, rounded once. prod: see
    :func:`_products`. amax, amin: no order changes them; a zero has no sign, as the order would decide it.
    """
    _require_reduction(reduce, ("sum", "prod", "mean", "amax", "amin"))
    if not index.numel():
        return self.clone(memory_format=torch.contiguous_format)
    places, values = flat_places("scatter_reduce", self, dim, index, src)
    if places.is_cuda:
        torch._assert_async((places >= 0).all(), "scatter_reduce: an index is out of range")
    return _reduced(self.reshape(-1), places, values, reduce, include_self).view(self.shape)


def index_reduce(self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Tensor:
    """:func:`scatter_reduce` of whole slices: ``index`` names one of ``self`` along ``dim`` for each of ``source``."""
    _require_reduction(reduce, ("prod", "mean", "amax", "amin"))
    dim = wrap_dim(self, dim)
    if index.dim() > 1:
        raise IndexError(f"index_reduce: expected a vector as index, but got {shape_of(index)}")
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"index_reduce: expected an index of int64 or int32, but got {index.dtype}")
    if self.dtype != source.dtype or self.device != source.device or self.device != index.device:
        raise RuntimeError("index_reduce: expected self and source of one dtype, and self, source and index on one device")
    if source.dim() == 0 and index.numel() != 1:
        raise too_few_dims("index_reduce", source)
    rows, sources = (x[None] if x.dim() == 0 else x for x in (self, source))
    if sources.shape != rows.shape[:dim] + (index.numel(),) + rows.shape[dim + 1 :]:
        raise RuntimeError(
            f"index_reduce: {shape_of(source)} at {index.numel()} places does not fit {shape_of(self)} along dimension {dim}"
        )
    places = index.reshape([-1 if d == dim else 1 for d in range(rows.dim())]).expand(sources.shape)
    return scatter_reduce(rows, dim, places, sources, reduce, include_self=include_self).view(self.shape)


def scatter_with(self: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    """``torch.scatter`` with ``reduce``: "add" or "multiply", ``self`` included."""
    _require_reduction(reduce, tuple(_OF_SCATTER))
    return scatter_reduce(self, dim, index, src, _OF_SCATTER[reduce])


def scatter_value_with(self: Tensor, dim: int, index: Tensor, value: float, *, reduce: str) -> Tensor:
    return scatter_with(self, dim, index, self.new_full(index.shape, value), reduce=reduce)


_OF_SCATTER = {"add": "sum", "multiply": "prod"}


def _require_reduction(reduce: str, known: tuple[str, ...]) -> None:
    if reduce not in known:
        raise RuntimeError(f"reduce argument must be either {', '.join(known[:-1])} or {known[-1]}, got {reduce}.")


def _reduced(self: Tensor, places: Tensor, values: Tensor, reduce: str, include_self: bool) -> Tensor:
    """Of vectors: values at places of self. What no place names stays."""
    is_named = torch.zeros(self.shape, dtype=torch.bool, device=self.device).index_fill_(0, places, True)
    if reduce == "prod":
        return _products(self, places, values, include_self, is_named)
    if reduce in ("amax", "amin"):
        device = "CUDA" if self.is_cuda else "CPU"
        kernel, keyset = stock.kernel_of("aten::scatter_reduce.two", device), torch._C.DispatchKeySet(getattr(_KEYS, device))
        reduced = kernel(keyset, self + 0.0, 0, places, values + 0.0, reduce, include_self=include_self)
        return torch.where(is_named, reduced, self)
    start = self if include_self else self.masked_fill(is_named, 0)
    if reduce == "sum":
        return kernel_set(self).index_add(start[:, None], places, values[:, None], 1.0)[:, 0]
    wide = accumulator_dtype(self.dtype)
    sums = kernel_set(self).index_add(start.to(wide)[:, None], places, values.to(wide)[:, None], 1.0)[:, 0]
    counts = torch.bincount(places, minlength=self.numel()) + include_self
    return torch.where(is_named, (sums / counts.to(wide)).to(self.dtype), self)


def _products(self: Tensor, places: Tensor, values: Tensor, include_self: bool, is_named: Tensor) -> Tensor:
    """In float64: neighbours by pairs, the pairs by pairs, and so on, in the order of the index; ``self`` last; rounded once.

    The values of a place lie behind each other. At step s those whose rank is a multiple of 2 s take in what lies s further, if
    it is of the same place: a tree over the place's own values, whatever the others are.
    """
    order = places.argsort(stable=True)
    runs, products = places[order], values[order].double()
    rank = torch.arange(runs.numel(), device=runs.device) - torch.searchsorted(runs, runs)
    step = 1
    while step < runs.numel():
        takes = (runs[:-step] == runs[step:]) & (rank[:-step] % (2 * step) == 0)
        taken = torch.where(takes, products[:-step] * products[step:], products[:-step])
        products = torch.cat([taken, products[-step:]])
        step *= 2
    beyond = self.numel()  # where all but the first of each place are written, to be dropped
    of_places = products.new_ones(beyond + 1).index_copy_(0, torch.where(rank == 0, runs, beyond), products)[:beyond]
    return torch.where(is_named, of_places * self if include_self else of_places, self).to(self.dtype)
