"""The summary on the terminal and the JSON file: both from the records that reach the controller."""

import json

import pytest

DIFFERENCE = {
    "index": [4, 17],
    "expected": "1.0",
    "actual": "1.0000001",
    "expected_hex": "0x3f800000",
    "actual_hex": "0x3f800001",
    "ulp": 1,
    "n_differ": 3,
    "n_total": 1024,
    "sizes": [2, 3],
    "shape": '{"rows":[{"id":0,"length":5,"content":"random"}],"layout":"left","extra_padding":0}',
}

TESTS = f"""
import pytest
from conftest import emit

@pytest.mark.compile_mode("eager", "default")
def test_model(compile_mode, batch_invariant):
    batch_invariant.hits["aten::mm"] = 1
    words = dict(compile_mode=compile_mode, examples=20, rows=300, compared_bytes=5_000_000, hits={{"aten::mm": 1234}})
    emit("R", **words)
    not_run = [{{"shape": "...", "reason": "out of memory"}}]
    emit("I", unclassified_ops=["aten::erfinv"], nan_rows=2, not_run=not_run, **words)

def test_that_fails():
    emit("X", "differs", difference={DIFFERENCE})
    assert False

def test_controls():
    emit("N", "caught", examples=3, difference={DIFFERENCE})
    emit("N", "inconclusive", examples=9)
"""


def test_the_summary_is_read_by_somebody_who_sees_it_first(pytester, run):
    pytester.makepyfile(TESTS)
    result = run("--batch-invariant")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            "*= batch invariance =*",
            "stub-model on cpu, fp32",
            "  compiled  *relation  *verdict  *examples  *rows  *compared",
            "  eager     *R run to run  *equal  *20  *300  *5.0 MB",
            "  default   *I alone == in a batch  *equal  *20  *300  *5.0 MB",
            "  eager     *X eager == compiled  *DIFFERS*",
            "DIFFERS: stub-model on cpu, fp32, compile mode eager, X eager == compiled",
            "  in *test_that_fails",
            "  3 of 1,024 values differ; the first at [[]4, 17]:",
            "  1.0 (0x3f800000) against 1.0000001 (0x3f800001), 1 ulp apart",
            "  the bits change at batch sizes 2-3",
            "  to repeat it, add --batchinv-shape '{*}'",
            "negative control: stock torch was caught, after 3 examples, *",
            "  in a batch of 1 row, left padding",
            "negative control: INCONCLUSIVE: stock torch did not vary in 9 examples, *",
            "operations replaced: 1 overload, 4,936 calls",
            "  *4,936  aten::mm",
            "NOT COVERED: 1 operation ran as stock torch has them, *",
            "  aten::erfinv",
            "not run: 2 examples",
            "  2 times: out of memory",
            "NaN: 4 rows held NaN*",
            "machine: a stub, *torch 2.0",
        ]
    )
    ours = [line for line in result.outlines if "stub-model" in line or line.startswith((" ", "batch invariance", "N"))]
    assert all(len(line) <= 120 for line in ours if "to repeat it" not in line and "emit(" not in line)


def test_the_record_is_written_also_when_tests_fail(pytester, run):
    pytester.makepyfile(TESTS)
    result = run("--batch-invariant", "--batchinv-report=new/a.json", "--batchinv-report=b.json")
    result.stdout.fnmatch_lines(["record of this run: *a.json", "record of this run: *b.json"])
    saved = json.loads(pytester.path.joinpath("new", "a.json").read_text())
    assert saved == json.loads(pytester.path.joinpath("b.json").read_text())
    assert saved["schema"] == 1
    assert saved["machine"] == {"cpu": "a stub", "torch": "2.0"}
    assert saved["settings"]["model"] == "tiny-qwen3"
    assert saved["outcome"] == {"exit_status": 1, "passed": 3, "failed": 1}
    assert len(saved["records"]) == 7
    assert {record["nodeid"].rpartition("::")[2] for record in saved["records"]} == {
        "test_model[eager]",
        "test_model[default]",
        "test_that_fails",
        "test_controls",
    }
    assert [path.name for path in pytester.path.joinpath("new").iterdir()] == ["a.json"]


def test_a_record_that_cannot_be_written_is_no_success(pytester):
    pytester.makepyfile(
        """
        import pathlib

        def test_it(): pathlib.Path("a.json").mkdir()
        """
    )
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", "--batchinv-report=a.json")
    assert result.ret == pytest.ExitCode.INTERNAL_ERROR
    result.stdout.fnmatch_lines(["NOT WRITTEN: *a.json*"])


def test_a_run_that_is_interrupted_shows_what_it_has(pytester):
    pytester.makepyfile(
        """
        from conftest import emit

        def test_it(): emit("R", examples=20)

        def test_interrupted(): raise KeyboardInterrupt
        """
    )
    result = pytester.runpytest_subprocess("--batch-invariant", "--batchinv-device=cpu", "--batchinv-report=a.json")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["  eager  *R run to run  *equal  *20*", "record of this run: *"])
    assert len(json.loads(pytester.path.joinpath("a.json").read_text())["records"]) == 1


def test_while_off_there_is_no_section(pytester, run):
    pytester.makepyfile("def test_it(): pass")
    run().stdout.no_fnmatch_line("*batch invariance*")


def test_long_runs_show_signs_of_life(pytester, monkeypatch):
    monkeypatch.setattr("pytest_batchinv.progress.SECONDS_BETWEEN_LINES", 0.0)
    pytester.makepyfile(
        """
        from pytest_batchinv import progress

        def test_it(): progress.report("stub-model: swept 3 of 9 batches")
        """
    )
    on = ["--batch-invariant", "--batchinv-device=cpu"]
    pytester.runpytest_inprocess(*on).stdout.fnmatch_lines(["stub-model: swept 3 of 9 batches"])
    pytester.runpytest_inprocess(*on, "-q").stdout.no_fnmatch_line("*swept*")
    pytester.runpytest_inprocess().stdout.no_fnmatch_line("*swept*")
