"""The cost model for reuse: which bits it moves, that none moves with the mode's rounding, and that the mode guards this."""

import contextlib

import pytest
import torch

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.patches import inductor_config, registry
from pytest_batchinv.patches.registry import PatchRefused, PatchWarning, applied, status

HIDDEN, MOST = 256, 16
pytestmark = pytest.mark.usefixtures("cold")


def shared(x, w1, b, w2):
    """A value with three users that cannot share one loop: stored it is rounded once more. Its cost follows the batch."""
    h = (x * w1 + b) * w2
    return h.flip(-1) + x, h.roll(1, -1) * x, h - b


def operands(dtype):
    torch.manual_seed(0)
    return [torch.randn(MOST, HIDDEN).to(dtype), *(torch.randn(HIDDEN).to(dtype) for _ in range(3))]


def rows_that_differ(dtype, patched, **settings) -> set[int]:
    """The batch sizes at which some row has other bits than in the batch of 16; static shapes, each compiled by itself."""
    x, *weights = operands(dtype)

    def run(size):
        torch._dynamo.reset()
        return torch.compile(shared, fullgraph=True, dynamic=False)(x[:size], *weights)

    with applied("realize_by_bytes") if patched else contextlib.nullcontext(), torch._inductor.config.patch(settings):
        full = run(MOST)
        return {
            size
            for size in (1, 2, 3)
            if any(not torch.equal(part, whole[:size]) for part, whole in zip(run(size), full, strict=True))
        }


def test_without_the_patch_no_row_of_bf16_depends_on_the_batch():
    assert rows_that_differ(torch.bfloat16, patched=False) == set()


def test_with_the_patch_rows_of_bf16_do_depend_on_the_batch():
    assert rows_that_differ(torch.bfloat16, patched=True) == {1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_with_eager_codes_rounding_the_patch_moves_no_bit(dtype):
    """Against torch with the same setting, at sizes where the decision differs; on the CPU before 2.13 by rounded_casts."""
    x, *weights = operands(dtype)
    with applied("inductor"), torch._inductor.config.patch(emulate_precision_casts=True):
        for size in (1, MOST):
            torch._dynamo.reset()
            stock = torch.compile(shared, fullgraph=True, dynamic=False)(x[:size], *weights)
            with applied("realize_by_bytes"):
                patched = torch.compile(shared, fullgraph=True, dynamic=False)(x[:size], *weights)
            assert all(torch.equal(a, b) for a, b in zip(stock, patched, strict=True))


def test_the_patch_changes_what_is_stored():
    """So that the equal bits above are not those of a patch that does nothing."""
    from torch._inductor import metrics

    x, *weights = operands(torch.bfloat16)

    def kernels(patched):
        torch._dynamo.reset()
        metrics.reset()
        with applied("realize_by_bytes") if patched else contextlib.nullcontext():
            with torch._inductor.config.patch(emulate_precision_casts=True):
                torch.compile(shared, fullgraph=True, dynamic=False)(x[:1], *weights)
        return metrics.ir_nodes_pre_fusion

    assert kernels(patched=True) > kernels(patched=False)


def test_the_method_is_the_same_object_after():
    from torch._inductor.ir import StorageBox

    before = vars(StorageBox)["should_realize_on_reuse"]
    with applied("realize_by_bytes"):
        assert vars(StorageBox)["should_realize_on_reuse"] is not before
    assert vars(StorageBox)["should_realize_on_reuse"] is before


def test_it_is_off_unless_asked_for_by_name():
    def state():
        return {row.name: row.state for row in status()}["realize_by_bytes"]

    with applied("inductor"), batch_invariant_mode():
        assert state() == "off"
    with applied("realize_by_bytes"):
        assert state() == "applied"


def test_the_mode_takes_it_because_the_mode_rounds_as_eager_code_does():
    x, *weights = operands(torch.bfloat16)
    expected = shared(x, *weights)
    with applied("realize_by_bytes"), batch_invariant_mode():
        for size in (1, MOST):
            compiled = torch.compile(shared, fullgraph=True, dynamic=False)(x[:size], *weights)
            assert all(torch.equal(part, whole[:size]) for part, whole in zip(compiled, expected, strict=True))


def test_the_mode_refuses_it_without_that_setting(monkeypatch):
    without = tuple(setting for setting in inductor_config.SETTINGS if setting.name != "emulate_precision_casts")
    monkeypatch.setattr(inductor_config, "SETTINGS", without)
    with applied("realize_by_bytes"), pytest.raises(PatchRefused, match="changes bits unless emulate_precision_casts is set"):
        with batch_invariant_mode():
            pass
    with batch_invariant_mode(), pytest.raises(PatchRefused, match="cannot be used together with batch-invariant mode"):
        with applied("realize_by_bytes"):
            pass


def test_the_mode_refuses_it_where_that_setting_has_no_effect(monkeypatch):
    """As on a build of torch 2.11 or 2.12 whose source of the C++ backend is not known."""
    rounded_casts = registry._patches["rounded_casts"]
    monkeypatch.setattr(rounded_casts, "torch", ">=2")
    monkeypatch.setattr(rounded_casts, "fingerprints", {})
    why = "is set, which has no effect here: patch rounded_casts is not in force .*cannot be used together"
    with applied("realize_by_bytes"), pytest.raises(PatchRefused, match=why), batch_invariant_mode():
        pass
    with pytest.warns(PatchWarning, match="rounded_casts is refused"), batch_invariant_mode():
        with pytest.raises(PatchRefused, match=why), applied("realize_by_bytes"):
            pass
