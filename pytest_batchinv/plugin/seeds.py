"""Random numbers: whatever draws them starts from a seed that does not depend on what ran before it."""

from __future__ import annotations

import contextlib
import random
import sys
import zlib
from collections.abc import Iterator
from typing import Any

DEFAULT = 67280421310721
"""torch's own (c10::detail default_rng_seed_val): what a test draws alone, without this plugin, it draws with it."""


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
