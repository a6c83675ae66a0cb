"""The table of architectures: each is built tiny and seeded, asked for relations, and a failure is a line and not an end."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pytest_batchinv.architectures import __main__ as command
from pytest_batchinv.architectures.configs import names, tiny_config, tiny_model
from pytest_batchinv.architectures.document import document


def run(capsys, *arguments):
    command.main([*arguments, "--cases", "2"])
    return capsys.readouterr().out


def test_models_are_tiny_and_the_same_every_time():
    one, other = (tiny_model("mistral", torch.float32) for _ in range(2))
    assert 1000 < sum(p.numel() for p in one.parameters()) < 1_000_000
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_every_kind_of_layer_is_there():
    assert set(tiny_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}
    assert {"llama", "qwen3", "gpt2", "mamba2", "bart"} <= set(names())


def test_a_line_says_what_was_equal_what_differs_and_what_was_left_out(capsys, tmp_path):
    out = tmp_path / "lines.jsonl"
    said = run(capsys, "llama", "mamba2", "--relations", "R,C", "--out", str(out))
    llama, mamba = map(json.loads, out.read_text().splitlines())
    assert (llama["relations"]["R"], llama["relations"]["C"]) == ({"equal": 2, "differ": 0, "errors": 0},) * 2
    assert llama["caches"] == ["dynamic", "static"]
    assert "keeps no cache" in mamba["relations"]["C"]["not_asked"]
    assert "llama                        R 2 equal  C 2 equal" in said
    assert "2 of 2 architectures were loaded" in said
    assert "C: 1 equal, 0 differ, 0 other, 1 not asked" in said


def test_a_fault_is_in_the_line_and_in_the_sum(capsys, monkeypatch, tmp_path):
    stock = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: stock(self, x) * (1 + 3e-7 * (x.shape[-2] > 16)))
    said = run(capsys, "llama", "--relations", "C", "--out", str(tmp_path / "lines.jsonl"))
    assert re.search("C [01] equal, [12] DIFFER", said)
    assert "C: 0 equal, 1 differ" in said
    (line,) = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    assert '"steps"' in line["relations"]["C"]["first_difference"]


def test_an_architecture_that_fails_is_a_line_and_one_that_there_is_not_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(command, "tiny_model", lambda name, dtype: 1 / 0)
    assert "llama                        ZeroDivisionError" in run(capsys, "llama")
    with pytest.raises(SystemExit):
        command.main(["no-such-thing"])
    assert "has no causal architecture no-such-thing" in capsys.readouterr().err


def test_the_document_is_made_of_the_stored_lines_and_tells_what_is_not_equal():
    root = Path(__file__).parents[2]
    stored = root / "benchmarks/results/architectures-cpu-fp32-part.jsonl"
    lines = [json.loads(line) for line in stored.read_text().splitlines()]
    made = document(lines)
    assert made == (root / "docs/architectures.md").read_text()
    loaded = [line for line in lines if "error" not in line]
    for line in loaded:
        (row,) = [text for text in made.splitlines() if text.startswith(f"| {line['architecture']} | ")]
        assert ("differ**" in row) == any(cells.get("differ") for cells in line["relations"].values())
        assert ("failed" in row) == any(cells.get("errors") for cells in line["relations"].values())
    assert made.count("\n* ") == len(lines) - len(loaded)
