"""Our attention for transformers: ``attn_implementation="batch_invariant"``.

transformers looks implementations up by name in two registries: one for the attention, one for the mask that it needs.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask

from pytest_batchinv.kernels import operators
from pytest_batchinv.kernels.aten.common import Refused

NAME = "batch_invariant"
PAGED_NAME = "batch_invariant_flash" if "page_size" in ContinuousBatchingConfig.__annotations__ else "paged|batch_invariant"
"""For continuous batching alone. A word in the name lets transformers build no mask and say where rows begin: "flash" in 5.23,
"paged|" in 5.17."""

Packing = tuple[Tensor, Tensor]
"""Columns of a packed sequence by row and position, int64 [rows, longest row], -1 after a row's end; and the way back: for
each column its slot in that matrix, int64 [tokens]."""

_SHORTEST = 24

_NO_MATTER = {
    *("cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
    "num_items_in_batch",
}
"""Keywords of transformers that change nothing of what attention computes. Any other one that a model gives does."""

_OF_PAGES = {
    *("cu_seq_lens_k", "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "block_table"),
    *("read_index", "write_index", "logits_indices", "logits_processor_args", "is_causal"),
}
"""Where rows and pages lie: read by the cache, or not needed with a mask."""


class Uncovered(ValueError):
    """What a model asks of its attention, and ours does not compute."""


def register() -> None:
    """Makes the name known to transformers, and the operator behind it to torch. To call it again changes nothing."""
    operators.operators()
    AttentionInterface.register(NAME, attention_forward)
    AttentionInterface.register(PAGED_NAME, paged_attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_2d)


@torch.no_grad()
def difference_from_eager(model: PreTrainedModel, longest: int) -> str:
    """How our attention computes another model than the model's own eager one does, as a sentence; empty if it does not.

    Asked with a row that is three times as long as any window, chunk or top-k of the config, at most ``longest`` tokens.
    """
    config = model.config.get_text_config()
    sizes = [v for k, v in config.to_dict().items() if isinstance(v, int) and re.search("window|chunk|top_?k", k)]
    length = min(longest, max(_SHORTEST, *(3 * size for size in sizes if 3 * size <= longest)))
    tokens = torch.arange(1, length + 1, device=str(model.device))[None] % config.vocab_size
    logits = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        try:
            logits.append(model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.double())
        except (Uncovered, Refused) as error:
            return str(error)
    expected, actual = logits
    moved = float(((expected - actual).abs().mean(-1) / expected.std(-1)).nan_to_num(0.0).amax())
    tolerance = 0.02 if model.dtype in (torch.float32, torch.float64) else 0.3
    return f"it moves logits by {moved:.2g} times their spread" if moved > tolerance else ""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    packing: Packing | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The contract of transformers: query, key and value [B, heads, tokens, D]; returns [B, tokens, heads, D].

    Key heads are not repeated: the operator maps query heads to key heads itself. softcap: scores s become
    ``softcap * tanh(s / softcap)``; s_aux: sinks [heads]. packing: given by the subject for a sequence of packed
    rows, which are unpacked here, since the operator counts keys from the start of a sequence. sliding_window: it is in the
    mask; with position_ids it tells how many keys of a row are hidden, or dropped by a cache, before the first that is seen.
    """
    _refuse_uncovered(dropout, kwargs)
    if packing is not None:
        columns, slots = packing
        unpacked = [_unpack(x, columns) for x in (query, key, value)]
        mask = _unpack_mask(attention_mask, columns)
        out, _ = attention_forward(module, *unpacked, mask, scaling, softcap=softcap, s_aux=s_aux)
        return out.flatten(0, 1)[slots][None], None
    is_whole = query.shape[2] == key.shape[2]  # no key is missing
    positions = None if is_whole or position_ids is None or position_ids.dim() != 2 else position_ids.long()
    if attention_mask is None and is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return _attend(query, key, value, attention_mask, is_causal, scaling, softcap, s_aux, sliding_window, positions), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    positions: Tensor | None,
) -> Tensor:
    """[B, tokens, heads, D]. positions: int64 [B, tokens], where keys may be missing before those that are seen."""
    # A single query is the last one: it sees every key.
    causal = mask is None and bool(is_causal) and query.shape[2] > 1
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    places = (positions, window) if window and mask is not None and positions is not None else (None, 0)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if sinks is None else sinks.to(query.dtype)
    out, _ = torch.ops.batchinv.attention(query, key, value, mask, causal, scale, softcap, sinks, *places)
    return out.transpose(1, 2).contiguous()


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The contract of continuous batching: query, key and value [1, heads, tokens, D] of rows behind each other; returns
    [1, tokens, heads, D].

    cache: puts the keys into its pages and gives all keys of these rows, behind each other, the last ones for the queries.
    Each row becomes one of a batch with padding on the right, since the operator counts keys from the start of a sequence.
    """
    if cu_seq_lens_q is None:
        raise Uncovered(f"the attention {PAGED_NAME!r} is for continuous batching alone: without it choose {NAME!r}")
    _refuse_uncovered(dropout, {name: value for name, value in kwargs.items() if name not in _OF_PAGES})
    key, value, k_starts = _paged(cache, key, value, module, sliding_window, kwargs)
    q_rows, k_rows = _columns_between(cu_seq_lens_q), _columns_between(k_starts)
    n_queries, n_keys = (x.ge(0).sum(1)[:, None, None] for x in (q_rows, k_rows))
    last = torch.arange(q_rows.shape[1], device=query.device)[None, :, None] + n_keys - n_queries
    keys = torch.arange(k_rows.shape[1], device=query.device)[None, None, :]
    visible = (keys <= last) & (keys < n_keys)
    if sliding_window:
        visible &= keys > last - sliding_window
    unpacked = (_unpack(query, q_rows), _unpack(key, k_rows), _unpack(value, k_rows))
    positions = None if position_ids is None else position_ids[0][q_rows.clamp(min=0)]
    out = _attend(*unpacked, visible[:, None], None, scaling, softcap, s_aux, sliding_window, positions)
    return out[q_rows >= 0][None], None


def _paged(
    cache: Any, key: Tensor, value: Tensor, module: nn.Module, window: int | None, words: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """All keys and values of the rows, [1, heads, tokens, D], and where each row's begin, int [rows + 1]."""
    states = {"key_states": key, "value_states": value, "layer_idx": module.layer_idx}
    if "kwargs" in inspect.signature(cache.update).parameters:
        key, value = cache.update(**states, kwargs=words)
        return key, value, words["cu_seq_lens_k"]
    # transformers 5.17
    key, value = cache.update(**states, read_index=words["read_index"], write_index=words["write_index"])
    starts = words["cu_seq_lens_k"]
    if isinstance(starts, dict):  # of a model with several types of layers
        starts = starts["sliding_attention" if window else "full_attention"]
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None], starts


