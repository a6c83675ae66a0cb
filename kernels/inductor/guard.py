"""The guard: an error where a graph still holds a matrix product or a reduction on floats."""

import functools

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from pytest_batchinv.kernels import table
from pytest_batchinv.kernels.overloads import only_moves_values, overload_of, siblings

# Higher-order operators whose kernels Inductor writes itself, with reductions in an order of its own.
_HIGHER_ORDER = ("flex_attention", "flex_attention_backward", "associative_scan")


class LeftoverError(RuntimeError):
    """A compiled graph still holds a matrix product or a float reduction that the table should have replaced."""


def refuse_leftovers(graph: Graph) -> None:
    found = sorted({str(node.target) for node in graph.nodes if _is_leftover(node)})
    if found:
        raise LeftoverError(
            f"batch-invariant mode: the compiled graph still holds {', '.join(found)}, whose bits may depend on the "
            "batch. Run this part in eager mode, or report it: the table lacks an entry."
        )


def _is_leftover(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, HigherOrderOperator):
        return node.target.name() in _HIGHER_ORDER
    if not isinstance(node.target, OpOverload) or node.target not in _leftovers():
        return False
    return _gives_floats(node) and not only_moves_values(node.target, node.args, node.kwargs)


@functools.cache
def _leftovers() -> frozenset[OpOverload]:
    prims = torch.ops.prims
    overloads = [overload for name in (*table.BACKEND_KERNELS, *table.REFUSED) if (overload := overload_of(name)) is not None]
    return frozenset(
        (
            prims.sum.default,
            prims.prod.default,
            prims.var.default,
            *overloads,
            *(sibling.overload for overload in overloads for sibling in siblings(overload)),
        )
    )


def _gives_floats(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(not isinstance(v, torch.Tensor) or v.is_floating_point() or v.is_complex() for v in values)
