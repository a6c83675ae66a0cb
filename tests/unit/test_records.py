"""Records, and who gets them."""

import json
import threading

import pytest

from pytest_batchinv import records
from pytest_batchinv.records import Record
from pytest_batchinv.report import Results, terminal
from pytest_batchinv.report import json as json_report
from pytest_batchinv.settings import DEFAULTS


def test_json_there_and_back():
    record = Record("m", "I", "differs", hits={"aten::mm": 3}, difference={"index": [1, 2]}, not_run=[{"reason": "memory"}])
    assert Record.from_json(record.to_json()) == record


def test_fields_of_a_later_version_are_left_out():
    text = json.dumps({**json.loads(Record("m", "I", "equal").to_json()), "of_tomorrow": 1})
    assert Record.from_json(text) == Record("m", "I", "equal")


def test_an_unknown_verdict_is_refused():
    with pytest.raises(ValueError, match="a verdict is one of equal, differs, .*, not 'fine'"):
        Record("m", "I", "fine")


def test_the_innermost_collector_gets_the_record_and_outside_nobody_does():
    outer, inner = [], []
    first, second, third = (Record("m", relation, "equal") for relation in "RIX")
    with records.collecting(outer.append):
        records.emit(first)
        with pytest.raises(KeyError), records.collecting(inner.append):
            records.emit(second)
            raise KeyError
        records.emit(third)
    records.emit(first)
    assert (outer, inner) == ([first, third], [second])


def test_the_machine_is_told_in_strings():
    facts = records.machine()
    assert {"python", "platform", "torch", "threads", "pytest-batchinv"} <= facts.keys()
    assert all(isinstance(value, str) for value in facts.values())


def test_the_summary_of_no_record_says_so():
    assert terminal.summary(Results(DEFAULTS)) == ["no test recorded a check"]


def test_one_bad_check_among_good_ones_shows_in_the_table():
    found = [Record("m", "I", verdict, examples=10) for verdict in ("equal", "differs", "equal")]
    [line] = [line for line in terminal.summary(Results(DEFAULTS, found)) if "alone == in a batch  " in line]
    assert line.split()[-5:] == ["DIFFERS", "30", "0", "0", "bytes"]


def test_many_operations_are_summed_up():
    hits = {f"aten::op{i}": i for i in range(1, 31)}
    lines = terminal.summary(Results(DEFAULTS, [Record("m", "I", "equal", hits=hits)]))
    start = lines.index("operations replaced: 30 overloads, 465 calls")
    counts = [int(line.split()[0]) for line in lines[start + 1 : lines.index("", start)]]
    assert counts[:2] == [30, 29]
    assert sum(counts) == 465


def test_a_report_replaces_the_old_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def no_room(*args):
        raise OSError("no room")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(json_report.os, "replace", no_room)
        json_report.write(Results(DEFAULTS), path)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    json_report.write(Results(DEFAULTS, [Record("m", "I", "equal")]), path)
    assert Record.from_json(json.dumps(json.loads(path.read_text())["records"][0])) == Record("m", "I", "equal")
    assert list(tmp_path.iterdir()) == [path]


def test_another_thread_collects_for_itself():
    got = []
    with records.collecting(got.append):
        thread = threading.Thread(target=records.emit, args=(Record("m", "I", "equal"),))
        thread.start()
        thread.join()
    assert got == []
