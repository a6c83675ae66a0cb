"""Faults of tensor parallel that one rank does not have: relation T must catch them, and no other can."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from pytest_batchinv import tensor_parallel
from pytest_batchinv.kernels import collectives

if TYPE_CHECKING:
    from pytest_batchinv.subjects.ranks import OverRanks


def _chain(parts: Tensor) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@contextlib.contextmanager
def _summed(added: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """Inside, ranks add the parts that they have gathered in this way."""
    with mock.patch.object(collectives._Call, "added", added):
        yield


@contextlib.contextmanager
def _partials(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a layer's partial sum is changed before the ranks add it."""
    before = tensor_parallel._Layer.over_ranks

    def over_ranks(self: Any, partial: Tensor) -> Tensor:
        return before(self, change(partial))

    with mock.patch.object(tensor_parallel._Layer, "over_ranks", over_ranks):
        yield


@contextlib.contextmanager
def _a_leaf_a_rank() -> Iterator[None]:
    before = tensor_parallel._Layer.__init__

    def init(self: Any, *args: Any) -> None:
        before(self, *args)
        self.leaves = 1

    with mock.patch.object(tensor_parallel._Layer, "__init__", init):
        yield


def _by_arrival(call: Any, parts: Tensor) -> Tensor:
    """What came first is rounded first: 16-bit sums of two parts have an order, too, where one of them is kept for later."""
    order = list(range(len(parts)))
    random.shuffle(order)
    first, *others = order
    return _chain(torch.stack([parts[first].bfloat16().to(parts.dtype), *(parts[i] for i in others)]))


def _ring(call: Any, parts: Tensor) -> Tensor:
    """Each rank ends with its own part, which is the only one that it has unrounded."""
    ring = parts.roll(-call.rank - 1, 0)
    return _chain(ring[:-1].bfloat16().to(parts.dtype)) + ring[-1]


def _long_messages(partial: Tensor) -> Tensor:
    """Past some rows another algorithm, which carries 16 bits."""
    return partial.bfloat16().to(partial.dtype) if partial.numel() > 64 * 64 else partial


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "the order of a ring": lambda: _summed(_ring),
    "in the order of arrival": lambda: _summed(_by_arrival),
    "partial sums rounded before they travel": lambda: _partials(lambda partial: partial.bfloat16().to(partial.dtype)),
    "another algorithm for long messages": lambda: _partials(_long_messages),
    "as many leaves as ranks": _a_leaf_a_rank,
}


@cache
def _healthy() -> OverRanks:
    """One world for all of them."""
    from pytest_batchinv.subjects.transformers import TransformersSubject

    return TransformersSubject("tiny-qwen3", device="cpu", dtype="fp32").over_ranks((1, 2))


def _with(fault: str) -> OverRanks:
    return _healthy().with_fault(fault)


MUTANTS: dict[str, Callable[[], Any]] = {name: partial(_with, name) for name in FAULTS}
