"""Saved reports: read, merged and compared, and ``python -m pytest_batchinv.report``."""

import json
import subprocess
import sys

import msgspec
import pytest
from saved_runs import COVERED, OPS, record, run

from pytest_batchinv.report import __main__ as command
from pytest_batchinv.report import compare, saved
from pytest_batchinv.report import json as json_report
from pytest_batchinv.report.record import SCHEMA, Counts, OpCoverage
from pytest_batchinv.report.saved import Run


def sentences(before, after, slack=0.0):
    return [(change.kind, change.sentence) for change in compare.compare(run(*before), run(*after), slack).changes]


def test_a_run_holds_against_itself():
    records = [record("R"), record("I"), record("I", "caught", mode="stock", control=True), record("X", "differs")]
    found = compare.compare(run(*records), run(*records))
    assert (found.changes, found.same) == ([], 3)


WORSE = {
    "is not equal": ([record()], [record(verdict="differs")], "was equal, is DIFFERS"),
    "raises": ([record()], [record(verdict="error", error="ValueError: no")], "was equal, is ERROR: ValueError: no"),
    "is refused": (
        [record()],
        [record(verdict="refused", error="aten::mm is not covered", ops=OPS)],
        "was equal, is REFUSED: aten::mm is not covered",
    ),
    "was not run": ([record()], [record(verdict="not_run", error="no memory")], "was equal, is not run: no memory"),
    "is not caught": (
        [record(verdict="caught", control=True, mode="stock")],
        [record(verdict="inconclusive", control=True, mode="stock")],
        "was caught, is INCONCLUSIVE",
    ),
    "relation is missing": ([record("R"), record("I")], [record("R")], "is missing in B: t.py::I"),
    "subject is missing": ([record(), record(name="n")], [record()], "is missing in B: t.py::I"),
    "dtype is missing": ([record()], [record(dtype="fp16")], "is missing in B: t.py::I"),
    "attention is missing": ([record()], [record(attention="eager")], "is missing in B: t.py::I"),
    "compile mode is missing": ([record()], [record(compile_mode="default")], "is missing in B: t.py::I"),
    "device is missing": ([record()], [record(device="cpu")], "is missing in B: t.py::I"),
    "control is missing": (
        [record(), record(verdict="caught", control=True, mode="stock")],
        [record()],
        "is missing in B: t.py::I",
    ),
    "mode is off": ([record()], [record(mode="off")], "is missing in B: t.py::I"),
    "test of the same subject is missing": (
        [record(nodeid="a"), record(nodeid="b", counts=Counts(examples=1))],
        [record(nodeid="a")],
        "is missing in B: b",
    ),
    "another test of the same subject differs": (
        [record(nodeid="a"), record(nodeid="b", verdict="differs")],
        [record(nodeid="a", verdict="differs"), record(nodeid="b")],
        "was equal, is DIFFERS",
    ),
    "fewer batches": ([record()], [record(counts=Counts(examples=411))], "ran 412 batches in A, 411 in B"),
    "fewer sizes": (
        [record()],
        [record(covered=("299 of 300 sizes (1-6, 8-300)", *COVERED[1:]))],
        "covered the batch sizes 7 in A, not in B",
    ),
    "smaller space": (
        [record()],
        [record(covered=("all sizes 1-200", *COVERED[1:]))],
        "covered the batch sizes 201-300 in A, not in B",
    ),
    "fewer pairs": (
        [record()],
        [record(covered=(*COVERED[:2], "1,559 of 1,560 pairs", *COVERED[3:]))],
        "covered 1,560 pairs in A, 1,559 in B",
    ),
    "fewer positions": (
        [record()],
        [record(covered=(COVERED[0], "1,279 of 40 x 32 positions", *COVERED[2:]))],
        "covered 1,280 positions in A, 1,279 in B",
    ),
    "no repeats": ([record()], [record(covered=(*COVERED[:3], COVERED[4]))], "covered 40 rows repeated in A, 0 in B"),
    "fewer layouts": ([record()], [record(covered=(*COVERED[:4], "layouts left"))], "covered the layouts right in A, not in B"),
    "operator is unverified": (
        [record()],
        [record(ops=OpCoverage(unverified=("aten::mm",), row_local=("aten::add",)))],
        "aten::mm was covered, is unverified",
    ),
    "operator is row-local": (
        [record()],
        [record(ops=OpCoverage(row_local=("aten::add", "aten::mm")))],
        "aten::mm was covered, is row-local",
    ),
    "operator runs past the table": (
        [record()],
        [record(ops=OpCoverage(covered={"aten::mm": 1}, bypassed=("aten::mm",), row_local=("aten::add",)))],
        "aten::mm was covered, is past the table",
    ),
    "operator was row-local": (
        [record()],
        [record(ops=OpCoverage(covered={"aten::mm": 1}, unverified=("aten::add",)))],
        "aten::add was row-local, is unverified",
    ),
    "operators are unknown": (
        [record()],
        [record(ops=OpCoverage(error="not traced"))],
        "the operators that ran are known in A, not in B: not traced",
    ),
    "operators are not recorded": (
        [record()],
        [record(ops=None)],
        "the operators that ran are known in A, not in B: no operators were recorded",
    ),
}


