"""The trace: a failing row on the two sides of a relation, operator by operator, and where its bits part.

The first side is run once, and what its operators took and gave is kept. The second side is run three times: to pair its
operators with those of the first; to compare the row's bytes in what each gave; and once more with the first side's bytes put
in place of wrong ones, so that each operator is fed what it was fed on the first side, and what diverges there diverges by
itself. Rows are compared by their bytes: no hash, no tolerance.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pytest_batchinv.compare import first_row_that_differs
from pytest_batchinv.diagnose.align import Key, Pairs, align_parts
from pytest_batchinv.diagnose.calls import (
    Operator,
    base_name,
    gives_empty_memory,
    is_view,
    numbers,
    read,
    writes_to_inputs,
    written,
)
from pytest_batchinv.diagnose.recorder import Around, Recorder
from pytest_batchinv.diagnose.rows import Finder, Match, Selection, finders, put_in_place, through_indices, through_padding
from pytest_batchinv.diagnose.where import Places, Where, storage_of
from pytest_batchinv.relations.base import Side
from pytest_batchinv.report.record import Badge, TracedOp
from pytest_batchinv.subjects.base import Observer, RowOutputs, Subject

KEPT_BYTES = 8 << 30
ALIGNMENT = 64
_INDEXING = {"index", "index_select", "gather", "embedding", "take", "index_add", "index_put", "scatter", "scatter_add"}
CUT = f"operators after the first {KEPT_BYTES >> 30} GiB of the first side's tensors were not compared"


@dataclass
class Kept:
    """One call of the first side, of those that compute: what it took and gave."""

    overload: Operator
    key: Key
    where: Where
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class Seen(NamedTuple):
    """One call of the second side, compared with its call of the first. blamed: the call that its difference comes from."""

    other: int
    inputs: tuple[Match, ...]
    outputs: tuple[Match, ...]
    shapes: tuple[str, str]
    blamed: int | None
    by_content: bool
    produced_by: tuple[int, ...]


@dataclass
class Walk:
    """One run of the second side: what was compared, by call, and the row's outputs at its end."""

    seen: dict[int, Seen]
    outputs: RowOutputs

    @property
    def diverged(self) -> bool:
        return any(seen.blamed is not None for seen in self.seen.values())


class Code(Protocol):
    """How the calls of a run are watched, and where each is in the user's program."""

    def places(self) -> Places: ...

    def observer(self, around: Around) -> Observer: ...


class EagerCode:
    """Operators, as they are dispatched."""

    def places(self) -> Places:
        return Places()

    def observer(self, around: Around) -> Observer:
        return Recorder(around=around)


