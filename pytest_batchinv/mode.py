"""Batch-invariant mode: one context that installs the table at every entry point, and restores exactly what it found."""

import atexit
import contextlib
import os
import threading
import time
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pytest_batchinv import flags, interrupts, workers
from pytest_batchinv.kernels import counters, eager, operators, table
from pytest_batchinv.kernels.tracing import not_compiled
from pytest_batchinv.patches import inductor_config, registry
from pytest_batchinv.patches.dispatcher import Holding, Registration
from pytest_batchinv.receipt import fingerprint, receipt
from pytest_batchinv.workers import ModeWarning

__all__ = [
    "Mode",
    "ModeError",
    "ModeWarning",
    "batch_invariant_mode",
    "fingerprint",
    "is_on",
    "receipt",
    "stock_torch",
    "worker_init_fn",
]


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
            f"{len(table.COMPOSITES)} composites, {len(table.REFUSED)} refused; fingerprint {fingerprint()}",
            *(f"patch {row.name}: {row.state} ({row.why})" for row in registry.status()),
            *(f"given back on exit: {registration}" for registration in _process.entries_of_others),
        ]


@dataclass(eq=False)
class _Token:
    """What the process knows of an open block. It does not keep the block itself alive."""

    on: bool
    thread: int = 0


class _Block(contextlib.ContextDecorator):
    """One ``with`` block of the mode, or of stock torch inside it. An interrupt leaves it entered or left, nothing between.

    An interrupt that comes as Python calls ``__exit__`` is raised before a line of it runs. Such a block is left when it is
    freed.
    """

    on: bool

    def __init__(self) -> None:
        self._token = _Token(self.on)
        self._when_freed: weakref.finalize[[_Token], _Block] | None = None

    def _enter(self) -> Mode:
        if self._when_freed is not None:
            raise ModeError("this block has been entered before: each with statement needs one of its own.")
        try:
            # Not in __init__: Dynamo traces that, and would read weakref's registry, which changes when anything is freed.
            self._when_freed = weakref.finalize(self, _process.leave, self._token)
            self._when_freed.atexit = False
            self._token.thread = threading.get_ident()
            while not _process.has(self._token):
                _process.wait_for_stock_of_other_threads()
                _process.enter(self._token)
            return Mode()
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        try:
            _process.leave(self._token)
        finally:
            if self._when_freed is not None:
                self._when_freed.detach()

    @not_compiled
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            try:
                if error is None and _process.has(self._token):
                    _process.check()
            finally:
                self._leave()
        except BaseException:
            self._leave()  # where an interrupt came before it was done
            raise

    def _recreate_cm(self) -> Self:  # what a decorated function enters at each call
        return type(self)()


class _ModeBlock(_Block):
    on = True

    @not_compiled
    def __enter__(self) -> Mode:
        return self._enter()


class _StockBlock(_Block):
    on = False

    @not_compiled
    def __enter__(self) -> None:
        self._enter()


