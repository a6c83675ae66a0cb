"""The trace: a failing row on the two sides of a relation, operator by operator, and where its bits part.

The first side is run once, and what its operators took and gave is kept. The second side is run three times: to pair its
operators with those of the first; to compare the row's bytes in what each gave; and once more with the first side's bytes put
in place of wrong ones, so that each operator is fed what it was fed on the first side, and what diverges there diverges by
itself. Rows are compared by their bytes: no hash, no tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from pytest_batchinv.compare import first_row_that_differs
from pytest_batchinv.diagnose.align import Key, Pairs, align
from pytest_batchinv.diagnose.recorder import Recorder, tensors_of
from pytest_batchinv.diagnose.rows import Finder, Match, Selection, geometries, put_in_place
from pytest_batchinv.diagnose.where import Places, storage_of
from pytest_batchinv.relations.base import Side
from pytest_batchinv.report.record import Badge, TracedOp
from pytest_batchinv.subjects.base import RowOutputs, Subject

KEPT_BYTES = 8 << 30
_INDEXING = {"index", "index_select", "gather", "embedding", "take", "index_add", "index_put", "scatter", "scatter_add"}
CUT = f"operators after the first {KEPT_BYTES >> 30} GiB of the first side's tensors were not compared"


@dataclass
class Kept:
    """One call of the first side: what it took and gave."""

    overload: OpOverload
    key: Key
    source: str
    line: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    is_view: bool = False


class Seen(NamedTuple):
    """One call of the second side, compared with its call of the first. blamed: the call that its difference comes from."""

    other: int
    inputs: tuple[Match, ...]
    outputs: tuple[Match, ...]
    shapes: tuple[str, str]
    blamed: int | None
    follows: bool
    by_content: bool
    produced_by: tuple[int, ...]


@dataclass
class Walk:
    """One run of the second side: what was compared, by call, and the row's outputs at its end."""

    seen: dict[int, Seen]
    outputs: RowOutputs


class TwoSides:
    """A subject's two runs. Raises what the subject raises; ValueError where the sides cannot be told apart or paired."""

    def __init__(self, subject: Subject, one: Side, other: Side) -> None:
        self.subject, self.one, self.other = subject, one, other
        self._finder = Finder(geometries(subject, one), geometries(subject, other))
        self.kept, self.expected = _kept(subject, one)
        self.calls = _keys(subject, other)
        self.pairs: Pairs = align([call.key for call in self.kept], [call.key for call in self.calls])
        self.is_cut = any(not call.outputs and not call.is_view for call in self.kept)

    def walk(self, heals: Callable[[int], bool]) -> Walk:
        """Runs the second side. heals: whether a call's output gets the first side's bytes where it diverges by itself."""
        watch = _Watch(self, heals)
        with watch.places:
            outputs = self.subject.run(self.other.case, Recorder(around=watch))
        return Walk(watch.seen, outputs)

    def is_equal(self, outputs: RowOutputs) -> bool:
        """Whether the row has the bits of the first side."""
        return first_row_that_differs(self.expected, _row(outputs, self.other.position)) is None

    def match(self, expected: Tensor, actual: Tensor, carried: Iterable[Selection]) -> Match:
        return self._finder.match(expected, actual, carried)

    def partner(self, number: int) -> Kept | None:
        there = self.pairs.by_other[number] if number < len(self.pairs.by_other) else -1
        return self.kept[there] if there >= 0 else None

    def badge(self, seen: Seen) -> Badge:
        return "content" if seen.by_content else self.pairs.badge


