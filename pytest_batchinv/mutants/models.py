"""Planted faults of models: a forward hook on the last decoder layer of a model of transformers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
"""Hidden states [sequences, tokens, hidden] -> the same shape."""


def follows_the_batch_size(hidden: Tensor) -> Tensor:
    """What a product does whose kernel is chosen by its number of rows."""
    return hidden * (1 + 3e-7) if hidden.shape[0] > 4 else hidden


def leaks_the_mean_of_the_batch(hidden: Tensor) -> Tensor:
    """As batch normalisation in training mode does, or a scale for each tensor."""
    return hidden + hidden.mean((0, 1), keepdim=True) * 1e-3


def noise() -> Change:
    ticks = itertools.count()
    return lambda hidden: hidden * (1 + 3e-7 * (next(ticks) % 2))


def follows_the_width(hidden: Tensor) -> Tensor:
    """What an attention does whose sums follow the number of its keys, padding included."""
    return hidden * (1 + 3e-7) if hidden.shape[1] > 40 else hidden


def follows_the_number_of_queries(n_queries: int) -> Change:
    """What a product does whose kernel is chosen by its number of rows, or an attention with a kernel of its own for decode."""
    return lambda hidden: hidden * (1 + 3e-7) if hidden.shape[1] == n_queries else hidden


PLANTED: dict[str, Callable[[], Change]] = {
    "R": noise,
    "S": lambda: leaks_the_mean_of_the_batch,
    "I": lambda: follows_the_batch_size,
    "L": lambda: follows_the_width,
    "C": lambda: follows_the_number_of_queries(16),
    "D": lambda: follows_the_number_of_queries(1),
}
"""By the relation that must catch it."""


@contextlib.contextmanager
def planted(model: nn.Module, change: Change) -> Iterator[None]:
    """Inside, the hidden states of the model's last decoder layer are changed."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        with torch.no_grad():
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = layers[-1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
