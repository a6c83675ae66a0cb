"""What relation T asks for: a model on several numbers of ranks. One rank is this process, and more are processes of their
own."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_batchinv import mode
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.ranks import RankError, Start, World
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NoRanks, NotRun, Observer, RowOutputs, Space, Span, Subject, SubjectInfo
from pytest_batchinv.tensor_parallel import LEAVES, rank_invariant

if TYPE_CHECKING:
    from pytest_batchinv.subjects.transformers import TransformersSubject

Encoded = list[dict[str, tuple[str, tuple[int, ...], bytes]]]
"""Rows as they travel: dtype, shape and bytes of each output."""


class OverRanks(Subject):
    """A model on the first of ``numbers`` of ranks. ``on(n)`` are the ranks of a world of n, each a subject of the same space.

    In the mode its row-parallel layers add in one tree over ``leaves`` leaves of K on every number of ranks, one included;
    under stock torch they are torch's own. The worlds start when they are first asked, and live as long as this subject or a
    copy of it. fault: the name of a planted fault of ``mutants/ranks.py`` that the ranks have, where there is more than one.

    Raises NoRanks where the model cannot be divided so, or a GPU for a rank is missing.
    """

    def __init__(self, subject: TransformersSubject, numbers: tuple[int, ...], leaves: int = LEAVES) -> None:
        self.subject, self.numbers, self.leaves, self.fault = subject, numbers, leaves, ""
        self.info: SubjectInfo = subject.info
        self.space: Space = subject.space
        self._worlds: dict[int, World] = {}
        self._ranks: dict[int, tuple[Subject, ...]] = {}
        for number in numbers:
            if why := _cannot(subject, number):
                raise NoRanks(why)

    def with_fault(self, fault: str) -> OverRanks:
        """The same ranks, with this planted fault."""
        other = copy.copy(self)
        other.fault, other._ranks = fault, {}
        return other

    def over_ranks(self, numbers: tuple[int, ...]) -> OverRanks:
        return self

    def on(self, number: int) -> tuple[Subject, ...]:
        """Each rank of so many. Rank 0 runs a case on all of them, and the others give what they computed in its last run."""
        if number not in self._ranks:
            self._ranks[number] = (_Here(self),) if number == 1 else _several(self, number)
        return self._ranks[number]

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """The outputs of the first number of ranks."""
        return self.on(self.numbers[0])[0].run(case, observer)

    def spans(self, case: BatchShape) -> list[Span]:
        return self.subject.spans(case)

    def in_eager_mode(self) -> OverRanks:
        eager = self.subject.in_eager_mode()
        return self if eager is self.subject else OverRanks(eager, self.numbers, self.leaves)

    def notes(self) -> tuple[str, ...]:
        return (f"{self.info.name}: on {', '.join(map(str, self.numbers))} ranks, {self.leaves} leaves",)

    def world(self, number: int) -> World:
        """Started again where it has ended."""
        world = self._worlds.get(number)
        if world is None or not world.is_alive:
            info = self.info
            words = {"model": info.name, "device": info.device.partition(":")[0], "dtype": info.dtype, "attn": info.attention}
            arguments = (words, self.subject.was_built_in_mode, info.compile_mode, self.leaves)
            start = Start(f"{__name__}:rank_of", arguments, words["device"])
            world = self._worlds[number] = World(number, start)
        return world


def _cannot(subject: TransformersSubject, number: int) -> str:
    """Why this model cannot be on so many ranks, as a sentence."""
    model: Any = subject.model
    name, config = subject.info.name, model.config.get_text_config()
    if not subject.is_known_by_name:
        return f"{name} is a loaded model, which other processes cannot load: give its preset, path or hub id"
    if number > 1 and subject.info.compile_mode != "eager":
        return f"compiled code on several ranks is not covered; {name} can be asked in eager code"
    if not getattr(model, "tp_plan", None):
        return f"{name} has no tp_plan, so transformers does not divide it over ranks"
    if "cuda" in subject.info.device and number > torch.cuda.device_count():
        return f"{number} ranks need a GPU each, and this process sees {torch.cuda.device_count()}"
    for heads in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, heads, None) or number
        if count % number:
            return f"{number} ranks cannot share the {count} {heads.removeprefix('num_').replace('_', ' ')} of {name} evenly"
    return ""


@contextlib.contextmanager
def _as_the_mode_is(model: Any, leaves: int) -> Iterator[None]:
    """One tree in the mode; torch as it is where the mode is off."""
    with rank_invariant(model, leaves) if mode.is_on() else contextlib.nullcontext():
        yield


class _Here(Subject):
    """One rank: this process."""

    def __init__(self, whole: OverRanks) -> None:
        self.subject, self.leaves, self.info, self.space = whole.subject, whole.leaves, whole.info, whole.space

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        with _as_the_mode_is(self.subject.model, self.leaves):
            return self.subject.run(case, observer)

    def spans(self, case: BatchShape) -> list[Span]:
        return self.subject.spans(case)


class _Rank(Subject):
    """One of several ranks. answers: what each gave for the last case, shared by all of them."""

    def __init__(self, whole: OverRanks, number: int, rank: int, answers: dict[str, list[RowOutputs]]) -> None:
        self.whole, self.number, self.rank, self.answers = whole, number, rank, answers
        self.info, self.space = whole.info, whole.space

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """Raises NotRun and Refused as the ranks do, and RankError where one of them failed."""
        key = case.to_json()
        if self.rank == 0:
            self.answers.clear()
            self.answers[key] = self._computed(key)
        return self.answers[key][self.rank]

    def spans(self, case: BatchShape) -> list[Span]:
        return self.whole.spans(case)

    def _computed(self, case: str) -> list[RowOutputs]:
        world = self.whole.world(self.number)
        try:
            (rows, digest), *others = world.ask(("run", case, mode.is_on(), self.whole.fault))
            first = self._decoded(rows)
            if all(other == digest for _, other in others):
                return [first] * self.number
            return [first, *(self._decoded(rows) for rows, _ in world.ask(("last",))[1:])]
        except RankError as error:
            for kind in (NotRun, Refused):
                if error.kind == kind.__name__:
                    raise kind(error.message) from None
            raise

    def _decoded(self, rows: Encoded) -> RowOutputs:
        return RowOutputs(rows=[{name: _tensor(*x).to(self.info.device) for name, x in row.items()} for row in rows])


def _several(whole: OverRanks, number: int) -> tuple[Subject, ...]:
    answers: dict[str, list[RowOutputs]] = {}
    return tuple(_Rank(whole, number, rank, answers) for rank in range(number))


def _encoded(outputs: Sequence[Any]) -> Encoded:
    return [{name: _bytes(x) for name, x in row.items()} for row in outputs]


def _bytes(x: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    x = x.detach().cpu().contiguous()
    return str(x.dtype).removeprefix("torch."), tuple(x.shape), x.view(-1).view(torch.uint8).numpy().tobytes()


def _tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)


# --- in a rank ---------------------------------------------------------------------------------------------------------


class _InARank:
    """One rank's part of the model, and whether it is in the mode now. Entering takes time, so it stays as it was asked
    last."""

    def __init__(self, rank: int, subject: TransformersSubject, leaves: int) -> None:
        self.rank, self.subject, self.leaves = rank, subject, leaves
        self.state = (False, "")
        self.stack = contextlib.ExitStack()
        self.last: Sequence[Any] = []

    def __call__(self, request: tuple[Any, ...]) -> tuple[Encoded | None, str]:
        """The rows, of rank 0 alone unless they are asked for, and their digest."""
        if request[0] == "run":
            _, case, in_mode, fault = request
            self._be((in_mode, fault))
            self.last = self.subject.run(BatchShape.from_json(case))
        rows = _encoded(self.last)
        digest = hashlib.sha256(repr([sorted(row.items()) for row in rows]).encode()).hexdigest()
        return (rows if self.rank == 0 or request[0] == "last" else None), digest

    def _be(self, state: tuple[bool, str]) -> None:
        if state == self.state:
            return
        self.stack.close()
        self.state = (False, "")
        in_mode, fault = state
        if in_mode:
            self.stack.enter_context(mode.batch_invariant_mode())
        if fault:
            from pytest_batchinv.mutants import ranks as planted

            self.stack.enter_context(planted.FAULTS[fault]())
        self.stack.enter_context(_as_the_mode_is(self.subject.model, self.leaves))
        self.state = state


def rank_of(
    rank: int, world_size: int, words: dict[str, Any], was_built_in_mode: bool, compile_mode: str, leaves: int
) -> _InARank:
    """The target of ``Start``: loads the model, in the mode if the first one was, and keeps this rank's part of it."""
    from pytest_batchinv.subjects.transformers import TransformersSubject

    with mode.batch_invariant_mode() if was_built_in_mode else contextlib.nullcontext():
        subject = TransformersSubject(**words)
    divide(subject.model, words["device"], world_size)
    return _InARank(rank, subject.in_compile_mode(compile_mode), leaves)


def divide(model: Any, device: str, world_size: int) -> None:
    """Over all ranks, by the model's tp_plan, as ``from_pretrained(tp_plan="auto")`` divides it: in place. Raises NoRanks."""
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError as error:
        raise NoRanks(f"this version of transformers does not divide a loaded model over ranks ({error}); 5.23 does") from None
    mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("tp",))
    plans = []  # transformers 5.17 takes the model's own
    if hasattr(model, "_resolve_parallel_plans"):
        plans = [model._resolve_parallel_plans(DistributedConfig(tp_size=world_size))[0]]
    apply_tensor_parallelism(model, mesh, *plans)


def _import_before_the_fork() -> None:
    """What each rank would take seconds to import."""
    import transformers.models.auto.modeling_auto  # noqa: F401

    import pytest_batchinv.kernels.inductor
    import pytest_batchinv.subjects.transformers  # noqa: F401
