"""Calls: which overloads run where a sample runs, forward and backward, and the in-place and ``.out`` forms beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from pytest_batchinv.diagnose.recorder import Recorder
from pytest_batchinv.kernels import scanned
from pytest_batchinv.kernels.overloads import siblings


@dataclass(frozen=True)
class Call:
    """A function of tensors with one set of arguments. name: the overload's, or the sample's. direction: "f" or "b".

    dtype: of its cell; "" where it neither takes nor gives floats.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    direction: str = "f"
    overload: OpOverload | None = None
    dtype: str = ""

    @property
    def signature(self) -> str:
        """What tells two calls of one overload apart: the other arguments, and how many dims the tensors have."""
        return str(tree_map_only(Tensor, lambda x: f"{x.dtype}{x.dim()}", (self.args, self.kwargs)))


def calls_of(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], differentiable: bool) -> list[Call]:
    """The overloads that this sample dispatches, with copies of their inputs. Raises what the sample raises going forward."""
    recorder = Recorder(lambda *_: True)
    with recorder:
        out = function(*args, **kwargs)
    forward = [_call(call, "f") for call in recorder.calls]
    if not differentiable:
        return forward
    return forward + _backward(function, args, kwargs, out)


def _backward(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], out: Any) -> list[Call]:
    """Those of the gradients alone: what the forward called, and where it cannot be differentiated, is left out."""
    args, kwargs = tree_map_only(Tensor, _needing_gradient, (args, kwargs))
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    recorder = Recorder(lambda *_: True)
    try:
        out = function(*args, **kwargs)
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
        if not inputs or not outs:
            return []
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outs]
        with recorder:
            torch.autograd.grad(outs, inputs, grads, allow_unused=True)
    except Exception:  # what has no gradient here has no calls; what ran before it raised is kept
        pass
    return [_call(call, "b") for call in recorder.calls]


def _needing_gradient(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex())


def _call(call: Any, direction: str) -> Call:
    return Call(call.name, call.overload, call.args, call.kwargs, direction, call.overload, call.dtype)


def forms(call: Call) -> Iterator[Call]:
    """The in-place and ``.out`` overloads of a call, with the same arguments."""
    if call.overload is None:
        return
    for sibling in siblings(call.overload):
        function = _writing(sibling.overload, sibling.out_names, call.overload)
        name = scanned.cell_name(sibling.overload, call.kwargs)
        yield Call(name, function, call.args, call.kwargs, call.direction, sibling.overload, call.dtype)


def _writing(overload: OpOverload, out_names: tuple[str, ...], functional: OpOverload) -> Callable[..., Any]:
    """What an overload wrote: to its first argument, or to outs that are empty and of the functional form's dtypes."""

    def run_in_place(first: Any, *args: Any, **kwargs: Any) -> Any:
        out = overload(first, *args, **kwargs)
        return first if out is None else out  # of lists

    def run(*args: Any, **kwargs: Any) -> Any:
        results = tree_map_only(Tensor, torch.empty_like, functional(*args, **kwargs))
        outs = results if isinstance(results, tuple) else (results,)
        overload(*args, **kwargs, **dict(zip(out_names, outs, strict=True)))
        return results

    return run if out_names else run_in_place
