"""A run that is killed half way goes on where it was."""

import json
import os
import signal

import pytest

TESTS = """
import os
import pytest
from conftest import emit, finding, stub

HERE = {"sources": os.environ.get("SOURCES", "here"), "patches": "any"}
stub("pytest_batchinv.receipt", receipt=lambda: {**HERE, "patches": "none"})


def ran(name):
    with open(os.environ["RAN"], "a") as file:
        file.write(name + "\\n")


@pytest.mark.parametrize("n", range(3))
def test_equal(n):
    ran(f"equal {n}")
    emit("R", receipt=HERE)
    emit("I", receipt=HERE)

def test_differs():
    ran("differs")
    emit("X", "differs", receipt=HERE, mode="off", finding=finding())

def test_equal_and_yet_failed():
    ran("failed")
    emit("I", receipt=HERE)
    assert not os.environ.get("FAIL")

def test_without_a_record():
    ran("none")

def test_killed():
    ran("killed")
    emit("I", receipt=HERE)
    if os.environ.get("KILL"):
        os.kill(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid(), int(os.environ["KILL"]))
        import time
        time.sleep(30)
"""


@pytest.fixture(params=[(), ("-n", "2")], ids=["plain", "xdist"])
def run(request, pytester, monkeypatch):
    """In a process of its own, as it is interrupted and killed. It writes after each test."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(pytester.path), os.environ.get("PYTHONPATH", "")]))
    (pytester.path / "often.py").write_text("from pytest_batchinv.report import unfinished\nunfinished.SECONDS = 0\n")
    command = ("-p", "often", "-p", "no:cacheprovider", "--batchinv-device=cpu")
    return lambda *args: pytester.runpytest_subprocess(*command, *args, *request.param)


@pytest.fixture
def ran(pytester, monkeypatch):
    """What ran since the last call, in order of names."""
    path = pytester.path / "ran"
    monkeypatch.setenv("RAN", str(path))
    # The receipt is asked for before a test file is imported.
    conftest = pytester.path / "conftest.py"
    conftest.write_text(
        conftest.read_text() + TESTS.partition("def ran")[0].replace("from conftest import emit, finding, stub", "")
    )
    pytester.makepyfile(TESTS)

    def told():
        lines = sorted(path.read_text().splitlines()) if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    return told


EVERY = ["differs", "equal 0", "equal 1", "equal 2", "failed", "killed", "none"]


def test_an_interrupted_run_is_taken_up_and_what_it_proved_is_not_run_again(run, ran, monkeypatch, pytester):
    monkeypatch.setenv("KILL", str(int(signal.SIGINT)))
    monkeypatch.setenv("FAIL", "1")
    first = run("--batch-invariant", "--batchinv-report", "run.json")
    assert set(ran()) >= {"killed"}
    first.stdout.fnmatch_lines(["to go on: the same command and --batchinv-resume *run.unfinished.json"])
    kept = json.loads((pytester.path / "run.unfinished.json").read_text())
    proven = {record["nodeid"] for record in kept["records"] if record["verdict"] == "equal"}
    assert not any("failed" in nodeid or "killed" in nodeid for nodeid in proven)

    monkeypatch.delenv("KILL")
    monkeypatch.delenv("FAIL")
    second = run("--batch-invariant", "--batchinv-report", "run.json", "--batchinv-resume", "run.unfinished.json")
    left_out = {f"equal {n}" for n in range(3) if any(f"test_equal[{n}]" in nodeid for nodeid in proven)}
    assert ran() == [name for name in EVERY if name not in left_out]
    second.stdout.fnmatch_lines([f"batch invariance: {len(left_out)} test*proven by run.unfinished.json, left out*"])
    report = json.loads((pytester.path / "run.json").read_text())
    assert sorted(record["relation"] for record in report["records"]) == sorted("RIRIRIXII")
    assert not (pytester.path / "run.unfinished.json").exists()


def test_a_killed_process_leaves_what_was_proven(run, ran, monkeypatch, pytester):
    monkeypatch.setenv("KILL", str(int(signal.SIGKILL)))
    assert run("--batch-invariant", "--batchinv-report", "run.json").ret == -signal.SIGKILL
    assert not (pytester.path / "run.json").exists()
    kept = json.loads((pytester.path / "run.unfinished.json").read_text())
    assert {record["verdict"] for record in kept["records"]} <= {"equal", "differs"}
    assert any("test_equal[0]" in record["nodeid"] for record in kept["records"])
    assert kept["outcome"]["exit_status"] is None


def test_what_other_sources_have_proven_runs_again(run, ran, monkeypatch, pytester):
    monkeypatch.setenv("KILL", str(int(signal.SIGINT)))
    run("--batch-invariant", "--batchinv-report", "run.json")
    ran()
    monkeypatch.delenv("KILL")
    monkeypatch.setenv("SOURCES", "others")
    second = run("--batch-invariant", "--batchinv-report", "run.json", "--batchinv-resume", "run.unfinished.json")
    assert ran() == EVERY
    second.stdout.fnmatch_lines(["batch invariance: 0 tests proven by run.unfinished.json, left out; * run again, as sources*"])


def test_a_run_that_ended_leaves_nothing_and_is_nothing_to_go_on_with(run, ran, pytester):
    run("--batch-invariant", "--batchinv-report", "run.json").assert_outcomes(passed=7)
    assert not (pytester.path / "run.unfinished.json").exists()
    refused = run("--batch-invariant", "--batchinv-resume", "run.json")
    refused.stderr.fnmatch_lines(["*--batchinv-resume: *run.json is the report of a run that ended*leave the option out*"])
    missing = run("--batch-invariant", "--batchinv-resume", "no.json")
    missing.stderr.fnmatch_lines(["*--batchinv-resume: there is no file no.json*"])


def test_a_run_that_was_asked_something_else_is_refused(run, ran, monkeypatch):
    monkeypatch.setenv("KILL", str(int(signal.SIGINT)))
    run("--batch-invariant", "--batchinv-report", "run.json")
    monkeypatch.delenv("KILL")
    arguments = ("--batch-invariant", "--batchinv-resume", "run.unfinished.json", "--batchinv-max-examples", "7")
    run(*arguments).stderr.fnmatch_lines(["*was made with max_examples 100, and this run has 7: give the same options*"])
