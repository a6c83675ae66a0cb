"""The operators at which a row's bits part: which, what they cause, what cures them, and at which sizes they change."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch._ops import OpOverload

from pytest_batchinv import mode
from pytest_batchinv.compare import first_difference, first_row_that_differs
from pytest_batchinv.diagnose import kernels, reproducer, sizes
from pytest_batchinv.diagnose.calls import Operator, writes_to_inputs
from pytest_batchinv.diagnose.recorder import tensors_of
from pytest_batchinv.diagnose.rows import Match, in_blocks, parts_of
from pytest_batchinv.diagnose.trace import CUT, Called, Kept, TwoSides, Walk, described, row_of, traced_ops
from pytest_batchinv.kernels import table
from pytest_batchinv.relations.base import Relation, Side
from pytest_batchinv.report.record import Breakpoints, Culprit, Trace
from pytest_batchinv.search.runs import SubjectRuns
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import Subject
from pytest_batchinv.subjects.compiled import short_dtype

MOST = 8
"""Culprits that are asked what they cause: each costs a run of the subject."""
_RUNS = 4
"""Of the second side, for noise that is not there every time."""
_MOST_ROWS = 512
_SECONDS = {"cpu": 0.5, "cuda": 2.0}
"""For the sizes of one operator. A GPU waits for each call's result: 512 calls take a second there."""


class Group(NamedTuple):
    """The calls of one operator from one line that diverged by themselves. blamed: the operator's first call; calls: where its
    difference showed, which is a later call for an operator that gave wrong indices."""

    blamed: int
    calls: tuple[int, ...]


def trace(relation: Relation, runs: SubjectRuns, case: BatchShape, position: int) -> Trace | None:
    """The trace of the row at this position of the case; None for a relation whose sides are no two runs.

    Of eager code, which knows modules and operators; of compiled code where eager code gives the row equal bits.
    """
    eager, found, pairs = runs.subject.in_eager_mode(), None, list(relation.two_runs(runs, case, position))
    for one, other in pairs:
        if other.case.steps and not parts_of(eager, other.case):
            return Trace(ops=(), notes=("the subject does not tell what each of its forwards computes, so there is no trace",))
        found = TwoSides(eager, one, other)
        if (plain := _diverging(found)) is not None:
            return _told(found, plain)
    if found is None:
        return None
    if eager is runs.subject:
        return Trace(ops=(), notes=("under the trace the row has equal bits on both sides",))
    return _of_compiled_code(runs.subject, pairs)


def _diverging(sides: TwoSides) -> Walk | None:
    for _ in range(_RUNS):
        plain = sides.walk(lambda number: False)
        if not sides.is_equal(plain.outputs):
            return plain
    return None


_BESIDE_EAGER = "the two sides run other graphs: the kernels of the second one are set beside eager code"
_EAGER_IS_EQUAL = "eager code gives the row equal bits on both sides: what Inductor made of it does not"


def _of_compiled_code(subject: Subject, pairs: list[tuple[Side, Side]]) -> Trace:
    # They load Inductor, which eager code has no need of.
    from pytest_batchinv.diagnose import bisection, crossed
    from pytest_batchinv.diagnose.generated import UNSEEN, CompiledCode

    for one, other in pairs:
        if parts_of(subject, other.case):
            return Trace(
                ops=(), notes=(_EAGER_IS_EQUAL, "of compiled code that runs in several forwards there is no trace yet")
            )
        code = CompiledCode.of(subject, (one.case, other.case))
        found = TwoSides(subject, one, other, code)
        if code.has_unseen or not found.calls:
            told = Trace(ops=(), notes=(UNSEEN,))
        elif (plain := _diverging(found)) is not None:
            told = _told(found, plain)
        else:
            continue
        if not told.culprits and told.ops:  # the two sides run other graphs, and eager code stands between them
            beside = crossed.beside_eager_code(subject, other)
            told = msgspec.structs.replace(beside, notes=(*beside.notes, _BESIDE_EAGER)) if beside.culprits else told
        bisected = () if told.culprits else (bisection.told(subject, _has_equal_bits(one, other)),)
        return msgspec.structs.replace(told, notes=(_EAGER_IS_EQUAL, *told.notes, *bisected))
    return Trace(ops=(), notes=(_EAGER_IS_EQUAL, "under the trace of compiled code it does, too"))


def _has_equal_bits(one: Side, other: Side) -> Callable[[Subject], bool]:
    def holds(subject: Subject) -> bool:
        expected = row_of(subject.run(one.case), one.position)
        return first_row_that_differs(expected, row_of(subject.run(other.case), other.position)) is None

    return holds


