"""Processes that are the ranks of one group: started together, asked together, ended together.

``World`` is what this process sees of them. A launcher (``__main__.py``) imports once what they all need and forks them; each
is asked over a socket of its own (``rank.py``). They meet at a file and at ports that the system chooses, so any number of
worlds can stand side by side. A rank that dies, fails or does not answer in time ends its world, and the error names it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

SECONDS = 300.0
"""How long ranks may take to start, and to answer one request, unless BATCHINV_RANK_SECONDS says otherwise."""

_GRACE = 5.0
"""Seconds in which the other ranks may fail, too, once one has."""


class RankError(RuntimeError):
    """A rank died, failed, or did not answer in time. ``kind`` is the name of the exception that a rank raised, or ""."""

    def __init__(self, sentence: str, kind: str = "", message: str = "") -> None:
        super().__init__(sentence)
        self.kind, self.message = kind, message


class Start(NamedTuple):
    """What each rank runs. target: "module:function" or "path.py:function": called as ``function(rank, world_size, *args)`` in
    each rank, it gives what is called with every request, and whose results are the answers: pickled, so plain data.

    device: "cpu" (gloo) or "cuda" (NCCL, one GPU a rank)."""

    target: str
    args: tuple[Any, ...] = ()
    device: str = "cpu"


class World:
    """``world_size`` ranks. They start now, and are asked with ``ask``. Raises RankError where they cannot start."""

    def __init__(self, world_size: int, start: Start, seconds: float | None = None) -> None:
        self.world_size = world_size
        self.seconds = seconds or float(os.environ.get("BATCHINV_RANK_SECONDS") or SECONDS)
        self._folder = tempfile.TemporaryDirectory(prefix="batchinv-ranks-")
        self._log = Path(self._folder.name, "log")
        pairs = [socket.socketpair() for _ in range(world_size + 1)]
        mine, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self._connections = [Connection(end.detach()) for end in mine[:-1]]
        self._control = Connection(mine[-1].detach())
        words = {
            "ranks": [end.fileno() for end in theirs[:-1]],
            "control": theirs[-1].fileno(),
            "store": str(Path(self._folder.name, "store")),
            "seconds": self.seconds,
            "target": start.target,
            "device": start.device,
            "parent": os.getpid(),
        }
        with open(self._log, "wb") as log:
            self._launcher = subprocess.Popen(
                [sys.executable, "-P", "-m", "pytest_batchinv.ranks", json.dumps(words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[end.fileno() for end in theirs],
                start_new_session=True,
                # Inductor's own pool of processes is none for a process that was forked.
                env={"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ},
            )
        for end in theirs:
            end.close()
        everything = (self._launcher, self._connections, self._control, self._folder)
        self._end = weakref.finalize(self, _end, *everything)
        self.ask(start.args)

    @property
    def is_alive(self) -> bool:
        return self._end.alive

    @property
    def processes(self) -> list[int]:
        """Ids of the launcher and of the ranks that live."""
        try:
            children = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children").read_text().split()
        except OSError:
            return []
        return [self._launcher.pid, *map(int, children)]

    def ask(self, request: Any) -> list[Any]:
        """The answers of all ranks, in order. Raises RankError: the world has ended then, unless all have failed alike."""
        if not self.is_alive:
            raise RankError(f"this world of {self.world_size} ranks has ended")
        try:
            for rank, connection in enumerate(self._connections):
                try:
                    connection.send(request)
                except OSError:
                    raise self._died(rank) from None
            return self._answers()
        except RankError as error:
            if not error.kind:
                self.close()
            raise
        except BaseException:  # an interrupt: the answers that are on their way are no answers to the next request
            self.close()
            raise

    def close(self) -> None:
        """Ends the ranks and waits for them. Again does nothing."""
        self._end()

    def _answers(self) -> list[Any]:
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + self.seconds
        while waiting:
            ready = cast("list[Connection]", wait([*waiting], max(0.0, deadline - time.monotonic())))
            if not ready:
                failed = {rank: answer for rank, answer in answers.items() if answer[0] == "error"}
                raise self._failed(*failed.popitem(), alone=True) if failed else self._late(sorted(waiting.values()))
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except (EOFError, OSError):
                    raise self._died(rank) from None
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + _GRACE)
        for rank in range(self.world_size):
            if answers[rank][0] == "error":
                raise self._failed(rank, answers[rank], alone=any(answer[0] != "error" for answer in answers.values()))
        return [answers[rank][1] for rank in range(self.world_size)]

    def _late(self, ranks: list[int]) -> RankError:
        who = f"{_ranks(ranks)} of {self.world_size}"
        return RankError(
            f"{who} did not answer within {self.seconds:g} s, and all {self.world_size} were ended. A rank that waits in a "
            "collective waits for one that is not in it; BATCHINV_RANK_SECONDS gives them more time."
        )

    def _failed(self, rank: int, answer: tuple[str, Any], alone: bool) -> RankError:
        """alone: other ranks went on, and are in no state to be asked again."""
        kind, message, where = answer[1]
        sentence = f"rank {rank} of {self.world_size} raised {kind}: {message}\n{where}".rstrip()
        return RankError(sentence, "" if alone else kind, message)

    def _died(self, rank: int) -> RankError:
        why = "ended"
        with contextlib.suppress(EOFError, OSError):
            while self._control.poll(_GRACE):
                who, status = self._control.recv()
                if who == rank:
                    why = _ending(status)
                    break
        return RankError(f"rank {rank} of {self.world_size} {why}, and the others were ended.{self._last_words()}")

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return "".join(f"\n  {line}" for line in lines[-_LINES:])


_LINES = 12


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with the code {os.waitstatus_to_exitcode(status)}"


def _end(
    launcher: subprocess.Popen[bytes],
    connections: list[Connection],
    control: Connection,
    folder: tempfile.TemporaryDirectory[str],
) -> None:
    """The launcher is the leader of the ranks' process group: they end with one signal, wherever they hang."""
    for connection in (*connections, control):
        connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    folder.cleanup()
