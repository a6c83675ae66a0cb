"""Plans: what a call does, as a function of the *descriptions* of its tensors, worked out once for each description.

All that the checks and the kernels ask about a tensor is its shape, strides, dtype and device, and whether it is aligned.
So a call describes its tensors, looks its plan up and calls it. While planning, the checks run (an error is raised anew at
each call, and never remembered), the tensors' canonical form is found, and the kernel's launch is made.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")
_PLANS_KEPT = 1 << 14
_plans: list[Any] = []


class Description(NamedTuple):
    """What a plan may know about a tensor. What it shares with a tensor has the tensor's own names: checks take either."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_aligned: bool
    """Whether it begins at a multiple of 16 bytes, which is what Triton specialises."""

    def dim(self) -> int:
        return len(self.shape)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def t(self) -> "Description":
        """Of the transposed matrix."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    def expand(self, shape: Sequence[int]) -> "Description":
        """As ``Tensor.expand``. Raises the same errors."""
        shape, missing = tuple(shape), len(shape) - len(self.shape)
        sizes, strides = (1,) * missing + tuple(self.shape), (0,) * missing + tuple(self.strides)
        if missing < 0 or any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
            torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape).expand(shape)  # raises
        kept = zip(sizes, shape, strides, strict=True)
        return self._replace(shape=shape, strides=tuple([stride if size == wanted else 0 for size, wanted, stride in kept]))

    def contiguous(self) -> "Description":
        """Of a contiguous copy."""
        strides = tuple([math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))])
        return self._replace(strides=strides, is_aligned=True)

    def merged(self, *groups: Sequence[int]) -> "Description | None":
        """Of the view at the same address that has one dim for each group of dims; None where it would be a copy."""
        shape, strides = [math.prod([self.shape[dim] for dim in group]) for group in groups], []
        following = 1  # torch leaves anything in the stride of a dim of size 1: here, what a contiguous tensor has
        for size, group in zip(reversed(shape), reversed(groups), strict=True):
            stride = following if size < 2 else self._stride_of(group)
            if stride is None:
                return None
            strides.append(stride)
            following = stride * max(size, 1)
        return self._replace(shape=tuple(shape), strides=tuple(reversed(strides)))

    def _stride_of(self, group: Sequence[int]) -> int | None:
        """The one stride that leads through these dims in their order, or None where there is none."""
        steps = [(self.shape[dim], self.strides[dim]) for dim in group if self.shape[dim] != 1]
        leads = all(step[1] == size * stride for step, (size, stride) in itertools.pairwise(steps))
        return steps[-1][1] if leads else None


@overload
def describe(x: Tensor) -> Description: ...
@overload
def describe(x: None) -> None: ...
@overload
def describe(x: Tensor | None) -> Description | None: ...
def describe(x: Tensor | None) -> Description | None:
    # ``tuple.__new__``, as the named tuple's own takes twice as long.
    return None if x is None else _new(Description, (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0))


_new: Callable[..., Description] = tuple.__new__


def alignment_bits(*aligned: bool) -> int:
    """One bit a tensor: whether it begins at a multiple of 16 bytes."""
    bits = 0
    for is_aligned in aligned:
        bits = 2 * bits + is_aligned
    return bits


def alignment(*tensors: Tensor | None) -> int:
    """``alignment_bits`` of these tensors; an absent one counts as not aligned."""
    return alignment_bits(*[tensor is not None and tensor.data_ptr() % 16 == 0 for tensor in tensors])


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's: this guard makes it so."""
    if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():  # as torch.cuda.current_device(), at half its cost
        return _HERE
    return torch.cuda.device(x.device)


_HERE = nullcontext()


def plan(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Remembers what the function returned for these arguments, which must be hashable."""
    remembering = functools.lru_cache(_PLANS_KEPT)(function)
    _plans.append(remembering)
    return remembering  # type: ignore[return-value]


def forget_plans() -> None:
    for remembering in _plans:
        remembering.cache_clear()
