"""The overloads that the table names, their ``.out`` and in-place siblings, and which calls the table serves."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from operator import methodcaller
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from pytest_batchinv.kernels import table
from pytest_batchinv.kernels.aten.common import Refused

__tracebackhide__ = methodcaller("errisinstance", Refused)

Implementation = Callable[..., Any]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COMPLEX = (torch.complex64, torch.complex128)
_QUANTISED = (torch.qint8, torch.quint8, torch.qint32)


@dataclass(frozen=True)
class Sibling:
    """An overload that computes the same as a functional one and writes its result to an argument."""

    overload: OpOverload
    out_names: tuple[str, ...]  # empty: in place, into the first argument


def overload_of(name: str) -> OpOverload | None:
    """The overload of this name ("mm", "mean.dim", "quantized::linear_dynamic"), or None where this torch has none.

    Without a namespace it is one of aten's.
    """
    namespace, _, rest = name.rpartition("::")
    packet_name, _, overload_name = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace or "aten"), packet_name, None)
    return getattr(packet, overload_name or "default", None) if packet is not None else None


@cache
def siblings(overload: OpOverload) -> tuple[Sibling, ...]:
    """The ``.out`` and in-place overloads with the same arguments."""
    return tuple(_out_siblings(overload)) + tuple(_inplace_siblings(overload))


def _out_siblings(overload: OpOverload) -> Iterator[Sibling]:
    wanted = _signature(overload)
    for other in _overloads(overload.overloadpacket):
        outs = tuple(a.name for a in other._schema.arguments if a.is_out)
        if outs and _signature(other) == wanted:
            yield Sibling(other, outs)


def _inplace_siblings(overload: OpOverload) -> Iterator[Sibling]:
    packet = getattr(torch.ops.aten, f"{overload._schema.name.split('::')[1]}_", None)
    wanted = _signature(overload)
    for other in _overloads(packet) if packet is not None else ():
        if _signature(other) == wanted:
            yield Sibling(other, ())


def _overloads(packet: OpOverloadPacket) -> Iterator[OpOverload]:
    for name in packet.overloads():
        overload = getattr(packet, name)
        if torch._C._dispatch_has_kernel(overload.name()):
            yield overload


def _signature(overload: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]


def is_exact(overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call computes with integers or booleans alone, or only moves values: torch's own kernel serves it.

    Raises Refused for complex numbers where the entry does not take them.
    """
    if overload in _by_torchs_own_kernels():  # integers too, some of which become floats
        return False
    if only_moves_values(overload, args, kwargs):
        return True
    if _name(overload) in table.OF_FLOAT8:
        return False
    dtype = kwargs.get("dtype")
    if dtype is None or dtype in _QUANTISED:  # that of weights, which says nothing of the rows
        dtype = _first_dtype(args)
    if dtype is None or dtype in _FLOATS:
        return False
    if dtype in _COMPLEX and (_name(overload) in table.COMPLEX or overload in _pointwise()):
        return False
    if dtype.is_complex or dtype.is_floating_point:
        raise Refused(f"batch-invariant mode has no kernel for {overload.name()} in {dtype}.")
    return not _makes_floats(overload, args)


@cache
def _by_torchs_own_kernels() -> frozenset[OpOverload]:
    return _with_siblings((*table.WHOLE_VECTORS, *table.AS_IN_EAGER_CODE))


@cache
def _pointwise() -> frozenset[OpOverload]:
    return _with_siblings(table.POINTWISE)


def _with_siblings(names: Iterable[str]) -> frozenset[OpOverload]:
    overloads = [overload for name in names if (overload := overload_of(name)) is not None]
    return frozenset((*overloads, *(sibling.overload for overload in overloads for sibling in siblings(overload))))


def only_moves_values(overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is an ``index_put`` that adds nothing up."""
    if _name(overload) not in table.ADD_ONLY_TO_ACCUMULATE:
        return False
    return not (args[3] if len(args) > 3 else kwargs.get("accumulate", False))


def _makes_floats(overload: OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether torch gives floats for integers here. ``pow`` does where its exponent, the last argument, is a float."""
    name = _name(overload)
    return name in table.FLOATS_OF_INTEGERS and (name != "pow" or isinstance(args[-1], float))


def _name(overload: OpOverload) -> str:
    """The operator's name, without the underscore of an in-place form."""
    return overload.overloadpacket.__name__.removesuffix("_")


def _first_dtype(args: tuple[Any, ...]) -> torch.dtype | None:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.dtype
    return None


def refusal(overload: OpOverload, reason: str) -> Implementation:
    """What stands for an overload that the mode does not cover."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Refused(f"batch-invariant mode does not cover {overload.name()}: {reason}.")

    return refuse
