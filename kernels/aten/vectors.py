"""Pointwise operators of the CPU by torch's own kernels, so that each value is computed by their vector code.

torch's loops take what is left behind the last whole vector of each thread's share by other code than the rest, with other
roundings. Here those values are computed once more, in a call of whole vectors. So a value has the same bits at any place, and
it is as accurate as torch's, since it is torch's.
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytest_batchinv.kernels import stock
from pytest_batchinv.kernels.aten.common import as_floats

UNIT = 256
"""Values. A multiple of what one step of any loop takes: two vectors of 64 bytes, of 1 to 16 bytes a value, and twice that."""
GRAIN = 32768
"""``at::internal::GRAIN_SIZE``: a loop over fewer values is not shared out between threads."""

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
Function = Callable[..., Any]


def whole_vectors(name: str) -> Function:
    """torch's kernel for the overload of this name, run on whole vectors. The result has the shape and dtype that torch gives.

    Tensors with one layout in memory give a result of that layout; others a contiguous one.
    """

    overload = f"aten::{name}"

    def run(*args: Any, **kwargs: Any) -> Any:
        kernel = stock.kernel_of(overload, "CPU")
        if len(args) == 1 and not kwargs and args[0].is_contiguous():
            x, size = args[0], args[0].numel()
            if 0 < size < UNIT:
                padded = torch.cat((x if x.dim() == 1 else x.reshape(-1), _ones(UNIT - size, x.dtype)))
                return kernel(_CPU, padded).as_strided(x.shape, _contiguous(x.shape))
            if size and size % UNIT == 0 and size <= GRAIN:  # whole vectors as they are, in one share
                return kernel(_CPU, x)
        return elementwise(partial(kernel, _CPU), args, kwargs)

    return run


def angle(self: Tensor) -> Tensor:
    """By the kernel of ``angle.out``: that of ``angle`` calls it through the dispatcher, which is the table's there."""
    dtype = self.dtype.to_real() if self.is_complex() else as_floats(self).dtype

    def into_new(x: Tensor) -> Tensor:
        return stock.kernel_of("aten::angle.out", "CPU")(_CPU, x, out=torch.empty(x.shape, dtype=dtype))

    return elementwise(into_new, (self,), {})


def elementwise(function: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``function`` of these tensors, broadcast, and of these other arguments: of one value at a time, whatever lies beside it.

    function: takes contiguous tensors of one dim and one size, gives such tensors. Tensors of no dim are handed on as they are,
    as they count for less in torch's choice of dtypes, unless there are no others.
    """
    places = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.dim()]
    places = places or [i for i, x in enumerate(args) if isinstance(x, Tensor)]
    tensors = [args[i] for i in places]
    shape, strides = layout_of(tensors)
    size = math.prod(shape)
    if not size:
        return function(*args, **kwargs)
    rows = [_row_of(x, shape, size, strides) for x in tensors]

    def call(rows: Sequence[Tensor]) -> Any:
        given = list(args)
        for i, row in zip(places, rows, strict=True):
            given[i] = row
        return function(*given, **kwargs)

    if size < UNIT:
        out, strides = call([torch.cat((row, _ones(UNIT - size, row.dtype))) for row in rows]), strides or _contiguous(shape)
        return out.as_strided(shape, strides) if isinstance(out, Tensor) else tuple(y.as_strided(shape, strides) for y in out)
    out, ends = call(rows), _ends_of_shares(size)
    if ends:
        again = call([torch.cat([row[end - UNIT : end] for end in ends]) if len(ends) > 1 else row[-UNIT:] for row in rows])
        _each(partial(_write_tails, ends), out, again)
    return _each(lambda y: _shaped(y, shape, strides), out)


def _row_of(x: Tensor, shape: torch.Size, size: int, strides: tuple[int, ...] | None) -> Tensor:
    """x as a vector of the result's order. Each step that a call can do without counts: most have few values."""
    if strides is not None:
        return x.as_strided((size,), (1,))
    if x.shape != shape:
        return x.expand(shape).reshape(-1)
    return x if len(shape) == 1 and x.is_contiguous() else x.reshape(-1)


@functools.lru_cache(maxsize=1024)
def _ones(n: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(n, dtype=dtype, device="cpu")


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return (1,) if len(shape) == 1 else tuple([math.prod(shape[dim + 1 :]) for dim in range(len(shape))])


def pow_of_tensors(self: Tensor | complex, exponent: Tensor | complex) -> Tensor:
    """``pow.Tensor_Tensor``. torch makes a tensor of no dim of a base that is a number, and Python is given the number."""
    base, exponent = (x if isinstance(x, Tensor) else _of_a_number(x, y) for x, y in ((self, exponent), (exponent, self)))
    return _pow_of_tensors(base, exponent)


_pow_of_tensors = whole_vectors("pow.Tensor_Tensor")


def _of_a_number(number: complex, beside: Any) -> Tensor:
    """A tensor of no dim, in a dtype that changes the dtype of the result no more than the number does."""
    if isinstance(number, int):
        return torch.scalar_tensor(number, dtype=torch.int64)
    is_wide = beside.dtype in (torch.float64, torch.complex128)
    dtype = torch.float64 if is_wide else torch.get_default_dtype()
    return torch.scalar_tensor(number, dtype=dtype.to_complex() if isinstance(number, complex) else dtype)


def layout_of(tensors: Sequence[Tensor]) -> tuple[torch.Size, tuple[int, ...] | None]:
    """The shape of the result, and its strides: those that the tensors share without a gap. None: it is contiguous."""
    first = tensors[0]
    shape, strides = first.shape, first.stride()
    if len(tensors) == 1 and first.is_contiguous():
        return shape, None
    if any(x.shape != shape for x in tensors[1:]):
        return torch.broadcast_shapes(*(x.shape for x in tensors)), None
    if all(x.is_contiguous() for x in tensors):
        return shape, None
    if any(x.stride() != strides for x in tensors[1:]) or torch.empty_like(first).stride() != strides:
        return shape, None
    return shape, strides


def _ends_of_shares(size: int) -> list[int]:
    """Where the shares of torch's threads end (``at::parallel_for``); none where all shares are whole units."""
    n_threads = min(torch.get_num_threads(), -(-size // GRAIN))
    share = -(-size // n_threads)
    if size % UNIT == 0 and (n_threads == 1 or share % UNIT == 0):
        return []
    return [*range(share, size, share), size]


def _write_tails(ends: list[int], out: Tensor, tails: Tensor) -> None:
    for end, tail in zip(ends, tails.split(UNIT), strict=True):
        out[end - UNIT : end].copy_(tail)


def _each(function: Function, *results: Any) -> Any:
    """``function`` of a result, or of each tensor of a tuple of them."""
    return function(*results) if isinstance(results[0], Tensor) else tuple(map(function, *results))


def _shaped(row: Tensor, shape: torch.Size, strides: tuple[int, ...] | None) -> Tensor:
    return row.view(shape) if strides is None else row.as_strided(shape, strides)


def fake(overload: torch._ops.OpOverload) -> Function:
    """What :func:`whole_vectors` gives, without its values: torch's shapes and dtypes in the layout of :func:`layout_of`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        out = overload(*args, **kwargs)
        tensors = [x for x in args if isinstance(x, Tensor)]
        _, strides = layout_of([x for x in tensors if x.dim()] or tensors)
        return _each(lambda x: x.new_empty(x.shape) if strides is None else x.new_empty_strided(x.shape, strides), out)

    return run
