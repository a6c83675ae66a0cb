"""What the registry promises, shown on a small package of its own: gates, exact undo, neighbours, cache keys, exit."""

import contextlib
import importlib
import subprocess
import sys
import textwrap
import threading
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv.patches import fingerprints, registry
from pytest_batchinv.patches.compilation import around_compilation
from pytest_batchinv.patches.registry import PatchRefused, PatchWarning, applied, bits_kept, patch, status

ENGINE = """
    LIMITS = {"one": 1}

    def function(x):
        return ("stock", x)

    class Engine:
        def method(self, x):
            return ("stock", x)

        @staticmethod
        def static(x):
            return ("stock", x)

        @classmethod
        def of_the_class(cls, x):
            return ("stock", x)
"""
KINDS = {
    "function": ("engine_z.core.function", lambda core: core.function(1)),
    "method": ("engine_z.core.Engine.method", lambda core: core.Engine().method(1)),
    "static method": ("engine_z.core.Engine.static", lambda core: core.Engine.static(1)),
    "class method": ("engine_z.core.Engine.of_the_class", lambda core: core.Engine.of_the_class(1)),
}


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A package engine_z with a module ``core``. Returns what imports that."""
    package = tmp_path / "engine_z"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "core.py").write_text(textwrap.dedent(ENGINE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: importlib.import_module("engine_z.core")
    for name in [name for name in sys.modules if name.split(".")[0] == "engine_z"]:
        del sys.modules[name]
    fingerprints.definition.cache_clear()


@pytest.fixture(autouse=True)
def alone(monkeypatch, engine):
    """A registry without any other patch, in which nothing stays applied."""
    monkeypatch.setattr(registry, "_patches", {})
    monkeypatch.setattr(registry, "_broken", {})
    monkeypatch.setattr(registry, "load", lambda: None)
    yield
    assert registry.applied_names() == []


def patched(original):
    def replacement(*args):
        kind, x = original(*args)
        return ("patched", kind, x)

    return replacement


def register(target="engine_z.core.function", factory=patched, name="of_the_engine", **words):
    def made(original):
        return factory(original)

    made.__name__ = name
    if "fingerprints" not in words:
        words["fingerprints"] = {"any": fingerprints.definition(target).fingerprint}
    patch(target, **{"torch": ">=2", "group": "engines", "reason": "a test", **words})(made)


def register_two(**words_of_the_second):
    register(name="first")
    register("engine_z.core.Engine.method", name="second", **words_of_the_second)


def row():
    (found,) = status()
    return found


def theirs(x):
    return ("theirs", x)


# --- in force inside, the same object after ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_is_in_force_inside_and_the_same_object_is_back_after(engine, kind):
    target, call = KINDS[kind]
    register(target)
    core, name = engine(), target.rpartition(".")[2]
    owner = vars(core.Engine) if "Engine" in target else vars(core)
    before = owner[name]
    with applied("engines"):
        assert call(core) == ("patched", "stock", 1)
        assert row().state == "applied"
    assert call(core) == ("stock", 1)
    assert owner[name] is before
    assert row().state == "off"


def test_a_module_that_was_not_imported_is_imported_and_patched_on_entry_and_not_for_the_status(engine):
    register()
    assert row().state == "off"
    assert "engine_z.core" not in sys.modules
    with applied("engines"):
        assert sys.modules["engine_z.core"].function(1) == ("patched", "stock", 1)
    assert engine().function(1) == ("stock", 1)


def test_a_module_level_value_can_be_patched(engine):
    before = engine().LIMITS
    register("engine_z.core.LIMITS", factory=lambda original: {**original, "two": 2})
    with applied("engines"):
        assert engine().LIMITS == {"one": 1, "two": 2}
    assert engine().LIMITS is before


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=20))
def test_in_force_while_any_block_is_open_in_whatever_order_they_close(steps):
    """Two patches, one of them in both groups' blocks; blocks close in any order, not only from the inside out."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(registry, "_patches", {})
        core = importlib.import_module("engine_z.core")
        stock = core.function, core.Engine.method
        register_two(group="others")
        asks = {0: ("engines",), 1: ("others",), 2: ("first", "others")}
        opened = {0: [], 1: [], 2: []}
        with ExitStack() as everything:
            for which, opens in steps:
                if opens:
                    block = ExitStack()
                    block.enter_context(applied(*asks[which]))
                    everything.push(block)
                    opened[which].append(block)
                elif opened[which]:
                    opened[which].pop(0).close()
                assert (core.function is not stock[0]) == bool(opened[0] or opened[2])
                assert (core.Engine.method is not stock[1]) == bool(opened[1] or opened[2])
                assert core.function(1) in (("stock", 1), ("patched", "stock", 1))  # never patched twice
        assert (core.function, core.Engine.method) == stock


