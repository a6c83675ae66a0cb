"""Functions of rows with a planted fault, and invariant ones. Each ``make`` gives a fresh function and its pool."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Planted = tuple[Callable[[Tensor], Tensor], Tensor]

N_ROWS, N_COLS = 40, 16


def pool(n_rows: int = N_ROWS, n_cols: int = N_COLS) -> Tensor:
    """Rows [n_rows, n_cols], all different, between -1 and 1; column 0 holds the row's index, exactly."""
    x = torch.rand(n_rows, n_cols, generator=torch.Generator().manual_seed(n_rows)).mul(2).sub(1)
    x[:, 0] = torch.arange(n_rows)
    return x


def invariant(x: Tensor) -> Tensor:
    """Each element by itself, exactly: a multiplication and an addition."""
    return x * 0.5 + 1.0


def index_of(x: Tensor) -> Tensor:
    """Which row of the pool stands at each position."""
    return x[:, 0].long()


def one_ulp_up(x: Tensor, where: Tensor | slice = slice(None)) -> Tensor:  # noqa: B008
    """x with the elements of these rows moved to the next float."""
    out = x.clone()
    out[where] = torch.nextafter(x[where], torch.tensor(torch.inf, dtype=x.dtype))
    return out


def varies_where(condition: Callable[[Tensor], Any], n_rows: int = N_ROWS) -> Planted:
    """``condition(index of the row at each position)`` gives the positions whose bits are others, or True for all."""

    def fn(x: Tensor) -> Tensor:
        hit = condition(index_of(x))
        out = invariant(x)
        if isinstance(hit, bool):
            return one_ulp_up(out) if hit else out
        return one_ulp_up(out, hit)

    return fn, pool(n_rows)


def at_exactly(size: int, n_rows: int = N_ROWS) -> Planted:
    return varies_where(lambda ids: len(ids) == size, n_rows)


def from_size(size: int, n_rows: int = N_ROWS) -> Planted:
    return varies_where(lambda ids: len(ids) >= size, n_rows)


def row_at_position(row: int, position: int, n_rows: int = N_ROWS) -> Planted:
    def condition(ids: Tensor) -> Tensor:
        return (ids == row) & (torch.arange(len(ids)) == position)

    return varies_where(condition, n_rows)


def row_right_after(row: int, before: int, n_rows: int = N_ROWS) -> Planted:
    def condition(ids: Tensor) -> Tensor:
        return (ids == row) & (torch.roll(ids, 1) == before) & (torch.arange(len(ids)) > 0)

    return varies_where(condition, n_rows)


def while_last(row: int, n_rows: int = N_ROWS) -> Planted:
    """All rows have other bits while this one stands last, after others."""
    return varies_where(lambda ids: len(ids) > 1 and int(ids[-1]) == row, n_rows)


def repeated(row: int, times: int, n_rows: int = N_ROWS) -> Planted:
    """All rows have other bits while this one stands in the batch so often."""
    return varies_where(lambda ids: int((ids == row).sum()) == times, n_rows)


def _bound(make: Callable[..., Planted], *args: int) -> Callable[[], Planted]:
    return lambda: make(*args)


BATCH: dict[str, Callable[[], Planted]] = {
    "exactly 64 rows": _bound(at_exactly, 64),
    "exactly 256 rows": _bound(at_exactly, 256),
    "exactly 213 rows": _bound(at_exactly, 213),
    "200 rows or more": _bound(from_size, 200),
    "2 rows or more": _bound(from_size, 2),
    "row 7 at position 3": _bound(row_at_position, 7, 3),
    "row 39 at position 31": _bound(row_at_position, 39, 31),
    "row 11 right after row 4": _bound(row_right_after, 11, 4),
    "row 0 right after row 39": _bound(row_right_after, 0, 39),
    "row 9 last": _bound(while_last, 9),
    "row 5 twice": _bound(repeated, 5, 2),
    "row 5 three times": _bound(repeated, 5, 3),
}


def noise() -> Planted:
    ticks = itertools.count()
    return (lambda x: one_ulp_up(invariant(x)) if next(ticks) % 2 else invariant(x)), pool()


def noise_in_batches() -> Planted:
    ticks = itertools.count()

    def fn(x: Tensor) -> Tensor:
        return one_ulp_up(invariant(x)) if len(x) > 1 and next(ticks) % 2 else invariant(x)

    return fn, pool()


def scaled_by_the_largest() -> Planted:
    """As per-tensor dynamic quantisation: every row is scaled by the largest value of the batch."""

    def fn(x: Tensor) -> Tensor:
        scale = x.abs().amax()
        return torch.round(x / scale * 127) * scale

    return fn, pool()


def reads_the_row_before() -> Planted:
    """An off-by-one address: the first row of every batch is its own neighbour."""
    return (lambda x: invariant(x) + torch.cat([x[:1], x[:-1]]) * 1e-3), pool()


def follows_the_last_row() -> Planted:
    """As padding that is filled with what stands last."""
    return (lambda x: invariant(x) + x[-1:] * 1e-3), pool()


def other_bits_when_compiled() -> Planted:
    def fn(x: Tensor) -> Tensor:
        return x * 0.5 + (1.0 if torch.compiler.is_compiling() else 2.0)

    return fn, pool()


INVARIANT: dict[str, Callable[[], Planted]] = {
    "pointwise": lambda: (invariant, pool()),
    "maximum of a row": lambda: ((lambda x: x.amax(-1)), pool()),
    "NaN of equal bits": lambda: ((lambda x: x * torch.nan), pool()),
    "integers": lambda: ((lambda x: x.cumsum(-1)), pool().mul(100).long()),
}
