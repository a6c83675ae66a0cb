"""What a trace sees: calls of operators, and of the kernels that Inductor generated in their place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor
from torch._ops import OpOverload

from pytest_batchinv.diagnose.recorder import tensors_of
from pytest_batchinv.diagnose.where import storage_of


class Generated(Protocol):
    """What generated code calls that is no operator. It has no schema: it says by itself what it reads and writes."""

    @property
    def is_mutable(self) -> bool: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def name(self) -> str: ...

    def reads(self, args: tuple[Any, ...]) -> list[Tensor]: ...

    def writes(self, args: tuple[Any, ...], out: Any) -> list[Tensor]: ...


Operator = OpOverload | Generated


def read(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors whose values the call reads: all but those that are given as ``out``."""
    if not isinstance(func, OpOverload):
        return func.reads(args)
    outs = {argument.name for argument in func._schema.arguments if argument.is_out}
    return tensors_of((args, {name: value for name, value in kwargs.items() if name not in outs}))


def written(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Tensor]:
    """The tensors that hold what the call computed: what it gave, and what else it wrote to."""
    if not isinstance(func, OpOverload):
        return func.writes(args, out)
    given = tensors_of(out)
    if not func._schema.is_mutable:
        return given
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    memory = set(map(storage_of, given))
    changed = tensors_of([named.get(argument.name) for argument in func._schema.arguments if argument.is_write])
    return given + [x for x in changed if storage_of(x) not in memory]


def numbers(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """The plain numbers and words that the call computes with, by the names of its arguments: no sizes, dims and places."""
    if not isinstance(func, OpOverload):
        return {}
    kinds = {argument.name: str(argument.type) for argument in func._schema.arguments}
    given = dict(zip(kinds, args, strict=False)) | kwargs
    return {
        name: repr(value)
        for name, value in given.items()
        if isinstance(value, (float, complex, bool, str)) or (isinstance(value, int) and kinds[name] in ("Tensor", "number"))
    }


def writes_to_inputs(func: Operator) -> bool:
    return func._schema.is_mutable if isinstance(func, OpOverload) else func.is_mutable


def base_name(func: Operator) -> str:
    """ "index_add" of aten::index_add_.out and all its kin."""
    return func.name().partition("::")[2].partition(".")[0].rstrip("_")


def gives_empty_memory(func: Operator) -> bool:
    """Whether it gives memory in which anything may stand."""
    return base_name(func).startswith(("empty", "new_empty"))


def is_view(func: Operator, given: Iterable[Tensor], outs: list[Tensor]) -> bool:
    """Whether the call computed nothing: it gave the memory that it was given."""
    memory = {storage_of(x) for x in given}
    return not writes_to_inputs(func) and bool(outs) and all(storage_of(x) in memory for x in outs)
