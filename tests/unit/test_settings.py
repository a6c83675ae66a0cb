"""Settings: the order of the doors, and the parsers."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_batchinv import markers, options, settings


def config(cli=None, ini=None):
    return SimpleNamespace(getoption=(cli or {}).get, getini=(ini or {}).get)


def test_nothing_given_is_the_default():
    assert settings.resolve(config(), {}) == settings.DEFAULTS
    assert settings.active.get() == settings.DEFAULTS


def test_the_command_line_comes_before_the_environment_before_the_ini_file():
    cli, env, ini = {"batchinv_dtype": "bf16"}, {"BATCHINV_DTYPE": "fp16"}, {"batchinv_dtype": "fp64"}
    assert settings.resolve(config(cli, ini), env).dtype == "bf16"
    assert settings.resolve(config(ini=ini), env).dtype == "fp16"
    assert settings.resolve(config(ini=ini), {}).dtype == "fp64"
    assert settings.resolve(config(ini=ini), {"BATCHINV_DTYPE": ""}).dtype == "fp64"


def test_every_option_has_a_field_and_three_doors_of_one_name():
    assert [option.name for option in options.OPTIONS] == list(settings.Settings.__dataclass_fields__)
    assert {option.flag for option in options.OPTIONS if not option.flag.startswith("--batchinv-")} == {"--batch-invariant"}
    for option in options.OPTIONS:
        assert (option.ini, option.env) == (f"batchinv_{option.name}", f"BATCHINV_{option.name.upper()}")


def test_reports_are_several_from_every_door(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = (tmp_path / "a.json", tmp_path / "b.json")
    given = ["a.json", "b.json"]
    assert settings.resolve(config({"batchinv_report": given}), {}).report == expected
    assert settings.resolve(config(), {"BATCHINV_REPORT": "a.json:b.json"}).report == expected
    assert settings.resolve(config(ini={"batchinv_report": given}), {}).report == expected


def test_a_switch_is_on_or_off_in_every_spelling():
    for text, value in {"1": True, "On": True, "TRUE": True, "no": False, "0": False}.items():
        assert settings.resolve(config(), {"BATCHINV_ENABLED": text}).enabled is value
    with pytest.raises(ValueError, match="BATCHINV_ENABLED: 'maybe' is neither on nor off; write one of 1, true"):
        settings.resolve(config(), {"BATCHINV_ENABLED": "maybe"})
    assert settings.resolve(config(ini={"batchinv_enabled": True}), {}).enabled
    assert not settings.resolve(config(ini={"batchinv_enabled": True}), {"BATCHINV_ENABLED": "0"}).enabled


def test_an_ini_value_that_pytest_itself_refuses_is_named():
    def getini(name):
        raise ValueError("invalid truth value 'maybe'")

    with pytest.raises(ValueError, match="ini option batchinv_enabled: invalid truth value 'maybe'"):
        settings.resolve(SimpleNamespace(getoption={}.get, getini=getini), {})


def test_relations_are_in_the_order_in_which_they_are_checked():
    assert options.parse_relations("N, X,I ,R,R") == ("R", "I", "X", "N")


@pytest.mark.parametrize("text", ["", "R,", "r", "L", "R;I"])
def test_unknown_relations_are_named(text):
    with pytest.raises(ValueError, match="no such relation as '.*'; ask for one or more of R "):
        options.parse_relations(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "ten", "", "²"])
def test_a_count_is_a_whole_number_from_1_on(text):
    with pytest.raises(ValueError, match="is not a whole number from 1 on"):
        options.parse_count(text)


def test_a_report_s_path_is_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.parse_report("~/a.json") == tmp_path / "a.json"
    assert options.parse_report("a.json") == Path.cwd() / "a.json"


def test_a_marker_changes_only_what_it_names():
    marker = markers.parse_batch_invariant((), {"relations": ["I", "R"], "dtype": "bf16"})
    applied = marker.applied_to(settings.DEFAULTS)
    assert (applied.relations, applied.dtype, applied.max_examples) == (("R", "I"), "bf16", 100)
    assert markers.parse_batch_invariant((), {}).applied_to(settings.DEFAULTS) == settings.DEFAULTS
