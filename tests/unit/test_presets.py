"""Presets and the layout of rows: pure data, without torch."""

import subprocess
import sys

import pytest

from pytest_batchinv.shapes import CONTENTS, BatchShape, Row
from pytest_batchinv.subjects import presets
from pytest_batchinv.subjects.presets import PRESETS, UnknownModel, is_preset, preset_config
from pytest_batchinv.subjects.transformers.layout import NO_ROW, lay_out, row_tokens

ROWS = (Row(0, 2), Row(1, 5), Row(2, 1))
VOCABULARY, OUTLIER = 499, 498


def test_presets_need_no_torch():
    code = (
        "import sys, runpy; names = runpy.run_path(sys.argv[1]); names['preset_config']('tiny-qwen3'); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code, presets.__file__], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_ships_its_configuration(name):
    assert preset_config(name)["model_type"] in ("llama", "qwen3", "qwen3_moe", "gpt2", "gemma3_text", "gpt_oss")


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
    tokens = row_tokens(row, VOCABULARY, OUTLIER)
    assert tokens == row_tokens(Row(3, 50, content), VOCABULARY, OUTLIER)
    assert tokens != row_tokens(Row(4, 50, content), VOCABULARY, OUTLIER)
    assert len(tokens) == 50
    assert set(tokens) <= set(range(VOCABULARY))


def test_the_tokens_of_a_row_are_these_on_every_machine():
    assert row_tokens(Row(0, 6), VOCABULARY, OUTLIER) == [268, 292, 127, 253, 272, 389]


def test_contents_differ_in_their_outlier_tokens():
    outliers = {content: row_tokens(Row(0, 200, content), VOCABULARY, 7).count(7) for content in CONTENTS}
    assert outliers["random"] == outliers["repeated"] == 0
    assert 100 < outliers["extreme"] < 200
    assert len(set(row_tokens(Row(0, 200, "repeated"), VOCABULARY, 7))) == 1


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_every_row_stands_whole_in_its_place(layout):
    laid_out = lay_out(BatchShape(ROWS, layout, extra_padding=2), VOCABULARY, OUTLIER)
    for number, (row, span) in enumerate(zip(ROWS, laid_out.spans, strict=True)):
        slots = laid_out.sequences[span.sequence][span.start : span.stop]
        tokens = row_tokens(row, VOCABULARY, OUTLIER)
        assert list(slots) == [(token, number, position) for position, token in enumerate(tokens)]


@pytest.mark.parametrize(("layout", "first_sequence"), [("right", [0, 0] + [NO_ROW] * 5), ("left", [NO_ROW] * 5 + [0, 0])])
def test_padding_belongs_to_no_row_and_stands_on_its_side(layout, first_sequence):
    laid_out = lay_out(BatchShape(ROWS, layout, extra_padding=2), VOCABULARY, OUTLIER)
    assert laid_out.rows[0] == first_sequence
    assert {len(sequence) for sequence in laid_out.sequences} == {7}


def test_packed_rows_share_one_sequence_and_count_their_positions_anew():
    laid_out = lay_out(BatchShape(ROWS, "packed"), VOCABULARY, OUTLIER)
    assert laid_out.rows == [[0, 0, 1, 1, 1, 1, 1, 2]]
    assert laid_out.positions == [[0, 1, 0, 1, 2, 3, 4, 0]]
