"""Presets and the layout of rows: pure data, without torch."""

import subprocess
import sys

import pytest

from pytest_batchinv.engines import presets
from pytest_batchinv.engines.layout import NO_ROW, lay_out, row_tokens
from pytest_batchinv.engines.presets import PRESETS, UnknownModel, is_preset, preset_config
from pytest_batchinv.shapes import CONTENTS, BatchShape, Row

ROWS = (Row(0, 2), Row(1, 5), Row(2, 1))
VOCABULARY, LOUD = 499, 498


def test_presets_need_no_torch():
    code = (
        "import sys, runpy; names = runpy.run_path(sys.argv[1]); names['preset_config']('tiny-qwen3'); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code, presets.__file__], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_ships_its_configuration(name):
    assert preset_config(name)["model_type"] in ("llama", "qwen3", "qwen3_moe", "gpt2", "gemma3_text")


@pytest.mark.parametrize("name", ["random:qwen3-9000b", "tiny-nothing"])
def test_a_misspelt_preset_is_refused_with_the_right_names(name):
    with pytest.raises(UnknownModel, match=f"no model '{name}'.*tiny-qwen3.*random:llama-3.1-8b.*hub id"):
        is_preset(name)


def test_paths_and_hub_ids_are_no_presets():
    assert not is_preset("org/name")
    assert not is_preset("./checkpoint")


@pytest.mark.parametrize("content", CONTENTS)
def test_the_tokens_of_a_row_depend_on_the_row_alone(content):
    row = Row(3, 50, content)
    tokens = row_tokens(row, VOCABULARY, LOUD)
    assert tokens == row_tokens(Row(3, 50, content), VOCABULARY, LOUD)
    assert tokens != row_tokens(Row(4, 50, content), VOCABULARY, LOUD)
    assert len(tokens) == 50
    assert set(tokens) <= set(range(VOCABULARY))


def test_the_tokens_of_a_row_are_these_on_every_machine():
    assert row_tokens(Row(0, 6), VOCABULARY, LOUD) == [268, 292, 127, 253, 272, 389]


def test_contents_differ_in_their_loud_tokens():
    loud = {content: row_tokens(Row(0, 200, content), VOCABULARY, 7).count(7) for content in CONTENTS}
    assert loud["random"] == loud["repeated"] == 0
    assert 100 < loud["extreme"] < 200
    assert len(set(row_tokens(Row(0, 200, "repeated"), VOCABULARY, 7))) == 1


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_every_row_stands_whole_in_its_place(layout):
    sheet = lay_out(BatchShape(ROWS, layout, extra_padding=2), VOCABULARY, LOUD)
    for number, (row, place) in enumerate(zip(ROWS, sheet.places, strict=True)):
        cells = sheet.lines[place.line][place.start : place.stop]
        tokens = row_tokens(row, VOCABULARY, LOUD)
        assert list(cells) == [(token, number, position) for position, token in enumerate(tokens)]


@pytest.mark.parametrize(("layout", "first_line"), [("right", [0, 0] + [NO_ROW] * 5), ("left", [NO_ROW] * 5 + [0, 0])])
def test_padding_belongs_to_no_row_and_stands_on_its_side(layout, first_line):
    sheet = lay_out(BatchShape(ROWS, layout, extra_padding=2), VOCABULARY, LOUD)
    assert sheet.rows[0] == first_line
    assert {len(line) for line in sheet.lines} == {7}


def test_packed_rows_share_one_line_and_count_their_positions_anew():
    sheet = lay_out(BatchShape(ROWS, "packed"), VOCABULARY, LOUD)
    assert sheet.rows == [[0, 0, 1, 1, 1, 1, 1, 2]]
    assert sheet.positions == [[0, 1, 0, 1, 2, 3, 4, 0]]
