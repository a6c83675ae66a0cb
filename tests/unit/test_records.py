"""Records, who gets them, and what the summary says of them."""

import json
import threading

import pytest

from pytest_batchinv import context
from pytest_batchinv.plugin.settings import DEFAULTS
from pytest_batchinv.report import json as json_report
from pytest_batchinv.report import record as records
from pytest_batchinv.report import saved, terminal
from pytest_batchinv.report.record import Counts, Finding, OpCoverage, Record, Section, Skipped
from pytest_batchinv.report.results import Results
from pytest_batchinv.subjects.base import SubjectInfo

FINDING = Finding(
    case='{"rows":[0,1]}',
    position=1,
    n_rows=2,
    row='{"id":1}',
    output="the output",
    sides=("alone", "in the batch"),
    kind="bits",
    index=(4,),
    expected="1.0",
    actual="2.0",
    expected_hex="0x3f800000",
    actual_hex="0x40000000",
    ulp=8388608,
    n_differ=3,
    n_total=64,
    sections=(Section("operators", ("aten::sqrt",)),),
)


def record(verdict="equal", relation="I", **words):
    info = SubjectInfo(name="m", kind="function", device="cpu", dtype="fp32")
    return Record(**{"subject": info, "relation": relation, "verdict": verdict, "mode": "on", **words})


def summary(*found):
    return terminal.summary(Results(DEFAULTS, list(found)))


def test_json_there_and_back():
    whole = record(
        "differs",
        finding=FINDING,
        hits={"aten::mm": 3},
        ops=OpCoverage(covered={"aten::mm": 3}, unverified=("aten::erfinv",)),
        not_run=(Skipped("{}", "memory"),),
        counts=Counts(examples=3, seconds=0.5),
    )
    assert Record.from_json(whole.to_json()) == whole


def test_fields_of_a_later_version_are_left_out():
    assert Record.from_json(json.dumps({**json.loads(record().to_json()), "of_tomorrow": 1})) == record()


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({**json.loads(record().to_json()), "verdict": "fine"})])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ValueError, match="not a record of schema 3: "):
        Record.from_json(text)


@pytest.mark.parametrize("verdict", ["equal", "inconclusive", "differs", "caught"])
def test_a_report_with_a_verdict_of_equal_bits_beside_a_finding_is_refused(tmp_path, verdict):
    """As one is that was changed by hand."""
    path = tmp_path / "run.json"
    json_report.write(Results(DEFAULTS, [record(verdict, finding=FINDING)]), path)
    if verdict in ("differs", "caught"):
        assert saved.read(path).records[0].verdict == verdict
    else:
        with pytest.raises(ValueError, match=f"contradicts itself: the record of .* says '{verdict}' and holds a finding"):
            saved.read(path)


def test_the_innermost_collector_gets_the_record_and_outside_nobody_does():
    outer, inner = [], []
    first, second, third = (record(relation=relation) for relation in "RIX")
    with context.collecting(outer.append):
        context.current().emit(first)
        with pytest.raises(KeyError), context.collecting(inner.append):
            context.current().emit(second)
            raise KeyError
        context.current().emit(third)
    context.current().emit(first)
    assert (outer, inner) == ([first, third], [second])


def test_another_thread_collects_for_itself():
    got = []
    with context.collecting(got.append):
        thread = threading.Thread(target=lambda: context.current().emit(record()))
        thread.start()
        thread.join()
    assert got == []


def test_the_machine_is_told_in_strings_that_json_knows():
    facts = records.machine()
    assert {"python", "platform", "torch", "threads", "pytest-batchinv"} <= facts.keys()
    assert Record.from_json(record(machine=facts).to_json()).machine == facts
    assert {type(value) for value in facts.values()} == {str}


def test_the_summary_of_no_record_says_so():
    assert summary() == ["no test recorded a check"]


def test_one_bad_check_among_good_ones_shows_in_the_table():
    counts = Counts(examples=10, rows=5, seconds=1.0)
    lines = summary(record(counts=counts), record("differs", counts=counts, finding=FINDING), record(counts=counts))
    [line] = [line for line in lines if line.startswith("  I ") and "batches" in line]
    assert line.split() == "I DIFFERS 30 batches 15 rows 0 bytes, 10 batches/s".split()


def test_a_subject_of_which_one_relation_broke_is_not_among_the_proven_ones():
    broken = [record(relation="R"), record("differs", finding=FINDING)]
    assert not [line for line in summary(*broken) if line.startswith("proven")]
    [line] = [line for line in summary(*broken, record(nodeid="another")) if line.startswith("proven")]
    assert "0 bits differ in I: 1 subject" in line


def test_many_operations_are_summed_up():
    lines = summary(record(hits={f"aten::op{i}": i for i in range(1, 31)}))
    start = lines.index("operations replaced: 30 overloads, 465 calls")
    counts = [int(line.split()[0]) for line in lines[start + 1 : lines.index("", start)]]
    assert counts[:2] == [30, 29]
    assert sum(counts) == 465


@pytest.mark.parametrize("words", [{"mode": "off"}, {"verdict": "error"}, {"verdict": "not_run"}])
def test_what_was_not_found_equal_in_the_mode_is_not_called_proven(words):
    assert not [line for line in summary(record(**words)) if line.startswith(("proven", "covered", "fingerprint"))]


def test_a_report_replaces_the_old_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def no_room(*args):
        raise OSError("no room")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(json_report.os, "replace", no_room)
        json_report.write(Results(DEFAULTS), path)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    json_report.write(Results(DEFAULTS, [record()]), path)
    assert Record.from_json(json.dumps(json.loads(path.read_text())["records"][0])) == record()
    assert list(tmp_path.iterdir()) == [path]
