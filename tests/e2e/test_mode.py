"""What the mode promises: it covers every overload, says what it refuses, and puts everything back."""

import contextlib
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from pytest_batchinv.kernels import eager, inductor, overloads, table
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.patches import registry, sources
from pytest_batchinv.patches.compilation import around_compilation
from pytest_batchinv.patches.registry import applied_names
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.census import unclassified_ops
from pytest_batchinv.mode import ModeError, fingerprint, is_on, stock_torch


@pytest.fixture(scope="module", autouse=True)
def _what_a_first_entry_imports():
    """Importing Inductor registers operators of its own, once a process: that is no trace of the mode."""
    with batch_invariant_mode():
        pass


def dispatcher_state() -> dict[str, str]:
    """The dispatcher's own account of every overload that the table touches, kernels with where they were registered."""
    names = {overload.name() for overload in _touched()}
    return {name: torch._C._dispatch_dump(name) for name in names}


def _touched():
    for name in (*table.BACKEND_KERNELS, *table.POINTWISE, *table.REFUSED, *table.COMPOSITES):
        overload = overloads.overload_of(name)
        if overload is not None:
            yield overload
            yield from (sibling.overload for sibling in overloads.siblings(overload))


def global_state() -> dict:
    from torch._inductor import compile_fx, graph, lowering
    from torch._inductor.codegen.cpp import CppVecKernel

    return {
        "dispatcher": dispatcher_state(),
        "registered": set(torch.library._impls),
        "compile_fx": (compile_fx.compile_fx, compile_fx.select_decomp_table),
        "fallback list": (graph.FALLBACK_ALLOW_LIST, lowering.FALLBACK_ALLOW_LIST),
        "indirect_assert": CppVecKernel.indirect_assert,
        "config": torch._inductor.config.save_config_portable(),
        "tag": torch.compiler.config.cache_key_tag,
        "matmul": torch.backends.cuda.matmul.fp32_precision,
        "conv": torch.backends.cudnn.conv.fp32_precision,
        "bf16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


def test_everything_is_as_it_was_after_the_mode():
    before = global_state()
    with batch_invariant_mode():
        torch.randn(3, 4) @ torch.randn(4, 5)
        assert dispatcher_state() != before["dispatcher"]
    assert global_state() == before


def test_everything_is_as_it_was_after_an_exception():
    before = global_state()
    with pytest.raises(ZeroDivisionError), batch_invariant_mode():
        raise ZeroDivisionError
    assert global_state() == before
    assert not is_on()


def test_nested_blocks_stay_on_until_the_outer_one_leaves():
    x = torch.randn(3, 4)
    with batch_invariant_mode() as outer:
        with batch_invariant_mode() as inner:
            x @ x.t()
        assert inner.hits == {"aten::mm": 1}
        assert is_on()
        x @ x.t()
        assert outer.hits == {"aten::mm": 2}
    assert not is_on()


def test_a_failed_entry_leaves_nothing_behind(monkeypatch):
    before = global_state()

    def fails():
        raise ModeError("planted")

    monkeypatch.setattr("pytest_batchinv.mode._canary", fails)
    with pytest.raises(ModeError, match="planted"), batch_invariant_mode():
        pass
    assert global_state() == before
    monkeypatch.undo()
    with batch_invariant_mode() as mode:
        torch.ones(2, 2) @ torch.ones(2, 2)
        assert mode.hits


def test_the_canary_names_an_entry_that_another_library_holds():
    thief = torch.library.Library("aten", "IMPL")
    stock_install = eager.installed

    class Stolen:
        def __enter__(self):
            self.context = stock_install()
            holding = self.context.__enter__()
            thief.impl("mm.out", lambda a, b, *, out: out.zero_(), "CPU", allow_override=True)
            return holding

        def __exit__(self, *error):
            thief._destroy()
            return self.context.__exit__(*error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_batchinv.mode.eager.installed", Stolen)
        with pytest.raises(ModeError, match="aten::mm.out did not reach the table"), batch_invariant_mode():
            pass


def test_eight_threads_share_the_mode_and_the_last_one_restores():
    before = global_state()
    barrier = threading.Barrier(8)
    x = torch.randn(5, 6)
    failures = []

    def work(delay: int) -> None:
        try:
            for _ in range(20):
                with batch_invariant_mode() as mode:
                    x.softmax(-1)
                    assert mode.hits.get("aten::_softmax", 0) > 0
            barrier.wait(timeout=60)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert global_state() == before


def test_stock_torch_inside_the_mode_is_stock_torch():
    x, w = torch.randn(9, 33), torch.randn(21, 33)
    expected = x @ w.t()
    with batch_invariant_mode() as mode:
        with stock_torch():
            assert torch.equal(x @ w.t(), expected)
        assert mode.hits == {}
        x @ w.t()
        assert mode.hits == {"aten::mm": 1}


def test_refused_operators_say_so_in_eager_and_compiled_code():
    x = torch.rand(3, 4)
    with batch_invariant_mode():
        with pytest.raises(Refused, match="aten::prod.dim_int: there is no batch-invariant kernel"):
            x.prod(-1)
        with pytest.raises(Exception, match="aten::prod.dim_int: there is no batch-invariant kernel"):
            torch.compile(lambda x: x.prod(-1), fullgraph=True)(x)
        with pytest.raises(Refused, match="1-d convolution; this one is 2-d"):
            F.conv2d(torch.rand(1, 2, 5, 5), torch.rand(3, 2, 3, 3))
        with pytest.raises(Refused, match="aten::exp in torch.complex64"):
            torch.ones(2, 2, dtype=torch.complex64).exp()
        with pytest.raises(Refused, match="aten::mm in torch.complex32"):
            torch.ones(2, 2, dtype=torch.complex32) @ torch.ones(2, 2, dtype=torch.complex32)
        with pytest.raises(Refused, match="dropout"):
            F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)


def test_a_product_that_the_table_missed_is_an_error_in_compiled_code(monkeypatch):
    monkeypatch.setattr(inductor, "_table", dict)
    with batch_invariant_mode(), pytest.raises(Exception, match="the compiled graph still holds aten.mm.default"):
        torch.compile(lambda a, b: torch.mm(a, b), fullgraph=True)(torch.rand(3, 4), torch.rand(4, 5))


def test_flex_attention_which_inductor_writes_itself_is_refused_in_compiled_code():
    from torch.nn.attention.flex_attention import flex_attention

    x = torch.rand(1, 2, 32, 16)
    with batch_invariant_mode(), pytest.raises(Exception, match="the compiled graph still holds flex_attention"):
        torch.compile(flex_attention, fullgraph=True)(x, x, x)


def test_a_users_own_pass_still_runs():
    seen = []

    class UsersPass(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.append(graph)

        def uuid(self):
            return "users-pass"

    # A graph out of a warm cache runs no pass: its key holds the pass's uuid.
    with (
        torch._inductor.utils.fresh_cache(),
        batch_invariant_mode(),
        torch._inductor.config.patch(post_grad_custom_post_pass=UsersPass()),
    ):
        torch.compile(lambda x: (x + 1).mean(-1))(torch.rand(3, 41))
    assert seen


def test_the_patches_that_this_torch_needs_are_in_force_inside():
    needed = [row.name for row in registry.status() if row.state == "off" and not row.numerics]
    before = applied_names()
    with batch_invariant_mode() as mode:
        assert applied_names() == sorted(needed)
        for name in needed:
            assert any(line.startswith(f"patch {name}: ") for line in mode.status())
    assert applied_names() == before == []


def test_a_patch_of_the_group_inductor_is_in_force_inside_on_every_torch(monkeypatch):
    """Shown with a patch of this test's own, as the newest versions of torch need none of ours."""
    from torch._inductor.ir import StorageBox

    def of_this_test(original):
        return lambda self: original(self)

    target = "torch._inductor.ir.StorageBox.num_reads"
    monkeypatch.setattr(registry, "_patches", dict(registry._patches))
    registry.patch(
        target, torch=">=2", group="inductor", reason="a test", fingerprints={"any": sources.definition(target).fingerprint}
    )(of_this_test)
    before = vars(StorageBox)["num_reads"]
    with batch_invariant_mode() as mode:
        assert vars(StorageBox)["num_reads"] is not before
        assert "patch of_this_test: applied (a test)" in mode.status()
    assert vars(StorageBox)["num_reads"] is before


def test_the_applied_patches_are_part_of_the_fingerprint():
    with batch_invariant_mode():
        without = fingerprint()
        with registry.applied("realize_by_bytes"):
            assert fingerprint() != without
        assert fingerprint() == without


def test_the_cache_key_of_a_compilation_holds_the_fingerprint_and_every_applied_patch():
    tags = []

    @contextlib.contextmanager
    def looks_at_the_tag():
        tags.append(torch.compiler.config.cache_key_tag)
        yield

    def compile_once() -> str:
        torch._dynamo.reset()
        with around_compilation(looks_at_the_tag):
            torch.compile(lambda x: (x + 1).mean(-1))(torch.rand(3, 5))
        return tags[-1]

    with batch_invariant_mode():
        for block in (contextlib.nullcontext(), registry.applied("realize_by_bytes"), contextlib.nullcontext()):
            with block:
                tag, names = compile_once(), applied_names()
                assert f"batchinv-{fingerprint()}" in tag
                assert all(f"{name}-" in tag for name in names)
                assert ("realize_by_bytes" in tag) == ("realize_by_bytes" in names)
    assert (tags[0], len(set(tags))) == (tags[2], 2)
    assert compile_once() == ""


def test_integers_keep_torchs_own_kernels():
    x = torch.arange(12).view(3, 4)
    with batch_invariant_mode() as mode:
        assert torch.equal(x.sum(-1), torch.tensor([6, 22, 38]))
        assert torch.equal(x.cumsum(-1)[:, -1], torch.tensor([6, 22, 38]))
        assert torch.equal(x @ x.t(), torch.tensor([[14, 38, 62], [38, 126, 214], [62, 214, 366]]))
        assert int(x.sum()) == 66
        assert mode.hits == {}
        assert x.sum(-1, dtype=torch.float32).dtype == torch.float32
        assert mode.hits == {"aten::sum.dim_IntList": 1}


def test_gradients_flow_through_the_mode():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    x = torch.randn(5, 8)
    model(x).log_softmax(-1).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with batch_invariant_mode():
        model(x).log_softmax(-1).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_attention_gradients_agree_with_torchs_own():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()

    def gradients():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    expected = gradients()
    with batch_invariant_mode():
        actual = gradients()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_a_warm_cache_shared_by_both_modes_never_mixes_them(tmp_path):
    """Three processes on one cache folder: off, on, off, then on again from a warm cache."""
    script = textwrap.dedent(
        """
        import contextlib, sys, torch
        from pytest_batchinv import batch_invariant_mode
        torch.manual_seed(0)
        x, w = torch.randn(3, 57), torch.randn(11, 57)
        def fn(x, w):
            return torch.log_softmax(torch.nn.functional.silu(x @ w.t()), -1).mean(-1)
        mode = batch_invariant_mode() if sys.argv[1] == "on" else contextlib.nullcontext()
        with torch.no_grad(), mode as entered:
            out = torch.compile(fn, fullgraph=True)(x, w)
        compiled_hits = sorted(n for n in (entered.hits if entered else {}) if n.startswith("batchinv"))
        hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
        hits += torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
        print(out.numpy().tobytes().hex(), ",".join(compiled_hits), "warm" if hits else "cold")
        """
    )

    def run(state: str) -> list[str]:
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, state], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip().split(" ")

    off, on, off_warm, on_warm = run("off"), run("on"), run("off"), run("on")
    assert on[1] == "batchinv::_log_softmax,batchinv::mean.dim,batchinv::mm,batchinv::silu"
    assert off[1] == ""
    assert (off[2], on[2]) == ("cold", "cold")
    assert off_warm == [off[0], "", "warm"]
    assert on_warm == [on[0], on[1], "warm"]


def test_what_was_compiled_before_the_mode_is_compiled_again_inside():
    x = torch.randn(3, 8)
    compiled = torch.compile(lambda x: x.mean(-1), fullgraph=True)
    compiled(x)
    with batch_invariant_mode() as mode:
        compiled(x)
        assert mode.hits == {"batchinv::mean.dim": 1}
    with batch_invariant_mode() as mode:
        with stock_torch():
            compiled(x)
        assert mode.hits == {}


def test_the_census_names_what_is_neither_in_the_table_nor_row_local():
    x = torch.rand(3, 5)

    def run():
        y = torch.where(x > 0, x, -x).exp() @ x.t()  # the table, and row-local operators
        return y.sinh(), torch.pow(x, x), torch.cdist(x, x), x.transpose(0, 1).contiguous()

    assert unclassified_ops(run) == ["aten::_cdist_forward", "aten::pow.Tensor_Tensor", "aten::sinh"]