def _columns_between(starts: Tensor) -> Tensor:
    """The columns of each row, from its start to the next one, int64 [rows, longest row], -1 after its end."""
    offsets = torch.arange(int(starts.diff().max()), device=starts.device)
    columns = starts[:-1, None] + offsets
    return torch.where(columns < starts[1:, None], columns, -1)


def _unpack(x: Tensor, columns: Tensor) -> Tensor:
    """[1, heads, tokens, D] -> [rows, heads, longest row, D]. After a row's end stands any token; the mask hides it."""
    return x[0].transpose(0, 1)[columns.clamp(min=0)].transpose(1, 2)


def _unpack_mask(mask: Tensor, columns: Tensor) -> Tensor:
    """[1, 1, tokens, tokens] -> [rows, 1, longest row, longest row]."""
    inside, columns = columns >= 0, columns.clamp(min=0)
    visible = mask[0, 0][columns[:, :, None], columns[:, None, :]]
    return (visible & inside[:, :, None] & inside[:, None, :])[:, None]


def attention_mask_2d(allow_is_causal_skip: bool = True, **kwargs) -> Tensor | None:
    """The boolean mask of sdpa, or None where causality is all of it, which the operator knows by itself.

    Both give the same bits, so a row alone may go without a mask and have one in a batch with padding. Sizes decide, never
    the values of a mask as in transformers: so compiled code decides as eager code does.
    """
    if allow_is_causal_skip and _is_causality_alone(**kwargs):
        return None
    return sdpa_mask(allow_is_causal_skip=False, **{**kwargs, "allow_is_bidirectional_skip": False})


def _is_causality_alone(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> bool:
    starts_at_zero = isinstance(q_offset, int) and q_offset == kv_offset == 0
    whole = starts_at_zero and q_length == kv_length and local_size is None
    return whole and attention_mask is None and mask_function is causal_mask_function


def _refuse_uncovered(dropout: float, kwargs: dict) -> None:
    asked = [name for name, value in kwargs.items() if value is not None and name not in _NO_MATTER]
    if dropout:
        asked.append("dropout")
    if asked:
        raise Uncovered(
            f"batch-invariant attention does not compute {' and '.join(asked)}, which this model asks for; "
            f'choose attn="eager" (and model.eval(), to turn dropout off)'
        )
