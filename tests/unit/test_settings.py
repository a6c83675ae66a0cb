"""Settings: the order of their sources, and the parsers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pytest_batchinv import check, relations
from pytest_batchinv.plugin import markers, options, settings
from pytest_batchinv.subjects.rows import RowsSubject


def config(cli=None, ini=None):
    return SimpleNamespace(getoption=(cli or {}).get, getini=(ini or {}).get)


def test_nothing_given_is_the_default():
    assert settings.resolve(config(), {}) == settings.DEFAULTS
    assert not options.any_given(config(), {})


def test_the_command_line_comes_before_the_environment_before_the_ini_file():
    cli, env, ini = {"batchinv_dtype": "bf16"}, {"BATCHINV_DTYPE": "fp16"}, {"batchinv_dtype": "fp64"}
    assert settings.resolve(config(cli, ini), env).dtype == "bf16"
    assert settings.resolve(config(ini=ini), env).dtype == "fp16"
    assert settings.resolve(config(ini=ini), {}).dtype == "fp64"
    assert settings.resolve(config(ini=ini), {"BATCHINV_DTYPE": ""}).dtype == "fp64"


def test_every_option_has_a_field_and_three_sources_of_one_name():
    assert [option.name for option in options.OPTIONS] == list(settings.Settings.__dataclass_fields__)
    assert {option.flag for option in options.OPTIONS if not option.flag.startswith("--batchinv-")} == {"--batch-invariant"}
    for option in options.OPTIONS:
        assert (option.ini, option.env) == (f"batchinv_{option.name}", f"BATCHINV_{option.name.upper()}")


def test_reports_are_several_from_every_source(monkeypatch, tmp_path):
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


@pytest.mark.parametrize(
    "environ, ini, says",
    [
        ({"BATCHINV_ENABLE": "1"}, {}, "no environment variable BATCHINV_ENABLE; there are .*BATCHINV_ENABLED, .*_REPORT"),
        ({"BATCHINV_MAX_EXAMPLE": "7"}, {}, "no environment variable BATCHINV_MAX_EXAMPLE; there are .*BATCHINV_MAX_EXAMPLES"),
        ({}, {"batchinv_enable": "1"}, "no ini option batchinv_enable; there are .*batchinv_enabled, "),
    ],
)
def test_a_misspelt_name_is_refused_with_the_right_ones(environ, ini, says):
    given = SimpleNamespace(getoption={}.get, getini={}.get, _inicfg=ini)
    assert options.any_given(given, environ)
    with pytest.raises(ValueError, match=says):
        settings.resolve(given, environ)


def test_a_variable_that_is_read_elsewhere_is_no_misspelling():
    assert settings.resolve(config(), {"BATCHINV_CACHE_DIR": "/tmp/x"}) == settings.DEFAULTS


@pytest.mark.parametrize("count", [0, -1, "5", 1.0, True])
def test_a_count_of_examples_is_refused_in_the_same_words_everywhere(count):
    says = rf"max_examples={count!r} is not a whole number from 1 on"
    with pytest.raises(ValueError, match=says):
        markers.parse_batch_invariant((), {"max_examples": count})
    with pytest.raises(ValueError, match=says):
        check.assert_batch_invariant(torch.relu, torch.ones(3, 2), max_examples=count)
    with pytest.raises(ValueError, match=says):
        check.check_batch_invariant(RowsSubject(torch.relu, [torch.ones(3, 2)]), max_examples=count)


def test_the_options_know_the_relations_of_the_registry_and_the_negative_control():
    words = {letter: relation.words for letter, relation in relations.RELATIONS.items()}
    assert options.RELATIONS == {**words, "N": options.RELATIONS["N"]}


def test_relations_are_in_the_order_in_which_they_are_checked():
    assert options.parse_relations("N, X,I ,R,S,R") == ("R", "S", "I", "X", "N")


@pytest.mark.parametrize("text", ["", "R,", "r", "Z", "R;I"])
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
    changed = markers.parse_batch_invariant((), {"relations": ["I", "R"], "dtype": "bf16"})
    assert changed == {"relations": ("R", "I"), "dtype": "bf16"}
    assert markers.parse_batch_invariant((), {}) == {}
