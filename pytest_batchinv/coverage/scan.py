"""The walk over all samples, in a process of its own: what ends that process is a result like any other."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection

import msgspec
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pytest_batchinv.coverage import states
from pytest_batchinv.coverage.calls import Call, calls_of, forms
from pytest_batchinv.coverage.measure import GRAIN, SIZES, Outcome, measure
from pytest_batchinv.coverage.rows import raise_if_the_device_is_lost
from pytest_batchinv.coverage.samples import DTYPES, Sample, names, samples
from pytest_batchinv.coverage.states import Cell, Found, Function
from pytest_batchinv.diagnose.coverage import vouched
from pytest_batchinv.kernels import scanned
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.mode import batch_invariant_mode, stock_torch

MOST_CALLS, MOST_TRIED = 2, 4
"""Calls of one overload in one dtype with other arguments: those with rows, and those that are asked for any."""
MOST_FUNCTIONS = 1
MOST_ENDS = 2
"""How often one source may end the process before it is left."""
SECONDS_TO_START = 300
SECONDS_FOR_ONE = 90
"""A call that takes longer hangs: it is ended, and named."""

Tell = Callable[[str], None]
_Key = tuple[str, str, str]  # operator, dtype, signature
_INTERRUPTED = "interrupted"


class Walk:
    """Measures the samples of one source after another, in this process. The mode must be on.

    seen: calls that need no measuring any more. It grows. tell: is told which call comes next, as it may end the process.
    """

    def __init__(
        self,
        device: str,
        threads: tuple[int, ...],
        seen: Iterable[_Key] = (),
        tell: Callable[[_Key], None] = lambda key: None,
    ) -> None:
        self._device, self._threads, self._tell = device, threads, tell
        self.seen: set[_Key] = set(seen)
        self._tried: Counter[tuple[str, str]] = Counter()  # by cell
        self._with_rows: Counter[tuple[str, str]] = Counter()

    def learn(self, cells: Iterable[Cell], seen: Iterable[_Key]) -> None:
        """What another process found."""
        self.seen |= set(seen)
        for cell in cells:
            self._count(cell.operator, cell.dtype, cell.state)

    def source(self, name: str, dtypes: Iterable[str]) -> Found:
        found = Found()
        for dtype in dtypes:
            try:
                given = _made(name, self._device, DTYPES[dtype])
            except Exception as error:
                raise_if_the_device_is_lost(error)
                found.not_run.append((name, dtype, _words(error)))
                continue
            for number, sample in enumerate(given):
                self._sample(sample, dtype, number, found)
        return found

    def _sample(self, sample: Sample, dtype: str, number: int, found: Found) -> None:
        as_function = number < MOST_FUNCTIONS and self._comes_next((sample.name, dtype, str(number)))
        try:
            calls = calls_of(sample.function, sample.args, sample.kwargs, sample.differentiable)
        except Refused as refused:
            found.functions.append(Function(sample.name, dtype, scanned.REFUSED, str(refused), ()))
            calls, as_function = [], False
        except Exception as error:
            raise_if_the_device_is_lost(error)
            found.not_run.append((sample.name, dtype, _words(error)))
            return
        for call in calls:
            self._call(call, sample.name, found)
        if as_function:
            outcome = measure(Call(sample.name, sample.function, sample.args, sample.kwargs), self._threads)
            ran = sorted({(call.name, call.dtype) for call in calls if call.direction == "f"})
            found.functions.append(Function(sample.name, dtype, outcome.state, outcome.why, tuple(ran)))

    def _call(self, call: Call, source: str, found: Found) -> None:
        if call.overload is None or call.overload.namespace == "batchinv" or not call.dtype:
            return
        if scanned.computes_nothing(call.overload) or not _is_on(call, self._device) or not self._is_wanted(call, MOST_CALLS):
            return
        is_second = self._with_rows[call.name, call.dtype] > 0
        outcome = self._record(call, measure(call, self._threads, 2, is_brief=is_second), source, found)
        if outcome.state == scanned.NO_ROWS:
            return
        for form in forms(call):
            if self._is_wanted(form, 1):
                self._record(form, measure(form, self._threads, is_brief=True), source, found)

    def _is_wanted(self, call: Call, most: int) -> bool:
        cell = call.name, call.dtype
        if self._with_rows[cell] >= most or self._tried[cell] >= MOST_TRIED:
            return False
        return self._comes_next((*cell, call.signature))

    def _comes_next(self, key: _Key) -> bool:
        if key in self.seen:
            return False
        self._tell(key)
        self.seen.add(key)
        return True

    def _record(self, call: Call, outcome: Outcome, source: str, found: Found) -> Outcome:
        self._count(call.name, call.dtype, outcome.state)
        found.cells.append(Cell(call.name, call.dtype, call.direction, outcome.state, outcome.why, source))
        return outcome

    def _count(self, operator: str, dtype: str, state: str) -> None:
        self._tried[operator, dtype] += 1
        self._with_rows[operator, dtype] += state != scanned.NO_ROWS


def _made(name: str, device: str, dtype: torch.dtype) -> list[Sample]:
    """The samples; with torch as it is where the mode refuses what makes them."""
    try:
        return list(samples(name, device, dtype))
    except Refused:
        with stock_torch():
            return list(samples(name, device, dtype))


def _is_on(call: Call, device: str) -> bool:
    tensors = [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    return all(x.device.type == device or x.dim() == 0 for x in tensors)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


# --- all of it --------------------------------------------------------------------------------------------------------


def scan(
    device: str,
    dtypes: Iterable[str],
    threads: tuple[int, ...],
    wanted: Iterable[str] = (),
    tell: Tell = lambda line: None,
    jobs: int = 1,
    found: Found | None = None,
) -> Found:
    """Every source, or those whose names are wanted, in so many processes. One that ends, or hangs, is started again.

    An interrupt ends it early, and is named in ``not_run``. found: of a scan that was interrupted, which goes on.
    """
    found = found or Found()
    found.not_run = [entry for entry in found.not_run if entry[0] != _INTERRUPTED]
    every = sources(wanted)
    left = [source for source in reversed(every) if source not in set(found.done)]
    at_work: list[tuple[_Worker, str, int]] = []  # the process, its source, how often that ended a process
    idle: list[_Worker] = []
    try:
        while left or at_work:
            while left and len(at_work) < jobs:
                worker = idle.pop() if idle else _Worker(device, tuple(dtypes), threads)
                at_work.append((worker, name := left.pop(), 0))
                worker.begin(name, found)
            ready = _Worker.ready([worker for worker, _, _ in at_work])
            for place in [place for place in at_work if place[0] in ready]:
                at_work.remove(place)
                worker, name, ends = place
                try:
                    done = worker.heard()
                    if done is None:
                        at_work.append(place)
                        continue
                    idle.append(worker)
                    found.add(done)
                    found.done.append(name)
                except _Ended as ended:
                    worker.end()
                    found.add(_of_the_end(ended, name))
                    found.seen += [ended.at] if ended.at else []
                    if ended.at and ends + 1 < MOST_ENDS:
                        at_work.append((again := _Worker(device, tuple(dtypes), threads), name, ends + 1))
                        again.begin(name, found)
                        continue
                    found.done.append(name)
                tell(f"{len(found.done)} of {len(every)}: {name}, {len(found.cells)} calls of operators")
    except KeyboardInterrupt:  # what was measured stands, and the data says that it is not all
        n_left = len(set(every).difference(found.done))
        found.not_run.append((_INTERRUPTED, "", f"{n_left} of {len(every)} sources were not run"))
    finally:
        for worker in (*idle, *(worker for worker, _, _ in at_work)):
            worker.end()
    return found


def sources(wanted: Iterable[str] = ()) -> list[str]:
    """Every source of samples, or those of these names."""
    chosen = set(wanted)
    return [name for name in names() if not chosen or short_name(name) in chosen]


def short_name(source: str) -> str:
    """As --only has it."""
    return source.partition(":")[2].partition("#")[0]


def _of_the_end(ended: _Ended, name: str) -> Found:
    """A call that ended the process is one that raised."""
    if ended.at is None or "::" not in ended.at[0]:
        return Found(not_run=[(name, ended.at[1] if ended.at else "", str(ended))])
    operator, dtype, _ = ended.at
    return Found(cells=[Cell(operator, dtype, "f", scanned.RAISES, str(ended), name)])


class _Ended(RuntimeError):
    """The process that measured has ended, or was ended. at: the call that it was at."""

    def __init__(self, words: str, at: _Key | None) -> None:
        super().__init__(words)
        self.at = at


class _Worker:
    """A process that measures one source after the other. It is told before each what the others have found."""

    def __init__(self, device: str, dtypes: tuple[str, ...], threads: tuple[int, ...]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
        self._mine, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, device, dtypes, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._cells, self._seen = 0, 0  # of the account that this process was told
        self._own: set[str] = set()
        self._at: _Key | None = None
        self._deadline = 0.0

    @staticmethod
    def ready(workers: Iterable[_Worker]) -> list[_Worker]:
        """Those that have something to say, and those that are over their time."""
        workers = list(workers)
        spoke = connection.wait([worker._mine for worker in workers], timeout=1)
        return [worker for worker in workers if worker._mine in spoke or time.monotonic() > worker._deadline]

    def begin(self, name: str, account: Found) -> None:
        self._at, self._deadline = None, time.monotonic() + SECONDS_TO_START
        cells = [cell for cell in account.cells[self._cells :] if cell.source not in self._own]
        news = msgspec.json.encode(Found(cells=cells, seen=account.seen[self._seen :]))
        self._own.add(name)
        self._cells, self._seen = len(account.cells), len(account.seen)
        with contextlib.suppress(ConnectionError):  # it is heard of that
            self._mine.send((name, news))

    def heard(self) -> Found | None:
        """What it found, if it is done. Raises _Ended where it ended, or hangs."""
        try:
            while self._mine.poll():
                message = self._mine.recv()
                if isinstance(message, bytes):
                    return msgspec.json.decode(message, type=Found)
                self._at, self._deadline = message, time.monotonic() + SECONDS_FOR_ONE
        except (EOFError, OSError):  # it may have ended within a message
            self._process.join()
            raise _Ended(f"it ended the process (exit code {self._process.exitcode})", self._at) from None
        if time.monotonic() > self._deadline:
            raise _Ended(f"it took more than {SECONDS_FOR_ONE} s, and was ended", self._at)
        return None

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._mine.close()


def _work(pipe: connection.Connection, device: str, dtypes: tuple[str, ...], threads: tuple[int, ...]) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, who ends this process
    walk = Walk(device, threads, tell=pipe.send)
    with batch_invariant_mode(), contextlib.suppress(EOFError, OSError):
        while True:
            name, news = pipe.recv()
            others = msgspec.json.decode(news, type=Found)
            walk.learn(others.cells, others.seen)
            before = set(walk.seen)
            try:
                part = walk.source(name, dtypes)
            except Exception as error:  # the device is lost: only a new process has it again
                print(f"{name}: {_words(error)}", file=sys.stderr)
                return
            part.seen = sorted(walk.seen - before)
            pipe.send(msgspec.json.encode(part))


# --- what it comes to -------------------------------------------------------------------------------------------------


def data(found: Found, device: str, threads: tuple[int, ...], dtypes: Iterable[str]) -> scanned.Scan:
    """The data file of what was found. It holds no time and no date: the same results are the same bytes."""
    version = str(torch.__version__).partition("+")[0]
    eager = states.merged(found.cells)
    scan = scanned.Scan(
        torch=version,
        device=scanned.device_kind(device),
        settings={"sizes": [*SIZES, GRAIN], "threads": list(threads), "dtypes": list(dtypes)},
        eager=eager,
        why=dict(sorted(_reasons(found.cells, eager))),
        functions=dict(sorted(Counter(function.state for function in found.functions).items())),
        not_run=sorted({" ".join(entry) for entry in found.not_run}),
    )
    quiet = sorted({f"{f.source} {f.dtype}: {f.why}" for f in silent(found.functions, scan, device)})
    return dataclasses.replace(scan, silent=quiet)


def _reasons(cells: Iterable[Cell], eager: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """For each operator the first call that left it unverified, in words."""
    bad = [cell for cell in cells if cell.state in (scanned.VARIES, scanned.RAISES)]
    for name, group in itertools.groupby(sorted(bad, key=lambda cell: cell.operator), key=lambda cell: cell.operator):
        for cell in group:
            if cell.dtype in eager[name].get(cell.state, "").split():
                yield name, f"{cell.dtype}: {cell.why}"
                break


def silent(functions: Iterable[Function], scan: scanned.Scan, device: str) -> list[Function]:
    """Samples that vary while a record would name none of the operators that ran in them."""
    return [
        f
        for f in functions
        if f.state == scanned.VARIES and all(_is_vouched(op, dtype, device, scan) for op, dtype in f.operators)
    ]


def _is_vouched(name: str, dtype: str, device: str, scan: scanned.Scan) -> bool:
    return vouched(scanned.overload_named(name), name, device, dtype, scan) is not None