class _Process:
    """The mode is a state of the process, as torch has one dispatcher: the block that was opened last decides it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.blocks: list[_Token] = []
        self.installation: contextlib.ExitStack | None = None
        self.entries_of_others: list[Registration] = []
        self.holding: Holding | None = None
        self._is_settling = False

    @property
    def _should_be_on(self) -> bool:
        return bool(self.blocks) and self.blocks[-1].on

    def has(self, block: _Token) -> bool:
        return block in self.blocks

    def wait_for_stock_of_other_threads(self) -> None:
        """Polls: an interrupt may come at any time here, and must not find a lock held."""
        while self._is_stock_of_another_thread():
            time.sleep(0.001)

    def _is_stock_of_another_thread(self) -> bool:
        return any(not block.on and block.thread != threading.get_ident() for block in self.blocks)

    def enter(self, block: _Token) -> None:
        """Opens the block, unless another thread has come to be in ``stock_torch`` meanwhile."""
        with interrupts.deferred(), self.lock:
            if self._is_stock_of_another_thread():
                return
            if not block.on:
                self._check_that_no_other_thread_is_in_the_mode()
                self.check()  # what was taken from us would be ours again after, and the theft forgotten
            self.blocks.append(block)
            self._settle()

    def leave(self, block: _Token) -> None:
        """Closes the block. One that is not open is left alone."""
        with interrupts.deferred(), self.lock:
            if not self.has(block):
                return
            self.blocks.remove(block)
            try:
                self._settle()
            except Exception as error:
                raise ModeError(
                    f"batch-invariant mode could not be installed again after stock_torch(): {error} "
                    "The mode is off in the blocks that are still open: leave them."
                ) from error

    def close(self) -> None:
        """At the end of the process: restores while torch is still whole. Blocks that are left later do nothing."""
        with interrupts.deferred(), self.lock:
            self.blocks.clear()
            self._settle()

    def after_fork_in_child(self) -> None:
        """Only the thread that forked lives here: the blocks of the others are its own."""
        self.lock.release()
        for block in self.blocks:
            block.thread = threading.get_ident()

    def check(self) -> None:
        """Raises ModeError where the mode should be on and is not, or not with all its entries."""
        with interrupts.deferred(), self.lock:
            if self._should_be_on and self.holding is None:
                raise ModeError(
                    "batch-invariant mode did not hold to its end: it could not be installed again after stock_torch()."
                )
            taken = self.holding.taken() if self.holding is not None else []
        if taken:
            raise ModeError(
                f"batch-invariant mode did not hold to its end: another library has taken {_listed(taken)}. What ran since "
                "may depend on the batch. Set that library up before the mode is entered, or turn its own mode off."
            )

    def _check_that_no_other_thread_is_in_the_mode(self) -> None:
        if any(block.on and block.thread != threading.get_ident() for block in self.blocks):
            raise ModeError(
                "stock_torch() cannot be entered: another thread is in batch_invariant_mode(), and would run stock torch too, "
                "as torch has one dispatcher for all threads. Enter it when the other threads have left the mode."
            )

    def _settle(self) -> None:
        """Installs or restores, as the blocks have it. A block that is freed meanwhile comes here from within."""
        if self._is_settling:
            return
        self._is_settling = True
        try:
            while self._should_be_on != (self.installation is not None):
                if self._should_be_on:
                    self._install()
                else:
                    self._restore()
        finally:
            self._is_settling = False

    def _install(self) -> None:
        from pytest_batchinv.kernels import inductor

        with contextlib.ExitStack() as stack:
            stack.enter_context(registry.bits_kept([s.name for s in inductor_config.SETTINGS if s.value is True]))
            stack.enter_context(registry.applied("inductor"))
            stack.enter_context(flags.in_force())
            stack.enter_context(workers.warn_of_processes_without_the_mode(worker_init_fn))
            operators.operators()
            self.entries_of_others = eager.entries_of_others()
            holding = stack.enter_context(eager.installed())
            stack.enter_context(inductor.installed(fingerprint))
            _check_nobody_before_us(holding)
            _canary()
            self.installation, self.holding = stack.pop_all(), holding

    def _restore(self) -> None:
        installation, self.installation, self.holding = self.installation, None, None
        if installation is not None:
            installation.close()


_process = _Process()
atexit.register(_process.close)
os.register_at_fork(
    before=_process.lock.acquire,
    after_in_parent=_process.lock.release,
    after_in_child=_process.after_fork_in_child,
)


def batch_invariant_mode() -> contextlib.AbstractContextManager[Mode, None]:
    """Makes torch batch-invariant inside the block, for all threads, in eager and compiled code.

    Blocks nest, and may be entered by several threads: the mode is on until the last one leaves. On leaving, dispatcher,
    decompositions, configuration, patches and backend flags are what they were. Entering and leaving drop Dynamo's compiled
    code. The patches of the group "inductor" that this torch needs, and that change no bits, are in force inside.

    A process that is forked inside has the mode. One that is spawned has not, and a ModeWarning says so: give it
    ``worker_init_fn``.

    Raises ModeError where an entry turns out not to be in force, at the beginning, or at the end of any block because
    another library took it meanwhile; PatchRefused where a patch that changes bits is applied; SettingError where this torch's
    settings are not the known ones.
    """
    return _ModeBlock()


def stock_torch() -> contextlib.AbstractContextManager[None, None]:
    """torch as it is, also inside the mode: for negative controls. A mode block inside it is on again.

    No thread runs stock torch without knowing it: this raises ModeError while another thread is in a block of the mode, and
    other threads that enter the mode, or ``stock_torch``, wait until this block is left.
    """
    return _StockBlock()


def is_on() -> bool:
    """Whether the mode is in force now."""
    return _process.installation is not None


def worker_init_fn(*_: object) -> None:
    """Enters the mode for the rest of this process: ``DataLoader(worker_init_fn=...)``, or the initializer of a pool."""
    block = batch_invariant_mode()
    block.__enter__()
    _blocks_of_this_process.append(block)


_blocks_of_this_process: list[contextlib.AbstractContextManager[Mode, None]] = []


def _check_nobody_before_us(holding: Holding) -> None:
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
    """Runs a few operators of each kind of entry, and checks that the table answered. No dispatch mode of others sees them."""
    with _disable_current_modes(), counters.counting_apart() as answered:
        x = torch.ones(2, 2)
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
