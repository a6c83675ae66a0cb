"""What the mode promises: it covers every overload, says what it refuses, and puts everything back."""

import contextlib
import subprocess
import sys
import textwrap
import threading
import traceback
import uuid
import warnings
import weakref

import pytest
import torch
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode, flags
from pytest_batchinv.diagnose.coverage import op_coverage
from pytest_batchinv.kernels import eager, inductor, overloads, table
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.mode import ModeError, fingerprint, is_on, receipt, stock_torch
from pytest_batchinv.patches import fingerprints, registry
from pytest_batchinv.patches.compilation import around_compilation
from pytest_batchinv.patches.registry import applied_names
from pytest_batchinv.shapes import of_rows
from pytest_batchinv.sources import digest
from pytest_batchinv.subjects.rows import RowsSubject


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
    for name in (*table.BACKEND_KERNELS, *table.POINTWISE, *table.WHOLE_VECTORS, *table.REFUSED, *table.COMPOSITES):
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
        "flags": flags_state(),
    }


def flags_state() -> dict:
    """torch's global flags as readers see them. Some cannot be read where older and newer ones were mixed."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]
    older = {
        "cudnn.allow_tf32": lambda: cudnn.allow_tf32,
        "matmul.allow_tf32": lambda: matmul.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision,
    }
    return {
        **{setting: torch._C._get_fp32_precision_getter(*setting) for setting in (("generic", "all"), *settings)},
        **{name: read_or_error(read) for name, read in older.items()},
        "bf16": (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k),
        "fp16": (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction_split_k),
        "fp16 accumulation": matmul.allow_fp16_accumulation,
        "cudnn": (cudnn.benchmark, cudnn.deterministic),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def read_or_error(read):
    try:
        return read()
    except RuntimeError:
        return "cannot be read"


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


FLAGS = {
    "as torch has them": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "no TF32 in cuDNN": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "TF32 everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "TF32 by backend": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "convolutions apart": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "none"),
    "recurrent layers apart": lambda: setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
    "products apart": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "products without split-K": lambda: setattr(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", (False, False)
    ),
}


@pytest.mark.parametrize("setting", FLAGS)
def test_flags_are_consistent_inside_and_as_they_were_after(setting):
    """Also what inherits: the parents of the settings are changed after, and their children must follow as before."""
    with flags.in_force():  # which puts back what this test sets, as the test shows
        for name in ("generic", "cuda", "mkldnn"):
            torch._C._set_fp32_precision_setter(name, "all", "none")
        for operator in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            operator.fp32_precision = "none"
        with torch.backends.__allow_nonbracketed_mutation():  # torch's own test code, once imported, forbids it
            FLAGS[setting]()
        before = flags_state()
        with flags.in_force():
            inside = flags_state()
            assert set(inside[setting] for setting in inside if isinstance(setting, tuple)) == {"ieee"}
            assert not inside["cudnn.allow_tf32"] and not inside["matmul.allow_tf32"]
            assert inside["float32_matmul_precision"] == "highest"
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                pass
        assert flags_state() == before
        parents = [torch._C._get_fp32_precision_getter(name, "all") for name in ("generic", "cuda")]
        for parent in ("ieee", "tf32", "none"):
            torch._C._set_fp32_precision_setter("generic", "all", parent)
            torch._C._set_fp32_precision_setter("cuda", "all", parents[1] if parent == parents[0] else "none")
            expected = flags_state()
            with flags.in_force():
                pass
            assert flags_state() == expected


def test_a_model_is_exported_in_the_mode():
    class Product(torch.nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1)

    x = torch.randn(3, 4, 4)
    with batch_invariant_mode() as mode:
        assert torch.backends.cudnn.allow_tf32 is False
        exported = torch.export.export(Product(), (x,)).module()
        expected, before = Product()(x), mode.hits
        assert torch.equal(exported(x), expected)
        assert mode.hits["aten::bmm"] == before["aten::bmm"] + 1


def test_the_mode_works_where_torchs_flags_are_frozen():
    """torch's own test utilities do so when they are imported."""
    with torch.backends.__allow_nonbracketed_mutation():  # thaws them at its end
        torch.backends.disable_global_flags()
        before = global_state()
        with batch_invariant_mode():
            assert torch.backends.cudnn.deterministic
            assert torch.backends.flags_frozen()
        assert global_state() == before
        assert torch.backends.flags_frozen()


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


