"""The summary on the terminal and the JSON file: both from the records that reach the controller."""

import json
from xml.etree import ElementTree

import pytest

from pytest_batchinv.report import __main__ as command
from pytest_batchinv.report import saved
from pytest_batchinv.report.record import SCHEMA

TESTS = """
import pytest
from conftest import emit, finding, subject
from pytest_batchinv.report.record import Counts, OpCoverage, Skipped

@pytest.mark.compile_mode("eager", "default")
def test_model(compile_mode, batch_invariant):
    info, hits = subject(compile_mode=compile_mode), {"aten::mm": 1234}
    emit("R", info=info, hits=hits)
    covered = ("all sizes 1-300", "99 of 99 pairs")
    ops = OpCoverage(unverified=("aten::erfinv",))
    counts = Counts(examples=20, rows=300, compared_bytes=5_000_000, nan_rows=2, seconds=2.0)
    not_run = (Skipped("{}", "out of memory"),)
    emit("I", info=info, hits=hits, covered=covered, ops=ops, counts=counts, not_run=not_run)

def test_that_fails():
    emit("X", "differs", mode="off", finding=finding())
    assert False

def test_controls():
    emit("I", "caught", mode="stock", control=True, finding=finding())
    emit("I", "inconclusive", mode="stock", control=True)
"""


def test_the_summary_is_read_by_somebody_who_sees_it_first(pytester, run):
    pytester.makepyfile(TESTS)
    result = run("--batch-invariant")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*= batch invariance =*"])
    result.stdout.fnmatch_lines_random(
        [
            "stub-model on cpu, fp32, attention batch_invariant, in batch-invariant mode",
            "  eager * R equal * I equal *40 batches *600 rows *10.0 MB, 10 batches/s",
            "  default * R equal * I equal *40 batches *600 rows *10.0 MB, 10 batches/s",
            "stub-model on cpu, fp32, attention batch_invariant, with the mode off",
            "  eager * X DIFFERS *",
            "DIFFERS: stub-model (fp32, attention batch_invariant, eager, cpu)",
            "  X eager == compiled, with the mode off, in test_the_summary*::test_that_fails",
            "  row id 1, 3 tokens, random; at position 1 of 2, left padding to 5 columns",
            "  3 of 1,024 values; the first at [[]4, 17]:",
            "  1.0 (0x3f800000) alone, 1.0000001 (0x3f800001) in the batch, 1 ulp apart",
            "  bits change at batch sizes 2-3, 9; 12 sizes from 1 to 300 were run, changes between them bisected",
            "  to repeat it: pytest --batch-invariant --batchinv-shape *",
            "negative control: stock torch was caught, after 20 batches, 300 rows, 5.0 MB",
            "negative control: INCONCLUSIVE: stock torch did not vary in 20 batches, 300 rows, 5.0 MB;",
            "operations replaced: 1 overload, 4,936 calls",
            "  *4,936  aten::mm",
            "UNVERIFIED: 1 operator ran as stock torch has them, *",
            "  aten::erfinv  in stub-model",
            "not run: 2 batches",
            "  2 times: out of memory",
            "NaN: 4 rows held NaN*",
        ]
    )
    end = result.outlines.index(next(line for line in result.outlines if line.startswith("proven")))
    result.stdout.fnmatch_lines(
        [
            "proven      0 bits differ in R, I: 2 subjects, 80 batches, 20.0 MB",
            "covered     all sizes 1-300; 99 of 99 pairs (stub-model, the widest)",
            "on          a stub, ? threads, torch 2.0",
            "control     the same search caught stock torch in 1 of 2 subjects",
            "not proven  1 DIFFERS; 1 unverified operator; 1 control INCONCLUSIVE; not asked: S, *",
        ]
    )
    ours = result.outlines[result.outlines.index(next(line for line in result.outlines if "= batch inv" in line)) : end + 7]
    assert all(len(line) <= 110 for line in ours if "to repeat it" not in line and "::" not in line)


