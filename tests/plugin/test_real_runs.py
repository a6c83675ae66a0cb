"""Runs with the real mode and real checks, each in a process of its own: verdicts, scopes, interrupts, replays."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from pytest_batchinv import BatchShape, check_batch_invariant, context
from pytest_batchinv.shapes import Row
from pytest_batchinv.subjects.rows import RowsSubject


@pytest.fixture(autouse=True)
def _nothing_is_stubbed(pytester, _no_settings_of_the_outer_run):
    pytester.makeconftest("")


VERDICTS = """
import pytest
import torch
from torch import nn
from pytest_batchinv import assert_batch_invariant, batch_invariant_mode
from pytest_batchinv.check import Refused
from pytest_batchinv.mode import is_on, stock_torch

marked = pytest.mark.batch_invariant


def check(fn):
    assert_batch_invariant(fn, torch.randn(3, 8), relations="I", max_examples=1)


class Block(nn.Module):
    def forward(self, x):
        return x.softmax(-1) + (0 if is_on() or len(x) == 1 else 1)


class Head(nn.Module):
    def forward(self, x):
        return x * 2


def test_of_a_block_with_the_mode_off():
    check(Block())

@marked
def test_of_a_block():
    check(Block())

def test_of_compiled_modules():
    check(torch.compile(Head(), backend="eager"))
    check(torch.compile(nn.Tanh(), backend="eager"))

@marked
def test_of_a_crash():
    def crash(x):
        if len(x) == 2:
            raise ArithmeticError("two rows are one too many")
        return x.softmax(-1)

    check(crash)

@marked
def test_of_a_refusal():
    def refuse(x):
        raise Refused("there is no kernel for this")

    check(refuse)

@marked
def test_of_a_dtype_that_follows_the_batch():
    check(lambda x: x.softmax(-1).to(torch.float64 if len(x) > 1 else torch.float32))

@marked
def test_of_what_ran_past_the_table():
    def past(x):
        with stock_torch():
            return x.softmax(-1)

    check(past)

@marked
def test_of_an_own_kernel():
    check(lambda x: x[:, :1] * 0 + torch.from_numpy(x.numpy().copy())[:, :1])

@marked
def test_of_nothing(batchinv_engine):
    pass


@pytest.fixture(scope="session")
def mode_in_session():
    return is_on()

@pytest.fixture(scope="session")
def mode_where_it_was_entered():
    with batch_invariant_mode():
        return is_on()

@pytest.fixture(scope="module")
def mode_in_module():
    yield is_on()
    assert not is_on()

@pytest.fixture(scope="module")
def mode_in_module_that_is_asked_for_late():
    return is_on()

@pytest.fixture
def mode_in_function():
    yield is_on()
    assert is_on()

@marked
def test_scopes(mode_in_session, mode_where_it_was_entered, mode_in_module, mode_in_function, request):
    assert not mode_in_session and not mode_in_module
    assert mode_where_it_was_entered
    assert mode_in_function and is_on()
    assert not request.getfixturevalue("mode_in_module_that_is_asked_for_late")
    assert is_on()
    torch.ones(2, 2).softmax(-1)