def masked(x):
    return torch._masked_softmax(x, x > 0.5)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_refused_operators_say_so_in_eager_and_compiled_code():
    x = torch.rand(3, 4)
    with batch_invariant_mode():
        with pytest.raises(Refused, match="aten::_masked_softmax: there is no batch-invariant kernel"):
            masked(x)
        with pytest.raises(Exception, match="aten::_masked_softmax: there is no batch-invariant kernel"):
            torch.compile(masked, fullgraph=True)(x)
        with pytest.raises(Refused, match="aten::logsumexp in torch.complex64"):
            torch.ones(2, 2, dtype=torch.complex64).logsumexp(-1)
        with pytest.raises(Refused, match="aten::mm in torch.complex32"):
            torch.ones(2, 2, dtype=torch.complex32) @ torch.ones(2, 2, dtype=torch.complex32)
        with pytest.raises(Refused, match="dropout"):
            F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)


def test_a_refusal_shows_the_users_frames_alone():
    x = torch.rand(3, 4)
    calls = (
        lambda: masked(x),
        lambda: torch.logsumexp(x.to(torch.complex64), -1, out=torch.empty(3, dtype=torch.complex64)),
        lambda: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5),
        lambda: x.to(torch.complex64).logsumexp(-1),
    )
    for call in calls:
        with batch_invariant_mode(), pytest.raises(Refused) as caught:
            call()
        assert {str(entry.path) for entry in caught.traceback.filter(caught)} == {__file__}
        ours = [frame for frame in traceback.extract_tb(caught.tb) if frame.filename != __file__]
        assert len(ours) == 1
        assert caught.value.__suppress_context__


def test_layers_with_a_fused_fast_path_are_batch_invariant_in_eager_and_compiled_code():
    torch.manual_seed(0)
    encoder = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    heads = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(9, 5, 32)
    with torch.no_grad(), batch_invariant_mode():
        for layer in (encoder, lambda x: heads(x, x, x, need_weights=False)[0], lambda x: heads(x, x, x)[1]):
            alone = torch.cat([layer(row[None]) for row in x])
            for n in (9, 1, 4):
                assert torch.equal(layer(x[:n]), alone[:n])
        assert torch.equal(torch.compile(encoder, fullgraph=True, dynamic=False)(x[:4]), encoder(x)[:4])
        torch.backends.mha.set_fastpath_enabled(True)
        with pytest.raises(Refused, match="set_fastpath_enabled.False."):
            encoder(x)


GRU = torch.nn.GRU(7, 5, batch_first=True).eval()


def rnn(x):
    """torch.compile leaves an RNN to eager code."""
    return GRU(x[None])[0].sum(-1)


def gradient(x):
    """torch.compile leaves the backward pass to eager code."""
    weight = torch.ones(7, requires_grad=True)
    return torch.autograd.grad(F.rms_norm(x, (7,), weight).square().sum(), weight)[0]


@pytest.mark.parametrize("function", [rnn, gradient])
def test_code_after_a_graph_break_is_compiled_as_often_as_in_stock_torch(function):
    """There Dynamo sees each Python frame that runs, and must pass over the table's."""

    def compilations() -> dict:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(function, backend="eager")
        for n in range(2, 14):
            compiled(torch.randn(n, 7))
        return {name: dict(torch._dynamo.utils.counters[name]) for name in ("frames", "stats")}

    expected = compilations()
    with batch_invariant_mode() as mode:
        assert compilations() == expected
        assert mode.hits


def test_a_compiled_function_may_enter_the_mode():
    @torch.compile(backend="eager")
    def product(x):
        with batch_invariant_mode() as mode:
            y = x @ x
            return y, mode

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, mode = product(torch.ones(3, 3))
    assert mode.hits["aten::mm"] == 1
    assert not is_on()


@pytest.mark.parametrize("block", [batch_invariant_mode, stock_torch])
def test_what_is_freed_while_dynamo_traces_does_not_disturb_a_block(block, monkeypatch):
    """Each object with a finalizer that is freed changes weakref's registry: code that Dynamo traces must not read it."""

    class FreesAnotherWhenRead:
        def __getattribute__(self, name):
            registry[object()] = None
            return object.__getattribute__(self, name)

    registry = {FreesAnotherWhenRead(): None, **weakref.finalize._registry}
    monkeypatch.setattr(weakref.finalize, "_registry", registry)

    @torch.compile(backend="eager")
    def product(x):
        with block():
            return x @ x

    assert product(torch.ones(3, 3)).sum() == 27


def test_a_product_that_the_table_missed_is_an_error_in_compiled_code(monkeypatch):
    monkeypatch.setattr(inductor, "_table", dict)
    with batch_invariant_mode(), pytest.raises(Exception, match="the compiled graph still holds aten.mm.default"):
        torch.compile(lambda a, b: torch.mm(a, b), fullgraph=True)(torch.rand(3, 4), torch.rand(4, 5))