class _Watch:
    """Around each operator of the second side."""

    def __init__(self, sides: TwoSides, heals: Callable[[int], bool]) -> None:
        self.sides, self.heals = sides, heals
        self.places = Places()
        self.seen: dict[int, Seen] = {}
        self._number = -1
        self._made_by: dict[int, int] = {}  # which call wrote last to this memory
        self._suspects: dict[int, int] = {}  # memory of indices that differ, and the call that they come from
        self._alive: list[Tensor] = []  # so that no memory is given out twice

    def __call__(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._number += 1
        number, kept = self._number, self.sides.partner(self._number)
        given = tensors_of((args, kwargs))
        before = None
        if kept is not None and kept.overload is func and kept.outputs and not kept.is_view:
            before = [self._compared(x, y, ()) for x, y in zip(kept.inputs, given, strict=False)]
        out = func(*args, **kwargs)
        made_by = tuple(dict.fromkeys(self._made_by[m] for x in given if (m := storage_of(x)) in self._made_by))
        if before is not None and kept is not None:
            self.seen[number] = self._seen(number, kept, before, given, tensors_of(out), made_by)
        if not _is_view(func, given, tensors_of(out)):
            for x in tensors_of(out):
                self._made_by[storage_of(x)] = number
                self._alive.append(x)
        return out

    def _compared(self, expected: Tensor, actual: Tensor, carried: Iterable[Selection]) -> Match:
        if expected.data_ptr() == actual.data_ptr() and expected.shape == actual.shape and expected.stride() == actual.stride():
            return Match(Selection(((slice(None), slice(None)),) * actual.dim(), False), None)  # a parameter
        return self.sides.match(expected, actual, carried)

    def _seen(
        self, number: int, kept: Kept, before: list[Match], given: list[Tensor], outs: list[Tensor], made_by: tuple[int, ...]
    ) -> Seen:
        carried = [match.selection for match in before if match.selection is not None]
        outputs = tuple(self._compared(x, y, carried) for x, y in zip(kept.outputs, outs, strict=False))
        differ = [
            (x, y, match) for x, y, match in zip(kept.outputs, outs, outputs, strict=False) if match.difference is not None
        ]
        blamed, follows = None, False
        if differ:
            blamed, follows = self._blame(number, before, given)
        values = False
        for expected, actual, match in differ:
            if _is_index(actual) or not given:
                origin = number if blamed is None else blamed
                self._suspects.setdefault(storage_of(actual), origin)
            else:
                values = True
                if not follows and self.heals(number) and match.selection is not None:
                    put_in_place(expected, actual, match.selection)
        if not values:
            blamed = None
        by_content = any(m.selection is not None and m.selection.by_content for m in (*before, *outputs))
        shapes = (_shapes(kept.outputs), _shapes(outs))
        return Seen(self.sides.pairs.by_other[number], tuple(before), outputs, shapes, blamed, follows, by_content, made_by)

    def _blame(self, number: int, before: list[Match], given: list[Tensor]) -> tuple[int | None, bool]:
        """Which call a difference comes from: this one, or the one that made an index that differs. Or it follows another."""
        wrong = [(x, match) for x, match in zip(given, before, strict=False) if not match.agrees]
        if not wrong:
            return number, False
        suspects = [self._suspects.get(storage_of(x)) if match.difference else None for x, match in wrong]
        if None in suspects:
            return None, True
        floats = any(_is_value(x) for x, match in zip(given, before, strict=False) if match.agrees)
        name = self.sides.calls[number].overload._schema.name.partition("::")[2].rstrip("_")
        return (number if floats and name not in _INDEXING else suspects[0]), False


class Called(NamedTuple):
    """One call of the second side. inputs: the tensors that it took, in words."""

    overload: OpOverload
    key: Key
    source: str
    line: str
    inputs: tuple[str, ...]
    is_view: bool


def _keys(subject: Subject, side: Side) -> list[Called]:
    """The operators of a side, in order."""
    calls: list[Called] = []
    places = Places()

    def around(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where = places.here()
        given = tensors_of((args, kwargs))
        out = func(*args, **kwargs)
        key = _key(func, places, where.module, where.source, args, kwargs, out)
        is_view = _is_view(func, given, tensors_of(out))
        calls.append(Called(func, key, where.source, where.line, tuple(map(described, given)), is_view))
        return out

    with places:
        subject.run(side.case, Recorder(around=around))
    return calls


def _kept(subject: Subject, side: Side) -> tuple[list[Kept], RowOutputs]:
    """The operators of a side with what they took and gave, and the row's outputs."""
    calls: list[Kept] = []
    places, keeper = Places(), _Keeper()

    def around(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where = places.here()
        given = tensors_of((args, kwargs))
        call = Kept(func, Key("", "", "", ()), where.source, where.line, args, kwargs)
        keeper.keep(given, call.inputs)
        if func._schema.is_mutable:
            keeper.about_to_change(given)
        out = func(*args, **kwargs)
        keeper.keep(tensors_of(out), call.outputs)
        call.key = _key(func, places, where.module, where.source, args, kwargs, out)
        call.is_view = _is_view(func, given, tensors_of(out))
        calls.append(call)
        return out

    with places:
        outputs = subject.run(side.case, Recorder(around=around))
    return calls, _row(outputs, side.position)


class _Keeper:
    """Keeps tensors as they are: those whose memory is about to be written to are copied before."""

    def __init__(self) -> None:
        self._held: dict[int, list[tuple[list[Tensor], int]]] = {}
        self._sizes: dict[int, int] = {}

    def keep(self, tensors: list[Tensor], into: list[Tensor]) -> None:
        memory = [storage_of(x) for x in tensors]
        self._sizes |= {m: x.untyped_storage().nbytes() for m, x in zip(memory, tensors, strict=True) if m}
        if sum(self._sizes.values()) > KEPT_BYTES:
            return
        for m, x in zip(memory, tensors, strict=True):
            self._held.setdefault(m, []).append((into, len(into)))
            into.append(x if m else x.clone())

    def about_to_change(self, tensors: list[Tensor]) -> None:
        for m in {storage_of(x) for x in tensors}:
            for kept, i in self._held.pop(m, ()):
                kept[i] = kept[i].clone()


def _key(func: OpOverload, places: Places, module: str, source: str, args: Any, kwargs: Any, out: Any) -> Key:
    parameters = [name for x in tensors_of((args, kwargs, out)) if (name := places.parameter(x))]
    return Key(module, func.name(), source, tuple(parameters))


def _is_view(func: OpOverload, given: list[Tensor], outs: list[Tensor]) -> bool:
    """Whether the call computed nothing: it gave the memory that it was given."""
    memory = {storage_of(x) for x in given}
    return not func._schema.is_mutable and bool(outs) and all(storage_of(x) in memory for x in outs)


def _row(outputs: RowOutputs, position: int) -> RowOutputs:
    return RowOutputs(rows=[{name: x.clone() for name, x in outputs[position].items()}])


def _is_value(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _is_index(x: Tensor) -> bool:
    """Integers may be places in a batch, which differ by right; what is read with them tells."""
    return not _is_value(x) and x.dtype != torch.bool


def described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} strides {list(x.stride())}"


def _shapes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors)


def traced_ops(sides: TwoSides, plain: Walk, healed: Walk) -> tuple[TracedOp, ...]:
    """What the second side ran, in order, without views; then what the first side alone ran. agreement: of the plain run."""
    alone = [n for n, call in enumerate(sides.calls) if sides.pairs.by_other[n] < 0 and not call.is_view]
    shown = sorted({*plain.seen, *alone})
    place = {number: i for i, number in enumerate(shown)}
    culprits = {seen.blamed for seen in healed.seen.values()} - {None}
    ops = [_traced(sides, number, plain.seen.get(number), number in culprits, place) for number in shown]
    for i in sides.pairs.only_one:
        call = sides.kept[i]
        if not call.is_view:
            ops.append(_one_sided(call.key, call.source, call.line, (i, -1), (_shapes(call.outputs), "")))
    return tuple(ops)


def _traced(sides: TwoSides, number: int, seen: Seen | None, is_culprit: bool, place: dict[int, int]) -> TracedOp:
    call = sides.calls[number]
    if seen is None:
        return _one_sided(call.key, call.source, call.line, (-1, number), ("", ""))
    first = next((match.difference for match in seen.outputs if match.difference is not None), None)
    agreement = "equal"
    if is_culprit:
        agreement = "differs"
    elif first is not None:
        agreement = "follows"
    elif not all(match.agrees for match in seen.outputs):
        agreement = "not compared"
    return TracedOp(
        overload=call.key.overload,
        index=(seen.other, number),
        agreement=agreement,  # type: ignore[arg-type]
        badge=sides.badge(seen),
        module=call.key.module,
        source=call.source,
        line=call.line,
        shapes=seen.shapes,
        n_differ=first.n_differ if first else 0,
        n_total=first.n_total if first else 0,
        ulp=first.ulp if first else None,
        produced_by=tuple(place[n] for n in seen.produced_by if n in place),
    )


def _one_sided(key: Key, source: str, line: str, index: tuple[int, int], shapes: tuple[str, str]) -> TracedOp:
    return TracedOp(
        overload=key.overload,
        index=index,
        agreement="not compared",
        badge="one side",
        module=key.module,
        source=source,
        line=line,
        shapes=shapes,
    )
