"""Batch-invariant mode inside vLLM: asked for or not at all, on a known version alone, and products that follow the mode.

Each test runs in a process of its own, beside a stand-in for vLLM: the plugin acts to the end of its process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parents[1] / "support" / "vllm_stand_in"
KNOWN = """
from pytest_batchinv.patches import registry
from pytest_batchinv.patches.fingerprints import definition
registry.load()
ours = registry._patches["vllm_products"]
ours.fingerprints = {"the stand-in": definition(ours.target).fingerprint}
"""
REGISTERED = "from pytest_batchinv import vllm_plugin\nvllm_plugin.register()\n"


def run(code, path=STAND_IN, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHINV_", "VLLM_"))}
    environment = {**clean, "PYTHONPATH": str(path), **variables}
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_the_plugin_does_nothing_unless_it_is_asked_for():
    for variables in ({}, {"BATCHINV_VLLM": ""}, {"BATCHINV_VLLM": "0"}):
        done = run(REGISTERED + "import sys; print('torch' in sys.modules, 'vllm' in sys.modules)", **variables)
        assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize(
    "variables, sentence",
    (
        ({"BATCHINV_VLLM": "maybe"}, "BATCHINV_VLLM: 'maybe' is neither on nor off"),
        ({"BATCHINV_VLLM": "1", "VLLM_BATCH_INVARIANT": "1"}, "are both on, and both take the same operators"),
        ({"BATCHINV_VLLM": "1", "path": "."}, "vLLM is not installed here: pip install vllm"),
        ({"BATCHINV_VLLM": "1"}, "vllm_products is refused: the source of .* has the unknown fingerprint .* in vLLM 0.32.0"),
    ),
    ids=("no switch", "two modes", "no vLLM", "other sources"),
)
def test_a_process_that_cannot_have_the_mode_ends_with_a_sentence(variables, sentence):
    done = run(REGISTERED, **variables)
    assert done.returncode == 1
    assert re.search(sentence, done.stderr), done.stderr


def test_another_version_is_refused(tmp_path):
    (tmp_path / "vllm").symlink_to(STAND_IN / "vllm")
    metadata = tmp_path / "vllm-0.33.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.1\n")
    done = run(REGISTERED, tmp_path, BATCHINV_VLLM="1")
    assert "vLLM 0.33.1 is installed, and its sources have not been read" in done.stderr
    done = run("from pytest_batchinv.patches import registry\nprint([r.why for r in registry.status() if r.vllm])", tmp_path)
    assert done.stdout == "['vLLM 0.33.1 is not ==0.32.*']\n"


def test_products_are_the_tables_in_the_mode_and_vllms_outside_of_it():
    done = run(
        KNOWN
        + """
import torch
from pytest_batchinv import mode, vllm_plugin
with mode.batch_invariant_mode() as before:  # entered before vLLM is imported
    vllm_plugin.prepare()
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(3, 2, dtype=dtype)
        x, weight, bias = torch.ones(4, 3, dtype=dtype), layer.weight, layer.bias
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        assert layer.weight is None
        assert torch.equal(layer.cpu_linear(x, None, bias.float()), torch.nn.functional.linear(x, weight, bias))
        with mode.stock_torch():
            assert layer.cpu_linear(x, None, None).min() > 900
    conv = torch.nn.Conv1d(2, 2, 3)
    dispatch_cpu_unquantized_gemm(conv, remove_weight=True)
    assert not hasattr(conv, "cpu_linear")
    assert torch.ops._C.greedy_argmax(torch.tensor([[1.0, 2.0]])).item() == 1
    assert before.hits["_C::greedy_argmax"] == 1
print("done")
"""
    )
    assert done.stdout == "done\n", done.stderr


def test_a_process_that_asks_for_the_mode_has_it_to_its_end():
    done = run(
        KNOWN
        + REGISTERED
        + REGISTERED
        + "from pytest_batchinv import mode; import os; print(mode.is_on(), os.environ['VLLM_DISABLE_COMPILE_CACHE'])",
        BATCHINV_VLLM="yes",
    )
    assert done.stdout == "True 1\n", done.stderr
