"""What surrounds a check: its defaults, the case that it replays, and who takes its records. The plugin sets it.

Outside of a test of the plugin the defaults hold, and nobody takes the records.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_batchinv.report.record import Record
    from pytest_batchinv.shapes import BatchShape
    from pytest_batchinv.subjects.base import SubjectInfo

DEFAULT_EXAMPLES = 100


@dataclass(frozen=True)
class Progress:
    """How far a check is. done, total: cases; total 0 where it is not known."""

    subject: str
    relation: str
    phase: str
    done: int
    total: int
    rows: int
    seconds: float


def _nobody(*_: object) -> None:
    pass


def _without_the_plugin(info: SubjectInfo, case: BatchShape) -> str:
    """The line for a test that pytest runs without --batch-invariant; outside of pytest, what to give to the check."""
    nodeid = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    if not nodeid:
        return f"pass case=BatchShape.from_json({case.to_json()!r}) to the check"
    return shlex.join(["pytest", "--batch-invariant", "--batchinv-shape", case.to_json(), nodeid])


@dataclass(frozen=True)
class Context:
    """case: the one batch shape to run instead of a search. ranks: numbers of ranks that relation T compares. strict: an
    unverified operator is an error. replay: the line that repeats a finding, from its case."""

    max_examples: int = DEFAULT_EXAMPLES
    case: BatchShape | None = None
    seed: int | None = None
    ranks: tuple[int, ...] = (1, 2)
    strict: bool = False
    emit: Callable[[Record], None] = _nobody
    progress: Callable[[Progress], None] = _nobody
    replay: Callable[[SubjectInfo, BatchShape], str] = _without_the_plugin


_current: ContextVar[Context] = ContextVar("batchinv_context", default=Context())  # noqa: B039 (it is frozen)


def current() -> Context:
    return _current.get()


@contextlib.contextmanager
def surrounding(context: Context) -> Iterator[None]:
    """Checks inside have this context."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def collecting(sink: Callable[[Record], None]) -> Iterator[None]:
    """Hands every record made inside to ``sink``, and to nobody else."""
    with surrounding(replace(current(), emit=sink)):
        yield
