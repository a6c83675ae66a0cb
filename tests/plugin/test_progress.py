"""Signs of life: a line that rewrites itself on a terminal, plain lines elsewhere, none with -q."""

import os
import pty
import subprocess
import sys

import pytest

from pytest_batchinv.context import Progress
from pytest_batchinv.plugin import progress

TESTS = """
import time
import pytest
from pytest_batchinv import context

def tell(done):
    context.current().progress(context.Progress("stub-model", "I", "sweep", done, 9, 30 * done, 2.0))

@pytest.mark.parametrize("i", range(2))
def test_it(i):
    for done in (3, 6):
        time.sleep(0.6)
        tell(done)
"""


def test_it_says_how_far_a_check_is_how_fast_and_how_long_it_will_take():
    told = Progress("tiny-qwen3", "I", "sweep", 12, 60, 480, 2.0)
    assert progress.words(told) == "tiny-qwen3 I sweep 12 of 60, 240 rows/s, 8 s left"
    assert progress.words(Progress("f", "R", "drawn", 7, 0, 14, 2.0)) == "f R drawn 7, 7 rows/s"


def test_where_there_is_no_terminal_lines_are_written_now_and_then(pytester, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.5)
    pytester.makepyfile(TESTS)
    on = ["--batch-invariant", "--batchinv-device=cpu"]
    result = pytester.runpytest_inprocess(*on)
    result.stdout.fnmatch_lines(["stub-model I sweep 3 of 9, 45 rows/s, 4 s left", "stub-model I sweep 6 of 9, *", "*passed*"])
    assert "\x1b" not in result.stdout.str()
    pytester.runpytest_inprocess(*on, "-q").stdout.no_fnmatch_line("*sweep*")
    pytester.runpytest_inprocess().stdout.no_fnmatch_line("*sweep*")


def test_the_controller_shows_the_lines_of_the_workers(pytester, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.2)
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", "-n2")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*gw? stub-model I sweep ? of 9, 45 rows/s, * s left*"])


def screen(text):
    """The lines on a terminal that has been sent this text. It knows what pytest and the display use."""
    lines, row, column, i = [""], 0, 0, 0
    while i < len(text):
        if text.startswith("\x1b[", i):
            end = next(n for n in range(i + 2, len(text)) if text[n].isalpha())
            number, code, i = text[i + 2 : end], text[end], end + 1
            if code == "A":
                row -= 1
            elif code == "G":
                column = int(number) - 1
            elif code == "K":
                lines[row] = "" if number == "2" else lines[row][:column]
            else:
                assert code == "m", f"an unknown sequence {number}{code}"
            continue
        if text[i] == "\r":
            column = 0
        elif text[i] == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + text[i] + lines[row][column + 1 :]
            column += 1
        i += 1
    return [line.rstrip() for line in lines]


def on_a_terminal(pytester, *args):
    """All that is sent to a terminal by a run of its own."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-P", "-m", "pytest", "--batch-invariant", "--batchinv-device=cpu", *args]
    environ = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    run = subprocess.Popen(command, cwd=pytester.path, stdout=theirs, stderr=theirs, stdin=theirs, env=environ)
    os.close(theirs)
    sent = b""
    while True:
        try:
            sent += os.read(ours, 4096)
        except OSError:  # how Linux tells that nobody holds the other end any more
            break
    os.close(ours)
    assert run.wait() == pytest.ExitCode.OK
    return sent.decode()


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["plain", "xdist"])
def test_on_a_terminal_the_line_rewrites_itself_below_pytest_s_own_and_leaves_nothing(pytester, workers):
    pytester.makepyfile(test_one=TESTS)
    sent = on_a_terminal(pytester, *workers)
    assert sent.count("stub-model I sweep") >= 2
    shown = screen(sent)
    assert not [line for line in shown if "sweep" in line]
    if not workers:
        assert [line for line in shown if line.startswith("test_one.py ..") and line.endswith("[100%]")]
        drawn = screen(sent[: sent.index("\x1b[A")])
        assert drawn[-2:] == ["test_one.py", "stub-model I sweep 3 of 9, 45 rows/s, 4 s left"]


def test_on_a_terminal_too_q_is_quiet(pytester):
    pytester.makepyfile(TESTS)
    assert "sweep" not in on_a_terminal(pytester, "-q")
