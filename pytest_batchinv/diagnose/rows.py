"""Where a row lies in a tensor of either side: found from shapes, from the inputs, or from the row's own bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pytest_batchinv.compare import Difference, as_bits, first_difference
from pytest_batchinv.relations.base import Side
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import Part, Span, Subject

_MOST_CHOICES = 64

Places = slice | tuple[int, ...]
"""Places along one dimension."""


class Geometry(NamedTuple):
    """n sequences of ``width`` columns; the row has the columns ``start`` to ``stop`` of one of them."""

    n: int
    width: int
    sequence: int
    start: int
    stop: int


class Selection(NamedTuple):
    """The row's places on either side, dimension by dimension. by_content: some were found by the row's bytes.

    permuted: the sizes of the dimension, on either side, along which the row's vectors stand in places of no order; else None.
    blocks: the dimension which, taken together with the next one, holds the columns: they were cut into blocks; else None.
    """

    dims: tuple[tuple[Places, Places], ...]
    finds_a_row: bool
    by_content: bool = False
    permuted: tuple[int, int] | None = None
    blocks: int | None = None


class Match(NamedTuple):
    """selection: None where the row cannot be found in the two tensors. difference: None where its bytes agree."""

    selection: Selection | None
    difference: Difference | None

    @property
    def agrees(self) -> bool:
        return self.selection is not None and self.difference is None


def geometries(subject: Subject, side: Side) -> tuple[Geometry, ...]:
    """The forms in which the subject's tensors hold the row: padded sequences; or a packed one, and what it is unpacked to."""
    case, spans = side.case, subject.spans(side.case)
    span = spans[side.position]
    if case.layout == "packed" and len(case) > 1:
        longest = max(2, *(other.stop - other.start for other in spans))  # the subject unpacks to two columns at least
        length = span.stop - span.start
        return (
            Geometry(1, case.width, 0, span.start, span.stop),
            Geometry(len(case), longest, side.position, 0, length),
        )
    width = max(case.width, *(other.stop for other in spans))
    return (Geometry(len(case), width, side.position, span.start, span.stop),)


Pair = tuple[Geometry, Geometry]


def parts_of(subject: Subject, case: BatchShape) -> list[Part]:
    """The forwards of a case that is computed in several, where the subject tells."""
    return subject.parts(case) if hasattr(subject, "parts") else []


def finders(subject: Subject, one: Side, other: Side) -> list[Finder]:
    """One for each forward of the second side: how to find the row in what it computes, in tensors of the two sides."""
    parts = parts_of(subject, other.case)
    if not parts:
        return [Finder([[pair] for pair in itertools.product(geometries(subject, one), geometries(subject, other))])]
    (whole,) = geometries(subject, one)
    return [Finder(_pairs_of_part(whole, subject.spans(other.case)[other.position], part)) for part in parts]


def _pairs_of_part(whole: Geometry, span: Span, part: Part) -> list[list[Pair]]:
    """What of the row the part computes: as queries, and with what the cache holds of it as keys. Dimensions may be of both."""
    start, stop = max(span.start, part.columns.start), min(span.stop, part.columns.stop)
    if start >= stop or span.sequence not in part.sequences:
        return []
    n, sequence = len(part.sequences), span.sequence - part.sequences.start
    moved = whole.start - span.start
    queries = Geometry(n, part.width, sequence, start - part.columns.start, stop - part.columns.start)
    keys = [Geometry(n, width, sequence, span.start, stop) for width in part.keys]
    return [
        [
            (whole._replace(start=start + moved, stop=stop + moved), queries),
            *((whole._replace(stop=stop + moved), geometry) for geometry in keys),
        ]
    ]


