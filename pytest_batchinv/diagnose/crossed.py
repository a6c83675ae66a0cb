"""Eager code against compiled code: the kernel at which the bits of one batch part.

Kernels hold other tensors than operators do: several operators are in one kernel, and what is between them is never written.
So each result of a kernel is looked for among those of the operators: by its bytes, in any order of its dimensions. Where no
operator gave these bytes, it is the nearest result of the same type and size, if that is near, or of an operator in the kernel.
A kernel whose inputs are operators' bytes, and whose result is not, is where the bits part. It then gets the operator's bytes,
so that the next kernel is fed what the operators were fed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from pytest_batchinv.compare import Difference, as_bits, first_difference
from pytest_batchinv.diagnose import bisection
from pytest_batchinv.diagnose.calls import Operator, base_name, gives_empty_memory, is_view, read, written
from pytest_batchinv.diagnose.generated import UNSEEN, CompiledCode
from pytest_batchinv.diagnose.trace import CUT, EagerCode, Kept, described, kept_calls, row_of, shapes_of
from pytest_batchinv.diagnose.where import Where, storage_of
from pytest_batchinv.relations.base import Side
from pytest_batchinv.report.record import Agreement, Culprit, Trace, TracedOp
from pytest_batchinv.subjects.base import RowOutputs, Subject

MOST = 8
EQUAL = "under the trace no kernel parted from the operators"
_NEAR = 2.0**-5
"""Of the largest value: a result that is farther from an operator's is another one."""


class Counterpart(NamedTuple):
    """The operator's result that a kernel's result stands for. difference: None where the bytes are the same."""

    operator: int
    expected: Tensor
    difference: Difference | None


class _Result(NamedTuple):
    operator: int
    name: str
    value: Tensor
    sum_of_bits: int


class _Results:
    """What the operators gave, by what can be told of it at once."""

    def __init__(self, calls: list[Kept]) -> None:
        self._alike: dict[tuple[torch.dtype, int], list[_Result]] = defaultdict(list)
        for number, call in enumerate(calls):
            for x in call.outputs:
                if x.layout == torch.strided and x.numel() and _has_bits(x):
                    result = _Result(number, base_name(call.overload), x, _sum_of_bits(x))
                    self._alike[x.dtype, x.numel()].append(result)

    def counterpart(self, actual: Tensor, within: Sequence[str]) -> Counterpart | None:
        """within: names of the operators that the kernel is made of."""
        alike = self._alike.get((actual.dtype, actual.numel()), []) if _has_bits(actual) else []
        total = _sum_of_bits(actual) if alike else 0
        for result in alike:
            if total == result.sum_of_bits and (same := _in_the_same_order(result.value, actual)) is not None:
                return Counterpart(result.operator, same, None)
        distances = [(_distance(result.value, actual), result) for result in alike]
        near = [found for found in distances if found[0] < _NEAR or found[1].name in within]
        if not near:
            return None
        _, result = min(near, key=lambda found: found[0])
        expected = result.value.reshape(actual.shape)
        return Counterpart(result.operator, expected, first_difference(expected, actual))


class _Event(NamedTuple):
    """One kernel's call, and how its results compare."""

    name: str
    where: Where
    inputs: tuple[str, ...]
    agreement: Agreement
    counterpart: Counterpart | None
    shapes: str


