"""Tiny models of every causal architecture that transformers has, with seeded weights. Nothing is downloaded."""

from __future__ import annotations

import inspect
import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 2
MOST_PARAMETERS = 20_000_000
_NAMES_OF_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")


def names() -> list[str]:
    """The causal architectures of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    """Seeded by the architecture's name. Raises ValueError for one whose configuration does not become tiny."""
    config = tiny_config(architecture)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, dtype=dtype).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{architecture} has {size:,} parameters with the tiny sizes; give it sizes of its own in tiny.json")
    torch.manual_seed(0)  # for buffers that are drawn
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _seed_weights(model, zlib.crc32(architecture.encode()))
    model.eval()
    return model


def tiny_config(architecture: str) -> Any:
    """The architecture's own defaults, with what ``tiny.json`` says of the fields that it has."""
    kind, tiny = CONFIG_MAPPING[architecture], _tiny()
    own = tiny["by_architecture"].get(architecture, {})
    fields, defaults = _fields(kind), _defaults(kind)
    words = {
        name: value
        for name, value in tiny["sizes"].items()
        if name in fields
        and name not in getattr(kind, "attribute_map", {})
        and not isinstance(defaults.get(name), (list, dict, tuple))
        and (name == "vocab_size" or defaults.get(name, 0) is not None)
    }
    n_layers = own.get("num_hidden_layers", LAYERS)
    words |= {name: n_layers for name in _NAMES_OF_LAYERS if name in words}
    for name in fields & set(tiny["per_layer"]) - own.keys():
        if (kinds := _each_kind_in_turn(defaults, name, n_layers)) is not None:
            words[name] = kinds
    if architecture in tiny["decoders"] and "is_decoder" in fields:
        words["is_decoder"] = True
    return kind(**words | own)


def _each_kind_in_turn(defaults: dict[str, Any], name: str, n_layers: int) -> list[Any] | None:
    """A list with an entry for each layer, cut so that every kind of entry is still there; None for what is no such list."""
    given = defaults.get(name)
    all_layers = defaults.get("num_hidden_layers") or defaults.get("n_layer")
    if not isinstance(given, list) or len(given) <= n_layers or len(given) != (all_layers or len(given)):
        return None
    kinds = list({str(entry): entry for entry in reversed(given)}.values())[::-1]
    kinds.sort(key=lambda entry: given.index(entry))
    return [kinds[i % len(kinds)] for i in range(n_layers)]


def _fields(kind: Any) -> set[str]:
    fields: set[str] = set()
    for base in kind.__mro__:
        fields |= set(getattr(base, "__annotations__", {}) or {})
        try:
            fields |= set(inspect.signature(base.__init__).parameters)
        except (TypeError, ValueError):
            continue
    return fields


def _defaults(kind: Any) -> dict[str, Any]:
    try:
        defaults: dict[str, Any] = kind().to_dict()
    except Exception:  # whatever a configuration without arguments trips over: then there are no defaults to respect
        return {}
    return defaults


@torch.no_grad()
def _seed_weights(model: nn.Module, seed: int) -> None:
    """Embeddings of the size of trained ones, matrices that keep the size of activations, vectors near where they begin."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        noise = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
        near_its_start = parameter.ndim == 1 or "A_log" in name or "conv1d" in name or name.endswith((".D", "dt_bias", "scale"))
        if id(parameter) in embeddings:
            parameter.copy_(noise.mul_(0.25))
        elif not near_its_start:
            parameter.copy_(noise.mul_(parameter.shape[-1] ** -0.5))
        elif torch.isfinite(parameter).all():
            parameter.add_(noise.mul_(0.1).to(parameter.dtype))
        else:
            parameter.copy_(noise.mul_(0.1))


@cache
def _tiny() -> dict[str, Any]:
    tiny: dict[str, Any] = json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))
    return tiny
