"""Signs of life on long runs: on a terminal one line that rewrites itself, elsewhere a plain line now and then.

Under xdist each worker leaves its line in a file, and the controller, which has the terminal, shows those of all.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_batchinv.context import Progress

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_REWRITES = 0.5
_FOLDER = "batchinv_progress"  # in a worker's input


def words(progress: Progress) -> str:
    """ "tiny-qwen3 I sweep 12 of 60, 480 rows/s, 3 s left"."""
    speed = progress.rows / progress.seconds if progress.seconds > 0 else 0.0
    far = f"{progress.done} of {progress.total}" if progress.total else f"{progress.done}"
    text = f"{progress.subject} {progress.relation} {progress.phase} {far}, {speed:,.0f} rows/s"
    if progress.total > progress.done > 0:
        text += f", {progress.seconds / progress.done * (progress.total - progress.done):.0f} s left"
    return text


@contextlib.contextmanager
def told(item: Any) -> Iterator[Callable[[Progress], None]]:
    """Takes the progress of this test's checks: to the display here, or on a worker to the file that the controller reads."""
    display = item.config.pluginmanager.get_plugin("batchinv-progress")
    folder = getattr(item.config, "workerinput", {}).get(_FOLDER)
    if display is not None:
        yield lambda progress: display.show(words(progress))
    elif folder:
        path = Path(folder, item.config.workerinput["workerid"])
        yield _Note(path)
        path.unlink(missing_ok=True)
    else:
        yield lambda progress: None


class _Note:
    """A worker's line, in a file of its own."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_REWRITES:
            return
        self._last = now
        with contextlib.suppress(OSError):
            self._path.write_text(words(progress), encoding="utf-8")


class Display:
    """Where the terminal is. On a terminal the line stands below pytest's own, and the cursor goes back. Silent with -q."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._rewrites = False
        self._last = time.monotonic()
        self._drawn = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._ended = threading.Event()

    def pytest_sessionstart(self) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        # With -s tests write to the terminal, too, and would write over the line.
        self._rewrites = terminal is not None and terminal.isatty and self._config.getoption("capture") != "no"

    def show(self, text: str) -> None:
        """At most as often as the kind of terminal asks for, counted from the last report of a test on."""
        if self._config.get_verbosity() < 0:
            return
        now = time.monotonic()
        if now - self._last < (SECONDS_BETWEEN_REWRITES if self._rewrites else SECONDS_BETWEEN_LINES):
            return
        self._last = now
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None:
            return
        with self._uncaptured():
            if self._rewrites:
                self._draw(text)
            else:
                terminal.ensure_newline()
                terminal.write_line(text)

    def pytest_runtest_logreport(self) -> None:
        self._clear()
        self._last = time.monotonic()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """xdist's hook: a folder for the workers' lines, and a thread that shows them."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="batchinv-progress-")
            threading.Thread(target=self._watch, daemon=True).start()
        node.workerinput[_FOLDER] = self._folder.name

    def pytest_keyboard_interrupt(self) -> None:
        self._clear()

    def pytest_sessionfinish(self) -> None:
        self._ended.set()
        self._clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _draw(self, text: str) -> None:
        """Writes the line below the cursor's, and goes back up to the cursor's column."""
        writer = self._config.get_terminal_writer()
        sys.stdout.write(f"\n\x1b[2K{text[: writer.fullwidth - 1]}\x1b[A\x1b[{writer.width_of_current_line + 1}G")
        sys.stdout.flush()
        self._drawn = bool(text)

    def _clear(self) -> None:
        if self._drawn:
            with self._uncaptured():
                self._draw("")

    def _uncaptured(self) -> contextlib.AbstractContextManager[None]:
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        return capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()

    def _watch(self) -> None:
        assert self._folder is not None
        folder = Path(self._folder.name)
        while not self._ended.wait(SECONDS_BETWEEN_REWRITES):
            lines = []
            with contextlib.suppress(OSError):
                for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                    lines.append(f"{entry.name} {Path(entry.path).read_text(encoding='utf-8')}")
            if lines:
                self.show("; ".join(lines))