def _told(sides: TwoSides, plain: Walk) -> Trace:
    healed = sides.walk(lambda number: True)
    if not sides.is_equal(healed.outputs):  # then what indexing gave was another row's, and no permutation
        healed = sides.walk(lambda number: True, permutations=False)
    by_itself = healed if _groups(sides, healed) else plain  # noise may be in the first run and not in the second
    groups = _groups(sides, by_itself)
    ops = traced_ops(sides, plain, healed)
    place = {op.index[1]: i for i, op in enumerate(ops)}
    asked = 0 if sides.one == sides.other else MOST  # noise may be there in one run and not in the next: it tells no cause
    effects = [_effect(sides, group) if i < asked else "not told" for i, group in enumerate(groups)]
    cures = {overload: _cure(sides, {overload}) for overload in dict.fromkeys(sides.calls[g.blamed].overload for g in groups)}
    rows = OwnRows.of(sides, healed, groups[_first_cause(effects)]) if groups else None
    culprits = tuple(
        Culprit(
            op=place[group.blamed],
            calls=len(group.calls),
            inputs=_inputs(sides, group),
            numbers=sides.other_numbers(group.blamed),
            effect=effect,  # type: ignore[arg-type]
            cure=cures[sides.calls[group.blamed].overload],
            sizes=_sizes(rows) if rows is not None and i == _first_cause(effects) else None,
            elsewhere=_elsewhere(rows) if rows is not None and i == _first_cause(effects) else (),
            kernels=_kernels(sides, group, rows) if rows is not None and i == _first_cause(effects) else ((), ()),
        )
        for i, (group, effect) in enumerate(zip(groups, effects, strict=True))
    )
    control_flow = _control_flow(sides, groups)
    notes = _notes(sides, healed, groups, control_flow)
    script, why = _script(sides, by_itself, groups[_first_cause(effects)]) if groups else ("", "")
    if groups and any(sides.other_numbers(groups[_first_cause(effects)].blamed)):
        script = ""  # it would blame the operator for the numbers that it is given
    if why:
        notes.append(f"no script of the operator alone: {why}")
    causing = {sides.calls[group.blamed].overload for group, effect in zip(groups, effects, strict=True) if effect == "causes"}
    if len(causing) > 1 and not mode.is_on():
        notes.append(_cure(sides, causing))
    return Trace(ops=ops, culprits=culprits, control_flow=control_flow, notes=tuple(notes), script=script)


def _first_cause(effects: list[str]) -> int:
    return effects.index("causes") if "causes" in effects else 0


def _groups(sides: TwoSides, healed: Walk) -> list[Group]:
    found: dict[tuple[str, str], list[int]] = {}
    blamed: dict[tuple[str, str], int] = {}
    for number, seen in healed.seen.items():
        if seen.blamed is not None:
            call = sides.calls[seen.blamed]
            name = (call.key.overload, call.where.source)
            found.setdefault(name, []).append(number)
            blamed.setdefault(name, seen.blamed)
    groups = [Group(blamed[name], tuple(numbers)) for name, numbers in found.items()]
    return sorted(groups, key=lambda group: group.blamed)


def _effect(sides: TwoSides, group: Group) -> str:
    """Whatever else diverges by itself gets the first side's bytes: what differs at the end comes from these calls."""
    outputs = sides.walk(lambda number: number not in group.calls).outputs
    return "does not reach the output" if sides.is_equal(outputs) else "causes"


