"""Runs the suite on the model that was asked for, and on two where none was; an operator is an item of its own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_batchinv.plugin import lifecycle
from pytest_batchinv.plugin.fixtures import default_models
from pytest_batchinv.plugin.settings import Settings
from pytest_batchinv.suite.names import DTYPES, OPERATORS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = lifecycle.settings_of(metafunc.config)
    if "batchinv_engine" in metafunc.fixturenames:
        metafunc.parametrize("model", _models(settings))
    if "operator" in metafunc.fixturenames:
        metafunc.parametrize("operator", OPERATORS)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES)


TORCHS_OWN_WARNINGS = (
    # torch 2.13's own torch/utils/mkldnn.py, while Inductor is imported; ends where torch drops torch.jit.
    "ignore:.torch.jit.script.* is deprecated:DeprecationWarning",
    # torch (seen in 2.11), as it records the CUDA graph of a part of a model that launches nothing.
    "ignore:The CUDA Graph is empty:UserWarning",
    # torch on Python 3.13.0 alone.
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first, so that xdist's workers end together; and not two of it in a row, for xdist hands
    out tests by twos at first."""
    long, short = [item for item in items if _compiles(item)], [item for item in items if not _compiles(item)]
    turns = itertools.zip_longest(long, short[: len(long)])
    items[:] = [item for turn in turns for item in turn if item is not None] + short[len(long) :]
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in TORCHS_OWN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


def _compiles(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("compile_mode", "eager") != "eager"


def _models(settings: Settings) -> tuple[str, ...]:
    if settings.model != "auto" or not settings.loads_a_model:
        return (settings.model,)
    if not settings.enabled:
        return default_models(settings.engine, "cpu")
    from pytest_batchinv import gpu

    return default_models(settings.engine, gpu.resolve_device(settings.device))


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """The model of tests that run none: parametrised for those that do."""
    return lifecycle.settings_of(request.config).model


@pytest.fixture
def batchinv_settings(batchinv_settings: Settings, model: str) -> Settings:
    return replace(batchinv_settings, model=model)