@pytest.mark.parametrize("before, after, sentence", WORSE.values(), ids=WORSE)
def test_what_holds_no_more_is_worse(before, after, sentence):
    assert [(kind, words) for kind, words in sentences(before, after) if kind == "worse"] == [("worse", sentence)]


BETTER = {
    "equal now": ([record(verdict="differs")], [record()], [("better", "was DIFFERS, is equal")]),
    "caught now": (
        [record(verdict="inconclusive", control=True, mode="stock")],
        [record(verdict="caught", control=True, mode="stock", counts=Counts(examples=3))],
        [("better", "was INCONCLUSIVE, is caught")],
    ),
    "more": ([record(counts=Counts(examples=4))], [record()], []),
    "another GPU of the host": ([record(device="cuda:1")], [record()], []),
    "a renamed test": ([record(nodeid="a")], [record(nodeid="b")], []),
    "a new relation": ([record()], [record(), record("X")], [("new", "was not checked before, is equal")]),
    "a new operator": ([record()], [record(ops=OpCoverage({"aten::mm": 1, "aten::bmm": 2}, ("aten::add",)))], []),
    "still unverified": (
        [record(ops=OpCoverage({"aten::mm": 1}, unverified=("aten::erfinv",)))],
        [record(ops=OpCoverage({"aten::mm": 1}, unverified=("aten::erfinv",)))],
        [],
    ),
    "caught sooner": (
        [record(verdict="caught", control=True, mode="stock")],
        [record(verdict="caught", control=True, mode="stock", counts=Counts(examples=2))],
        [],
    ),
    "all instead of one": (
        [record(replayed=True, covered=("the one batch that was given",), counts=Counts(examples=1))],
        [record()],
        [],
    ),
}


@pytest.mark.parametrize("before, after, changes", BETTER.values(), ids=BETTER)
def test_what_holds_as_before_or_better_is_not_worse(before, after, changes):
    assert sentences(before, after) == changes


def test_slack_is_for_counts_and_not_for_sizes():
    fewer = record(
        counts=Counts(examples=400),
        covered=("299 of 300 sizes (1-299)", COVERED[1], "1,500 of 1,560 pairs", *COVERED[3:]),
    )
    assert sentences([record()], [fewer], 0.05) == [("worse", "covered the batch sizes 300 in A, not in B")]


def write(path, *records, **words):
    json_report.write_saved(run(*records, **words), path)
    return str(path)


def test_the_command_says_what_is_worse_names_both_machines_and_fails(tmp_path, capsys):
    before = write(tmp_path / "a.json", record("R"), record("I"))
    there = {"machine": {"cpu": "b", "torch": "2.15.0"}, "fingerprint": "f2"}
    after = write(tmp_path / "b.json", record("R", **there), record("I", "differs", **there))
    assert command.main(["compare", before, after]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"A  {before}: 2 records",
        "   on a, ? threads, torch 2.13.0",
        "   fingerprint f1",
        f"B  {after}: 2 records",
        "   on b, ? threads, torch 2.15.0",
        "   fingerprint f2",
        "   cpu: a in A, b in B",
        "   torch: 2.13.0 in A, 2.15.0 in B",
        "",
        "WORSE   m (bf16, sdpa, eager, cuda), I alone == in a batch, in batch-invariant mode:",
        "        was equal, is DIFFERS",
        "",
        "B is worse than A in 1 place; 1 check held in both.",
    ]


def test_the_command_passes_where_all_holds(tmp_path, capsys):
    path = write(tmp_path / "a.json", record("R"), record("I"))
    assert command.main(["compare", path, path]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all that held in A holds in B: 2 checks."


@pytest.mark.parametrize("slack, status", [([], 1), (["--slack", "2"], 0), (["--slack", "1%"], 1)])
def test_the_command_takes_slack_in_percent(tmp_path, slack, status, capsys):
    before = write(tmp_path / "a.json", record())
    after = write(tmp_path / "b.json", record(counts=Counts(examples=405)))
    assert command.main(["compare", before, after, *slack]) == status


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot be read: No such file or directory."),
        ("{", "is no record of a run: "),
        ("\udcff", "is no record of a run: "),
        ("[]", "is no record of a run: "),
        ('{"records": []}', "is no record of a run: "),
        ('{"schema": 3, "records": [{}]}', "is no record of schema 3: "),
        ('{"schema": 1, "records": []}', "has schema 1, and this version reads 2 and 3: records of schema 1 call a check that"),
        ('{"schema": 99, "records": []}', "has schema 99, and this version reads 2 and 3. Update pytest-batchinv."),
        ('{"schema": 3, "records": []}', "holds no record, so there is nothing to compare."),
    ],
)
def test_what_is_no_record_is_told_in_a_sentence_and_is_no_answer(tmp_path, capsys, content, says):
    good, bad = write(tmp_path / "a.json", record()), tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content.encode("utf-8", "surrogateescape"))
    for pair in ([good, str(bad)], [str(bad), good]):
        assert command.main(["compare", *pair]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"pytest_batchinv.report compare: {bad} {says}")
        assert out == ""


