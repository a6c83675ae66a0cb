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


def test_the_workflow_runs_every_row_of_the_matrix_on_the_reusable_one():
    jobs = yaml.safe_load(CI)["jobs"]
    commands = [step["run"] for step in jobs["matrix"]["steps"] if "run" in step]
    assert any("jq -c . .github/gpu-matrix.json" in command for command in commands)
    machine = jobs["machine"]
    assert machine["uses"] == "./.github/workflows/machine.yml"
    assert machine["strategy"]["matrix"] == "${{ fromJSON(needs.matrix.outputs.rows) }}"


def test_the_reusable_workflow_takes_exactly_what_it_is_given():
    given = yaml.safe_load(CI)["jobs"]["machine"]["with"]
    inputs = yaml.safe_load(MACHINE)[True]["workflow_call"]["inputs"]  # YAML reads the key "on" as true
    assert given.keys() == inputs.keys() == ROWS[0].keys()
    assert set(re.findall(r"inputs\.(\w+)", MACHINE)) == inputs.keys()


def test_the_reusable_workflow_tests_everywhere_and_keeps_the_record_of_the_suite_on_a_gpu():
    steps = yaml.safe_load(MACHINE)["jobs"]["run"]["steps"]
    (test,) = [step for step in steps if "make test" in step.get("run", "")]
    assert "if" not in test
    (suite,) = [step for step in steps if "make verify" in step.get("run", "")]
    (kept,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert "inputs.gpu != ''" in suite["if"]
    assert "inputs.gpu != ''" in kept["if"]
    assert f"REPORT={kept['with']['path']}" in suite["run"]


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
