"""Rows of a call: along which dimension of which inputs a batch may grow, found by trying, never by a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from pytest_batchinv.compare import as_bits
from pytest_batchinv.coverage.calls import Call
from pytest_batchinv.kernels.aten.common import Refused

POOL = 32
"""Different rows of which batches are made: with 8 of 5 values, stock ``sigmoid`` seemed to keep its bits."""
MOST_DIMS = 3
MOST_VALUES = 140_000
"""A batch whose inputs would hold more values is not run; of rows that are large themselves, as matrices are, fewer."""
LARGE_ROW, MOST_VALUES_OF_LARGE_ROWS = 1000, 20_000

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_Sizes = dict[int, int]  # a size of the sample -> the size in its place


@dataclass(frozen=True)
class Layout:
    """Which leaves of the arguments carry rows, along which dim, and which whole numbers among them count the rows."""

    tensors: tuple[int, ...]
    dim: int
    numbers: tuple[int, ...]
    is_new: bool = False  # the dim is put in front of what the sample has


class Batches:
    """Batches of a call in one layout, with every other dimension as ``sizes`` has it.

    ``run(ids)`` gives the outputs for these rows of the pool: those that follow the rows, with the rows first.
    """

    def __init__(self, call: Call, layout: Layout, sizes: _Sizes, is_plain: bool = False) -> None:
        self._call, self._layout = call, layout
        leaves, self._spec = tree_flatten((call.args, call.kwargs))
        self._leaves = list(leaves)
        self._pools: dict[int, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        paths = tree_flatten_with_path((call.args, call.kwargs))[0]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                own = leaf[None] if i in layout.tensors and layout.is_new else leaf
                kept = layout.dim if i in layout.tensors else None
                stretched = _stretched(own, sizes, kept, is_plain)
                if kept is not None:
                    self._pools[i] = _pool(stretched, kept, generator, is_plain)
                else:
                    noisy = stretched.shape != own.shape and not is_plain
                    self._leaves[i] = _noisy(stretched, generator) if noisy else stretched
            elif type(leaf) is int and i not in layout.numbers and leaf in sizes and _is_in_a_list(paths[i][0]):
                self._leaves[i] = sizes[leaf]
        self.row_values = max((pool.numel() // POOL for pool in self._pools.values()), default=0)
        self.followed: tuple[tuple[int, int], ...] = ()
        self.why = ""

    def run(self, ids: Tensor, offset: int = 0) -> list[Tensor]:
        outputs = self._outputs(ids, offset)
        return [outputs[i].movedim(dim, 0) for i, dim in self.followed]

    def fit(self, n_rows: int) -> bool:
        """Whether a batch of so many rows is run."""
        return n_rows * self.row_values <= (MOST_VALUES if self.row_values < LARGE_ROW else MOST_VALUES_OF_LARGE_ROWS)

    def find_rows(self) -> bool:
        """Whether outputs follow the rows, and each row is what it is alone, and at any place beside any others.

        Where it is not, ``why`` has the reason. Numbers that the call draws are no such reason. Raises what the call raises.
        """
        three, five = self._outputs(torch.arange(3)), self._outputs(torch.arange(5))
        if len(three) != len(five):
            return False
        pairs = enumerate(zip(three, five, strict=True))
        self.followed = tuple((i, dim) for i, (a, b) in pairs if (dim := _grown(a, b)) is not None)
        if not self.followed or self._rows_mix():
            return False
        if not self._draws():
            self.why = self._what_is_no_row()
        return not self.why

    def _rows_mix(self) -> bool:
        """At one size: a row keeps its content, and all others get another. True where there is no other content."""
        pools = [bits_of_rows(pool) for pool in self._pools.values()]
        steps = (POOL // 2, 3, 2, 1)
        differing = [sum(int((bits[:5] != bits[step : 5 + step]).any(1).sum()) for bits in pools) for step in steps]
        if not max(differing):
            return True
        step = steps[differing.index(max(differing))]
        ids = torch.arange(5)
        before = [bits_of_rows(x) for x in self.run(ids)]
        for position in (0, 1, len(ids) - 1):
            others = ids + step
            others[position] = ids[position]
            after = [bits_of_rows(x) for x in self.run(others)]
            if any(not torch.equal(a[position], b[position]) for a, b in zip(before, after, strict=True)):
                return True
        return False

    def _what_is_no_row(self) -> str:
        """Whether a row is another at another place, or alone, by more than rounding; in words.

        This tells a batch dimension from another, and no verdict on bits comes from it: what it finds leaves a cell unverified.
        """
        for row in (0, POOL // 2):
            if any(_is_another(out[:1].expand_as(out), out) for out in self.run(torch.full((4,), row))):
                return f"what it makes of a row follows its position in dim {self._layout.dim}"
        batch = self.run(torch.arange(5))
        for row in (0, 4):
            alone = self.run(torch.tensor([row]))
            pairs = zip(alone, batch, strict=True)
            if any(_is_another(y.index_copy(0, torch.tensor([row], device=y.device), x), y) for x, y in pairs):
                return f"what it makes of a row follows the number of rows in dim {self._layout.dim}"
        return ""

    def _draws(self) -> bool:
        """Whether it gives other numbers from another seed."""
        one, other = (self._outputs(torch.arange(3), seed=seed) for seed in (0, 1))
        return any(x.shape != y.shape or not torch.equal(as_bits(x), as_bits(y)) for x, y in zip(one, other, strict=True))

    def _outputs(self, ids: Tensor, offset: int = 0, seed: int = 0) -> list[Tensor]:
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in self._leaves]  # a call may write to its inputs
        for i, pool in self._pools.items():
            leaves[i] = _placed(pool.index_select(0, ids.to(pool.device)).movedim(0, self._layout.dim), offset)
        for i in self._layout.numbers:
            leaves[i] = len(ids)
        args, kwargs = tree_unflatten(leaves, self._spec)
        _seed(seed)
        results = self._call.function(*args, **kwargs)
        return [x for x in tree_flatten(results)[0] if isinstance(x, Tensor)]


def _seed(seed: int) -> None:
    """As ``torch.manual_seed``, which formats a traceback at each call where there is no GPU."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def layouts(call: Call) -> Iterator[Layout]:
    """What may be tried, the likeliest first: all tensors of a size in a dim, those of as many dims, one alone."""
    leaves, paths = _leaves_and_paths(call)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    if not tensors:
        return
    first = leaves[tensors[0]]
    seen = set()
    for dim in range(min(first.dim(), MOST_DIMS)):
        size = first.shape[dim]
        same = [i for i in tensors if leaves[i].dim() > dim and leaves[i].shape[dim] == size]
        ranked = [i for i in same if leaves[i].dim() == first.dim()]
        for group in (same, ranked, [tensors[0]], [i for i in tensors if leaves[i].dim() > dim]):
            for numbers in _numbers(leaves, paths, size, dim):
                layout = Layout(tuple(group), dim, numbers)
                if layout not in seen and group:
                    seen.add(layout)
                    yield layout
    for i in tensors[1:]:
        for dim in range(min(leaves[i].dim(), MOST_DIMS)):
            if (layout := Layout((i,), dim, ())) not in seen:
                seen.add(layout)
                yield layout
    floats = [i for i in tensors if leaves[i].is_floating_point() or leaves[i].is_complex()]
    for group in (tensors, floats):
        if group:
            yield Layout(tuple(group), 0, (), is_new=True)