"""


def test_each_verdict_is_told_apart_in_summary_file_and_exit_status(pytester):
    pytester.makepyfile(test_it=VERDICTS)
    result = pytester.runpytest_subprocess("--batch-invariant", "--batchinv-device=cpu", "--batchinv-report=a.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    failed = set(re.findall(r"^(?:FAILED|ERROR) test_it.py::(\w+) - ", result.stdout.str(), re.M))
    saved = json.loads(pytester.path.joinpath("a.json").read_text())
    verdicts = {record["nodeid"].partition("::")[2]: (record["verdict"], record["mode"]) for record in saved["records"]}
    assert verdicts == {
        "test_of_a_block_with_the_mode_off": ("differs", "off"),
        "test_of_a_block": ("equal", "on"),
        "test_of_compiled_modules": ("equal", "off"),
        "test_of_a_crash": ("error", "on"),
        "test_of_a_refusal": ("refused", "on"),
        "test_of_a_dtype_that_follows_the_batch": ("shape_differs", "on"),
        "test_of_what_ran_past_the_table": ("error", "on"),
        "test_of_an_own_kernel": ("equal", "on"),
    }
    assert failed == {*(name for name, (verdict, _) in verdicts.items() if verdict != "equal"), "test_of_nothing"}
    names = {record["subject"]["name"] for record in saved["records"] if "compiled" in record["nodeid"]}
    assert names == {"Head", "Tanh"}
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["outcome"]["exit_status"] == 1
    result.stdout.fnmatch_lines_random(
        [
            "*test_of_nothing passed, but *so it proves nothing.",
            "*ArithmeticError: two rows are one too many",
            "ERROR: test_of_a_crash.crash (fp32, eager, cpu)",
            "  I alone == in a batch, in batch-invariant mode, in test_it.py::test_of_a_crash",
            "  at the batch {*",
            "REFUSED: test_of_a_refusal*",
            "SHAPE DIFFERS: test_of_a_dtype*",
            "  float32 [[]8] alone against float64 [[]8] in the batch",
            "ERROR: test_of_what_ran_past*",
            "  ModeError: *but aten::_softmax*",
            "not proven  1 DIFFERS; 2 ERROR; 1 REFUSED; 1 SHAPE DIFFERS; 2 equal checks of torch as it is*",
        ]
    )


def test_an_interrupted_check_is_in_the_summary_and_in_the_file_and_nothing_is_said_about_the_mode(pytester):
    pytester.makepyfile(
        test_it="""
        import pytest, signal, torch
        from pytest_batchinv import assert_batch_invariant

        @pytest.mark.batch_invariant
        def test_it():
            def interrupted(x):
                if len(x) == 3:
                    signal.raise_signal(signal.SIGINT)
                return x.softmax(-1)

            assert_batch_invariant(interrupted, torch.randn(8, 4), relations="I")
        """
    )
    result = pytester.runpytest_subprocess("--batch-invariant", "--batchinv-device=cpu", "--batchinv-report=a.json")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert result.stderr.str() == ""
    assert "Exception ignored" not in result.stdout.str()
    result.stdout.fnmatch_lines(["  I INTERRUPTED *", "INTERRUPTED: *", "not proven  1 INTERRUPTED;*", "record of this run: *"])
    saved = json.loads(pytester.path.joinpath("a.json").read_text())
    (record,) = saved["records"]
    assert (record["verdict"], record["case"]) == ("interrupted", '{"rows":[0,1,2]}')
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["outcome"]["exit_status"] == 2


def pasted(line, folder, *more):
    """What a shell prints in which the line was pasted; ``pytest`` is there that of this Python."""
    shim = folder / "bin" / "pytest"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m pytest "$@"\n')
    shim.chmod(0o755)
    environ = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}"}
    run = subprocess.run(" ".join([line, *more]), shell=True, cwd=folder, env=environ, capture_output=True, text=True)
    return run.stdout + run.stderr


def finding_of(text):
    """Row, difference with hex values, and the line that repeats it, from the summary of a run."""
    summary = text[text.index("= batch invariance =") :].splitlines()
    start = next(number for number, line in enumerate(summary) if line.startswith("  row "))
    (replay,) = [line.partition(": ")[2] for line in summary if line.startswith("  to repeat it: ")]
    return summary[start : start + 3], replay


ROWS = """
import pytest
import torch
from pytest_batchinv import assert_batch_invariant

W = torch.randn(8, 8)

def varies(x, offset):
    y = x @ W + offset
    return y.where(torch.arange(len(x))[:, None] != 2, y * 1.5)

@pytest.fixture(scope="module")
def wide():
    return torch.randn(1)

@pytest.fixture
def narrow():
    return torch.randn(1)

def test_before(wide, narrow):
    torch.randn(7)

def test_it(wide, narrow):
    rows = torch.randn(12, 8)
    assert_batch_invariant(lambda x: varies(x, wide + narrow), rows)
"""


def test_the_line_to_repeat_it_finds_the_same_in_a_function_of_rows_from_where_pytest_was_started(pytester):
    folder = pytester.mkdir("packages")
    folder.joinpath("tests").mkdir()
    folder.joinpath("tests", "test_before.py").write_text("import torch\ntorch.randn(3)\n")
    folder.joinpath("tests", "test_rows.py").write_text(ROWS)
    first = pasted("pytest --batch-invariant --batchinv-device cpu tests", folder)
    assert f"rootdir: {pytester.path}\n" in first
    found, replay = finding_of(first)
    second = pasted(replay, folder)
    assert finding_of(second) == (found, replay)
    assert "1 failed" in second
    assert "the rows are not those" not in second


def test_a_replay_on_other_rows_says_so():
    subject, got = RowsSubject(torch.relu, [torch.randn(3, 4)]), []
    for pool in (subject.digest(), "0" * 12):
        with context.collecting(got.append):
            check_batch_invariant(subject, "I", case=BatchShape((Row(0), Row(1)), pool=pool))
    assert got[0].notes == ()
    assert "the rows are not those of the finding" in got[1].notes[0]


def test_the_line_to_repeat_it_finds_the_same_in_a_compiled_model(pytester):
    pytester.makepyfile(
        test_model="""
        import pytest
        from pytest_batchinv import check_batch_invariant

        @pytest.mark.compile_mode("default")
        def test_it(batchinv_engine):
            check_batch_invariant(batchinv_engine, relations=["I"], max_examples=1)
        """
    )
    options = "--batchinv-dtype fp16 --batchinv-attn sdpa --batchinv-device cpu"
    found, replay = finding_of(pasted(f"pytest --batch-invariant {options}", pytester.path))
    assert finding_of(pasted(replay, pytester.path)) == (found, replay)


def test_a_folder_named_kernels_among_the_tests_harms_nothing(pytester):
    """Of this name there is a package of Hugging Face, which transformers looks for."""
    pytester.mkpydir("kernels")
    pytester.makepyfile(
        test_model="""
        import kernels
        from pytest_batchinv import BatchShape, check_batch_invariant

        def test_it(batchinv_engine):
            check_batch_invariant(batchinv_engine, "R", case=BatchShape.from_json('{"rows":[0,1]}'))
        """
    )
    result = pytester.runpytest_subprocess("--batch-invariant", "--batchinv-device=cpu")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["  eager * R equal *"])
