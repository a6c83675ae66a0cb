"""compile_mode means the same on SM80 and on SM90: nothing runs eager code because of the GPU's capability."""

import textwrap

import pytest

from pytest_batchinv import gpu
from pytest_batchinv.plugin.markers import COMPILE_MODES, GPU_COMPILE_MODES

TEST = f"""
    import pytest
    from pytest_batchinv import gpu

    @pytest.mark.compile_mode(*{COMPILE_MODES!r})
    def test_it(compile_mode):
        assert compile_mode
"""


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_every_compile_mode_runs_whatever_the_capability(pytester, monkeypatch, capability):
    monkeypatch.setattr(gpu, "capability", lambda *args: capability)
    monkeypatch.setattr(gpu, "missing", lambda *args: "")
    monkeypatch.setattr(gpu, "resolve_device", lambda *args: "cuda")
    pytester.makepyfile(textwrap.dedent(TEST))
    result = pytester.inline_run("-p", "no:cacheprovider", "--batch-invariant")
    passed, skipped, failed = result.listoutcomes()
    ran = [report.nodeid.partition("[")[2].rstrip("]") for report in passed]
    assert sorted(ran) == sorted(COMPILE_MODES)
    assert set(GPU_COMPILE_MODES) <= set(ran)
    assert (skipped, failed) == ([], [])
