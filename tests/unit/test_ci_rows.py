"""Which rows of the matrix CI runs: those whose runner is there, and the others say that they have not run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / ".github/gpu-matrix.json").read_text(encoding="utf-8"))["include"]


def rows_that_run(folder: Path, **variables: str) -> tuple[list[str], list[str]]:
    """The names of the rows that CI is given, and the lines of the run's summary, one for each row of the matrix."""
    outputs = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    environment = {**variables, **{name: str(path) for name, path in outputs.items()}}
    subprocess.run([sys.executable, ROOT / ".github/rows.py"], env=environment, check=True)
    key, value = outputs["GITHUB_OUTPUT"].read_text().split("=", 1)
    assert key == "rows"
    return [row["name"] for row in json.loads(value)["include"]], outputs["GITHUB_STEP_SUMMARY"].read_text().splitlines()[2:]


@pytest.mark.parametrize("variables", [{}, {"GPU_RUNNERS": ""}])
def test_a_row_whose_gpu_has_no_runner_is_not_queued_and_says_that_it_has_not_run(variables, tmp_path):
    names, lines = rows_that_run(tmp_path, **variables)
    assert names == [row["name"] for row in ROWS if not row["gpu"]]
    for row, line in zip(ROWS, lines, strict=True):
        assert row["name"] in line
        assert ("not run" in line) == bool(row["gpu"])


def test_a_row_whose_runner_is_there_runs(tmp_path):
    names, lines = rows_that_run(tmp_path, GPU_RUNNERS="gpu-h100, gpu-a100,gpu-h200")
    assert names == [row["name"] for row in ROWS]
    assert "not run" not in "".join(lines)


def test_buildkite_gets_the_same_rows_and_skips_with_a_reason():
    command = [sys.executable, ROOT / ".github/rows.py", "--buildkite"]
    out = subprocess.run(command, env={"GPU_RUNNERS": "gpu-h100"}, check=True, capture_output=True, text=True).stdout
    steps = json.loads(out)["steps"]
    assert [step["label"] for step in steps] == [row["name"] for row in ROWS]
    for row, step in zip(ROWS, steps, strict=True):
        assert ("skip" in step) == bool(row["gpu"] and row["runner"] != "gpu-h100")
        assert f"TORCH={row['torch']} " in step["commands"][0] and step["commands"][0].startswith("make test ")
        assert any(command.startswith("make verify ") for command in step["commands"]) == bool(row["gpu"])


def test_every_python_that_is_supported_and_both_gpus_have_a_row():
    assert {row["python"] for row in ROWS if not row["gpu"]} == {"3.11", "3.12", "3.13"}
    assert {row["gpu"] for row in ROWS} >= {"A100", "H100", "H200"}
