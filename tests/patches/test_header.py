"""What a run in the mode says about the patches before its first test."""

import os
import re
from pathlib import Path

import pytest

from pytest_batchinv.patches import registry

# pytester gives its tests a home of their own, in which the CPU's kernels would have to be compiled again.
CACHE = os.environ.get("BATCHINV_CACHE_DIR") or str(Path.home() / ".cache" / "pytest-batchinv")


@pytest.fixture
def run(pytester):
    """pytest in a process of its own, without this project's settings."""

    def run(*arguments):
        pytester.makepyfile("def test_it(): pass")
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)

    return run


def test_the_header_has_rows_for_the_patches_and_none_without_the_option(run):
    lines = [line for line in run("--batch-invariant").outlines if "invariance: patches" in line]
    for row in registry.status():
        state = {"off": "off, as they change bits" if row.numerics else "with the mode"}.get(row.state, row.state)
        assert any(re.search(rf"patches {state}: [\w, ]*{row.name}", line) for line in lines)
    assert len(lines) == len({(row.state, row.numerics) for row in registry.status()})
    assert "invariance: patches" not in run().stdout.str()


def test_a_refused_patch_is_in_the_header_with_the_fingerprint_that_was_found(pytester, run):
    pytester.makeconftest(
        """
        from pytest_batchinv.patches.registry import patch

        @patch("torch._inductor.ir.StorageBox.num_reads", torch=">=2", group="inductor", reason="x", fingerprints={"2.0": "0"})
        def of_the_conftest(original):
            return original
        """
    )
    result = run("--batch-invariant")
    result.stdout.fnmatch_lines(["batch invariance: patch of_the_conftest REFUSED: the source of * unknown fingerprint *"])


def test_the_plugin_imports_no_torch_while_the_mode_is_off(pytester, run):
    pytester.makeconftest(
        """
        import sys

        def pytest_collection_finish(session):
            print("TORCH IMPORTED" if "torch" in sys.modules else "no torch yet")
        """
    )
    result = run("-s")
    result.assert_outcomes(passed=1)
    assert "no torch yet" in result.stdout.str()


def test_an_entry_that_is_taken_in_a_test_fails_that_test_at_its_end(pytester, monkeypatch):
    monkeypatch.setenv("BATCHINV_CACHE_DIR", CACHE)
    pytester.makepyfile(
        """
        import pytest, torch

        library = torch.library.Library("aten", "IMPL")

        @pytest.mark.batch_invariant
        def test_that_sets_another_library_up():
            torch.ones(2, 2) @ torch.ones(2, 2)
            library.impl("bmm", lambda a, b: a, "CPU", allow_override=True)
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore", "--batch-invariant")
    result.assert_outcomes(passed=1, errors=1)
    assert re.search(r"another library has taken aten::bmm on CPU, registered at .*\.py:\d+", result.stdout.str())
