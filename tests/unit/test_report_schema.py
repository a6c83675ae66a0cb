"""The description of the JSON report is that of the structs."""

import json
import typing
from pathlib import Path

import msgspec
import pytest

from pytest_batchinv.report import __main__ as command
from pytest_batchinv.report import record, schema
from pytest_batchinv.report.record import Finding, Record, Trace, TracedOp
from pytest_batchinv.report.saved import READABLE

PAGE = Path(__file__).parents[2].joinpath("docs", "report.md").read_text()


def test_the_page_is_what_the_structs_say():
    assert PAGE.endswith(f"\n{schema.markdown()}\n")


def test_every_struct_that_a_report_can_hold_is_described():
    described = schema.structs()
    assert {Record, Finding, Trace, TracedOp} <= set(described)
    for struct in described:
        assert f"### {struct.__name__}\n" in PAGE
        assert (struct.__doc__ or "").strip()
    for name in typing.get_type_hints(Finding):
        assert f"| `{name}` |" in PAGE


@pytest.mark.parametrize("words", [record.Verdict, record.Mode, record.Badge, record.Agreement])
def test_every_word_that_stands_for_something_is_explained(words):
    explained = PAGE[: PAGE.index("What follows is made of the code")]
    assert [word for word in typing.get_args(words) if f"`{word}`" not in explained] == []


def test_the_page_names_the_schemas_that_are_written_and_read():
    assert f"This version writes schema {record.SCHEMA} and reads {' and '.join(map(str, READABLE))}." in PAGE


def test_the_json_schema_is_printed(capsys):
    assert command.main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["$ref"] == "#/$defs/Saved"
    assert set(printed["$defs"]) == {struct.__name__ for struct in schema.structs()}
    assert set(printed["$defs"]["Record"]["properties"]) == {field.name for field in msgspec.structs.fields(Record)}
