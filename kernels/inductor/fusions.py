"""Rewrites of a graph that save memory traffic and change no bit: their kernels do the same sums in the same order.

Inductor fuses pointwise code into its own reductions, but not into an operator of ours. Without these rewrites the squares
of each norm would go through memory as float32, and so would the logprobs of the whole vocabulary for the few that are wanted.
"""

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten, prims = torch.ops.aten, torch.ops.prims


def fuse_mean_of_squares(graph: Graph) -> None:
    """``mean(x * x)`` becomes ``batchinv::mean_of_squares(x)``, with x as it was before it was widened from 16 bits."""
    means = graph.find_nodes(op="call_function", target=torch.ops.batchinv.mean.dim)
    if any([_fuse_mean_of_squares(mean) for mean in means]):
        graph.eliminate_dead_code()


def fuse_chosen_logprobs(graph: Graph) -> None:
    """``log_softmax(x, -1).gather(-1, index)`` becomes ``batchinv::chosen_logprobs(x, index)``, with x as above."""
    gathers = graph.find_nodes(op="call_function", target=aten.gather.default)
    if any([_fuse_chosen_logprobs(gather) for gather in gathers]):
        graph.eliminate_dead_code()


def _fuse_mean_of_squares(mean: Node) -> bool:
    squares, dim, keepdim, dtype = _mean_arguments(mean)
    x = _squared(squares)
    if x is None or dtype is not None or not _is_wide(x):
        return False
    mean.target, mean.kwargs = torch.ops.batchinv.mean_of_squares.default, {}
    mean.args = (_before_widening(x), dim, keepdim)
    return True


def _fuse_chosen_logprobs(gather: Node) -> bool:
    logprobs, dim, index = _args(gather)[:3]
    if logprobs.target is not torch.ops.batchinv._log_softmax.default or len(logprobs.users) > 1:
        return False
    values, places = logprobs.meta["val"], index.meta["val"]
    last = values.dim() - 1
    if last < 0 or {dim, logprobs.args[1]} - {-1, last} or not _are_equal(values.shape[:-1], places.shape[:-1]):
        return False
    gather.target, gather.kwargs = torch.ops.batchinv.chosen_logprobs.default, {}
    gather.args = (_before_widening(logprobs.args[0]), index, values.dtype)
    return True


def _are_equal(sizes: torch.Size, others: torch.Size) -> bool:
    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _mean_arguments(mean: Node) -> tuple[Any, ...]:
    """The arguments of ``mean.dim``, with the defaults filled in."""
    arguments: dict[str, Any] = {**dict(zip(("self", "dim", "keepdim"), mean.args, strict=False)), **mean.kwargs}
    return arguments["self"], arguments["dim"], arguments.get("keepdim", False), arguments.get("dtype")


def _squared(node: Node) -> Any:
    """x where the node is x * x or x ** 2."""
    if node.target is aten.mul.Tensor and node.args[0] is node.args[1]:
        return _args(node)[0]
    if node.target in (aten.pow.Tensor_Scalar, torch.ops.batchinv.pow.Tensor_Scalar) and node.args[1] == 2:
        return _args(node)[0]
    return None


def _is_wide(x: Node) -> bool:
    """In the dtype in which squares are summed, so that they are rounded once here as there."""
    return x.meta["val"].dtype in (torch.float32, torch.float64)


def _before_widening(x: Node) -> Any:
    """The tensor of 16 bits that x was, or x: the operator widens by itself."""
    is_widened = x.target is prims.convert_element_type.default and x.meta["val"].dtype == torch.float32
    narrow = _args(x)[0] if is_widened else x
    return narrow if narrow.meta["val"].dtype in (torch.float16, torch.bfloat16) else x
