"""Random numbers: whatever draws them starts from a seed that does not depend on what ran before it."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

DEFAULT = 0


def load_torch() -> None:
    """Its generator starts anywhere when it is imported: what a module draws right after its import must be seeded before."""
    with heavy_imports():
        import torch  # noqa: F401


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """torch and transformers warn about themselves while they load: with -W error that would fail the first test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def start(seed: int | None) -> None:
    """torch, random and numpy start from this seed; what is not loaded is left alone."""
    number = DEFAULT if seed is None else seed
    random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)


@contextlib.contextmanager
def apart(seed: int | None, name: str) -> Iterator[None]:
    """What draws inside starts from a seed of its own, and what draws after goes on as if nothing had been drawn."""
    states = [(put_back, state()) for state, put_back in _generators()]
    start((DEFAULT if seed is None else seed) + zlib.crc32(name.encode()))
    try:
        yield
    finally:
        for put_back, state in states:
            put_back(state)


def _generators() -> Iterator[tuple[Any, Any]]:
    yield random.getstate, random.setstate
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        yield torch.get_rng_state, torch.set_rng_state
        if torch.cuda.is_initialized():
            yield torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
    if "numpy" in sys.modules:
        numbers = sys.modules["numpy"].random
        yield numbers.get_state, numbers.set_state
