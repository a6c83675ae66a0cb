"""Runs the suite on the model that was asked for, and on two where none was; an operator is an item of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_batchinv.plugin import lifecycle
from pytest_batchinv.plugin.fixtures import DEFAULT_MODELS
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first, so that xdist's workers end together."""
    items.sort(key=lambda item: not _compiles(item))


def _compiles(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("compile_mode", "eager") != "eager"


def _models(settings: Settings) -> tuple[str, ...]:
    if settings.model != "auto":
        return (settings.model,)
    if not settings.enabled:
        return DEFAULT_MODELS["cpu"]
    from pytest_batchinv import gpu

    return DEFAULT_MODELS[gpu.resolve_device(settings.device)]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """The model of tests that run none: parametrised for those that do."""
    return lifecycle.settings_of(request.config).model


@pytest.fixture
def batchinv_settings(batchinv_settings: Settings, model: str) -> Settings:
    return replace(batchinv_settings, model=model)