def test_flex_attention_which_inductor_writes_itself_is_refused_in_compiled_code():
    from torch.nn.attention.flex_attention import flex_attention

    x = torch.rand(1, 2, 32, 16)
    with batch_invariant_mode(), pytest.raises(Exception, match="the compiled graph still holds flex_attention"):
        torch.compile(flex_attention, fullgraph=True)(x, x, x)


@pytest.mark.parametrize("given", [lambda users: users, lambda users: [users]], ids=["one", "a list"])
def test_a_users_own_pass_still_runs(given):
    """Inductor takes a list from torch 2.13 on; the mode does on every version."""
    seen = []

    class UsersPass(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.append(graph)

        def uuid(self):  # another one each time: it is part of a graph's key, and a graph out of a warm cache runs no pass
            return str(uuid.uuid4())

    with (
        batch_invariant_mode(),
        torch._inductor.config.patch(post_grad_custom_post_pass=given(UsersPass())),
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
        target,
        torch=">=2",
        group="inductor",
        reason="a test",
        fingerprints={"any": fingerprints.definition(target).fingerprint},
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


def test_the_receipt_covers_every_source_and_nothing_that_is_made_of_them(tmp_path):
    folder = tmp_path / "kernels"
    for path in ("a.py", "aten/b.py", "cpu/gemm.cpp", "cpu/deep/rows.h", "tiles.json"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"text of {path}")
    before = digest(folder)
    for path in ("__pycache__/a.cpython-311.pyc", "a.pyc", "cpu/gemm.o", "notes.txt"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("made")
    assert digest(folder) == before
    for path in ("a.py", "aten/b.py", "cpu/gemm.cpp", "cpu/deep/rows.h", "tiles.json"):
        text = (folder / path).read_text()
        (folder / path).write_text(text + " changed")
        assert digest(folder) != before, path
        (folder / path).write_text(text)
    (folder / "a.py").rename(folder / "c.py")
    assert digest(folder) != before


def test_the_receipt_names_its_parts_and_starts_no_cuda():
    parts = receipt()
    assert parts.keys() == {"sources", "op table", "torch", "triton", "vllm", "cpu", "gpu", "patches"}
    assert parts["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in parts.values())
    assert not torch.cuda.is_initialized()
    with registry.applied("realize_by_bytes"):
        changed = {name for name, value in receipt().items() if value != parts[name]}
    assert changed == {"patches"}


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
    """Four processes on one cache folder: off, on, then both again from a warm cache. All are forks of one, for its imports."""
    script = textwrap.dedent(
        """
        import contextlib, os, sys, torch
        import torch._inductor.compile_fx
        from pytest_batchinv import batch_invariant_mode
        torch.manual_seed(0)
        x, w = torch.randn(3, 57), torch.randn(11, 57)
        def fn(x, w):
            return torch.log_softmax(torch.nn.functional.silu(x @ w.t()), -1).mean(-1)
        for state in ("off", "on", "off", "on"):
            if os.fork() == 0:
                break
            assert os.wait()[1] == 0
        else:
            os._exit(0)
        mode = batch_invariant_mode() if state == "on" else contextlib.nullcontext()
        with torch.no_grad(), mode as entered:
            out = torch.compile(fn, fullgraph=True)(x, w)
        compiled_hits = sorted(n for n in (entered.hits if entered else {}) if n.startswith("batchinv"))
        hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
        hits += torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
        print(out.numpy().tobytes().hex(), ",".join(compiled_hits), "warm" if hits else "cold", flush=True)
        os._exit(0)
        """
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=True)
    off, on, off_warm, on_warm = (line.split(" ") for line in done.stdout.splitlines())
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


def test_op_coverage_sorts_what_a_function_calls_by_how_the_mode_vouches_for_it():
    x = torch.rand(3, 5)

    def run(x):
        y = torch.where(x.isnan(), x, -x).exp() @ x.t()[:, :1].repeat(1, 3)  # the table, and row-local operators
        return y, x.sinh(), torch.pow(x, x), x.log2(), torch.view_as_real(x * 1j)

    with batch_invariant_mode():
        found = op_coverage(RowsSubject(run, [x]), [of_rows([0, 1, 2])])
    assert {"aten::exp", "aten::mm", "aten::sinh", "aten::pow.Tensor_Tensor"} <= set(found.covered)
    assert found.unverified == ("aten::mul.Tensor",)
    assert {"aten::log2", "aten::where.self", "aten::neg"} <= set(found.row_local)
    assert found.bypassed == ()
