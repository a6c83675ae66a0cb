"""A finding comes with a script of the one operator, which runs without the subject and shows the fault by itself."""

import subprocess
import sys

import pytest
import torch

from pytest_batchinv import BatchVarianceError, assert_batch_invariant
from pytest_batchinv.mutants.faults import FAULTS


def trace_of(fn, *inputs, relations=("R", "S", "I")):
    with pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(fn, *inputs, relations=relations, seed=0)
    return caught.value.finding.trace


def run(text, file):
    file.write_text(text)
    return subprocess.run([sys.executable, "-P", file], capture_output=True, text=True, check=False)


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(256, 64), torch.randn(40, 256)


def test_the_script_exits_with_1_while_the_fault_lives_and_with_0_when_it_does_not(tmp_path):
    script = trace_of(*linear()).script
    shown = run(script, tmp_path / "script.py")
    assert shown.returncode == 1 and "bytes of the row differ" in shown.stdout
    assert "pytest_batchinv" not in script
    mended = script.replace("torch.ops.aten.addmm.default(", "addmm(").replace(
        "OUTPUTS =", "def addmm(b, x, w):\n    return torch.stack([(row[:, None] * w).sum(0) + b for row in x])\n\n\nOUTPUTS ="
    )
    assert run(mended, tmp_path / "mended.py").returncode == 0


def test_drawn_numbers_are_taken_where_they_show_the_fault_and_else_the_findings_own():
    fault = next(fault for fault in FAULTS if fault.name == "split-K from 32 rows on")
    fn, pool = fault.make()
    script = trace_of(fn, pool).script
    assert "torch.float32, 0, 0, 'cpu')" in script
    assert "import pytest_batchinv.mutants.faults  # registers batchinv_mutants::split_k" in script

    special = torch.full((8, 64), 1e30)
    script = trace_of(lambda x: more_where_large(x) * 1.0, special).script
    assert "torch.float32, 0, 0, 'cpu')" not in script and "torch.float32, 0, 'c" in script


@torch.library.custom_op("batchinv_tests::more_where_large", mutates_args=())
def more_where_large(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0 if x.amax() > 1e20 and len(x) > 1 else x * 1.0


def test_a_script_keeps_strides_and_alignment():
    fault = next(fault for fault in FAULTS if fault.name == "memory that is not aligned")
    fn, pool = fault.make()
    script = trace_of(fn, pool).script
    assert "tensor([1, 64], [65, 1], torch.float32, 0," in script


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao, which is deprecated
def test_packed_weights_are_written_down(tmp_path):
    torch.manual_seed(0)
    layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(64, 16)), {torch.nn.Linear})
    trace = trace_of(layer, torch.randn(40, 64))
    assert trace.ops[trace.cause.op].overload == "quantized::linear_dynamic"
    assert run(trace.script, tmp_path / "script.py").returncode == 1


def test_what_cannot_be_written_down_says_why():
    fault = next(fault for fault in FAULTS if fault.name == "written in place for a few rows")
    fn, pool = fault.make()
    trace = trace_of(fn, pool)
    assert not trace.script
    assert any(note.startswith("no script of the operator alone: the call writes to") for note in trace.notes)


def test_a_result_that_is_none_is_left_out():
    """As attention on a GPU gives its logsumexp where no gradient asks for it."""
    library = torch.library.Library("batchinv_tests_none", "DEF")
    library.define("first(Tensor x) -> (Tensor, Tensor, Tensor)")
    library.impl("first", lambda x: (None, x * 1.0 if len(x) == 1 else x * (1 + 3e-7), None), "CPU")
    trace = trace_of(lambda x: torch.ops.batchinv_tests_none.first(x)[1], torch.randn(8, 16))
    assert "torch.ops.batchinv_tests_none.first.default(" in trace.script
