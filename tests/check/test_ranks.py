"""A world of ranks answers, or says which rank failed and how; and no process outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_batchinv.ranks import RankError, Start, World

SUPPORT = Path(__file__).parents[1] / "support" / "ranks_that_fail.py"
START = Start(f"{SUPPORT}:failing")


def ended(processes, seconds=10.0):
    """Whether all of them have ended; one that its parent has not waited for yet counts as ended."""
    deadline = time.monotonic() + seconds
    while any(_lives(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ranks_answer_in_order_and_are_gone_after():
    world = World(3, START)
    processes = world.processes
    answers = world.ask("add")
    assert [answer[:2] for answer in answers] == [(0, 6.0), (1, 6.0), (2, 6.0)]
    assert processes == [processes[0], *(answer[2] for answer in answers)]
    with pytest.raises(RankError, match="rank 0 of 3 raised ValueError: nobody likes it") as error:
        world.ask("all raise")
    assert error.value.kind == "ValueError"
    assert world.ask("add") == answers  # where all have failed alike, all can be asked again
    world.close()
    assert ended(processes)
    with pytest.raises(RankError, match="this world of 3 ranks has ended"):
        world.ask("add")


@pytest.mark.parametrize(
    ("request_", "seconds", "words"),
    [
        ("raise", 60, r"rank 1 of 2 raised ValueError: rank 1 does not like it"),
        ("exit", 60, r"rank 1 of 2 ended with the code 3, and the others were ended"),
        ("be killed", 60, r"rank 1 of 2 was ended by SIGKILL, and the others were ended"),
        ("hang", 2, r"ranks 0, 1 of 2 did not answer within 2 s, and all 2 were ended"),
    ],
)
def test_a_rank_that_fails_alone_ends_the_world_with_a_sentence(request_, seconds, words):
    world = World(2, START)
    processes, world.seconds = world.processes, seconds
    with pytest.raises(RankError, match=words) as error:
        world.ask(request_)
    assert error.value.kind == ""
    assert not world.is_alive
    assert ended(processes)


def test_a_rank_that_cannot_start_says_why():
    with pytest.raises(RankError, match="rank 1 of 2 raised ValueError: rank 1 does not like its arguments"):
        World(2, START._replace(args=("at the start",)))
    with pytest.raises(RankError, match=r"(?s)rank [01] of 2 ended.*ModuleNotFoundError: No module named 'no_such_module'"):
        World(2, Start("no_such_module:function"))


_ASKING = f"""
from pytest_batchinv.ranks import Start, World
world = World(2, Start({str(SUPPORT)!r} + ":failing"))
print(*world.processes, flush=True)
world.ask("hang")
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_process_that_asks(ending):
    command = [sys.executable, "-P", "-c", _ASKING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asking:
        processes = [int(word) for word in asking.stdout.readline().split()]
        assert len(processes) == 3 and not ended(processes, seconds=0)
        os.kill(asking.pid, ending)
    assert ended(processes)
