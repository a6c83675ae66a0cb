"""Gathers inside a masked region on the CPU: the fault is there exactly where the gate is open, and gone with the patch."""

import subprocess
import sys
import textwrap

import pytest
import torch
from pytest_batchinv.patches import registry
from pytest_batchinv.patches.registry import applied
from torch.nn import functional as F

needs_the_patch = pytest.mark.skipif(
    not registry.torch_version() < registry.Version("2.12"), reason="torch 2.12 and later write it right by themselves"
)
pytestmark = pytest.mark.usefixtures("cold")


def gathered_and_padded(x, index):
    return F.pad(x[:, index], (0, 0, 1, 1))


def inputs():
    torch.manual_seed(0)
    return torch.randn(8, 100), torch.randint(0, 100, (64,))


def compiles() -> bool:
    """Whether it compiles, and then gives eager code's values; any other error than the known one is raised."""
    x, index = inputs()
    torch._dynamo.reset()
    try:
        out = torch.compile(gathered_and_padded, fullgraph=True)(x, index)
    except torch._inductor.exc.InductorError as error:
        assert "VecMask" in str(error)
        return False
    assert torch.equal(out, gathered_and_padded(x, index))
    return True


def test_without_the_patch_the_fault_shows_exactly_where_the_gate_is_open(needed):
    assert compiles() == (not needed("indirect_assert"))


def test_with_the_patch_it_compiles_and_after_it_the_method_is_the_same_object():
    from torch._inductor.codegen.cpp import CppVecKernel

    before = vars(CppVecKernel)["indirect_assert"]
    with applied("inductor"):
        assert compiles()
    assert vars(CppVecKernel)["indirect_assert"] is before


@needs_the_patch
def test_the_fault_is_back_after_the_patch():
    with applied("indirect_assert"):
        assert compiles()
    assert not compiles()


def test_an_index_out_of_bounds_is_still_caught_under_the_mask():
    x, index = inputs()
    index[3] = 100
    script = """
        import torch
        from pytest_batchinv.patches.registry import applied
        torch.manual_seed(0)
        x, index = torch.randn(8, 100), torch.randint(0, 100, (64,))
        index[3] = {}
        with applied("inductor"):
            torch.compile(lambda x, i: torch.nn.functional.pad(x[:, i], (0, 0, 1, 1)), fullgraph=True)(x, index)
        """

    def run(value):
        code = textwrap.dedent(script).format(value)
        return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)

    assert run(99).returncode == 0
    assert "index out of bounds" in run(100).stderr


@needs_the_patch
def test_inductors_cpp_backend_is_not_imported_for_it_and_a_look_at_its_spec_does_not_use_it_up():
    code = """
        import importlib.util, sys, torch
        from pytest_batchinv.patches import registry
        state = lambda: {row.name: row.state for row in registry.status()}["indirect_assert"]
        with registry.applied("inductor"):
            assert "torch._inductor.codegen.cpp" not in sys.modules
            assert importlib.util.find_spec("torch._inductor.codegen.cpp") is not None
            assert state() == "waiting", state()
            torch.compile(lambda x: x + 1)(torch.ones(3))
            assert "torch._inductor.codegen.cpp" in sys.modules
            assert state() == "applied", state()
        print("done")
        """
    done = subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