def test_threads_share_a_patch_and_the_last_one_undoes_it(engine):
    core = engine()
    stock = core.function
    register()
    barrier, failures = threading.Barrier(8), []

    def work():
        try:
            barrier.wait(timeout=60)
            for _ in range(50):
                with applied("engines"):
                    assert core.function(1) == ("patched", "stock", 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert core.function is stock


# --- nothing stays half patched ---------------------------------------------------------------------------------------


def raising(error):
    def factory(original):
        raise error

    return factory


def test_an_exception_in_the_block_undoes_the_patches(engine):
    before = engine().function
    register_two()
    with pytest.raises(ZeroDivisionError), applied("engines"):
        raise ZeroDivisionError
    assert engine().function is before


def test_a_patch_that_fails_on_entry_undoes_the_ones_before_it(engine):
    before = engine().function
    register_two(factory=raising(OSError("no compiler")))
    why = "patch second is refused: it could not be applied: OSError: no compiler"
    with pytest.raises(PatchRefused, match=why), applied("first", "second"):
        pass
    assert engine().function is before
    with pytest.warns(PatchWarning, match=why), applied("engines"):
        assert registry.applied_names() == ["first"]
    assert engine().function is before


def test_ctrl_c_between_two_patches_undoes_the_first_one(engine):
    before = engine().function
    register_two(factory=raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), applied("engines"):
        pass
    assert engine().function is before
    assert registry.applied_names() == []


def test_a_warning_that_is_an_error_undoes_the_patches(engine, recwarn):
    before = engine().function
    register_two(fingerprints={})
    import warnings

    warnings.simplefilter("error")
    with pytest.raises(PatchWarning), applied("engines"):
        pass
    assert engine().function is before


def test_a_module_that_cannot_be_imported_is_a_refusal_in_a_sentence(engine, tmp_path):
    (tmp_path / "engine_z" / "broken.py").write_text("import a_module_that_is_not_there\n\ndef f(x):\n    return x\n")
    before = engine().function
    register(name="first")
    register("engine_z.broken.f", name="second")
    why = "second is refused: it could not be applied: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    with pytest.warns(PatchWarning, match=why), applied("engines"):
        assert engine().function(1) == ("patched", "stock", 1)
    with pytest.raises(PatchRefused, match=why), applied("engines", "second"):
        pass
    assert engine().function is before


# --- the gates --------------------------------------------------------------------------------------------------------


def test_an_unknown_fingerprint_is_refused_aloud_with_the_one_that_was_found(engine):
    register(fingerprints={"2.11.0": "0123456789abcdef"})
    found = fingerprints.definition("engine_z.core.function").fingerprint
    stock = engine().function
    assert row().state == "refused"
    assert f"unknown fingerprint {found}" in row().why
    with pytest.warns(PatchWarning, match=f"of_the_engine is refused: .*unknown fingerprint {found}") as warned:
        with applied("engines"):
            assert engine().function is stock
    assert warned[0].filename == __file__
    with pytest.raises(PatchRefused, match=f"unknown fingerprint {found}"), applied("of_the_engine"):
        pass


def test_the_fingerprint_follows_the_text_and_neither_its_place_nor_trailing_blanks(engine, tmp_path):
    def fingerprint_of(text):
        (tmp_path / "engine_z" / "other.py").write_text(text)
        fingerprints.definition.cache_clear()
        return fingerprints.definition("engine_z.other.f").fingerprint

    base = fingerprint_of("def f(x):\n    return x\n")
    assert fingerprint_of("import os\n\n\nif os.name:\n    def f(x):  \n        return x\n") == base
    assert fingerprint_of("def f(x):\n    return x + 1\n") != base
    assert fingerprint_of("@staticmethod\ndef f(x):\n    return x\n") != base


@pytest.mark.parametrize(
    "version, state", [("2.10.0", "not needed"), ("2.11.0+cu130", "off"), ("2.11.1", "off"), ("2.12.0", "not needed")]
)
def test_the_range_decides_whether_a_patch_is_needed(engine, monkeypatch, version, state):
    monkeypatch.setattr(registry, "torch_version", lambda: registry.Version(version))
    register(torch=">=2.11,<2.12")
    assert row().state == state
    with applied("engines"), applied("of_the_engine"):
        assert engine().function(1) == (("stock", 1) if state == "not needed" else ("patched", "stock", 1))


@pytest.mark.parametrize("version, state", [(None, "not needed"), ("0.31.2", "not needed"), ("0.32.1+cpu", "off")])
def test_a_patch_of_vllm_is_needed_on_versions_of_its_range_alone(engine, monkeypatch, version, state):
    monkeypatch.setattr(registry, "vllm_version", lambda: version and registry.Version(version))
    register(vllm="==0.32.*")
    assert row().state == state
    assert row().why == {None: "vLLM is not installed", "0.31.2": "vLLM 0.31.2 is not ==0.32.*"}.get(version, "a test")


def test_a_patch_that_changes_bits_needs_its_name(engine):
    register(numerics=True)
    with applied("engines"):
        assert engine().function(1) == ("stock", 1)
        assert "only when asked for by name" in row().why
    with applied("of_the_engine"):
        assert engine().function(1) == ("patched", "stock", 1)


def test_a_patch_that_changes_bits_and_the_promise_to_keep_them_exclude_each_other(engine):
    register(numerics=True, harmless_with="rounding")
    with bits_kept(["other"]), pytest.raises(PatchRefused, match="changes bits unless rounding is set"):
        with applied("of_the_engine"):
            pass
    with applied("of_the_engine"), pytest.raises(PatchRefused, match="changes bits unless rounding is set"):
        with bits_kept([]):
            pass
    for outer, inner in [
        (bits_kept(["rounding"]), applied("of_the_engine")),
        (applied("of_the_engine"), bits_kept(["rounding"])),
    ]:
        with outer, inner:
            assert engine().function(1) == ("patched", "stock", 1)


def test_a_setting_without_effect_makes_no_patch_harmless(engine):
    """The patch that would give it its effect is refused, as on a build of torch that nobody has read."""
    register(numerics=True, harmless_with="rounding")
    register("engine_z.core.Engine.method", name="rounding_works", gives_effect_to="rounding", fingerprints={})
    why = "rounding is set, which has no effect here: patch rounding_works is not in force .*unknown fingerprint"
    with bits_kept(["rounding"]), pytest.raises(PatchRefused, match=why), applied("of_the_engine"):
        pass
    with applied("of_the_engine"), pytest.raises(PatchRefused, match=why), bits_kept(["rounding"]):
        pass


def compiles() -> bool:
    torch._dynamo.reset()
    return torch.compile(lambda x: x + 1)(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize("fault", ["taken", "failed", "never applied"])
def test_a_setting_that_has_no_effect_when_code_is_compiled_is_found_by_the_compilation(engine, fault):
    register(numerics=True, harmless_with="rounding")
    factory = raising(OSError("no compiler")) if fault == "failed" else patched
    register("engine_z.core.Engine.method", factory, "rounding_works", gives_effect_to="rounding", group="others")
    asked = ("of_the_engine",) if fault == "never applied" else ("others", "of_the_engine")
    with bits_kept(["rounding"]), pytest.warns(PatchWarning) if fault == "failed" else contextlib.nullcontext():
        with applied(*asked):
            if fault == "taken":
                assert compiles()
                engine().Engine.method = theirs
            with pytest.raises(Exception, match="patch rounding_works is not in force"):
                compiles()
    assert compiles()


def test_a_target_that_is_not_there_is_refused(engine):
    register("engine_z.core.gone", fingerprints={})
    assert row().state == "refused"
    with pytest.raises(PatchRefused, match="defines no gone"), applied("of_the_engine"):
        pass


def test_a_wrapper_object_in_place_of_a_function_is_refused(engine):
    class Wrapper:
        def __call__(self, x):
            return x

    stock = engine().function
    register(factory=lambda original: Wrapper())
    with pytest.warns(PatchWarning, match="Return a plain function"), applied("engines"):
        assert engine().function is stock


def test_names_are_unique_and_unknown_ones_are_errors(engine):
    register()
    with pytest.raises(ValueError, match="there is a patch named of_the_engine already"):
        register()
    for words in (("enginse",), ()):
        with pytest.raises(ValueError, match="there are: engines, of_the_engine"), applied(*words):
            pass


# --- beside other engines ---------------------------------------------------------------------------------------------


def test_who_came_later_is_left_alone_and_named(engine):
    register()
    with applied("engines"):
        engine().function = theirs
        assert row().state == "taken"
        assert "theirs" in row().why and __file__ in row().why
    assert engine().function is theirs


def test_who_came_before_is_refused_and_named(engine):
    engine().function = theirs
    register()
    assert row().state == "refused"
    assert "engine_z.core.function is held by" in row().why and __file__ in row().why
    with pytest.warns(PatchWarning, match="is held by .*theirs"), applied("engines"):
        assert engine().function is theirs
    assert engine().function is theirs


def test_who_comes_with_the_module_is_refused_and_named(engine, tmp_path):
    """The target's module is patched by another engine as it is imported."""
    (tmp_path / "engine_z" / "late.py").write_text("def f(x):\n    return x\n\ndef g(x):\n    return x\n\nf = g\n")
    register("engine_z.late.f")
    with pytest.raises(PatchRefused, match="engine_z.late.f is held by engine_z.late.g"), applied("of_the_engine"):
        pass


def test_what_a_neighbour_put_back_as_the_original_is_known_as_ours(engine):
    """A neighbour that patched later takes ours for the original, and gives it back after we have left."""
    core, stock = engine(), engine().function
    register()
    with applied("engines"):
        what_they_found, core.function = core.function, theirs
    core.function = what_they_found
    with applied("engines"):
        assert core.function(1) == ("patched", "stock", 1)
    assert core.function is stock


# --- compiled code ----------------------------------------------------------------------------------------------------


def test_compiled_code_follows_the_patch_and_is_stock_again_after(engine):
    core = engine()
    register(factory=lambda original: lambda x: ("patched", x * 3))
    compiled = torch.compile(lambda x: core.function(x)[1] + 0, backend="eager", fullgraph=True)
    x = torch.ones(2)
    assert compiled(x).tolist() == [1, 1]
    with applied("engines"):
        assert compiled(x).tolist() == [3, 3]
    assert compiled(x).tolist() == [1, 1]


def test_code_that_was_compiled_with_other_patches_is_compiled_again(engine):
    """A patch of the compiler itself is seen by no guard of Dynamo."""
    register()
    compilations = []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: (compilations.append(1), graph.forward)[1])

    def count() -> int:
        compiled(torch.ones(2))
        return len(compilations)

    assert (count(), count()) == (1, 1)
    with applied("engines"):
        assert count() == 2
        with applied("engines"):
            assert count() == 2
    assert (count(), count()) == (3, 3)


def test_the_applied_patches_are_part_of_the_cache_key_in_every_thread(engine):
    """A warm cache serves only who compiled with the same patches, whichever thread compiles."""
    register()

    def compiles_cold() -> bool:
        torch._dynamo.utils.counters.clear()
        assert compiles()
        counters = torch._dynamo.utils.counters
        return not (counters["inductor"]["fxgraph_cache_hit"] or counters["aot_autograd"]["autograd_cache_hit"])

    def in_a_thread(function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]

    with torch._inductor.utils.fresh_cache():
        assert [compiles_cold(), compiles_cold(), in_a_thread(compiles_cold)] == [True, False, False]
        with applied("engines"):
            assert [in_a_thread(compiles_cold), compiles_cold()] == [True, False]
        assert not compiles_cold()
    assert torch.compiler.config.cache_key_tag == ""


def test_an_inner_block_leaves_the_order_of_the_outer_ones_as_it_was():
    """The order of the tags is part of the cache key: another order finds a warm cache cold."""
    entered = []

    def maker(name):
        return lambda: contextlib.nullcontext(entered.append(name))

    def order():
        entered.clear()
        assert compiles()
        return "".join(entered)

    first, second = maker("1"), maker("2")
    with around_compilation(first), around_compilation(second):
        with around_compilation(first):
            assert order() == "121"
        assert order() == "12"


def test_inductors_entry_is_torchs_own_again_or_belongs_to_who_wrapped_it_since(engine, monkeypatch):
    from torch._inductor import compile_fx

    register()
    stock = compile_fx.compile_fx
    with applied("engines"):
        assert compile_fx.compile_fx is not stock
    assert compile_fx.compile_fx is stock
    with applied("engines"):
        ours = compile_fx.compile_fx
        monkeypatch.setattr(compile_fx, "compile_fx", lambda *args, **kwargs: ours(*args, **kwargs))
        of_another = compile_fx.compile_fx
    assert compile_fx.compile_fx is of_another
    assert compiles()


# --- the process ------------------------------------------------------------------------------------------------------


def run_python(code: str, *path) -> str:
    """Runs code in a process of its own, with these folders in front of its path. Nothing may be written to stderr."""
    front = "".join(f"sys.path.insert(0, {str(folder)!r})\n" for folder in path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys\n{front}{textwrap.dedent(code)}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_process_that_ends_inside_blocks_undoes_them_without_a_message():
    """They stay open in a suspended generator, a daemon thread and an object that is never left, while torch still works."""
    out = run_python(
        """
        import atexit, threading
        def are_torchs_own():
            return vars(StorageBox)["should_realize_on_reuse"] is stock, compile_fx.compile_fx is entry

        atexit.register(lambda: print("at exit:", *are_torchs_own()))
        from torch._inductor import compile_fx
        from torch._inductor.ir import StorageBox
        from pytest_batchinv.patches.registry import applied, bits_kept
        entry, stock = compile_fx.compile_fx, vars(StorageBox)["should_realize_on_reuse"]

        def suspended():
            with applied("realize_by_bytes"), bits_kept(["emulate_precision_casts"]):
                yield

        def stays(entered=threading.Event()):
            with applied("realize_by_bytes"):
                entered.set()
                threading.Event().wait()

        generator = suspended()
        next(generator)
        kept = applied("realize_by_bytes")
        kept.__enter__()
        threading.Thread(target=stays, daemon=True).start()
        stays.__defaults__[0].wait()
        print("inside:", *are_torchs_own())
        """
    )
    assert out.splitlines() == ["inside: False False", "at exit: True True"]


def test_a_block_that_was_dropped_is_undone_at_once(engine):
    """As by an exception between ``__enter__`` and the body."""
    stock = engine().function
    register()
    block = applied("engines")
    block.__enter__()
    assert engine().function is not stock
    del block
    assert engine().function is stock


def test_neither_the_registry_nor_its_status_imports_torch():
    out = run_python(
        """
        from pytest_batchinv.patches import registry
        rows = registry.status()
        assert not any(name.split(".")[0] == "torch" for name in sys.modules)
        print(*(row.name for row in rows))
        """
    )
    assert out.split() == ["lazy_operator_text", "indirect_assert", "rounded_casts", "realize_by_bytes", "vllm_products"]


def test_users_patches_come_by_entry_point_and_one_that_fails_to_load_is_a_row(tmp_path):
    (tmp_path / "users_patches.py").write_text(
        "from pytest_batchinv.patches.registry import patch\n\n"
        '@patch("torch._inductor.ir.StorageBox.num_reads", torch=">=2", group="users", reason="a test", fingerprints={})\n'
        "def of_a_user(original):\n    return original\n"
    )
    info = tmp_path / "users-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: users\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pytest_batchinv.patches]\ngood = users_patches\nbad = users_gone\n")
    out = run_python(
        """
        from pytest_batchinv.patches import registry
        for row in registry.status()[-2:]:
            print(row.name, row.group, row.state, row.why)
        """,
        tmp_path,
    )
    good, bad = out.splitlines()
    assert good.startswith("of_a_user users refused the source of torch._inductor.ir.StorageBox.num_reads has the unknown")
    assert bad.startswith("bad  refused its module could not be loaded: ModuleNotFoundError: No module named 'users_gone'")
