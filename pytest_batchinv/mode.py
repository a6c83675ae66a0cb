"""Batch-invariant mode: one context that installs the table at every door, and puts back exactly what it found."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from pytest_batchinv import kernels, patches
from pytest_batchinv.kernels import counters, eager, operators
from pytest_batchinv.patches import inductor_config, registry
from pytest_batchinv.patches.dispatcher import Holding, Registration


class ModeError(RuntimeError):
    """The mode could not be brought into force, or was found not to be: what it promises would not hold."""


class Mode:
    """The mode as one ``with`` block sees it."""

    def __init__(self) -> None:
        self._before = counters.hits()

    @property
    def hits(self) -> dict[str, int]:
        """Calls by overload since this block was entered: ``aten::`` from eager code, ``batchinv::`` from compiled code."""
        grown = {name: count - self._before.get(name, 0) for name, count in counters.hits().items()}
        return {name: count for name, count in grown.items() if count > 0}

    def status(self) -> list[str]:
        """Lines that tell what is installed here."""
        devices = "cpu and cuda" if torch.backends.cuda.is_built() else "cpu"
        return [
            f"batch-invariant mode: {len(operators.operators())} overloads and their .out and in-place forms on {devices}, "
            f"{len(eager.table.COMPOSITES)} composites, {len(eager.table.REFUSED)} refused; fingerprint {fingerprint()}",
            *(f"patch {row.name}: {row.state} ({row.why})" for row in registry.status()),
            *(f"given back on exit: {registration}" for registration in _process.entries_of_others),
        ]


class _Process:
    """The mode is a state of the process (torch has one dispatcher): the first block installs, the last one restores."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.installation: contextlib.ExitStack | None = None
        self.entries_of_others: list[Registration] = []
        self.holding: Holding | None = None

    def enter(self) -> None:
        with self.lock:
            if self.depth == 0:
                self._install()
            self.depth += 1

    def leave(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                self._restore()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        with self.lock:
            was_on = self.installation is not None
            if was_on:
                self.check_entries()  # what was taken from us would be ours again after, and the theft forgotten
                self._restore()
            try:
                yield
            finally:
                if was_on:
                    self._install()

    def check_entries(self) -> None:
        """Raises ModeError where another library has taken an entry of ours since the mode was entered."""
        with self.lock:
            taken = self.holding.taken() if self.holding is not None else []
        if taken:
            raise ModeError(
                f"batch-invariant mode did not hold to its end: another library has taken {_listed(taken)}. What ran since "
                "may depend on the batch. Set that library up before the mode is entered, or turn its own mode off."
            )

    def _install(self) -> None:
        from pytest_batchinv.kernels import inductor

        with contextlib.ExitStack() as stack:
            stack.enter_context(registry.bits_kept([s.name for s in inductor_config.SETTINGS if s.value is True]))
            stack.enter_context(registry.applied("inductor"))
            stack.enter_context(_backend_flags())
            operators.operators()
            self.entries_of_others = eager.entries_of_others()
            self.holding = stack.enter_context(eager.installed())
            stack.enter_context(inductor.installed(fingerprint))
            _nobody_in_front(self.holding)
            _canary()
            self.installation = stack.pop_all()

    def _restore(self) -> None:
        installation, self.installation, self.holding = self.installation, None, None
        installation.close()


_process = _Process()


@contextlib.contextmanager
def batch_invariant_mode() -> Iterator[Mode]:
    """Makes torch batch-invariant inside the block, for all threads, in eager and compiled code.

    Blocks nest, and may be entered by several threads: the mode is on until the last one leaves. On leaving, dispatcher,
    decompositions, configuration, patches and backend flags are what they were. Entering and leaving drop Dynamo's compiled
    code. The patches of the group "inductor" that this torch needs, and that change no bits, are in force inside.

    Raises ModeError where an entry turns out not to be in force, at the beginning, or at the end of any block because
    another library took it meanwhile; PatchRefused where a patch that changes bits is applied; SettingError where this torch's
    settings are not the known ones.
    """
    _process.enter()
    try:
        yield Mode()
        _process.check_entries()
    finally:
        _process.leave()


@contextlib.contextmanager
def stock_torch() -> Iterator[None]:
    """torch as it is, also inside the mode: for negative controls. Other threads wait at the mode's door meanwhile."""
    with _process.suspended():
        yield


def is_on() -> bool:
    """Whether the mode is in force now."""
    return _process.installation is not None


def fingerprint() -> str:
    """Names the state that compiled code depends on: our sources, the versions of torch and Triton, the applied patches."""
    return hashlib.sha256(f"{_sources()} {registry.applied_tag()}".encode()).hexdigest()[:12]


@cache
def _sources() -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    with contextlib.suppress(ImportError):
        import triton

        digest.update(triton.__version__.encode())
    for package in (kernels, patches):
        for path in sorted(Path(package.__path__[0]).rglob("*.[cp][py]*")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _backend_flags() -> Iterator[None]:
    """float32 means IEEE float32, and what is left to cuBLAS and cuDNN is deterministic."""
    flags = [
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "deterministic", True),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in flags]
    try:
        for owner, name, value in flags:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _nobody_in_front(holding: Holding) -> None:
    """No other library may stand between a call and our entries, say at an Autograd key, or at CUDA for a composite."""
    in_front = holding.in_front()
    if in_front:
        raise ModeError(
            f"batch-invariant mode cannot be entered: calls would reach {_listed(in_front)} before the table. "
            "Turn the mode of that library off."
        )


def _listed(registrations: list[Registration]) -> str:
    shown = "; ".join(str(registration) for registration in registrations[:_MOST_NAMED])
    return shown + (f"; and {len(registrations) - _MOST_NAMED} more" if len(registrations) > _MOST_NAMED else "")


_MOST_NAMED = 5


def _canary() -> None:
    """Runs a few operators through every eager door and checks that the table answered."""
    x = torch.ones(2, 2)
    with counters.counting_apart() as answered:
        torch.mm(x, x, out=torch.empty(2, 2))
        torch.nn.functional.linear(x, x, x[0])
        torch.addmm(x[0], x, x)
        x.softmax(-1).mean(-1)
    for name in ("aten::mm.out", "aten::linear", "aten::addmm", "aten::_softmax", "aten::mean.dim"):
        if name not in answered:
            raise ModeError(
                f"batch-invariant mode was entered, but {name} did not reach the table: another library holds this entry. "
                "Enter the mode after that library has been set up, or turn its own mode off."
            )


def receipt() -> dict[str, str]:
    return {}
