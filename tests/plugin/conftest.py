"""Each test here runs a small pytest of its own; ``run`` gives it in one process, and under xdist with two workers.

The inner tests use a stub of the mode and of the engine, so that they import no torch: the plugin is what is tested.
"""

import os

# pytester undoes the imports of an inner run. What the runs share is loaded before: a second import of torch fails, and
# one of our modules would be a second module.
import hypothesis.stateful  # noqa: F401
import pytest
import torch  # noqa: F401

import pytest_batchinv.plugin.enabled
import pytest_batchinv.report.html.charts
import pytest_batchinv.subjects.presets  # noqa: F401

STUBS = """
import contextlib
import copy
import sys
import types


class Mode:
    depth = 0

    def __init__(self):
        self.hits = {}

    def status(self):
        return [f"depth {Mode.depth}"]


class ModeError(RuntimeError):
    pass


@contextlib.contextmanager
def batch_invariant_mode():
    Mode.depth += 1
    try:
        yield Mode()
    finally:
        Mode.depth -= 1


@contextlib.contextmanager
def stock_torch():
    depth, Mode.depth = Mode.depth, 0
    try:
        yield
    finally:
        Mode.depth = depth


class TransformersSubject:
    built = []

    def __init__(self, **words):
        if words["attn"] == "unheard-of":
            raise ValueError("no such attention as 'unheard-of'; use eager or sdpa")
        self.words = words
        self.compile_mode = "eager"
        self.built.append(words)

    def in_compile_mode(self, compile_mode):
        other = copy.copy(self)
        other.compile_mode = compile_mode
        return other


def stub(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


stub(
    "pytest_batchinv.mode",
    Mode=Mode,
    ModeError=ModeError,
    batch_invariant_mode=batch_invariant_mode,
    stock_torch=stock_torch,
)
stub("pytest_batchinv.subjects.transformers", TransformersSubject=TransformersSubject)


if "torch" not in sys.modules:  # on a worker of xdist: the real one takes seconds to load
    stub("torch", set_num_threads=id, manual_seed=id, get_rng_state=int, set_rng_state=id)
    sys.modules["torch"].cuda = types.SimpleNamespace(is_initialized=bool, is_available=bool)


def subject(name="stub-model", kind="transformers", **words):
    from pytest_batchinv.subjects.base import SubjectInfo

    attention = "batch_invariant" if kind == "transformers" else ""
    return SubjectInfo(**{"name": name, "kind": kind, "device": "cpu", "dtype": "fp32", "attention": attention, **words})


def finding(**words):
    from pytest_batchinv.report.record import Breakpoints, Finding

    return Finding(
        **{
            "case": '{"rows":[{"id":0,"length":5},{"id":1,"length":3}],"layout":"left"}',
            "position": 1,
            "n_rows": 2,
            "row": '{"id":1,"length":3}',
            "output": "logprobs",
            "sides": ("alone", "in the batch"),
            "kind": "bits",
            "index": (4, 17),
            "expected": "1.0",
            "actual": "1.0000001",
            "expected_hex": "0x3f800000",
            "actual_hex": "0x3f800001",
            "ulp": 1,
            "n_differ": 3,
            "n_total": 1024,
            "breakpoints": Breakpoints(((2, 3), (9, 9)), 12, 300),
            "replay": "pytest --batch-invariant --batchinv-shape '{}' test_it.py::test_it",
            **words,
        }
    )


def emit(relation="I", verdict="equal", info=None, **words):
    from pytest_batchinv import context
    from pytest_batchinv.report.record import Counts, Record

    words.setdefault("mode", "on")
    words.setdefault("counts", Counts(examples=20, rows=300, compared_bytes=5_000_000, forwards=40, seconds=2.0))
    words.setdefault("machine", {"cpu": "a stub", "torch": "2.0"})
    context.current().emit(Record(subject=info or subject(), relation=relation, verdict=verdict, **words))
"""


@pytest.fixture(autouse=True)
def _no_settings_of_the_outer_run(monkeypatch, pytester):
    for name in list(os.environ):
        if name.startswith(("BATCHINV_", "PYTEST_XDIST_")) or name in ("PYTEST_ADDOPTS", "CI"):
            monkeypatch.delenv(name)
    pytester.makeconftest(STUBS)
    pytester.makeini("[pytest]\n")


@pytest.fixture(params=[(), ("-n", "2")], ids=["plain", "xdist"])
def run(request, pytester):
    """Runs the inner pytest with these arguments, and with none of torch."""
    return lambda *args: pytester.runpytest_inprocess("--batchinv-device=cpu", *args, *request.param)
