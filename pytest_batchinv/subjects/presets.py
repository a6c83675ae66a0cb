"""Presets: models known by name, built from a shipped configuration and seeded weights. No torch is needed here.

"tiny-*" are small enough for a CPU; "wide-*" have a few layers of true widths, for a GPU; "random:*" have the true sizes
of published models. Nothing is downloaded.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

PRESETS = (
    "tiny-llama",
    "tiny-qwen3",
    "tiny-qwen3-d64",
    "tiny-qwen3-moe",
    "tiny-qwen3-8-heads",
    "tiny-qwen3-moe-8-heads",
    "tiny-gpt2",
    "tiny-gemma",
    "wide-qwen3",
    "wide-llama",
    "wide-qwen3-moe",
    "wide-gpt2",
    "wide-gemma",
    "wide-gpt-oss",
    "random:qwen3-0.6b",
    "random:qwen3-1.7b",
    "random:qwen3-4b",
    "random:qwen3-8b",
    "random:qwen3-30b-a3b",
    "random:llama-3.2-1b",
    "random:llama-3.1-8b",
)


class UnknownModel(ValueError):
    """The name is neither a preset, nor the path of a model, nor the id of one that can be loaded from the hub."""

    def __init__(self, name: str, reason: str = "") -> None:
        because = f" ({reason})" if reason else ""
        super().__init__(
            f"there is no model {name!r}{because}; give one of the presets {', '.join(PRESETS)}, the path of a local "
            f"model, or a hub id such as org/name"
        )


def is_preset(name: str) -> bool:
    """Whether the name is a preset's. Raises UnknownModel where it is written like one ("random:...") and is none."""
    if name not in PRESETS and name.startswith(("random:", "tiny-", "wide-")):
        raise UnknownModel(name)
    return name in PRESETS


def preset_config(name: str) -> dict[str, Any]:
    """The preset's configuration, as transformers writes it in a config.json."""
    if not is_preset(name):
        raise UnknownModel(name)
    return dict(_configs()[name])


@cache
def _configs() -> dict[str, dict[str, Any]]:
    configs: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("configs.json").read_text(encoding="utf-8"))
    return configs
