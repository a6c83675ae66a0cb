"""Runs the suite on the model that was asked for, and on two tiny ones where none was."""

from dataclasses import replace

import pytest

from pytest_batchinv.keys import SETTINGS
from pytest_batchinv.settings import DEFAULTS, Settings

DEFAULT_MODELS = (DEFAULTS.model, "tiny-llama")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batchinv_engine" in metafunc.fixturenames:
        asked = metafunc.config.stash[SETTINGS].model
        metafunc.parametrize("model", DEFAULT_MODELS if asked == DEFAULTS.model else (asked,))


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """The model of tests that run none: parametrised for those that do."""
    return request.config.stash[SETTINGS].model


@pytest.fixture
def batchinv_settings(batchinv_settings: Settings, model: str) -> Settings:
    return replace(batchinv_settings, model=model)
