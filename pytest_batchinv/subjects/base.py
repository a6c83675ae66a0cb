"""What is tested: a subject turns batch shapes into the outputs of their rows. The checks know nothing else of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from pytest_batchinv.shapes import BOUNDARIES, MAX_ROWS, BatchShape, Row

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_batchinv.subjects.ranks import OverRanks

Observer = contextlib.AbstractContextManager[object]
"""Entered around the forward of a subject alone, not around the building of its inputs: a recorder of operators, say."""

RowOutput = Mapping[str, "Tensor"]
"""What a subject gives for one row: tensors by name."""


class NotRun(Exception):
    """This batch could not be run here (out of memory, say): it is reported as not run, and the check goes on."""


class NoGradients(Exception):
    """The subject has no gradients that belong to its rows: why, as a sentence."""


class NoRanks(Exception):
    """The subject cannot be run on these numbers of ranks: why, as a sentence."""


class SubjectInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Words that name a subject in records.

    kind: "function" or "module" for functions of rows; "transformers", or another word for what else runs sequences. attention:
    "" where it has none. elsewhere: another process computes it, which neither the mode nor a trace reaches.
    """

    name: str
    kind: str
    device: str
    dtype: str
    attention: str = ""
    compile_mode: str = "eager"
    elsewhere: bool = False

    @property
    def is_model(self) -> bool:
        """Whether its rows are sequences of tokens, in a layout."""
        return self.kind not in ("function", "module")


class Span(NamedTuple):
    """Where a row lies in the tensors of a case: columns ``start`` to ``stop`` of this sequence (the index in dim 0)."""

    sequence: int
    start: int
    stop: int


class Part(NamedTuple):
    """What one forward of a run computes, of a case that is computed in several: a subject with a method ``parts(case)`` tells.

    sequences, columns: those of the case whose results are kept. width: columns of the forward's tensors, with tokens that are
    rejected later. keys: how many columns a tensor of keys may have.
    """

    sequences: range
    columns: range
    width: int
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """The batch shapes that a subject can run.

    pool: for a function of rows, the length of each row of its pool, and ``palette`` is that pool; None where rows of any
    identity can be made. palette: distinct rows that a search takes its batches from, so that each runs alone only once.
    alike: for a pool of ragged rows, a word for the shapes of each; rows of one word may stand for each other.
    max_position: tokens that have a position, 0 where the subject is told none. max_keys: that a cache holds. caches: what it
    can compute in steps with. window: of its sliding attention, 0 for none. lays_out: a batch says which rows there are, and
    the subject lays them out by itself: no padding can be asked for. shapes_follow_length: rows of one length have the same
    shapes. forgets: its caches can drop tokens again. left_out: what it cannot do, as sentences for the record.
    """

    palette: tuple[Row, ...]
    pool: tuple[int, ...] | None = None
    layouts: tuple[str, ...] = ("right",)
    max_rows: int = MAX_ROWS
    max_length: int = 1
    max_tokens: int = 1 << 30
    alike: tuple[str, ...] = ()
    max_position: int = 0
    max_keys: int = 1 << 30
    caches: tuple[str, ...] = ()
    window: int = 0
    lays_out: bool = False
    shapes_follow_length: bool = True
    forgets: bool = True
    left_out: tuple[str, ...] = ()

    def sizes(self) -> range:
        """Batch sizes that can be run with the shortest row."""
        return range(1, min(self.max_rows, self.max_tokens) + 1)

    def boundaries(self) -> list[int]:
        return [size for size in BOUNDARIES if size in self.sizes()]

    @property
    def pads_both_sides(self) -> bool:
        return {"right", "left"} <= set(self.layouts)

    def fits(self, case: BatchShape) -> bool:
        return len(case) <= self.max_rows and case.tokens <= self.max_tokens

    def holds(self, case: BatchShape) -> str:
        """Why this case is not one of the space's, as a sentence; empty where it is."""
        if case.layout not in self.layouts:
            return f"the subject has no layout {case.layout!r}, only {', '.join(self.layouts)}"
        if case.opposite_padding and not self.pads_both_sides:
            return f"the subject takes padding on one side alone: {self.layouts[0]}"
        if why := self._no_steps(case):
            return why
        longest = max(row.length for row in case.rows)
        if case.first_position and case.first_position + longest > self.max_position:
            return f"its positions end at {case.first_position + longest}, the subject takes {self.max_position}"
        if self.pool is None:
            return f"its longest row has {longest} tokens, the subject takes {self.max_length}" * (longest > self.max_length)
        outside = sorted({row.id for row in case.rows if row.id >= len(self.pool)})
        return f"there is no row {outside[0]} in a pool of {len(self.pool)}" if outside else ""

    def _no_steps(self, case: BatchShape) -> str:
        if case.steps is None:
            return ""
        if case.steps.cache not in self.caches:
            return f"the subject keeps no {case.steps.cache} cache, only {', '.join(self.caches) or 'none at all'}"
        if case.steps.rejected and not self.forgets:
            return "its cache forgets no tokens, so none can be rejected"
        if case.width + case.steps.spare > self.max_keys:
            return f"its cache has room for {case.width + case.steps.spare} keys, the subject takes {self.max_keys}"
        shortest = min(row.length for row in case.rows)
        if case.steps.prefix and (case.layout != "right" or case.opposite_padding or case.steps.prefix >= shortest):
            return "a prefix comes before padding on the right, and is shorter than each row"
        return ""


