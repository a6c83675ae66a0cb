"""Each test here runs a small pytest of its own; ``run`` gives it in one process, and under xdist with two workers.

The inner tests use a stub of the mode and of the engine, so that they import no torch: the plugin is what is tested.
"""

import os

# pytester undoes the imports of an inner run. What the runs share is loaded before: a second import of torch fails, and
# one of our modules would be a second module.
import hypothesis.stateful  # noqa: F401
import pytest
import torch  # noqa: F401

from pytest_batchinv import preflight, progress, records, report, shapes, xdist  # noqa: F401
from pytest_batchinv.engines import presets  # noqa: F401
from pytest_batchinv.report import json, terminal  # noqa: F401

STUBS = """
import contextlib
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


class TransformersEngine:
    built = []

    def __init__(self, **words):
        if words["attn"] == "unheard-of":
            raise ValueError("no such attention as 'unheard-of'; use eager or sdpa")
        self.__dict__.update(words)
        self.built.append(words)


def stub(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


stub("pytest_batchinv.mode", Mode=Mode, ModeError=ModeError, batch_invariant_mode=batch_invariant_mode)
stub("pytest_batchinv.engines.transformers", TransformersEngine=TransformersEngine)


def emit(relation="I", verdict="equal", **words):
    from pytest_batchinv import records

    case = {"compile_mode": "eager", "device": "cpu", "dtype": "fp32", "machine": {"cpu": "a stub", "torch": "2.0"}}
    records.emit(records.Record("stub-model", relation, verdict, **{**case, **words}))
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
