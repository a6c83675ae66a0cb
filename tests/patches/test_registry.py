"""What the registry promises, shown on a small package of its own: gates, landing, exact undo, neighbours, cache keys."""

import contextlib
import importlib
import importlib.util
import subprocess
import sys
import textwrap
import threading
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_batchinv.patches import registry, sources
from pytest_batchinv.patches.compilation import around_compilation
from pytest_batchinv.patches.registry import PatchRefused, PatchWarning, applied, bits_kept, patch, status

ENGINE = """
    LIMITS = {"one": 1}

    def function(x):
        return ("stock", x)

    class Base:
        def inherited(self, x):
            return ("stock", x)

    class Engine(Base):
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
ANY_TORCH = ">=2"


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A package engine_z: ``core`` defines names, ``user`` has bound one of them. Returns what imports a module of it."""
    package = tmp_path / "engine_z"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "core.py").write_text(textwrap.dedent(ENGINE))
    (package / "user.py").write_text("from engine_z.core import function\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda name="core": importlib.import_module(f"engine_z.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "engine_z"]:
        del sys.modules[name]
    sources.definition.cache_clear()
    sources.split.cache_clear()


@pytest.fixture
def alone(monkeypatch):
    """A registry without any other patch."""
    monkeypatch.setattr(registry, "_patches", {})
    monkeypatch.setattr(registry, "_broken", {})
    monkeypatch.setattr(registry, "load", lambda: None)


@pytest.fixture(autouse=True)
def _nothing_stays(alone, engine):
    yield
    assert not any(type(finder).__module__ == "pytest_batchinv.patches.imports" for finder in sys.meta_path)
    assert registry.applied_names() == []


def patched(original):
    def replacement(*args):
        kind, x = original(*args)
        return ("patched", kind, x)

    return replacement


def register(target="engine_z.core.function", factory=patched, name="of_the_engine", **words):
    factory = factory_named(name, factory)
    if "fingerprints" not in words:
        words["fingerprints"] = {"any": sources.definition(words.get("source") or target).fingerprint}
    words = {"torch": ANY_TORCH, "group": "engines", "reason": "a test", **words}
    patch(target, **words)(factory)


def factory_named(name, factory):
    def made(original):
        return factory(original)

    made.__name__ = name
    return made


def row():
    (found,) = status()
    return found


def owner_dict(core, target):
    return vars(core.Engine) if "Engine" in target else vars(core)


# --- in force inside, the same object after ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_is_in_force_inside_and_the_same_object_is_back_after(engine, kind):
    target, call = KINDS[kind]
    core = engine()
    register(target)
    name = target.rpartition(".")[2]
    before = owner_dict(core, target)[name]
    with applied("engines"):
        assert call(core) == ("patched", "stock", 1)
        assert row().state == "applied"
    assert call(core) == ("stock", 1)
    assert owner_dict(core, target)[name] is before
    assert row().state == "off"


def test_a_patch_of_an_inherited_method_leaves_no_shadow_on_the_class(engine):
    core = engine()
    register("engine_z.core.Engine.inherited", source="engine_z.core.Base.inherited")
    with applied("engines"):
        assert core.Engine().inherited(1) == ("patched", "stock", 1)
        assert core.Base().inherited(1) == ("stock", 1)
    assert "inherited" not in vars(core.Engine)


