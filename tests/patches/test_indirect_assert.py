"""Gathers inside a masked region on the CPU: the fault is there exactly where the gate is open, and gone with the patch."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn import functional as F

from pytest_batchinv.patches import registry
from pytest_batchinv.patches.registry import applied

needs_the_patch = pytest.mark.skipif(
    not registry.torch_version() < registry.Version("2.12"), reason="torch 2.12 and later write it right by themselves"
)
pytestmark = pytest.mark.usefixtures("cold")


def gathered_and_padded(x, index):
    return F.pad(x[:, index], (0, 0, 1, 1))


def inputs():
    torch.manual_seed(0)
    return torch.randn(8, 100), torch.randint(0, 100, (64,))


def smallest():
    return gathered_and_padded, inputs()


def decoder_of_emu3():
    """A real model: entries of a code book, gathered, laid out by rows of an image, and padded along time."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    config = Emu3VQVAEConfig(
        codebook_size=64, base_channels=32, channel_multiplier=[1], num_res_blocks=1, attn_resolutions=[], hidden_size=32,
        temporal_downsample_factor=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Emu3VQVAE(config).eval().decode, (torch.randint(0, 64, (1, 8, 8)),)


# The model takes 40 seconds to compile, and shows nothing where torch needs no patch.
subjects = pytest.mark.parametrize("subject", [smallest, pytest.param(decoder_of_emu3, marks=needs_the_patch)])


def compiles(subject) -> bool:
    """Whether it compiles, and then gives eager code's values; any other error than the known one is raised."""
    fn, arguments = subject()
    torch._dynamo.reset()
    with torch.no_grad():
        try:
            out = torch.compile(fn, fullgraph=True)(*arguments)
        except torch._inductor.exc.InductorError as error:
            assert "VecMask" in str(error)
            return False
        torch.testing.assert_close(out, fn(*arguments))
    return True


@subjects
def test_without_the_patch_the_fault_shows_exactly_where_the_gate_is_open(subject, needed):
    assert compiles(subject) == (not needed("indirect_assert"))


@subjects
def test_with_the_patch_it_compiles_and_after_it_the_method_is_the_same_object(subject):
    from torch._inductor.codegen.cpp import CppVecKernel

    before = vars(CppVecKernel)["indirect_assert"]
    with applied("inductor"):
        assert compiles(subject)
    assert vars(CppVecKernel)["indirect_assert"] is before


@needs_the_patch
def test_the_fault_is_back_after_the_patch():
    with applied("indirect_assert"):
        assert compiles(smallest)
    assert not compiles(smallest)


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