class TwoSides:
    """A subject's two runs. Raises what the subject raises."""

    def __init__(self, subject: Subject, one: Side, other: Side, code: Code | None = None) -> None:
        self.subject, self.one, self.other, self.code = subject, one, other, code or EagerCode()
        self._finders = finders(subject, one, other)
        self.kept, self.expected, self.is_cut = kept_calls(subject, one, self.code)
        self.calls = self._calls()
        by_part: list[list[Key]] = [[] for _ in self._finders]
        for call in self.calls:
            by_part[call.part].append(call.key)
        self.pairs: Pairs = align_parts([call.key for call in self.kept], by_part)

    def walk(self, heals: Callable[[int], bool], permutations: bool = True) -> Walk:
        """Runs the second side. heals: whether a call's output gets the first side's bytes where it diverges by itself.

        permutations: whether what indexing gives may hold the row in another place.
        """
        watch = _Watch(self, heals, permutations)
        with watch.places:
            outputs = self.subject.run(self.other.case, self.code.observer(watch))
        return Walk(watch.seen, outputs)

    def part(self, places: Places) -> int:
        """The forward of the second side that runs: -1 between those of a run in several, where the subject's own code is."""
        if len(self._finders) == 1:
            return 0
        return places.n_forwards - 1 if places.is_inside else -1

    def finder(self, number: int) -> Finder:
        """Finds the row in what this call of the second side takes and gives."""
        return self._finders[self.calls[number].part]

    def arguments(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of this call of the second side, where all before it was fed what the first side was. Its tensors are copies."""
        watch = _Watch(self, lambda number: True, True)
        watch.keeps_arguments_of = number
        with watch.places:
            self.subject.run(self.other.case, self.code.observer(watch))
        return watch.arguments

    def is_equal(self, outputs: RowOutputs) -> bool:
        """Whether the row has the bits of the first side."""
        return first_row_that_differs(self.expected, row_of(outputs, self.other.position)) is None

    def partner(self, number: int) -> Kept | None:
        there = self.pairs.by_other[number] if number < len(self.pairs.by_other) else -1
        return self.kept[there] if there >= 0 else None

    def other_numbers(self, number: int) -> tuple[str, str]:
        """The plain numbers that the partner of this call and this call were given, where they are not the same, in words."""
        kept, there = self.partner(number), self.calls[number].numbers
        here = there if kept is None else numbers(kept.overload, kept.args, kept.kwargs)
        differ = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        one, other = (", ".join(f"{name}={given.get(name, 'none')}" for name in differ) for given in (here, there))
        return one, other

    def badge(self, seen: Seen) -> Badge:
        return "content" if seen.by_content else self.pairs.badge

    def _calls(self) -> list[Called]:
        """Of the second side, in order."""
        calls: list[Called] = []
        places = self.code.places()

        def around(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            part = self.part(places)
            if part < 0:
                return func(*args, **kwargs)
            where, given = places.here(), read(func, args, kwargs)
            shapes = tuple(x.shape for x in given)
            out = func(*args, **kwargs)
            outs = written(func, args, kwargs, out)
            if not is_view(func, given, outs):
                key = _key(func, places, where, given, outs)
                calls.append(Called(func, key, where, tuple(map(described, given)), shapes, numbers(func, args, kwargs), part))
            return out

        with places:
            self.subject.run(self.other.case, self.code.observer(around))
        return calls


def kept_calls(subject: Subject, side: Side, code: Code) -> tuple[list[Kept], RowOutputs, bool]:
    """The calls of a side with what they took and gave, the row's outputs, and whether some were too large to keep."""
    calls: list[Kept] = []
    places, keeper, owners = code.places(), _Keeper(), _Owners()

    def around(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where, given = places.here(), owners.of(func, read(func, args, kwargs))
        call = Kept(func, Key("", "", "", ()), where, args, kwargs)
        if writes_to_inputs(func):
            keeper.keep(given, call.inputs)
            keeper.about_to_change([*given, *written(func, args, kwargs, None)])
        out = func(*args, **kwargs)
        outs = written(func, args, kwargs, out)
        if is_view(func, given, outs):
            return out
        if not writes_to_inputs(func):
            keeper.keep(given, call.inputs)
            owners.add(outs)
        keeper.keep(owners.of(func, outs), call.outputs)
        call.key = _key(func, places, where, given, outs)
        calls.append(call)
        return out

    with places:
        outputs = subject.run(side.case, code.observer(around))
    return calls, row_of(outputs, side.position), keeper.is_full


class _Owners:
    """Whole tensors by their memory: what is written through a view is looked at in the tensor that the view is of.

    They are held weakly, so that a trace keeps no tensor that the subject has let go.
    """

    def __init__(self) -> None:
        self._owners: dict[int, weakref.ref[Tensor]] = {}

    def add(self, outs: list[Tensor]) -> None:
        for x in outs:
            self._owners[storage_of(x)] = weakref.ref(x)

    def of(self, func: Operator, tensors: list[Tensor]) -> list[Tensor]:
        """For an operator that writes to its inputs; of others the tensors themselves."""
        if not writes_to_inputs(func):
            return tensors
        return [self._owner(x) for x in tensors]

    def _owner(self, x: Tensor) -> Tensor:
        owner = self._owners.get(storage_of(x))
        whole = owner() if owner is not None else None
        return x if whole is None else whole


class _Watch:
    """Around each operator of the second side."""

    def __init__(self, sides: TwoSides, heals: Callable[[int], bool], permutations: bool) -> None:
        self.sides, self.heals, self.permutations = sides, heals, permutations
        self.places = sides.code.places()
        self.seen: dict[int, Seen] = {}
        self.keeps_arguments_of = -1
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._number = -1
        self._made_by: dict[int, int] = {}  # which call wrote last to this memory
        self._suspects: dict[int, int] = {}  # memory of what may differ by right, and the call that it comes from
        self._undefined: set[int] = set()  # memory that nothing was written to
        self._permuted: dict[int, tuple[Selection]] = {}  # where the row was found that stands in places of no order
        self._owners = _Owners()

    def __call__(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.sides.part(self.places) < 0:
            return func(*args, **kwargs)
        given, number = self._owners.of(func, read(func, args, kwargs)), self._number + 1
        before = self._before(func, given, number) if writes_to_inputs(func) else None
        out = func(*args, **kwargs)
        outs = written(func, args, kwargs, out)
        if is_view(func, given, outs):
            return out
        if number == self.keeps_arguments_of:
            self.arguments = torch.utils._pytree.tree_map_only(Tensor, as_it_lies, (args, kwargs))
        self._number = number
        if not writes_to_inputs(func):
            before = self._before(func, given, number)
        self._forget(func, given, outs)
        if before is not None:
            self.seen[number] = self._seen(before, args, given, self._owners.of(func, outs))
        self._note(func, outs)
        return out

    def _before(self, func: Operator, given: list[Tensor], number: int) -> list[Match] | None:
        """The inputs of the call; None where it has no partner that can be compared."""
        kept = self.sides.partner(number)
        if kept is None or kept.overload.name() != func.name() or not kept.outputs or gives_empty_memory(func):
            return None
        if not self.sides.finder(number).has_row:
            return None
        known = [self._permuted.get(storage_of(x), ()) for x in given]
        return [self._compared(number, x, y, places) for x, y, places in zip(kept.inputs, given, known, strict=False)]

    def _forget(self, func: Operator, given: list[Tensor], outs: list[Tensor]) -> None:
        """What is known of memory that was not read is of a tensor that had it before."""
        given_memory = set(map(storage_of, given)) if writes_to_inputs(func) else set()
        for memory in set(map(storage_of, outs)) - given_memory:
            self._made_by.pop(memory, None)
            self._suspects.pop(memory, None)
            self._permuted.pop(memory, None)
            self._undefined.discard(memory)

    def _note(self, func: Operator, outs: list[Tensor]) -> None:
        self._made_by |= dict.fromkeys(map(storage_of, outs), self._number)
        self._undefined.difference_update(map(storage_of, outs))
        if not writes_to_inputs(func):
            self._owners.add(outs)
        if gives_empty_memory(func):
            self._undefined.update(map(storage_of, outs))

    def _compared(
        self, number: int, expected: Tensor, actual: Tensor, carried: Iterable[Selection], permuted: bool = False
    ) -> Match:
        if expected.data_ptr() == actual.data_ptr() and expected.shape == actual.shape and expected.stride() == actual.stride():
            return Match(Selection(((slice(None), slice(None)),) * actual.dim(), False), None)  # a parameter
        return self.sides.finder(number).match(expected, actual, carried, permuted)

    def _seen(self, before: list[Match], args: tuple[Any, ...], given: list[Tensor], outs: list[Tensor]) -> Seen:
        number, kept = self._number, self.sides.partner(self._number)
        assert kept is not None
        made_by = tuple(dict.fromkeys(self._made_by[m] for x in given if (m := storage_of(x)) in self._made_by))
        carried = [match.selection for match in before if match.selection is not None]
        permuted = self.permutations and (base_name(kept.overload) in _INDEXING or any(c.by_content for c in carried))
        if self.permutations:
            carried = [*_through_indices(kept, before, given), *carried]
        else:
            carried = [selection for selection in carried if not selection.by_content]
        carried = [*_through_padding(kept, args, before), *carried]
        outputs = tuple(self._compared(number, x, y, carried, permuted) for x, y in zip(kept.outputs, outs, strict=False))
        for x, match in zip(outs, outputs, strict=False):
            if match.selection is not None and match.selection.permuted is not None:
                self._permuted[storage_of(x)] = (match.selection,)
        differ = [
            (x, y, match) for x, y, match in zip(kept.outputs, outs, outputs, strict=False) if match.difference is not None
        ]
        blamed, follows = None, False
        if differ:
            blamed, follows = self._blame(number, before, given)
        values = False
        for expected, actual, match in differ:
            assert match.selection is not None
            if _is_index(actual) or not given or self.sides.finder(number).is_shared(match.selection):
                origin = number if blamed is None else blamed
                self._suspects.setdefault(storage_of(actual), origin)
            else:
                values = True
                if not follows and self.heals(number):
                    put_in_place(expected, actual, match.selection)
        if not values:
            blamed = None
        by_content = any(m.selection is not None and m.selection.by_content for m in (*before, *outputs))
        shapes = (shapes_of(kept.outputs), shapes_of(outs))
        return Seen(self.sides.pairs.by_other[number], tuple(before), outputs, shapes, blamed, by_content, made_by)

    def _blame(self, number: int, before: list[Match], given: list[Tensor]) -> tuple[int | None, bool]:
        """Which call a difference comes from: this one, or the one that made what it was given and that differs by right.

        None, and True, where it follows a difference that is told already.
        """
        read = [(x, match) for x, match in zip(given, before, strict=False) if storage_of(x) not in self._undefined]
        wrong = [(x, match) for x, match in read if not match.agrees]
        if not wrong:
            return number, False
        suspects = [self._suspects.get(storage_of(x)) if match.difference else None for x, match in wrong]
        if None in suspects:
            return None, True
        indices_alone = all(_is_index(x) for x, _ in wrong)
        computes = any(_is_value(x) for x, match in zip(given, before, strict=False) if match.agrees)
        if indices_alone and computes and base_name(self.sides.calls[number].overload) not in _INDEXING:
            return number, False
        return suspects[0], False


class Called(NamedTuple):
    """One call of the second side. inputs: the tensors that it took, in words; shapes: theirs; numbers: the plain ones. part:
    in which forward."""

    overload: Operator
    key: Key
    where: Where
    inputs: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    numbers: dict[str, str]
    part: int


class _Keeper:
    """Keeps tensors as they are: those whose memory is about to be written to are copied before."""

    def __init__(self) -> None:
        self._held: dict[int, list[tuple[list[Tensor], int]]] = {}
        self._sizes: dict[int, int] = {}
        self.is_full = False

    def keep(self, tensors: list[Tensor], into: list[Tensor]) -> None:
        memory = [storage_of(x) for x in tensors]
        self._sizes |= {m: x.untyped_storage().nbytes() for m, x in zip(memory, tensors, strict=True) if m}
        self.is_full = self.is_full or sum(self._sizes.values()) > KEPT_BYTES
        if self.is_full:
            return
        for m, x in zip(memory, tensors, strict=True):
            self._held.setdefault(m, []).append((into, len(into)))
            into.append(x if m else x.clone())

    def about_to_change(self, tensors: list[Tensor]) -> None:
        for m in {storage_of(x) for x in tensors}:
            for kept, i in self._held.pop(m, ()):
                kept[i] = kept[i].clone()


def as_it_lies(x: Tensor) -> Tensor:
    """A copy with the tensor's strides, overlapping ones too, and its alignment."""
    offset, extent = x.data_ptr() % ALIGNMENT // x.itemsize, extent_of(x)
    memory = torch.empty(offset + extent, dtype=x.dtype, device=x.device)
    memory[offset:] = x.as_strided((extent,), (1,))
    return memory.as_strided(x.shape, x.stride(), offset)


def extent_of(x: Tensor) -> int:
    """How many values lie between the tensor's first and last one, these included."""
    return 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def _key(func: Operator, places: Places, where: Where, given: list[Tensor], outs: list[Tensor]) -> Key:
    parameters = [name for x in (*given, *outs) if (name := places.parameter(x))]
    return Key(where.module, func.name(), where.source, tuple(parameters))


def _through_padding(kept: Kept, args: tuple[Any, ...], before: list[Match]) -> Iterator[Selection]:
    """Where the row stands in a padded tensor. args: those of the second side."""
    if (
        base_name(kept.overload) == "constant_pad_nd"
        and before
        and (of := before[0].selection) is not None
        and of.blocks is None
    ):
        yield through_padding(of, kept.args[1], args[1], (kept.args[0].shape, args[0].shape))


def _through_indices(kept: Kept, before: list[Match], given: list[Tensor]) -> Iterator[Selection]:
    """Where the row stands in what was taken along one dimension by indices."""
    if base_name(kept.overload) not in ("index", "index_select") or len(kept.inputs) != 2 or len(before) != 2:
        return
    of, (x, one), other = before[0].selection, kept.inputs, given[1]
    dim = kept.args[1] if base_name(kept.overload) == "index_select" else 0
    along_one = isinstance(kept.args[1], int) or len(kept.args[1]) == 1
    if (
        of is not None
        and of.blocks is None
        and along_one
        and one.dim() == other.dim() == 1
        and one.dtype == other.dtype == torch.int64
    ):
        found = through_indices(of, dim, one, other, (x.shape[dim], given[0].shape[dim]))
        if found is not None:
            yield found


def row_of(outputs: RowOutputs, position: int) -> RowOutputs:
    return RowOutputs(rows=[{name: x.clone() for name, x in outputs[position].items()}])


def _is_value(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _is_index(x: Tensor) -> bool:
    """Integers may be places in a batch, which differ by right; what is read with them tells."""
    return not _is_value(x) and x.dtype != torch.bool


def described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} strides {list(x.stride())}"


def shapes_of(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors)


def traced_ops(sides: TwoSides, plain: Walk, healed: Walk) -> tuple[TracedOp, ...]:
    """What the second side ran, in order, without views; then what the first side alone ran. agreement: of the plain run."""
    alone = [n for n in range(len(sides.calls)) if sides.pairs.by_other[n] < 0]
    shown = sorted({*plain.seen, *alone})
    place = {number: i for i, number in enumerate(shown)}
    culprits = {seen.blamed for walk in (plain, healed) for seen in walk.seen.values()} - {None}
    ops = [_traced(sides, number, plain.seen.get(number), number in culprits, place) for number in shown]
    for i in sides.pairs.only_one:
        call = sides.kept[i]
        ops.append(_one_sided(call, (i, -1), (shapes_of(call.outputs), "")))
    return tuple(ops)


def _traced(sides: TwoSides, number: int, seen: Seen | None, is_culprit: bool, place: dict[int, int]) -> TracedOp:
    call = sides.calls[number]
    if seen is None:
        return _one_sided(call, (-1, number), ("", ""))
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
        source=call.where.source,
        line=call.where.line,
        made_of=call.where.made_of,
        shapes=seen.shapes,
        n_differ=first.n_differ if first else 0,
        n_total=first.n_total if first else 0,
        ulp=first.ulp if first else None,
        produced_by=tuple(place[n] for n in seen.produced_by if n in place),
    )


def _one_sided(call: Kept | Called, index: tuple[int, int], shapes: tuple[str, str]) -> TracedOp:
    return TracedOp(
        overload=call.key.overload,
        index=index,
        agreement="not compared",
        badge="one side",
        module=call.key.module,
        source=call.where.source,
        line=call.where.line,
        made_of=call.where.made_of,
        shapes=shapes,
    )