def test_an_exception_undoes_the_patch(engine):
    core = engine()
    before = core.function
    register()
    with pytest.raises(ZeroDivisionError), applied("engines"):
        raise ZeroDivisionError
    assert core.function is before


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=20))
def test_in_force_while_any_block_is_open_in_whatever_order_they_close(steps):
    """Two patches, one of them in both groups' blocks; blocks close in any order, not only from the inside out."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(registry, "_patches", {})
        core = importlib.import_module("engine_z.core")
        stock = core.function, core.Engine.method
        register("engine_z.core.function", name="first")
        register("engine_z.core.Engine.method", name="second", group="others")
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


# --- landing when the module comes ------------------------------------------------------------------------------------


def test_a_patch_waits_for_its_module_and_lands_when_it_is_imported(engine):
    register()
    with applied("engines"):
        assert "engine_z" not in sys.modules
        assert row().state == "waiting"
        assert engine().function(1) == ("patched", "stock", 1)
        assert row().state == "applied"
    assert engine().function(1) == ("stock", 1)


def test_a_look_at_the_spec_does_not_use_the_waiting_patch_up(engine):
    register()
    with applied("engines"):
        for _ in range(2):
            assert importlib.util.find_spec("engine_z.core") is not None
        assert row().state == "waiting"
        assert engine().function(1) == ("patched", "stock", 1)


def test_a_patch_that_was_undone_while_it_waited_never_lands(engine):
    register()
    with applied("engines"):
        pass
    assert engine().function(1) == ("stock", 1)


def test_a_module_imported_by_another_thread_gets_its_patch_and_nothing_locks_up(engine):
    register()
    with applied("engines"):
        thread = threading.Thread(target=engine)
        thread.start()
        thread.join(timeout=60)
        assert engine().function(1) == ("patched", "stock", 1)


@pytest.mark.parametrize("imported_before", [(), ("core",), ("core", "user")])
def test_every_place_that_bound_the_old_name_is_patched_and_given_back(engine, imported_before):
    for name in imported_before:
        engine(name)
    register(also=("engine_z.user.function",))
    with applied("engines"):
        assert engine("user").function(1) == ("patched", "stock", 1)
        assert engine("user").function is engine("core").function
    assert engine("user").function is engine("core").function
    assert engine("user").function(1) == ("stock", 1)


def test_a_module_level_value_can_be_patched(engine):
    core = engine()
    before = core.LIMITS
    register("engine_z.core.LIMITS", factory=lambda original: {**original, "two": 2})
    with applied("engines"):
        assert core.LIMITS == {"one": 1, "two": 2}
    assert core.LIMITS is before


# --- the gates --------------------------------------------------------------------------------------------------------


def test_an_unknown_fingerprint_is_refused_aloud_with_the_one_that_was_found(engine):
    register(fingerprints={"2.11.0": "0123456789abcdef"})
    found = sources.definition("engine_z.core.function").fingerprint
    stock = engine().function
    assert row().state == "refused"
    assert f"unknown fingerprint {found}" in row().why
    with pytest.warns(PatchWarning, match=f"of_the_engine is refused: .*unknown fingerprint {found}"):
        with applied("engines"):
            assert engine().function is stock
    with pytest.raises(PatchRefused, match=f"unknown fingerprint {found}"), applied("of_the_engine"):
        pass


def test_the_fingerprint_follows_the_text_and_neither_its_place_nor_trailing_blanks(engine, tmp_path):
    def fingerprint_of(text):
        (tmp_path / "engine_z" / "other.py").write_text(text)
        sources.definition.cache_clear()
        return sources.definition("engine_z.other.f").fingerprint

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


def test_a_patch_that_changes_bits_needs_its_name(engine):
    core = engine()
    register(numerics=True)
    with applied("engines"):
        assert core.function(1) == ("stock", 1)
        assert "only when asked for by name" in row().why
    with applied("of_the_engine"):
        assert core.function(1) == ("patched", "stock", 1)


def test_a_patch_that_changes_bits_and_the_promise_to_keep_them_exclude_each_other(engine):
    register(numerics=True, harmless_with="rounding")
    with bits_kept(["other"]), pytest.raises(PatchRefused, match="changes bits unless rounding is set"):
        with applied("of_the_engine"):
            pass
    with applied("of_the_engine"), pytest.raises(PatchRefused, match="changes bits unless rounding is set"):
        with bits_kept([]):
            pass
    with bits_kept(["rounding"]), applied("of_the_engine"):
        assert engine().function(1) == ("patched", "stock", 1)
    with applied("of_the_engine"), bits_kept(["rounding"]):
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


def test_a_setting_that_loses_its_effect_meanwhile_is_found_by_the_next_compilation(engine):
    core = engine()
    register(numerics=True, harmless_with="rounding")
    register("engine_z.core.Engine.method", name="rounding_works", gives_effect_to="rounding", group="others")

    def compiles():
        torch._dynamo.reset()
        return torch.compile(lambda x: x + 1)(torch.ones(2)).tolist() == [2, 2]

    with bits_kept(["rounding"]), applied("others", "of_the_engine"):
        assert compiles()
        core.Engine.method = theirs
        with pytest.raises(Exception, match="patch rounding_works is not in force .*has since been taken by .*theirs"):
            compiles()
    assert compiles()


def test_a_target_that_is_not_there_is_refused(engine):
    register("engine_z.core.gone", fingerprints={})
    assert row().state == "refused"
    assert "defines no gone" in row().why
    with pytest.raises(PatchRefused, match="defines no gone"), applied("of_the_engine"):
        pass


def test_a_wrapper_object_in_place_of_a_function_is_refused(engine):
    stock = engine().function

    class Wrapper:
        def __call__(self, x):
            return x

    register(factory=lambda original: Wrapper())
    with pytest.warns(PatchWarning, match="Return a plain function"), applied("engines"):
        assert row().state == "refused"
        assert engine().function is stock


def test_names_are_unique_and_unknown_ones_are_errors(engine):
    register()
    with pytest.raises(ValueError, match="there is a patch named of_the_engine already"):
        register()
    for words in (("enginse",), ()):
        with pytest.raises(ValueError, match="there are: engines, of_the_engine"), applied(*words):
            pass


# --- beside other engines ---------------------------------------------------------------------------------------------


def theirs(x):
    return ("theirs", x)


def test_who_came_later_is_left_alone_and_named(engine):
    core = engine()
    register()
    with applied("engines"):
        core.function = theirs
        assert row().state == "taken"
        assert "test_registry.theirs" in row().why.replace("tests.patches.", "")
        assert __file__ in row().why
    assert core.function is theirs


def test_who_came_before_is_refused_and_named(engine):
    core = engine()
    core.function = theirs
    register()
    assert row().state == "refused"
    assert "engine_z.core.function is held by" in row().why
    assert __file__ in row().why
    with pytest.warns(PatchWarning, match="is held by .*theirs"), applied("engines"):
        assert core.function is theirs
    assert core.function is theirs


def test_who_comes_with_the_module_is_refused_and_named(engine, tmp_path):
    """The target's module is patched by another engine as it is imported, before our patch lands."""
    (tmp_path / "engine_z" / "core.py").write_text(
        textwrap.dedent(ENGINE)
        + "\ndef theirs(x):\n    return ('theirs', x)\n\nfunction_of_torch = function\nfunction = theirs\n"
    )
    register(fingerprints={"any": sources.definition("engine_z.core.theirs").fingerprint}, source="engine_z.core.theirs")
    with applied("engines"), pytest.warns(PatchWarning, match="is held by engine_z.core.theirs"):
        core = engine()
        assert core.function(1) == ("theirs", 1)
        assert row().state == "refused"


