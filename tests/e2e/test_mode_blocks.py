"""The mode as blocks of a process: nested in any way, in threads, failed, interrupted, forked, spawned, and at its end."""

import contextlib
import functools
import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch

from pytest_batchinv import batch_invariant_mode, interrupts, mode
from pytest_batchinv.kernels import counters
from pytest_batchinv.mode import ModeError, ModeWarning, is_on, stock_torch, worker_init_fn


def answered() -> bool:
    """Whether the table answers a product now."""
    with counters.counting_apart() as hits:
        torch.ones(2, 2) @ torch.ones(2, 2)
    return "aten::mm" in hits


@pytest.fixture(autouse=True)
def _everything_is_as_it_was() -> Iterator[None]:
    before = torch._C._dispatch_dump("aten::mm")
    yield
    assert not is_on()
    assert not mode._process.blocks
    assert torch._C._dispatch_dump("aten::mm") == before


def test_blocks_nest_in_any_order_and_the_last_one_opened_decides():
    opened = []
    for block in (batch_invariant_mode, stock_torch, batch_invariant_mode, batch_invariant_mode, stock_torch):
        opened.append((block is batch_invariant_mode, block()))
        opened[-1][1].__enter__()
        assert answered() == is_on() == opened[-1][0]
    while opened:
        should_be_on, inner = opened.pop()
        assert answered() == is_on() == should_be_on
        inner.__exit__(None, None, None)
    assert not answered()


def test_blocks_that_are_left_in_the_order_in_which_they_were_opened():
    outer, stock, inner = batch_invariant_mode(), stock_torch(), batch_invariant_mode()
    with contextlib.ExitStack() as stack:
        for block in (inner, stock, outer):
            stack.push(block)
        outer.__enter__(), stock.__enter__(), inner.__enter__()
        outer.__exit__(None, None, None)
        assert answered()
        stock.__exit__(None, None, None)
        assert answered()
        inner.__exit__(None, None, None)
        assert not answered()


def test_a_block_inside_stock_torch_outside_the_mode_is_on():
    with stock_torch():
        with batch_invariant_mode() as inside:
            assert answered()
            torch.ones(2, 2) @ torch.ones(2, 2)
            assert inside.hits == {"aten::mm": 1}
        assert not answered()


def test_a_block_decorates_a_function_that_calls_itself():
    @batch_invariant_mode()
    def depth(n: int) -> list[bool]:
        return [is_on(), *(depth(n - 1) if n else [])]

    assert depth(2) == [True, True, True]


def test_a_block_is_entered_once():
    block = batch_invariant_mode()
    with block, pytest.raises(ModeError, match="needs one of its own"), block:
        pass


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_stock_torch_is_refused_while_another_thread_is_in_the_mode():
    entered, leave = threading.Event(), threading.Event()

    def work() -> bool:
        with batch_invariant_mode():
            entered.set()
            assert leave.wait(60)
            return answered()

    thread, results = in_thread(work)
    assert entered.wait(60)
    with pytest.raises(ModeError, match="another thread is in batch_invariant_mode"), stock_torch():
        pass
    leave.set()
    thread.join(60)
    assert results == [True]
    with stock_torch():
        assert not is_on()


def test_another_thread_waits_with_entering_until_stock_torch_is_left():
    started = threading.Event()

    def work() -> bool:
        started.set()
        with batch_invariant_mode():
            return answered()

    with batch_invariant_mode():
        with stock_torch():
            thread, results = in_thread(work)
            assert started.wait(60)
            with batch_invariant_mode():
                assert answered()
            thread.join(0.2)
            assert results == [] and not answered()
        thread.join(60)
        assert results == [True]
        assert answered()


def test_a_failed_return_from_stock_torch_is_one_error_and_leaves_a_consistent_state(monkeypatch):
    def fails() -> None:
        raise ModeError("planted.")

    with pytest.raises(ModeError) as caught, batch_invariant_mode(), stock_torch():
        monkeypatch.setattr(mode, "_canary", fails)
    assert "could not be installed again after stock_torch(): planted." in str(caught.value)
    monkeypatch.undo()
    with batch_invariant_mode():
        assert answered()


def test_a_mode_that_did_not_come_back_is_an_error_at_the_end_of_the_block(monkeypatch):
    def fails() -> None:
        raise ModeError("planted.")

    with pytest.raises(ModeError, match="did not hold to its end"), batch_invariant_mode():
        monkeypatch.setattr(mode, "_canary", fails)
        with pytest.raises(ModeError, match="planted"), stock_torch():
            pass
        monkeypatch.undo()
        assert not answered()
        with batch_invariant_mode():
            assert answered()
        monkeypatch.setattr(mode, "_canary", fails)
        with pytest.raises(ModeError, match="planted"), stock_torch():
            pass


# --- interrupts ------------------------------------------------------------------------------------------------------

