"""The fixtures. What a test asks for here it gets for its own run only; models are kept for the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest

from pytest_batchinv.plugin import lifecycle
from pytest_batchinv.plugin.markers import GPU_COMPILE_MODES
from pytest_batchinv.plugin.stash import MODELS, RUN, Run

if TYPE_CHECKING:
    from pytest_batchinv.mode import Mode
    from pytest_batchinv.plugin.settings import Settings

KEPT_MODELS = 2
DEFAULT_MODELS = {"cpu": ("tiny-qwen3", "tiny-llama"), "cuda": ("wide-qwen3", "wide-llama")}
"""What "auto" is by device: small enough for a CPU; on a GPU wide enough that stock torch varies in bf16. The first one is
the model of a test of one's own, and the packaged suite runs both."""
MODELS_OF_VLLM = {"cpu": ("tiny-qwen3-d64",), "cuda": ("wide-qwen3",)}
"""The same for vLLM: on a CPU its heads have 32 dims or more, and its float32 products vary at K = 2048, not at 1024."""


def default_models(engine: str, device: str) -> tuple[str, ...]:
    return (MODELS_OF_VLLM if engine == "vllm" else DEFAULT_MODELS)[device]


def model_loader() -> Callable[..., Any]:
    """Loads a subject in eager mode, or gives one that it has loaded; its compile modes share the model."""
    return lru_cache(maxsize=KEPT_MODELS)(_load)


def _load(engine: str, url: str | None, **words: str) -> Any:
    from pytest_batchinv.kernels import counters

    with counters.counting_apart():  # to build a model is no test of it
        if engine in ("transformers", "transformers-hidden"):
            from pytest_batchinv.subjects.transformers import TransformersSubject

            return TransformersSubject(**words, **({"hidden": True} if engine == "transformers-hidden" else {}))
        if engine in ("transformers-generate", "transformers-sample", "transformers-assisted"):
            from pytest_batchinv.subjects.transformers import TransformersSubject
            from pytest_batchinv.subjects.transformers.generation import Generation, Sampling

            sampling = Sampling() if engine == "transformers-sample" else None
            return Generation(TransformersSubject(**words), sampling=sampling, assisted=engine == "transformers-assisted")
        if engine == "transformers-continuous":
            from pytest_batchinv.subjects.transformers import TransformersSubject
            from pytest_batchinv.subjects.transformers.continuous import ContinuousBatching

            return ContinuousBatching(TransformersSubject(**words))
        if engine == "vllm":
            from pytest_batchinv.subjects.vllm import VllmSubject

            return VllmSubject(**words)
        if engine in ("http", "http-chat"):
            return _served(url, engine, words["model"])
        from pytest_batchinv import extensions

        return extensions.load(extensions.ENGINES, engine)(url=url, **words)


def _served(url: str | None, engine: str, model: str) -> Any:
    try:
        from pytest_batchinv.subjects.http import HttpSubject, ServerError
    except ModuleNotFoundError as error:
        raise ValueError(f"the engine {engine} needs {error.name}: pip install 'pytest-batchinv[http]'") from None
    try:
        return HttpSubject(model, url or "", api="chat" if engine == "http-chat" else "completions")
    except ServerError as error:
        raise ValueError(str(error)) from None


def in_compile_mode(subject: Any, compile_mode: str, engine: str) -> Any:
    """Engines of other packages may have no compile modes; those skip the items of any other mode than eager."""
    if hasattr(subject, "in_compile_mode"):
        return subject.in_compile_mode(compile_mode)
    if compile_mode != "eager":
        pytest.skip(f"the engine {engine} has no compile modes, so there is nothing to run in the mode {compile_mode}")
    return subject


@pytest.fixture
def batchinv_settings(request: pytest.FixtureRequest) -> Settings:
    """The Settings of this test: the options, and the arguments of its batch_invariant marker."""
    if not lifecycle.enabled(request.config):
        pytest.skip(lifecycle.NEEDS_OPTION)
    run: Run = request.node.stash[RUN]
    return run.settings


@pytest.fixture
def batch_invariant(request: pytest.FixtureRequest, batchinv_settings: Settings) -> Iterator[Mode]:
    """The Mode that this test runs in; its ``hits`` count the replaced operations. Needs --batch-invariant."""
    with lifecycle.mode_of(request.node) as mode:
        yield mode


@pytest.fixture
def compile_mode(request: pytest.FixtureRequest) -> str:
    """The compile mode of this test item: from @pytest.mark.compile_mode, else "eager"."""
    mode = getattr(request, "param", "eager")
    if mode in GPU_COMPILE_MODES:
        device = lifecycle.resolve_device(lifecycle.settings_of(request.config))
        if device != "cuda":
            pytest.skip(f"compile mode {mode} needs a CUDA GPU; this run is on the {device}")
    return mode


@pytest.fixture
def batchinv_engine(request: pytest.FixtureRequest, batchinv_settings: Settings, compile_mode: str) -> Any:
    """The model under test in this item's compile mode, as a subject of the checks. Needs --batch-invariant.

    It does not turn the mode on by itself: the marker batch_invariant does, and a negative control goes without.
    """
    device = lifecycle.resolve_device(batchinv_settings)
    dtype, model = batchinv_settings.dtype, batchinv_settings.model
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16"
    if model == "auto" and batchinv_settings.loads_a_model:
        model = default_models(batchinv_settings.engine, device)[0]
    from pytest_batchinv.plugin.seeds import heavy_imports

    try:
        with heavy_imports():
            loaded = request.config.stash[MODELS](
                engine=batchinv_settings.engine,
                url=batchinv_settings.url,
                model=model,
                device=device,
                dtype=dtype,
                attn=batchinv_settings.attn,
            )
        return in_compile_mode(loaded, compile_mode, batchinv_settings.engine)
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
