"""Caches of keys and values: those of transformers, as a model's configuration asks for them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from pytest_batchinv.shapes import Steps
from pytest_batchinv.subjects.base import NotRun


def word_of(model: nn.Module) -> str:
    """The keyword by which the model's forward takes a cache, "" where it takes none: transformers 5.24 renamed it."""
    parameters = inspect.signature(model.forward).parameters
    return next((word for word in ("cache", "past_key_values") if word in parameters), "")


def new(steps: Steps, config: Any, n_columns: int) -> Cache:
    """An empty cache. "dynamic" keeps all keys, also of layers with a sliding window, which then comes as a mask."""
    if steps.cache == "static":
        return StaticCache(config=config, max_cache_len=n_columns + steps.spare)
    cache = DynamicCache(config=config)
    if steps.cache == "dynamic":
        cache.layers = [DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers]
    if steps.rejected:
        cache.activate_past_recording()
    return cache


def columns_of_keys(cache: Cache, config: Any, n_queries: int) -> dict[str, tuple[int, int]]:
    """By kind of layer, the column of its first key in the next step of so many queries, and the number of its keys."""
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    columns = {}
    for layer, kind in enumerate(kinds):
        n_keys, first = cache.get_mask_sizes(n_queries, layer)
        columns[kind] = (first, n_keys)
    return columns


def joined(caches: Sequence[Cache], n_tokens: int) -> Cache:
    """One cache for a batch, of caches that each hold the first tokens of one row.

    Raises NotRun for layers that are not rows of keys and values, and RuntimeError where a cache does not hold the tokens: then
    the next step would compute something else than what comes after them.
    """
    batch = caches[0]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            raise NotRun(f"a prefix is not reused in layers of the kind {type(layers[0]).__name__}")
        if any(layer.get_seq_length() != n_tokens for layer in layers):
            held = sorted({layer.get_seq_length() for layer in layers})
            raise RuntimeError(f"the caches hold {held} tokens where the prefix has {n_tokens}: nothing could be reused")
        layers[0].keys = torch.cat([layer.keys for layer in layers])
        layers[0].values = torch.cat([layer.values for layer in layers])
    return batch