def found_rows(call: Call, sizes: _Sizes, layout: Layout) -> tuple[Batches | None, str]:
    """Batches whose rows are rows, or None and why there are none; with the sample's own values where the call refuses others.

    Raises Refused where the mode does.
    """
    for is_plain in (False, True):
        try:
            batches = Batches(call, layout, sizes, is_plain)
            is_found = batches.fit(5) and batches.find_rows()
            return batches if is_found else None, batches.why
        except Refused:
            raise
        except Exception as error:
            raise_if_the_device_is_lost(error)
    return None, ""


def _is_another(x: Tensor, y: Tensor) -> bool:
    """Whether x is another than y by more than rounding: integers by anything, floats by a tenth of the largest of y."""
    if not (y.is_floating_point() or y.is_complex()):
        return not torch.equal(x, y)
    difference, largest = ((z.to(_wide(z))).abs().nan_to_num() for z in (x.to(_wide(x)) - y.to(_wide(y)), y))
    return bool(y.numel()) and float(difference.max()) > 0.1 * float(largest.max())


def raise_if_the_device_is_lost(error: Exception) -> None:
    if "CUDA error" in str(error) or "device-side assert" in str(error):
        raise error


def _leaves_and_paths(call: Call) -> tuple[list[Any], list[Any]]:
    with_paths, _ = tree_flatten_with_path((call.args, call.kwargs))
    return [leaf for _, leaf in with_paths], [path for path, _ in with_paths]


def _numbers(leaves: list[Any], paths: list[Any], size: int, dim: int) -> Iterator[tuple[int, ...]]:
    """No whole number counts the rows; or those at this place in a list do (sizes of a tensor); or a lone one does, too."""
    whole = [i for i, leaf in enumerate(leaves) if type(leaf) is int and leaf == size]
    yield ()
    listed = tuple(i for i in whole if _is_in_a_list(paths[i]) and keystr(paths[i][-1:]) == f"[{dim}]")
    if listed:
        yield listed
    alone = tuple(i for i in whole if not _is_in_a_list(paths[i]))
    if alone:
        yield listed + alone


def _is_in_a_list(path: Any) -> bool:
    return len(path) > 2


def _stretched(x: Tensor, sizes: _Sizes, kept: int | None, is_plain: bool) -> Tensor:
    """x with dims of other sizes, its values repeated; the dim ``kept`` stays. A vector of unequal places has unequal ones.

    torch promises nothing of places that are written twice.
    """
    if kept is None and not is_plain and _names_places_once(x) and len(x) in sizes:
        repeats = torch.arange(sizes[len(x)], device=x.device)
        return (x[repeats % len(x)] + repeats // len(x) * (x.max() + 1)).argsort().argsort()
    for dim, size in enumerate(x.shape):
        if dim != kept and size in sizes:
            x = x.index_select(dim, torch.arange(sizes[size], device=x.device) % size)
    return x


def _names_places_once(x: Tensor) -> bool:
    return x.dtype == torch.int64 and x.dim() == 1 and len(x) > 1 and int(x.min()) >= 0 and len(x.unique()) == len(x)


def _pool(x: Tensor, dim: int, generator: torch.Generator, is_plain: bool) -> Tensor:
    """POOL rows, in front: two of the sample, more with noise, then values of many scales, and zeros of both signs.

    Integers, which may name places, stay those of the sample's row, in another order each time that it comes up. LAPACK's
    pivots, of int32, keep theirs.
    """
    x = x.movedim(dim, 0)
    n = max(len(x), 1)
    rows = x.index_select(0, torch.arange(POOL, device=x.device) % n).contiguous()
    if is_plain or x.dtype == torch.int32:
        return rows
    if not (x.is_floating_point() or x.is_complex()) or x.element_size() == 1:
        return torch.stack([row.flatten().roll(i // n).view_as(row) for i, row in enumerate(rows)])
    half = POOL // 2
    rows[2:half] = _noisy(rows[2:half], generator)
    scale = 10.0 ** torch.randint(-1, 2, rows[half:].shape, generator=generator)
    rows[half:] = _normal(rows[half:], generator, scale).to(rows)
    flat = rows[half:].reshape(-1)  # a view: rows are contiguous
    flat[3::11], flat[7::13] = 0.0, -0.0
    return rows


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with each value moved by some of its size, so that repeated values are no longer the same."""
    if not (x.is_floating_point() or x.is_complex()) or x.element_size() == 1:
        return x
    return (x.to(_wide(x)) * (1 + 0.1 * _normal(x, generator).to(x.device))).to(x.dtype)


def _normal(x: Tensor, generator: torch.Generator, scale: Tensor | float = 1.0) -> Tensor:
    """Normal numbers times the scale, both drawn on the CPU, so that they are the same on every device."""
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.complex64 if x.is_complex() else torch.float32)
    return drawn.to(_wide(x)) * scale


def _wide(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def _placed(x: Tensor, offset: int) -> Tensor:
    """A copy of x that is contiguous, and begins this many values after the beginning of its memory."""
    memory = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
    return memory[offset:].view(x.shape).copy_(x)


def _grown(three: Tensor, five: Tensor) -> int | None:
    """The dim that has 3 of one and 5 of the other, all others being equal; None where there is no such dim."""
    if three.dim() != five.dim() or three.layout != torch.strided:
        return None
    differs = [dim for dim, (a, b) in enumerate(zip(three.shape, five.shape, strict=True)) if a != b]
    if len(differs) != 1 or (three.shape[differs[0]], five.shape[differs[0]]) != (3, 5):
        return None
    return differs[0]


def bits_of_rows(x: Tensor) -> Tensor:
    """The bits of x, row by row: integers of two dims. One NaN is as good as another.

    Which of them ``0 / 0`` gives follows the place in memory on a CPU; where that matters, the checks of a subject say so.
    """
    if x.dtype in _FLOATS:
        x = x.masked_fill(x.isnan(), torch.nan)
    return as_bits(x.flatten(1) if x.dim() > 1 else x[:, None])