def test_what_a_neighbour_put_back_as_the_original_is_known_as_ours(engine):
    """A neighbour that patched later takes ours for the original, and gives it back after we have left."""
    core = engine()
    stock = core.function
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
    core.function.__globals__["torch"] = torch
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

    def counts(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x + 1, backend=counts)

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
    x = torch.arange(6.0)

    def compiles_cold() -> bool:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile(lambda x: (x + 1) * 2)(x)
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
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1)(torch.ones(2))
        return "".join(entered)

    first, second = maker("1"), maker("2")
    with around_compilation(first), around_compilation(second):
        with around_compilation(first):
            assert order() == "121"
        assert order() == "12"


def test_inductors_entry_is_torchs_own_again(engine):
    from torch._inductor import compile_fx

    register()
    before = compile_fx.compile_fx
    with applied("engines"):
        assert compile_fx.compile_fx is not before
    assert compile_fx.compile_fx is before


# --- the package's own face -------------------------------------------------------------------------------------------


def run_python(code: str, *path) -> str:
    """Runs code in a process of its own, with these folders in front of its path."""
    front = "".join(f"sys.path.insert(0, {str(folder)!r})\n" for folder in path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys\n{front}{textwrap.dedent(code)}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_neither_the_registry_nor_its_status_nor_entering_a_block_imports_torchs_inductor():
    out = run_python(
        """
        from pytest_batchinv.patches import registry
        assert not any(name.split(".")[0] == "torch" for name in sys.modules)
        rows = registry.status()
        assert not any(name.split(".")[0] == "torch" for name in sys.modules)
        import torch
        with registry.applied("inductor"):
            assert "torch._inductor.codegen.cpp" not in sys.modules
            assert "torch._inductor.graph" not in sys.modules
        print(*(row.name for row in rows))
        """
    )
    assert out.split() == ["fallback_allow_list", "indirect_assert", "rounded_casts", "realize_by_bytes"]


@pytest.fixture
def users_distribution(tmp_path):
    """A distribution that registers one patch of its own, and one entry point that cannot be loaded."""
    (tmp_path / "users_patches.py").write_text(
        textwrap.dedent(
            """
            from pytest_batchinv.patches.registry import patch

            @patch("torch._inductor.ir.StorageBox.num_reads", torch=">=2", group="users", reason="a test", fingerprints={})
            def of_a_user(original):
                return original
            """
        )
    )
    info = tmp_path / "users-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: users\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pytest_batchinv.patches]\ngood = users_patches\nbad = users_gone\n")
    return tmp_path


def test_users_patches_come_by_entry_point_and_one_that_fails_to_load_is_a_row(users_distribution):
    out = run_python(
        """
        from pytest_batchinv.patches import registry
        for row in registry.status()[-2:]:
            print(row.name, row.group, row.state, row.why)
        """,
        users_distribution,
    )
    good, bad = out.splitlines()
    assert good.startswith("of_a_user users refused the source of torch._inductor.ir.StorageBox.num_reads has the unknown")
    assert bad.startswith("bad  refused its module could not be loaded: ModuleNotFoundError: No module named 'users_gone'")
