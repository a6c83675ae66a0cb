"""What the two installers share: the overloads behind the table's names, their siblings, and the ``batchinv`` operators."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from pytest_batchinv.kernels import table
from pytest_batchinv.kernels.aten import attention
from pytest_batchinv.kernels.aten.common import Refused
from torch._ops import OpOverload

Implementation = Callable[..., Any]
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_hits: dict[str, int] = {}


def count(name: str) -> None:
    """Counts one call. A lost update between threads would only make a count smaller, never zero."""
    _hits[name] = _hits.get(name, 0) + 1


@contextlib.contextmanager
def counting_apart() -> Iterator[dict[str, int]]:
    """Calls inside are counted in the dict that is handed out, and in nothing else."""
    global _hits
    before, _hits = _hits, {}
    try:
        yield _hits
    finally:
        _hits = before


def hits() -> dict[str, int]:
    """Calls by overload since the process began: ``aten::`` from eager code, ``batchinv::`` from compiled code."""
    return dict(_hits)


@dataclass(frozen=True)
class Sibling:
    """An overload that computes the same as a functional one and writes its result to an argument."""

    overload: OpOverload
    out_names: tuple[str, ...]  # empty: in place, into the first argument


def overload_of(name: str) -> OpOverload | None:
    """The aten overload of this name ("mm", "mean.dim"), or None where this torch has none."""
    packet_name, _, overload_name = name.partition(".")
    packet = getattr(torch.ops.aten, packet_name, None)
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


def _overloads(packet) -> Iterator[OpOverload]:
    for name in packet.overloads():
        overload = getattr(packet, name)
        if torch._C._dispatch_has_kernel(overload.name()):
            yield overload


def _signature(overload: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]


def is_exact(overload: OpOverload, args: tuple, kwargs: dict) -> bool:
    """Whether this call sums integers or booleans, which no order can change: torch's own kernel serves it.

    Raises Refused for complex numbers.
    """
    first = next((a for a in args if isinstance(a, torch.Tensor)), None)
    dtype = kwargs.get("dtype") or (first.dtype if first is not None else None)
    if dtype is None or dtype in _FLOATS:
        return False
    if dtype.is_complex or dtype.is_floating_point:
        raise Refused(f"batch-invariant mode has no kernel for {overload.name()} in {dtype}.")
    return True


def refusal(overload: OpOverload, reason: str) -> Implementation:
    def refuse(*args, **kwargs):
        raise Refused(f"batch-invariant mode does not cover {overload.name()}: {reason}.")

    return refuse


@cache
def operators() -> dict[OpOverload, OpOverload]:
    """aten overload -> the ``batchinv`` operator of the same schema: opaque to Inductor, run by the same implementation.

    They are defined once a process and do nothing until a graph calls them.
    """
    library = torch.library.Library("batchinv", "FRAGMENT")
    _keep_alive.append(library)
    _define_attention(library)
    made = {}
    for name, implementation in table.LEAVES.items():
        overload = overload_of(name)
        if overload is not None:
            made[overload] = _define(library, overload, implementation, _contiguous_fake(overload))
    for name, implementation in table.POINTWISE.items():
        overload = overload_of(name)
        made[overload] = _define(library, overload, implementation, _like_the_input)
    return made


_keep_alive: list[torch.library.Library] = []


def _define(
    library: torch.library.Library, overload: OpOverload, implementation: Implementation, fake: Implementation
) -> OpOverload:
    schema = str(overload._schema).split("::", 1)[1]
    name = overload.name().split("::", 1)[1]
    library.define(schema, tags=_TAGS)
    library.impl(name, _counted(f"batchinv::{name}", implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"batchinv::{name}", fake, lib=library)
    packet_name, _, overload_name = name.partition(".")
    return getattr(getattr(torch.ops.batchinv, packet_name), overload_name or "default")


def _define_attention(library: torch.library.Library) -> None:
    library.define(attention.ATTENTION_SCHEMA, tags=_TAGS)
    library.impl("attention", _counted("batchinv::attention", attention.attention), "CompositeExplicitAutograd")
    torch.library.register_fake("batchinv::attention", attention.attention_fake, lib=library)
    torch.library.register_autograd(
        "batchinv::attention", attention.attention_backward, setup_context=attention.attention_setup_context, lib=library
    )


def _counted(name: str, implementation: Implementation) -> Implementation:
    def run(*args, **kwargs):
        count(name)
        return implementation(*args, **kwargs)

    return run


def _contiguous_fake(overload: OpOverload) -> Implementation:
    """aten's own fake, made contiguous: that is what every implementation returns."""

    def fake(*args, **kwargs):
        out = overload(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return torch.empty(out.shape, dtype=out.dtype, device=out.device)
        return tuple(torch.empty(o.shape, dtype=o.dtype, device=o.device) for o in out)

    return fake


def _like_the_input(self: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return torch.empty_like(self)
