"""Attention masks: built by us for every batch, so that the mask of a row alone and in a batch have the same form.

transformers leaves a mask out where nothing is padded, and another code path runs. A 4-d mask it takes as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Masks = Tensor | dict[str, Tensor]
Windows = dict[str, int | None]

_KINDS = {"full_attention", "sliding_attention"}


def windows_of(config: Any) -> Windows | None:
    """Sliding window (None: none) by kind of layer, as the configuration tells; None for attention of another sort."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if getattr(config, "attention_chunk_size", None) is not None or not getattr(config, "is_causal", True):
        return None
    if layer_types is None:
        return {"full_attention" if window is None else "sliding_attention": window}
    if not _KINDS.issuperset(layer_types):
        return None
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(layer_types))}


def window_of(config: Any) -> int:
    """The sliding window in tokens, 0 where no layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return 0 if window is None or (kinds is not None and "sliding_attention" not in kinds) else window


def padding_mask(rows: Tensor) -> Tensor:
    """The 2-d mask that every model takes: 1 where a token belongs to a row."""
    return (rows >= 0).long()


def visible(rows: Tensor, positions: Tensor, windows: Windows) -> dict[str, Tensor]:
    """By kind of layer, [lines, 1, queries, keys], True: visible. A token sees the tokens of its own row up to itself; padding
    sees and is seen by nothing."""
    return {kind: _visible(rows, positions, window) for kind, window in windows.items()}


def of_columns(visible: Tensor, queries: slice, first_key: int, n_keys: int) -> Tensor:
    """The part for these queries, and for ``n_keys`` keys from this column on; what is beyond the batch is hidden."""
    part = visible[:, :, queries, first_key : first_key + n_keys]
    return torch.nn.functional.pad(part, (0, n_keys - part.shape[-1]))


def formed(visible: dict[str, Tensor], form: Callable[[Tensor], Any]) -> Any:
    """4-d masks: one where all layers are of one kind, else a dict by kind, which such models take. form: brings a boolean mask
    into what the attention implementation reads."""
    masks = {kind: form(mask) for kind, mask in visible.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _visible(rows: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """[lines, 1, queries, keys], True: visible. Positions count within the row, so packing is no special case."""
    query_row, key_row = rows[:, None, :, None], rows[:, None, None, :]
    query, key = positions[:, None, :, None], positions[:, None, None, :]
    visible = (query_row == key_row) & (key_row >= 0) & (key <= query)
    return visible if window is None else visible & (key > query - window)


def boolean(visible: Tensor) -> Tensor:
    """The form that sdpa and our own attention read."""
    return visible


def additive(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The form that eager attention adds to its scores. Not -inf: a query that sees nothing must not become NaN."""
    return lambda visible: torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )
