"""Measuring a call: each row alone, and in batches of every size, width, place in memory and number of threads."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_batchinv.coverage.calls import Call
from pytest_batchinv.coverage.rows import POOL, Batches, Layout, bits_of_rows, found_rows, layouts, raise_if_the_device_is_lost
from pytest_batchinv.kernels import counters, scanned
from pytest_batchinv.kernels.aten.common import Refused

SIZES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 65)
GRAIN = 2053
"""Rows that are enough for torch to share them among threads."""
ODD, EVEN, WIDE, OTHERS = 37, 64, 256, 24
SOME, FEW = (2, 5, 17, 65, GRAIN), (2, 17, 65)
"""The sizes at the even and the wide width, and those of a brief measuring."""


@dataclass(frozen=True)
class Outcome:
    """What a call showed: its state, how its rows were laid out, and where they changed their bits first."""

    state: str
    why: str = ""


def measure(call: Call, threads: tuple[int, ...], most_layouts: int = 1, is_brief: bool = False) -> Outcome:
    """Looks for rows in one layout after the other, and compares them. The first change of bits ends it.

    is_brief: in two widths, and few sizes. The second layout is measured so in any case.
    """
    answered = held = 0
    other: Outcome | None = None
    try:
        for layout in layouts(call):
            with counters.counting_apart() as hits:
                outcome = _compared(call, layout, threads, is_brief or held > 0)
            if outcome.state == scanned.VARIES:
                return outcome
            if outcome.state == scanned.NO_ROWS:
                other = other or (outcome if outcome.why else None)
                continue
            held += 1
            answered += call.name in hits
            if held >= most_layouts or _is_unchecked(call):
                break
    except Refused as refused:
        other = Outcome(scanned.REFUSED, str(refused))
    except Exception as error:
        raise_if_the_device_is_lost(error)
        other = Outcome(scanned.RAISES, f"{type(error).__name__}: {error}".partition("\n")[0])
    if held:
        return Outcome(scanned.COVERED if answered else scanned.ROW_LOCAL)
    return other or Outcome(scanned.NO_ROWS)


def widths(call: Call, layout: Layout) -> Iterator[dict[int, int]]:
    """Sizes in the place of the sample's: none; another last one, odd and even; a wide one, and others for all others.

    A size is replaced wherever it stands, so that the operands still fit each other.
    """
    yield {}
    leaves = [x for x in torch.utils._pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    first = next((x for x in leaves if x.dim()), None)
    if first is None or _trusts_places(call, leaves):
        return
    last = first.shape[-1]
    if last > 1:
        yield {last: ODD}
        yield {last: EVEN}
        sizes = {size for x in leaves for size in x.shape if size > 1}
        yield {**dict.fromkeys(sizes, OTHERS), last: WIDE}


def _trusts_places(call: Call, leaves: list[Tensor]) -> bool:
    """Whether it reads or writes at places that whole numbers name, unchecked: they fit the sizes of the sample alone."""
    places = any(not (x.is_floating_point() or x.is_complex()) and x.dtype != torch.bool for x in leaves)
    return places and ("_backward" in call.name or _is_unchecked(call))


def _is_unchecked(call: Call) -> bool:
    """Whether torch would read past the end of memory in a call that it should refuse."""
    return call.name.partition(".")[0] in _UNCHECKED


_UNCHECKED = {
    *("aten::lu_unpack", "aten::linalg_ldl_solve", "aten::max_unpool2d", "aten::max_unpool3d"),
    *("aten::_weight_int8pack_mm", "aten::_weight_int4pack_mm_for_cpu", "aten::_dyn_quant_matmul_4bit"),
}
"""Of the last three torch 2.11 to 2.13 read whole vectors: with 37 columns in bf16, past the end of memory."""


def _compared(call: Call, layout: Layout, threads: tuple[int, ...], is_brief: bool) -> Outcome:
    """Whether there are rows in this layout, and the first change of bits in words."""
    found = False
    for number, sizes in enumerate(itertools.islice(widths(call, layout), 2 if is_brief else None)):
        batches, why = found_rows(call, sizes, layout)
        if batches is None:
            if not sizes:
                return Outcome(scanned.NO_ROWS, why)
            continue
        found = True
        sizes_to_run = FEW if is_brief else (*SIZES, GRAIN) if number < 2 else SOME
        difference = _first_difference(batches, threads, sizes_to_run)
        if difference:
            return Outcome(scanned.VARIES, f"rows in dim {layout.dim}, {_words(sizes)}{difference}")
    return Outcome(scanned.ROW_LOCAL if found else scanned.NO_ROWS)


def _first_difference(batches: Batches, threads: tuple[int, ...], every: tuple[int, ...]) -> str:
    with running_on(threads[0]):
        alone = [batches.run(torch.tensor([i])) for i in range(POOL)]
    expected = [bits_of_rows(torch.cat([rows[k] for rows in alone])) for k in range(len(alone[0]))]
    unaligned, shared = ((17,), (GRAIN,)) if every == FEW else ((3, 17), (2, 8, 65, GRAIN))
    for n_threads, offset, sizes in ((threads[0], 0, every), (threads[0], 1, unaligned), (threads[-1], 0, shared)):
        with running_on(n_threads):
            for n in sizes:
                if not batches.fit(n):
                    continue
                ids = (torch.arange(n) * 5 + n) % POOL
                for mine, out in zip(expected, batches.run(ids, offset), strict=True):
                    differing = _rows_that_differ(mine.index_select(0, ids.to(mine.device)), bits_of_rows(out))
                    if differing:
                        where = f", {offset} past the beginning of memory" if offset else ""
                        threads_used = f", {n_threads} threads" if n_threads > 1 else ""
                        return f"{differing} of {n} rows differ{where}{threads_used}"
    return ""


def _rows_that_differ(expected: Tensor, actual: Tensor) -> int:
    if expected.shape != actual.shape:
        return len(actual)
    if torch.equal(expected, actual):
        return 0
    return int((expected != actual).reshape(len(actual), -1).any(1).sum())


def _words(sizes: dict[int, int]) -> str:
    return "".join(f"{size} made {new}, " for size, new in sorted(sizes.items()))


@contextlib.contextmanager
def running_on(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
