"""compile_mode means the same on SM80 and on SM90: nothing runs eager code because of the GPU's capability."""

import inspect
import re
import textwrap

import pytest
from pytest_batchinv.kernels import inductor
from pytest_batchinv.patches import rules

from pytest_batchinv import fixtures, gpu
from pytest_batchinv.engines import module as module_engine
from pytest_batchinv.engines import transformers as transformers_engine
from pytest_batchinv.markers import COMPILE_MODES, GPU_COMPILE_MODES

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


@pytest.mark.parametrize("module", [transformers_engine, module_engine, inductor, rules, fixtures], ids=lambda m: m.__name__)
def test_nothing_between_a_compile_mode_and_torch_compile_asks_for_the_capability(module):
    assert re.findall(r"capability|get_device_properties|enforce_eager", inspect.getsource(module)) == []