def test_two_subjects_of_one_name_are_two_lines_that_say_whether_the_mode_was_on(pytester, run):
    pytester.makepyfile(
        """
        from conftest import emit, finding, subject

        def test_off():
            emit(info=subject("Block", "module"), verdict="differs", mode="off", finding=finding(row='{"id":1}'))

        def test_on():
            emit(info=subject("Block", "module"))

        def test_on_too():
            emit(info=subject("Block", "module", compile_mode="default"))
        """
    )
    run("--batch-invariant").stdout.fnmatch_lines_random(
        [
            "1 function of rows on cpu, fp32, with the mode off",
            "  I DIFFERS *20 batches *",
            "    Block",
            "2 functions of rows on cpu, fp32, in batch-invariant mode",
            "  I equal *40 batches *",
            "    Block, Block (default)",
        ]
    )


@pytest.mark.parametrize(
    "verdict, words",
    [
        ("error", "ERROR"),
        ("refused", "REFUSED"),
        ("shape_differs", "SHAPE DIFFERS"),
        ("interrupted", "INTERRUPTED"),
        ("not_run", "not run"),
    ],
)
def test_a_verdict_that_is_not_equal_is_never_among_the_proven(pytester, verdict, words):
    pytester.makepyfile(
        f"""
        from conftest import emit

        def test_it(): emit(verdict="{verdict}", error="ValueError: five rows are too many", case='{{"rows":[0,1]}}')
        """
    )
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", "--batchinv-report=a.json")
    result.stdout.fnmatch_lines([f"  eager * I {words} *", "*five rows are too many*", f"not proven  1 {words};*"])
    result.stdout.no_fnmatch_line("proven *")
    (record,) = json.loads(pytester.path.joinpath("a.json").read_text())["records"]
    assert (record["verdict"], record["error"]) == (verdict, "ValueError: five rows are too many")


def test_the_record_is_written_also_when_tests_fail(pytester, run):
    pytester.makepyfile(TESTS)
    result = run("--batch-invariant", "--batchinv-report=new/a.json", "--batchinv-report=b.json")
    result.stdout.fnmatch_lines(["record of this run: *a.json", "record of this run: *b.json"])
    saved = json.loads(pytester.path.joinpath("new", "a.json").read_text())
    assert saved == json.loads(pytester.path.joinpath("b.json").read_text())
    assert saved["schema"] == SCHEMA
    assert saved["machine"] == {"cpu": "a stub", "torch": "2.0"}
    assert saved["settings"]["model"] == "auto"
    assert saved["outcome"] == {"exit_status": 1, "passed": 3, "failed": 1}
    assert len(saved["records"]) == 7
    assert {record["nodeid"].rpartition("::")[2] for record in saved["records"]} == {
        "test_model[eager]",
        "test_model[default]",
        "test_that_fails",
        "test_controls",
    }
    assert [path.name for path in pytester.path.joinpath("new").iterdir()] == ["a.json"]


def test_the_page_is_written_beside_the_record_also_when_tests_fail(pytester, run):
    pytester.makepyfile(TESTS)
    result = run("--batch-invariant", "--batchinv-report=new/a.html", "--batchinv-report=a.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["record of this run: *a.json", "page of this run: *a.html"])
    page = pytester.path.joinpath("new", "a.html").read_text()
    for words in ("Not proven: 1 DIFFERS", "aten::erfinv", "out of memory", "3 of 1,024 values", "3 passed, 1 failed"):
        assert words in page
    assert page.count('<tr><th scope="row">stub-model') == 3  # eager in the mode, default in the mode, eager with it off
    records = json.loads(pytester.path.joinpath("a.json").read_text())["records"]
    assert len(records) == 7


def test_names_of_subjects_cannot_act_on_the_page(pytester, run):
    pytester.makepyfile(
        """
        from conftest import emit, finding, subject

        EVIL = "</script><script>alert(1)</script>"

        def test_it():
            emit(info=subject(EVIL), verdict="differs", finding=finding(output=EVIL, replay=EVIL))
        """
    )
    run("--batch-invariant", "--batchinv-report=a.html")
    page = pytester.path.joinpath("a.html").read_text()
    assert page.count("<script>") == page.count("</script>") == 1
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") >= 4


def test_a_page_without_its_libraries_is_a_usage_error_before_the_run(pytester, monkeypatch):
    monkeypatch.setattr("pytest_batchinv.report.html.NEEDS", ("jinja2", "no_such_library"))
    pytester.makepyfile("def test_it(): print('ran')")
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", "--batchinv-report=a.html")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: --batchinv-report: a.html needs no_such_library, which is not installed: "
            "pip install 'pytest-batchinv[[]report]'. Or ask for a .json, and *"
        ]
    )
    assert result.outlines == []


