"""Inductor's fallback list: custom operators go straight to their fallback, without their whole history as text.

Up to torch 2.12 ``GraphLowering.call_function`` writes each operator that has no lowering into a log message with all its
arguments, whether anybody logs or not, and the text of an argument holds the text of everything it was made from: a chain of
operators that use the previous result twice costs exponentially in its depth. Operators in ``FALLBACK_ALLOW_LIST`` are not
written. From torch 2.13 on the text is made only when it is logged.

Layout constraints do not change. The list's own path registers a fallback without one, so that an operator without a layout
tag would see other strides than in eager code; so before this list says yes, the operator gets the constraint that the slow
path would have given it (``config.custom_op_default_layout_constraint``). What is left in Inductor's tables after the patch is
what torch itself leaves there for each operator that it has met.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pytest_batchinv.patches.registry import patch

_NAMESPACES: Counter[str] = Counter(["batchinv"])
_BUILT_IN = ("aten", "prim", "prims")  # torch decides about these by other rules, in backward graphs above all


@contextlib.contextmanager
def fast_namespaces(*names: str) -> Iterator[None]:
    """Inside, the patched list holds all operators of these namespaces too ("mylib" for ``torch.ops.mylib``).

    Raises ValueError for torch's built-in namespaces.
    """
    if refused := [name for name in names if name in _BUILT_IN or "::" in name]:
        raise ValueError(f"{', '.join(refused)}: name namespaces of your own operators, without ::, and none of torch's")
    _NAMESPACES.update(names)
    try:
        yield
    finally:
        _NAMESPACES.subtract(names)


@patch(
    "torch._inductor.lowering.FALLBACK_ALLOW_LIST",
    also=("torch._inductor.graph.FALLBACK_ALLOW_LIST",),
    source="torch._inductor.graph.GraphLowering.call_function",
    torch="<2.13",
    group="inductor",
    reason="compile time is exponential in the depth of a chain of custom operators; layout constraints stay as they are",
    upstream="vllm-project/vllm#42129",
    fingerprints={"2.11.0": "90f24f99ebf2f847", "2.12.0": "93fd5a19fa137552", "2.12.1": "93fd5a19fa137552"},
)
def fallback_allow_list(original: Any) -> "FallbackList":
    return FallbackList(original)


class FallbackList:
    """torch's list and all operators of the fast namespaces. Reads and writes go to torch's list."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __contains__(self, name: object) -> bool:
        if name in self._stock:
            return True
        if not isinstance(name, str) or _NAMESPACES[name.partition("::")[0]] <= 0:
            return False
        _keep_layout_constraint(name)
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    # Special methods are looked up on the class, past __getattr__.
    def __iter__(self) -> Iterator[Any]:
        return iter(self._stock)

    def __len__(self) -> int:
        return len(self._stock)

    def __eq__(self, other: object) -> bool:
        return self._stock == (other._stock if isinstance(other, FallbackList) else other)

    __hash__ = None

    def __or__(self, other: Any) -> Any:
        return self._stock | other

    def __repr__(self) -> str:
        return f"FallbackList({self._stock!r}, and namespaces {sorted(+_NAMESPACES)})"


def _keep_layout_constraint(name: str) -> None:
    """Gives the untagged overloads of ``namespace::operator`` their constraint; tagged ones have it from their tag."""
    import torch

    lowering = sys.modules["torch._inductor.lowering"]
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operator)
    for overload in (getattr(packet, overload_name) for overload_name in packet.overloads()):
        if overload in lowering.lowerings or lowering.get_layout_constraint_tag(overload, with_default=False) is not None:
            continue
        constraint = lowering.tag_to_layout_constraint(lowering.get_layout_constraint_tag(overload, with_default=True))
        if constraint is not None:
            lowering.add_layout_constraint(overload, constraint)