def _cure(sides: TwoSides, overloads: set[Operator]) -> str:
    """The mode's kernels for these operators in their place on both sides, the rest stock. Empty with the mode on."""
    if mode.is_on() or not all(isinstance(overload, OpOverload) for overload in overloads):
        return ""  # what Inductor generates has no counterpart in the mode
    in_place: dict[Operator, Callable[..., Any]] = {}
    for overload in overloads:
        kernel = _kernel(overload)
        if kernel is None:
            return f"the mode has no kernel of its own for {overload.name()}"
        in_place[overload] = kernel

    def around(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return in_place.get(func, func)(*args, **kwargs)

    try:
        one = sides.subject.run(sides.one.case, sides.code.observer(around))[sides.one.position]
        other = sides.subject.run(sides.other.case, sides.code.observer(around))[sides.other.position]
    except Exception as error:
        return f"could not be tried: {type(error).__name__}: {error}"
    named = ", ".join(sorted(overload.name() for overload in overloads))
    equal = all(first_difference(one[name], other[name]) is None for name in one)
    return f"with the mode's kernel for {named} and nothing else of it the bits are {'equal' if equal else 'still others'}"


def _kernel(overload: Operator) -> Callable[..., Any] | None:
    name = overload.name().removeprefix("aten::")
    return table.BACKEND_KERNELS.get(name) or table.POINTWISE.get(name) or table.WHOLE_VECTORS.get(name)


class OwnRows:
    """An operator of the first side, run on any number of its own rows: the row's first vector, repeated."""

    def __init__(self, kept: Kept, dims: list[int], out_dim: int) -> None:
        self._kept, self._dims, self._out_dim = kept, dims, out_dim

    @classmethod
    def of(cls, sides: TwoSides, healed: Walk, group: Group) -> OwnRows | None:
        """None where the operator's rows do not lie along one dimension of each tensor."""
        seen = healed.seen.get(group.blamed)
        if seen is None or seen.blamed != group.blamed:
            return None
        kept = sides.kept[seen.other]
        if writes_to_inputs(kept.overload) or len(seen.outputs) != len(kept.outputs):
            return None
        if any(not x.is_floating_point() and not x.is_complex() for x in kept.inputs):
            return None  # places in a batch mean nothing in another one
        found, out_dim = [_rows_along(match) for match in seen.inputs], _rows_along(seen.outputs[0])
        dims = [dim for dim in found if dim is not None]
        if out_dim is None or out_dim < 0 or len(dims) < len(found) or max(dims, default=-1) < 0:
            return None
        return cls(kept, dims, out_dim)

    @property
    def dtype(self) -> torch.dtype:
        return next(x.dtype for x in self._kept.inputs if x.is_floating_point() or x.is_complex())

    def in_dtype(self, dtype: torch.dtype) -> OwnRows:
        """The same operator with the same rows rounded to another dtype."""
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in self._kept.inputs]
        return OwnRows(replace(self._kept, inputs=inputs), self._dims, self._out_dim)

    @property
    def is_on_cpu(self) -> bool:
        return self._kept.inputs[0].device.type == "cpu"

    def first(self, n_rows: int) -> Tensor:
        """What the first of so many rows is given."""
        first = tensors_of(called(self._kept, self.inputs(n_rows)))[0]
        return first.select(self._out_dim, 0).clone()

    def inputs(self, n_rows: int) -> list[Tensor]:
        return [x if dim < 0 else _repeated(x, dim, n_rows) for x, dim in zip(self._kept.inputs, self._dims, strict=True)]

    def launched(self, n_rows: int) -> tuple[str, ...]:
        """The kernels of a call with so many rows."""
        inputs = self.inputs(n_rows)
        return kernels.launched(lambda: called(self._kept, inputs))

    def count(self, shapes: tuple[torch.Size, ...]) -> int:
        """The rows of a call with inputs of these shapes."""
        return max(shape[dim] for shape, dim in zip(shapes, self._dims, strict=True) if dim >= 0)


def _sizes(rows: OwnRows) -> Breakpoints:
    """The numbers of its own rows at which the operator gives the first row other bits than for one row."""
    alone = rows.first(1)
    deadline = time.monotonic() + _SECONDS.get(alone.device.type, 0.5)
    known = {1: False}
    for n_rows in range(2, _MOST_ROWS + 1):
        if time.monotonic() > deadline:
            break
        known[n_rows] = first_difference(alone, rows.first(n_rows)) is not None
    return Breakpoints(sizes.ranges(known), len(known), max(known))


def _elsewhere(rows: OwnRows) -> tuple[tuple[str, Breakpoints], ...]:
    """Its sizes in other dtypes, and with one thread; what the operator does not take is left out."""
    found = []
    gives_floats = rows.first(1).is_floating_point()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype != rows.dtype and gives_floats:
            with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):
                found.append((short_dtype(dtype), _sizes(rows.in_dtype(dtype))))
    threads = torch.get_num_threads()
    if rows.is_on_cpu and threads > 1:
        try:
            torch.set_num_threads(1)
            found.append((f"{short_dtype(rows.dtype)} with one thread", _sizes(rows)))
        finally:
            torch.set_num_threads(threads)
    return tuple(found)


def _kernels(sides: TwoSides, group: Group, rows: OwnRows) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the operator launches for its rows on either side; empty on a CPU."""
    there = sides.pairs.by_other[group.blamed]
    if sides.kept[there].inputs[0].device.type != "cuda":
        return (), ()
    one = rows.count(tuple(x.shape for x in sides.kept[there].inputs))
    return rows.launched(one), rows.launched(rows.count(sides.calls[group.blamed].shapes))


def _script(sides: TwoSides, walk: Walk, group: Group) -> tuple[str, str]:
    """A script that shows the group's first call alone, or why there is none."""
    seen = walk.seen[group.calls[0]]
    if seen.blamed != group.calls[0]:
        return "", "its result holds no row of its own, and the difference shows in what was computed with it"
    kept = sides.kept[seen.other]
    if not isinstance(kept.overload, OpOverload):
        return "", "it is a kernel that Inductor generated"
    try:
        return reproducer.script(
            reproducer.Sides(
                operator=kept.overload,
                first=_with_inputs(kept, kept.inputs),
                second=sides.arguments(group.calls[0]),
                inputs=seen.inputs,
                outputs=seen.outputs,
                title=f"{kept.overload.name()} gives the same values other bits where the rest of the batch is another one.",
                is_noise=sides.one == sides.other,
            )
        ), ""
    except reproducer.Unwritable as why:
        return "", str(why)


