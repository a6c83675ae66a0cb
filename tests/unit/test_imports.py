"""What importing the package brings along, and what it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
