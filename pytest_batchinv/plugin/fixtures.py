"""The fixtures. What a test asks for here it gets for its own run only; engines are kept for the session."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from pytest_batchinv import items
from pytest_batchinv.keys import MAKE_ENGINE, RUN, SETTINGS
from pytest_batchinv.markers import GPU_COMPILE_MODES
from pytest_batchinv.settings import Settings

KEPT_ENGINES = 4  # one for each compile mode of a usual test; more of them would fill a GPU


def engine_maker() -> Callable[..., Any]:
    return lru_cache(maxsize=KEPT_ENGINES)(_build_engine)


def _build_engine(**words: str) -> Any:
    from pytest_batchinv.engines.transformers import TransformersEngine

    return TransformersEngine(**words)


@pytest.fixture
def batchinv_settings(request: pytest.FixtureRequest) -> Settings:
    """The Settings of this test: the options, and the arguments of its batch_invariant marker."""
    if not request.config.stash[SETTINGS].enabled:
        pytest.skip(items.NEEDS_OPTION)
    return request.node.stash[RUN].settings


@pytest.fixture
def batch_invariant(request: pytest.FixtureRequest, batchinv_settings: Settings) -> Any:
    """The Mode that this test runs in; its ``hits`` count the replaced operations. Needs --batch-invariant."""
    return items.enter_mode(request.node)


@pytest.fixture
def compile_mode(request: pytest.FixtureRequest) -> str:
    """The compile mode of this test item: from @pytest.mark.compile_mode, else "eager"."""
    mode = getattr(request, "param", "eager")
    if mode in GPU_COMPILE_MODES:
        device = items.resolve_device(request.config.stash[SETTINGS])
        if device != "cuda":
            pytest.skip(f"compile mode {mode} needs a CUDA GPU; this run is on the {device}")
    return mode


@pytest.fixture
def batchinv_engine(request: pytest.FixtureRequest, batchinv_settings: Settings, compile_mode: str) -> Any:
    """The model under test in this item's compile mode, ready for batch shapes. Needs --batch-invariant.

    It does not turn the mode on by itself: the marker batch_invariant does, and a negative control goes without.
    """
    device = items.resolve_device(batchinv_settings)
    dtype = batchinv_settings.dtype
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16"
    try:
        with items.heavy_imports():
            return request.config.stash[MAKE_ENGINE](
                model=batchinv_settings.model,
                device=device,
                dtype=dtype,
                attn=batchinv_settings.attn,
                compile_mode=compile_mode,
            )
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