@dataclass
class RowOutputs(Sequence[RowOutput]):
    """The outputs of a batch, row by row.

    stacked: where all rows have outputs of one shape, each output as one tensor [n_rows, ...]; else None, and ``rows`` holds
    them one by one. shared: what belongs to the batch as a whole, and may differ in another one: gradients of weights. What is
    read must not be written to by a later run of the subject.
    """

    stacked: dict[str, Tensor] | None = None
    rows: list[dict[str, Tensor]] = field(default_factory=list)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.stacked.values()))) if self.stacked is not None else len(self.rows)

    def __getitem__(self, position):  # type: ignore[no-untyped-def, override]
        if self.stacked is None:
            return self.rows[position]
        return {name: tensor[position] for name, tensor in self.stacked.items()}

    @property
    def nbytes(self) -> int:
        parts = [self.stacked] if self.stacked is not None else self.rows
        return sum(tensor.nbytes for part in parts for tensor in part.values())


class Subject(Protocol):
    """A subject that is ready to run. A class that derives from it has the methods that are written out here."""

    info: SubjectInfo
    space: Space

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """The outputs of each row of the case, in the order of ``case.rows``. Raises NotRun, Refused, ValueError."""
        ...

    def spans(self, case: BatchShape) -> list[Span]:
        """Where each row lies in the tensors that the case is run with."""
        ...

    def in_eager_mode(self) -> Subject:
        """The same subject with the same weights, run by eager code: itself, where nothing is compiled."""
        return self

    def with_gradients(self) -> Subject:
        """A subject of the same space whose outputs are the gradients of each row. Raises NoGradients with the reason."""
        raise NoGradients(f"{self.info.name} gives no gradients of its rows")

    def over_ranks(self, numbers: tuple[int, ...]) -> OverRanks:
        """The subject on these numbers of ranks of tensor parallel, the first of which is compared with the others. Raises
        NoRanks with the reason."""
        raise NoRanks(f"{self.info.name} cannot be divided over ranks: that is for models that transformers loads by name")

    def digest(self) -> str:
        """Names the pool's content; empty where rows are made from the case alone."""
        return ""

    def notes(self) -> tuple[str, ...]:
        """Sentences about the runs since it was last asked, for the record."""
        return ()


@contextlib.contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """The forward of a subject, with whoever watches it."""
    with observer or contextlib.nullcontext():
        yield