_TRACED = {mode.__file__, interrupts.__file__}


class InterruptAtLine:
    """Ctrl-C as the n-th line of the mode's own code begins to run."""

    def __init__(self, n: int) -> None:
        self.n, self.seen = n, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in _TRACED:
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.n:
                signal.raise_signal(signal.SIGINT)
        return self

    def run(self) -> bool:
        """Enters and leaves a block. Whether that was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            with batch_invariant_mode():
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def test_an_interrupt_at_any_line_of_entering_or_leaving_leaves_nothing_behind(monkeypatch):
    """With an installation of one step, so that each line is a quick one: of the blocks, the lock, and the deferral."""
    installed = []

    def install(process: Any) -> None:
        process.installation = contextlib.ExitStack()
        process.installation.callback(installed.remove, process)
        installed.append(process)

    monkeypatch.setattr(mode._Process, "_install", install)
    monkeypatch.setattr(mode._Process, "check", lambda process: None)
    lines = InterruptAtLine(0)
    assert not lines.run()
    for n in range(1, lines.seen + 1):
        assert InterruptAtLine(n).run(), n
        assert (installed, mode._process.blocks, is_on()) == ([], [], False), n
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, n
    thread, results = in_thread(lambda: mode._process.lock.acquire(timeout=5) and mode._process.lock.release())
    thread.join()
    assert results == [None]  # the lock was free


def test_an_interrupt_within_the_whole_installation_leaves_nothing_behind():
    before = (torch._C._dispatch_dump("aten::mm"), torch._C._dispatch_dump("aten::linear"), torch.backends.cudnn.deterministic)
    lines = InterruptAtLine(0)
    assert not lines.run()
    for n in range(2, lines.seen, lines.seen // 6):
        assert InterruptAtLine(n).run(), n
        now = (torch._C._dispatch_dump("aten::mm"), torch._C._dispatch_dump("aten::linear"), torch.backends.cudnn.deterministic)
        assert (now, is_on()) == (before, False), n


# --- processes -------------------------------------------------------------------------------------------------------

ENDS = """
import os, sys, threading
from pytest_batchinv.mode import batch_invariant_mode

with batch_invariant_mode():
    pass
def rows():
    with batch_invariant_mode():
        yield 1
        yield 2

if os.fork() == 0:  # this process ends in blocks that nobody left
    block = batch_invariant_mode()
    block.__enter__()
    generator = rows()
    next(generator)
elif os.fork() == 0:  # and this one while a thread is in one
    entered = threading.Event()

    def work():
        with batch_invariant_mode():
            entered.set()
            threading.Event().wait()

    threading.Thread(target=work, daemon=True).start()
    entered.wait()
else:
    print(os.wait()[1], os.wait()[1])
    with batch_invariant_mode():
        sys.exit(3)
"""


def test_a_process_that_ends_in_the_mode_says_nothing(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    done = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "0 0\n", "")


def loaded(**options: Any) -> list[Any]:
    """What a worker of a DataLoader says of itself. With one sample that is not collated, but converted by the probe."""
    probe = functools.partial(eval, "__import__('pytest_batchinv.mode', fromlist=['mode']).is_on()")
    return list(torch.utils.data.DataLoader([{}], batch_size=None, num_workers=1, collate_fn=probe, **options))


@pytest.mark.filterwarnings("error::pytest_batchinv.mode.ModeWarning")
def test_forked_workers_have_the_mode_and_spawned_ones_by_their_initializer():
    with batch_invariant_mode():
        assert loaded(multiprocessing_context="fork") == [True]
        assert loaded(multiprocessing_context="spawn", worker_init_fn=worker_init_fn) == [True]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_does_not_have_the_mode_is_told_by_a_warning(method):
    process = multiprocessing.get_context(method).Process(target=int)
    with batch_invariant_mode(), pytest.warns(ModeWarning, match=f"started by {method} .* runs stock torch"):
        process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.filterwarnings("error::pytest_batchinv.mode.ModeWarning")
def test_a_process_that_is_spawned_under_stock_torch_is_told_nothing():
    process = multiprocessing.get_context("spawn").Process(target=int)
    with batch_invariant_mode(), stock_torch():
        process.start()
    process.join()
    assert process.exitcode == 0


def test_a_forked_process_leaves_the_mode_whichever_thread_it_comes_from():
    """Its parent's other threads are not in it, and their blocks are its own."""
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with batch_invariant_mode():
            entered.set()
            leave.wait(60)

    def child(pipe: Any) -> None:
        with stock_torch():
            pipe.send((is_on(), answered()))
        pipe.send((is_on(), answered()))

    thread, _ = in_thread(work)
    assert entered.wait(60)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == (False, False)
    assert ours.recv() == (True, True)
    process.join()
    leave.set()
    thread.join(60)
