"""The CI matrix as data, and what importing the package does and does not bring along."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / ".github/gpu-matrix.json").read_text(encoding="utf-8"))["include"]
CI = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
MACHINE = (ROOT / ".github/workflows/machine.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_matrix_has_a_cpu_row_for_every_python(python):
    assert [row for row in ROWS if (row["gpu"], row["capability"], row["python"]) == ("", "", python)]


@pytest.mark.parametrize(("gpu", "capability"), [("A100", "80"), ("H100", "90")])
def test_the_matrix_has_a_row_for_each_generation_of_gpus(gpu, capability):
    assert [row for row in ROWS if (row["gpu"], row["capability"]) == (gpu, capability)]


def test_every_row_has_a_name_of_its_own():
    assert len({row["name"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_every_row_holds_each_key_that_the_workflow_reads_and_no_other(row):
    read = set(re.findall(r"\{ matrix\.(\w+)", CI))
    assert {"runner", "python", "torch", "gpu", "capability"} <= read
    assert set(row) == read
    assert all(isinstance(value, str) for value in row.values())


def test_every_row_that_names_a_gpu_names_its_capability():
    assert all(bool(row["gpu"]) == bool(row["capability"]) for row in ROWS)


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
    names, lines = rows_that_run(tmp_path, GPU_RUNNERS="gpu-h100, gpu-a100")
    assert names == [row["name"] for row in ROWS]
    assert "not run" not in "".join(lines)


def test_the_workflow_runs_every_row_of_the_matrix_on_the_reusable_one():
    jobs = yaml.safe_load(CI)["jobs"]
    (read,) = [step for step in jobs["matrix"]["steps"] if step.get("run") == "python3 .github/rows.py"]
    assert read["env"] == {"GPU_RUNNERS": "${{ vars.GPU_RUNNERS }}"}
    machine = jobs["machine"]
    assert machine["uses"] == "./.github/workflows/machine.yml"
    assert machine["strategy"]["matrix"] == "${{ fromJSON(needs.matrix.outputs.rows) }}"


def test_the_reusable_workflow_takes_exactly_what_it_is_given():
    given = yaml.safe_load(CI)["jobs"]["machine"]["with"]
    inputs = yaml.safe_load(MACHINE)[True]["workflow_call"]["inputs"]  # YAML reads the key "on" as true
    assert given.keys() == inputs.keys() == ROWS[0].keys()
    assert set(re.findall(r"inputs\.(\w+)", MACHINE)) == inputs.keys()


def test_the_reusable_workflow_tests_everywhere_and_keeps_the_records_of_a_gpu():
    steps = yaml.safe_load(MACHINE)["jobs"]["run"]["steps"]
    (test,) = [step for step in steps if "make test" in step.get("run", "")]
    assert "if" not in test
    (suite,) = [step for step in steps if "make verify" in step.get("run", "")]
    (bits,) = [step for step in steps if "benchmarks/class_check.py" in step.get("run", "")]
    (kept,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    for step in (suite, bits, kept):
        assert "inputs.gpu != ''" in step["if"]
    record, check = kept["with"]["path"].split()
    assert f"REPORT={record}" in suite["run"]
    assert f"--out {check}" in bits["run"]


# --- imports ----------------------------------------------------------------------------------------------------------


def python(code: str) -> str:
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", ["kernels", "patches"])
def test_the_folders_of_the_checkout_are_no_top_level_packages(name):
    assert python(f"import importlib.util; print(importlib.util.find_spec({name!r}))") == "None"


def test_this_pytest_run_has_the_checkout_root_off_its_path():
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


@pytest.mark.parametrize("module", ["pytest_batchinv", "pytest_batchinv.plugin"])
def test_importing_it_imports_no_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'triton', 'numpy'}} & sys.modules.keys()))"
    assert python(code) == "[]"