def test_a_record_needs_no_library_of_the_page(pytester, monkeypatch):
    monkeypatch.setattr("pytest_batchinv.report.html.NEEDS", ("no_such_library",))
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", "--batchinv-report=a.json")
    assert result.ret == pytest.ExitCode.OK


def properties(path):
    """The properties of each test case of a JUnit file, by its name."""
    cases = ElementTree.parse(path).getroot().iter("testcase")
    return {case.get("name"): [(p.get("name"), p.get("value")) for p in case.iter("property")] for case in cases}


def test_junit_says_what_was_found_and_holds_no_record(pytester, run):
    pytester.makepyfile(
        TESTS
        + """
def test_with_a_property_of_its_own(request):
    request.node.user_properties.append(("mine", 1))

def test_without(): pass
"""
    )
    run("--batch-invariant", "--junit-xml=a.xml")
    found = properties(pytester.path / "a.xml")
    stub = "stub-model (fp32, attention batch_invariant, {}, cpu)"
    for compile_mode in ("eager", "default"):
        assert found[f"test_model[{compile_mode}]"] == [
            ("batchinv.subject", stub.format(compile_mode)),
            ("batchinv.relation.R", "equal"),
            ("batchinv.relation.R.batches", "20"),
            ("batchinv.relation.I", "equal"),
            ("batchinv.relation.I.batches", "20"),
            ("batchinv.mode", "on"),
        ]
    assert found["test_that_fails"] == [
        ("batchinv.subject", stub.format("eager")),
        ("batchinv.relation.X", "differs"),
        ("batchinv.relation.X.batches", "20"),
        ("batchinv.relation.X.replay", "pytest --batch-invariant --batchinv-shape '{}' test_it.py::test_it"),
        ("batchinv.mode", "off"),
    ]
    assert [value for name, value in found["test_controls"] if name == "batchinv.control.I"] == ["caught", "inconclusive"]
    assert found["test_with_a_property_of_its_own"] == [("mine", "1")]
    assert found["test_without"] == []
    assert "batchinv_record" not in pytester.path.joinpath("a.xml").read_text()


def test_records_of_workers_and_of_one_process_compare_as_equal(pytester):
    pytester.makepyfile(TESTS)
    for name, args in (("a.json", ()), ("b.json", ("-n2",))):
        pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", f"--batchinv-report={name}", *args)
    a, b = (str(pytester.path / name) for name in ("a.json", "b.json"))
    assert (command.main(["compare", a, b]), command.main(["compare", b, a])) == (0, 0)
    assert len(saved.read(pytester.path / "b.json").records) == 7


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


def test_while_off_there_is_no_section(pytester, run):
    pytester.makepyfile("def test_it(): pass")
    run().stdout.no_fnmatch_line("*batch invariance*")


def test_what_torch_logs_for_its_own_trace_is_not_printed_with_a_failure(pytester, run):
    pytester.makepyfile(
        a_compiler="""
        import logging

        def compile():
            logger = logging.getLogger("torch.__trace")
            logger.setLevel(logging.DEBUG)
            logger.debug("of the trace")
            logging.getLogger("mine").warning("of mine")
        """
    )
    pytester.makepyfile("import a_compiler\n\ndef test_it():\n    a_compiler.compile()\n    assert False\n")
    pytester.syspathinsert()
    result = run("--batch-invariant", "--batchinv-device=cpu")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*of mine*"])
    result.stdout.no_fnmatch_line("*of the trace*")


def test_a_script_of_the_operator_that_varies_is_written_beside_the_report(pytester, run):
    pytester.makepyfile(
        """
        import pytest
        from conftest import emit, finding
        from pytest_batchinv.report.record import Trace

        @pytest.mark.parametrize("way", ["a/b"])
        def test_that_fails(way):
            trace = Trace(ops=(), script="raise SystemExit(1)")
            emit("I", "differs", finding=finding(trace=trace))
            assert False
        """
    )
    result = run("--batch-invariant", "--batchinv-report", "run.json")
    result.stdout.fnmatch_lines(["record of this run: *run.json, and 1 script of the operators that vary, alone: *run-scripts"])
    (script,) = pytester.path.joinpath("run-scripts").iterdir()
    assert pytester.runpython(script).ret == 1