def test_a_report_of_schema_2_is_read_and_one_record_of_another_schema_is_not(tmp_path):
    path = tmp_path / "a.json"
    old = json.loads(msgspec.json.encode(run(record())))
    old["schema"] = old["records"][0]["schema"] = 2
    path.write_text(json.dumps(old))
    assert saved.read(path).records == (record(schema=2),)
    old["records"][0]["schema"] = 1
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="has schema 1"):
        saved.read(path)


def test_every_schema_that_is_read_is_one_that_was_written():
    assert max(saved.READABLE) == SCHEMA


def test_reports_of_two_hosts_become_one(tmp_path, capsys):
    one = write(
        tmp_path / "a.json", record("R"), settings={"model": "auto", "seed": 1}, outcome={"exit_status": 0, "passed": 2}
    )
    there = {"cpu": "b", "torch": "2.13.0"}
    two = write(
        tmp_path / "b.json",
        record("R", machine=there),
        record("I", machine=there),
        settings={"model": "auto", "seed": 2},
        outcome={"exit_status": 1, "passed": 1, "failed": 1},
    )
    both = str(tmp_path / "c.json")
    assert command.main(["merge", one, two, "-o", both]) == 0
    assert capsys.readouterr().out == f"3 records of 2 runs: {both}\n"
    merged = saved.read(tmp_path / "c.json")
    assert merged.records == (record("R"), record("R", machine=there), record("I", machine=there))
    assert merged.machine == {"torch": "2.13.0"}
    assert merged.settings == {"model": "auto"}
    assert merged.outcome == {"exit_status": 1, "passed": 3, "failed": 1}
    assert [run.machine["cpu"] for run in merged.merged] == ["a", "b"]
    third = write(tmp_path / "d.json", record("X"))
    assert command.main(["merge", both, third, "-o", both]) == 0
    again = saved.read(tmp_path / "c.json")
    assert [len(again.records), len(again.merged)] == [4, 3]
    assert again.merged[2] == Run(machine=record().machine)


def test_a_run_that_did_not_end_makes_the_whole_unfinished():
    ended, cut = run(record(), outcome={"exit_status": 0}), run(record("R"), outcome={"exit_status": None})
    assert saved.merge({"a": ended, "b": cut}).outcome == {"exit_status": None}


def test_a_run_that_is_given_twice_is_not_counted_twice(tmp_path, capsys):
    path, copy = write(tmp_path / "a.json", record()), write(tmp_path / "b.json", record("R"), record())
    assert command.main(["merge", path, path, "-o", str(tmp_path / "c.json")]) == 2
    assert command.main(["merge", path, copy, "-o", str(tmp_path / "c.json")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].endswith(f"{path} is given more than once: give each run once.")
    assert err[1].endswith(f"{path} and {copy} hold the same record of t.py::I: give each run once.")
    assert not (tmp_path / "c.json").exists()


def test_a_saved_record_becomes_a_page(tmp_path, capsys):
    path = write(tmp_path / "a.json", record())
    assert command.main(["html", path]) == 0
    assert "0 bits differ in I" in (tmp_path / "a.html").read_text()
    assert command.main(["html", path, "-o", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
    assert command.main(["html", path, "-o", str(tmp_path / "no" / "b.html")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_a_page_of_two_hosts_names_both(tmp_path):
    there = {"cpu": "another", "torch": "2.13.0"}
    one, two = write(tmp_path / "a.json", record()), write(tmp_path / "b.json", record(machine=there))
    command.main(["merge", one, two, "-o", str(tmp_path / "c.json")])
    command.main(["html", str(tmp_path / "c.json")])
    text = (tmp_path / "c.html").read_text()
    assert '<h2 id="machines-title">Machines</h2>' in text
    assert "another, ? threads, torch 2.13.0" in text and "a, ? threads, torch 2.13.0" in text


def test_the_command_imports_no_torch(tmp_path):
    path = write(tmp_path / "a.json", record())
    code = (
        "import sys; from pytest_batchinv.report.__main__ main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    ).replace("__main__ main", "__main__ import main")
    for arguments in (["html", path], ["compare", path, path], ["schema"]):
        subprocess.run([sys.executable, "-P", "-c", code, *arguments], check=True, capture_output=True)