class Finder:
    """Finds the row in pairs of tensors of two sides.

    groups: forms in which the two sides may hold the row; along each dimension a tensor has any one form of a group.
    """

    def __init__(self, groups: Sequence[Sequence[Pair]]) -> None:
        self._groups = groups
        self._pairs = [pair for group in groups for pair in group]
        self._several = any(max(a.n, b.n) > 1 for a, b in self._pairs)

    @property
    def has_row(self) -> bool:
        return bool(self._pairs)

    def match(self, expected: Tensor, actual: Tensor, carried: Iterable[Selection] = (), permuted: bool = False) -> Match:
        """The first selection under which the bytes agree; else the likeliest one, with what differs.

        permuted: the rows may stand in any order, so that the row is looked for by its bytes, too; else that is done only
        where no shape tells where it is, for equal bytes elsewhere may be those of another row.
        """
        if expected.dtype != actual.dtype or expected.dim() != actual.dim() or not _readable(expected, actual):
            return Match(None, None)
        likeliest: Match | None = None
        for selection in self._selections(expected.shape, actual.shape, tuple(carried)):
            difference = first_difference(*selected(expected, actual, selection))
            if difference is None:
                return Match(selection, None)
            likeliest = likeliest or Match(selection, difference)
        if (permuted or likeliest is None) and (by_content := _by_content(expected, actual)) is not None:
            return Match(by_content, None)
        return likeliest or self._in_blocks(expected, actual) or Match(None, None)

    def _in_blocks(self, expected: Tensor, actual: Tensor) -> Match | None:
        """Where columns were padded to blocks of one size, as recurrences do: the row's own may lie in several."""
        for a, b in self._pairs:
            for dim in range(expected.dim() - 1):
                size = expected.shape[dim + 1]
                n_blocks = expected.shape[dim], actual.shape[dim]
                if size < 2 or actual.shape[dim + 1] != size or n_blocks != (-(-a.width // size), -(-b.width // size)):
                    continue
                columns = slice(a.start, a.stop), slice(b.start, b.stop)
                one, other = (x.flatten(dim, dim + 1).shape for x in (expected, actual))
                for found in self._selections(one, other, (), {dim: columns}):
                    selection = found._replace(blocks=dim)
                    return Match(selection, first_difference(*selected(expected, actual, selection)))
        return None

    def is_shared(self, selection: Selection) -> bool:
        """Whether the tensor holds no row of its own: it may follow the neighbours by right."""
        return self._several and not selection.finds_a_row

    def _selections(
        self,
        one: torch.Size,
        other: torch.Size,
        carried: tuple[Selection, ...],
        known: Mapping[int, tuple[slice, slice]] = MappingProxyType({}),
    ) -> list[Selection]:
        """known: the row's places along some dimensions."""
        found: dict[str, Selection] = {}
        for group in self._groups:
            choices = [
                [("columns", *known[dim])] if dim in known else _distinct(_choices(i, j, group, dim, carried))
                for dim, (i, j) in enumerate(zip(one, other, strict=True))
            ]
            for combination in itertools.islice(itertools.product(*choices), _MOST_CHOICES):
                kinds = [kind for kind, _, _ in combination]
                if kinds.count("batch") + kinds.count("tokens") > 1 or "tokens" in kinds and "columns" in kinds:
                    continue
                dims = tuple((x, y) for _, x, y in combination)
                finds_a_row = any(kind in ("batch", "tokens", "carried") for kind in kinds) or group[0][1].n == 1
                lists = [(i, j) for (_, y), i, j in zip(dims, one, other, strict=True) if isinstance(y, tuple)]
                by_content = bool(lists) and any(selection.by_content for selection in carried)
                found.setdefault(repr(dims), Selection(dims, finds_a_row, by_content, (*lists, None)[0]))
        return sorted(found.values(), key=lambda selection: not selection.finds_a_row)


Choice = tuple[str, Places, Places]


def _choices(one: int, other: int, group: Sequence[Pair], dim: int, carried: tuple[Selection, ...]) -> Iterator[Choice]:
    """The places that a dimension of these sizes may hold the row at."""
    for selection in carried:
        for x, y in selection.dims:
            if isinstance(y, tuple) and selection.permuted == (one, other):
                yield "carried", x, y
    for a, b in group:
        yield from _places(one, other, a, b)
    if one == other:
        yield "whole", slice(None), slice(None)


def _places(one: int, other: int, a: Geometry, b: Geometry) -> Iterator[Choice]:
    units = (
        ("batch", a.n, b.n, (a.sequence, a.sequence + 1), (b.sequence, b.sequence + 1)),
        ("tokens", a.n * a.width, b.n * b.width, _token_places(a), _token_places(b)),
        ("columns", a.width, b.width, (a.start, a.stop), (b.start, b.stop)),
    )
    for kind, unit_a, unit_b, (start_a, stop_a), (start_b, stop_b) in units:
        times = one // unit_a
        if one % unit_a or other % unit_b or times != other // unit_b or not times:
            continue
        if unit_a == unit_b and (times > 1 or unit_a == 1):
            continue  # any dimension could be that many of them
        if kind == "columns" and times > 1 and b.n > 1:
            continue
        yield kind, slice(start_a * times, stop_a * times), slice(start_b * times, stop_b * times)


def _distinct(choices: Iterator[Choice]) -> list[Choice]:
    return list({repr(choice): choice for choice in choices}.values())


def _token_places(g: Geometry) -> tuple[int, int]:
    return g.sequence * g.width + g.start, g.sequence * g.width + g.stop


def selected(expected: Tensor, actual: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """The row in both tensors."""
    one = [x for x, _ in selection.dims]
    other = [y for _, y in selection.dims]
    if selection.blocks is not None:
        expected, actual = (x.flatten(selection.blocks, selection.blocks + 1) for x in (expected, actual))
    return _taken(expected, one), _taken(actual, other)


def _taken(x: Tensor, places: Sequence[Places]) -> Tensor:
    for dim, place in enumerate(places):
        if isinstance(place, slice):
            start, stop, _ = place.indices(x.shape[dim])
            x = x.narrow(dim, start, stop - start)
        else:
            x = x.index_select(dim, torch.tensor(place, dtype=torch.long, device=x.device))
    return x


def put_in_place(expected: Tensor, actual: Tensor, selection: Selection) -> bool:
    """Writes the row's bytes of the first side into the second side's tensor. False where its memory does not allow it."""
    if any(stride == 0 and size > 1 for stride, size in zip(actual.stride(), actual.shape, strict=True)):
        return False
    part, target, lists = expected, actual, []
    if selection.blocks is not None:
        part, target = (x.flatten(selection.blocks, selection.blocks + 1) for x in (expected, actual))
        if target.data_ptr() != actual.data_ptr():
            return False
    for dim, (x, y) in enumerate(selection.dims):
        part = _taken(part, [slice(None)] * dim + [x])
        if isinstance(y, slice):
            start, stop, _ = y.indices(target.shape[dim])
            target = target.narrow(dim, start, stop - start)
        else:
            lists.append((dim, torch.tensor(y, dtype=torch.long, device=actual.device)))
    if len(lists) > 1:
        return False
    if lists:
        target.index_copy_(lists[0][0], lists[0][1], part)
    else:
        target.copy_(part)
    return True


def in_blocks(of: Selection, shape: torch.Size) -> tuple[int, int, int] | None:
    """The columns of a block, and at which of them the row begins on either side; None where it is held in no blocks.

    shape: of the second side's tensor.
    """
    for dim, (x, y) in enumerate(of.dims):
        if dim == of.blocks and isinstance(x, slice) and isinstance(y, slice):
            return shape[dim + 1], x.start % shape[dim + 1], y.start % shape[dim + 1]
        is_padded = of.permuted is not None and not of.by_content and of.permuted[0] == of.permuted[1] == shape[dim]
        if is_padded and isinstance(x, tuple) and isinstance(y, tuple) and x[0] != y[0]:
            return shape[dim], x[0], y[0]
    return None


def through_indices(of: Selection, dim: int, one: Tensor, other: Tensor, sizes: tuple[int, int]) -> Selection | None:
    """Where the row stands in ``x.index_select(dim, indices)`` of both sides, given where it stands in x.

    one, other: the indices, int64 [n] and [m]. sizes: of x along dim. Places that one vector of x is taken to more than once
    are paired in order. None where the two sides take the row's vectors a different number of times.
    """
    x, y = (_listed(places, size) for places, size in zip(of.dims[dim], sizes, strict=True))
    if len(x) != len(y):
        return None
    taken = [_by_source(indices.tolist()) for indices in (one, other)]
    pairs: list[tuple[int, int]] = []
    for source, there in zip(x, y, strict=True):
        first, second = taken[0].get(source, []), taken[1].get(there, [])
        if len(first) != len(second):
            return None
        pairs += zip(first, second, strict=True)
    if not pairs:
        return None
    pairs.sort()
    dims = list(of.dims)
    dims[dim] = (tuple(i for i, _ in pairs), tuple(j for _, j in pairs))
    return Selection(tuple(dims), True, of.by_content, (len(one), len(other)))


def through_padding(of: Selection, one: Sequence[int], other: Sequence[int], sizes: tuple[torch.Size, torch.Size]) -> Selection:
    """Where the row stands in ``constant_pad_nd(x, padding)`` of both sides, given where it stands in x.

    one, other: the padding of either side, before and after each dimension, the last one first. sizes: of the two x.
    """
    dims, permuted = list(of.dims), None
    for i in range(0, min(len(one), len(other)), 2):
        dim = len(dims) - 1 - i // 2
        if dims[dim] == (slice(None), slice(None)) or not any((*one[i : i + 2], *other[i : i + 2])):
            continue
        x, y = (_listed(places, size[dim]) for places, size in zip(of.dims[dim], sizes, strict=True))
        dims[dim] = tuple(place + one[i] for place in x), tuple(place + other[i] for place in y)
        permuted = sizes[0][dim] + sum(one[i : i + 2]), sizes[1][dim] + sum(other[i : i + 2])
    return Selection(tuple(dims), of.finds_a_row, of.by_content, permuted)


def _by_source(indices: list[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, source in enumerate(indices):
        found.setdefault(source, []).append(place)
    return found


def _listed(places: Places, size: int) -> list[int]:
    return list(range(size)[places]) if isinstance(places, slice) else list(places)


def _by_content(expected: Tensor, actual: Tensor) -> Selection | None:
    """Where every vector of the first side stands in the second, along the one dimension in which their shapes differ."""
    differ = [dim for dim in range(expected.dim()) if expected.shape[dim] != actual.shape[dim]]
    if len(differ) != 1 or not expected.is_floating_point() or not expected.numel():
        return None
    (dim,) = differ
    wanted, there = (_vectors(x, dim) for x in (expected, actual))
    places: dict[bytes, list[int]] = {}
    for place, vector in enumerate(there):
        places.setdefault(vector, []).append(place)
    found = []
    for vector in wanted:
        if not places.get(vector):
            return None
        found.append(places[vector].pop(0) if len(places[vector]) > 1 else places[vector][0])
    dims: list[tuple[Places, Places]] = [(slice(None), slice(None))] * expected.dim()
    dims[dim] = (tuple(range(len(wanted))), tuple(found))
    return Selection(tuple(dims), True, True, (expected.shape[dim], actual.shape[dim]))


def _vectors(x: Tensor, dim: int) -> list[bytes]:
    rows = as_bits(x.movedim(dim, 0).reshape(x.shape[dim], -1)).cpu().numpy()
    return [row.tobytes() for row in rows]


def _readable(*tensors: Tensor) -> bool:
    return all(x.layout == torch.strided and x.device.type != "meta" and not x.is_quantized for x in tensors)
