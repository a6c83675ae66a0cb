"""Planted faults of kernels: an entry of the op table whose bits follow the number of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pytest_batchinv.kernels import table

SCALE = 1 + 3e-7
"""The next float32 but one: what another order of sums does to a value."""


@contextlib.contextmanager
def scaled_from(entry: str, n_rows: int) -> Iterator[None]:
    """Inside, and for modes entered inside, this entry's result is scaled where its dim 0 has ``n_rows`` or more.

    entry: a name of the table's backend kernels, such as "mm" or "_softmax", or of its composites.
    """
    with contextlib.ExitStack() as stack:
        for entries in (table.BACKEND_KERNELS, table.COMPOSITES, table.PLANNED):
            if entry in entries:
                stack.enter_context(mock.patch.dict(entries, {entry: _scaled(entries[entry], n_rows)}))
        yield


def _scaled(implementation: Callable[..., Any], n_rows: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        out = implementation(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        if not isinstance(first, Tensor) or first.dim() < 1 or first.shape[0] < n_rows:
            return out
        scaled = torch.mul(first, SCALE)
        return (scaled, *out[1:]) if isinstance(out, tuple) else scaled

    return run