def called(kept: Kept, inputs: list[Tensor]) -> Any:
    """The operator with these tensors in place of those that it was given."""
    args, kwargs = _with_inputs(kept, inputs)
    return kept.overload(*args, **kwargs)


def _with_inputs(kept: Kept, inputs: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves, form = torch.utils._pytree.tree_flatten((kept.args, kept.kwargs))
    tensors = iter(inputs)
    leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, form)
    return args, kwargs


def _repeated(x: Tensor, dim: int, n_rows: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = n_rows
    return x.narrow(dim, 0, 1).expand(shape).contiguous()


def _rows_along(match: Match) -> int | None:
    """The dimension along which the row's vectors lie; -1 for a tensor without rows; None where there are several."""
    if match.selection is None or match.selection.blocks is not None:
        return None
    whole = (slice(None), slice(None))
    dims = [dim for dim, places in enumerate(match.selection.dims) if places != whole]
    return None if len(dims) > 1 else (*dims, -1)[0]


def _inputs(sides: TwoSides, group: Group) -> tuple[tuple[str, ...], tuple[str, ...]]:
    there = sides.pairs.by_other[group.blamed]
    one = tuple(described(x) for x in sides.kept[there].inputs) if there >= 0 else ()
    return one, sides.calls[group.blamed].inputs


def _control_flow(sides: TwoSides, groups: list[Group]) -> tuple[str, ...]:
    """What one side alone ran before the first culprit, or in it, but for copies."""
    until = groups[0].blamed if groups else len(sides.calls)
    before = [there for there in sides.pairs.by_other[: until + 1] if there >= 0]
    last = max(before, default=len(sides.kept))
    only_one = [sides.kept[i] for i in sides.pairs.only_one if i <= last]
    only_other = [sides.calls[n] for n in range(min(until + 1, len(sides.calls))) if sides.pairs.by_other[n] < 0]
    often = [Counter(_named(call) for call in calls) for calls in (sides.kept, sides.calls)]
    lines = [_only("first", _named(call), *often) for call in only_one if not _copies(call)]
    lines += [_only("second", _named(call), *often) for call in only_other if not _copies(call)]
    return tuple(dict.fromkeys(lines))


def _only(side: str, name: str, one: Counter[str], other: Counter[str]) -> str:
    if one[name] and other[name]:
        return f"the first side calls {name} {one[name]} times, the second {other[name]}"
    return f"only the {side} side calls {name}"


def _copies(call: Kept | Called) -> bool:
    """Whether the call changes no bits: a batch of one row is contiguous where a larger one has to be copied."""
    return call.key.overload == "aten::clone"


def _named(call: Kept | Called) -> str:
    where = [f"in {call.key.module}" * bool(call.key.module), f"({call.where.source})" * bool(call.where.source)]
    return " ".join([call.key.overload, *filter(None, where)])


def _moved(sides: TwoSides, healed: Walk, group: Group) -> str:
    """Where padding put the row elsewhere in the blocks of columns that the operator was given: sums may follow the place."""
    seen = healed.seen.get(group.blamed)
    for match, shape in zip(seen.inputs if seen is not None else (), sides.calls[group.blamed].shapes, strict=False):
        if (found := match.selection and in_blocks(match.selection, shape)) is not None:
            size, one, other = found
            name = sides.calls[group.blamed].overload.name()
            where = f"the row begins at column {one} of a block on one side, {other} on the other"
            return f"{name} takes blocks of {size} columns: {where}"
    return ""


def _notes(sides: TwoSides, healed: Walk, groups: list[Group], control_flow: tuple[str, ...]) -> list[str]:
    notes = list(filter(None, [_moved(sides, healed, group) for group in groups[:1]]))
    if sides.is_cut:
        notes.append(CUT)
    if not sides.is_equal(healed.outputs) and (groups or not control_flow):
        notes.append(
            "with the first side's bytes in place of all that diverged, the output still differs: part of it was not seen"
        )
    elif not healed.diverged:
        notes.append("the operator diverged in one run and not in the next: noise")
    return notes