class _Walk:
    """Around each call of a compiled run. heals: whether a call's results get the operators' bytes."""

    def __init__(self, code: CompiledCode, results: _Results, heals: Callable[[int], bool]) -> None:
        self.places, self._results, self._heals = code.places(), results, heals
        self.events: list[_Event] = []
        self._agreement: dict[int, Agreement] = {}  # of what a call wrote, by memory

    def __call__(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where, given = self.places.here(), read(func, args, kwargs)
        inputs = tuple(map(described, given))
        fed = [self._agreement.get(storage_of(x), "equal") for x in given]
        out = func(*args, **kwargs)
        outs = written(func, args, kwargs, out)
        if gives_empty_memory(func):
            self._agreement |= dict.fromkeys(map(storage_of, outs), "equal")
        elif outs and not is_view(func, given, outs):
            self._compare(func, where, inputs, fed, outs)
        return out

    def _compare(self, func: Operator, where: Where, inputs: tuple[str, ...], fed: list[Agreement], outs: list[Tensor]) -> None:
        within = where.made_of[0].split(", ") if where.made_of else [base_name(func)]
        found = [self._results.counterpart(x, within) for x in outs]
        differ = [part for part in found if part is not None and part.difference is not None]
        agreement: Agreement = "equal"
        if differ:
            agreement = "differs" if all(kind == "equal" for kind in fed) else "follows"
        elif None in found:
            agreement = "not compared"
        number = len(self.events)
        for x, part in zip(outs, found, strict=True):
            kind: Agreement = "not compared" if part is None else "equal" if part.difference is None else agreement
            if part is not None and kind == "differs" and self._heals(number):
                x.copy_(part.expected)
                kind = "equal"
            if part is None and all(kind == "equal" for kind in fed):
                kind = "equal"  # what no operator writes: it is told by the kernels that read it
            self._agreement[storage_of(x)] = kind
        shown = (*differ, *(part for part in found if part is not None), None)[0]
        self.events.append(_Event(func.name(), where, inputs, agreement, shown, shapes_of(outs)))


def trace(subject: Subject, side: Side) -> Trace:
    """The kernels of the compiled run of this batch beside the operators of the eager one; or what bisection tells."""
    told = beside_eager_code(subject, side)
    if told.culprits or EQUAL in told.notes:
        return told
    expected = row_of(subject.in_eager_mode().run(side.case), side.position)
    bisected = bisection.told(subject, lambda again: not _differs(expected, row_of(again.run(side.case), side.position)))
    return msgspec.structs.replace(told, notes=(*told.notes, bisected))


def beside_eager_code(subject: Subject, side: Side) -> Trace:
    """The kernels of the compiled run of this batch, and the operators of the eager one that their results stand for."""
    code = CompiledCode.of(subject, (side.case,))
    calls, expected, is_cut = kept_calls(subject.in_eager_mode(), side, EagerCode())
    results = _Results(calls)

    def walk(heals: Callable[[int], bool]) -> tuple[_Walk, RowOutputs]:
        watch = _Walk(code, results, heals)
        return watch, row_of(subject.run(side.case, code.observer(watch)), side.position)

    healed, at_the_end = walk(lambda number: True)
    if code.has_unseen or not healed.events:
        return Trace(ops=(), notes=(UNSEEN,))
    parted = [number for number, event in enumerate(healed.events) if event.agreement == "differs"]

    def effect(number: int) -> str:
        _, outputs = walk(lambda other: other != number)
        return "causes" if _differs(expected, outputs) else "does not reach the output"

    culprits = tuple(
        Culprit(
            op=number,
            calls=1,
            inputs=(_inputs(calls, healed.events[number]), healed.events[number].inputs),
            effect=effect(number) if i < MOST else "not told",  # type: ignore[arg-type]
        )
        for i, number in enumerate(parted)
    )
    notes = [CUT] * is_cut
    if _differs(expected, at_the_end):
        notes.append("with the operators' bytes in place of all that parted the output still differs: part of it was not seen")
    elif not parted:
        notes.append(EQUAL)
    return Trace(
        ops=tuple(_traced(calls, i, event) for i, event in enumerate(healed.events)), culprits=culprits, notes=tuple(notes)
    )


def _traced(calls: list[Kept], number: int, event: _Event) -> TracedOp:
    part = event.counterpart
    difference = part.difference if part is not None else None
    return TracedOp(
        overload=event.name,
        index=(part.operator if part is not None else -1, number),
        agreement=event.agreement,
        badge="content" if part is not None else "one side",
        module=calls[part.operator].where.module if part is not None else "",
        source=event.where.source,
        line=event.where.line,
        made_of=event.where.made_of,
        shapes=(shapes_of([part.expected]) if part is not None else "", event.shapes),
        n_differ=difference.n_differ if difference is not None else 0,
        n_total=difference.n_total if difference is not None else 0,
        ulp=difference.ulp if difference is not None else None,
    )


def _inputs(calls: list[Kept], event: _Event) -> tuple[str, ...]:
    return tuple(map(described, calls[event.counterpart.operator].inputs)) if event.counterpart is not None else ()


def _differs(expected: RowOutputs, actual: RowOutputs) -> bool:
    return any(first_difference(x, actual[0][name]) is not None for name, x in expected[0].items())


def _has_bits(x: Tensor) -> bool:
    return x.dtype != torch.bool and not x.is_quantized and x.device.type != "meta"


def _sum_of_bits(x: Tensor) -> int:
    """The same for the same values in any order; equal bytes are compared where it is."""
    bits = as_bits(x)
    return int(bits.sum(dtype=torch.int64)) if bits.dtype != torch.uint64 else int(bits.view(torch.int64).sum())


def _in_the_same_order(x: Tensor, actual: Tensor) -> Tensor | None:
    """x in the shape of the other tensor, where that has its bytes in this or another order of the dimensions."""
    if torch.equal(as_bits(x.reshape(actual.shape)), as_bits(actual)):
        return x.reshape(actual.shape)
    squeezed = x.squeeze()
    if squeezed.dim() > 4:
        return None
    for order in itertools.permutations(range(squeezed.dim())):
        turned = squeezed.permute(order).reshape(actual.shape)
        if torch.equal(as_bits(turned), as_bits(actual)):
            return turned
    return None


def _distance(x: Tensor, actual: Tensor) -> float:
    if not (x.is_floating_point() or x.is_complex()):
        return float("inf")
    wide = torch.complex128 if x.is_complex() else torch.float64
    a, b = x.reshape(-1).to(wide), actual.reshape(-1).to(wide)
    largest = a.abs().amax()
    return float((a - b).abs().amax() / largest) if largest > 0 else float("inf")
