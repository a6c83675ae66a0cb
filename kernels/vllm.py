"""Operators of vLLM's CPU build (``torch.ops._C``): each function here has the arguments of the operator that it stands for.

Read in vLLM 0.32.0. Its products are no operators that could be replaced: they are given packed weights
(``patches/vllm_products.py``). A KV cache that is written here is read here alone: vLLM's kernels keep keys in another order.
"""

import re

from torch import Tensor
from torch._ops import OpOverload

from pytest_batchinv.kernels.aten.common import Refused, kernel_set
from pytest_batchinv.kernels.reference import accumulator_dtype


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    isa: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    """Writes token t's key and value [Hkv, D] to place ``slot % block_size`` of block ``slot // block_size``.

    key, value: [T, Hkv, D]. The caches: [n_blocks, Hkv, block_size, D], of the keys' dtype. A negative slot is padding.
    Values are moved, and nothing is computed.
    """
    _refuse_quantized(kv_cache_dtype)
    block_size = key_cache.shape[2]
    kept = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[kept].long()
    block, place = slots // block_size, slots % block_size
    for cache, given in ((key_cache, key), (value_cache, value)):
        cache[block, :, place] = given[kept]


def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    sliding_window_size: int,
    block_table: Tensor,
    softcap: float,
    scheduler_metadata: Tensor,
    s_aux: Tensor | None,
    dynamic_causal: Tensor | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    """``packed_attention`` of each request over the keys and values of its blocks: its order, whatever vLLM's schedule says.

    query, output: [T, H, D]. query_start_loc: [N + 1], where each request's queries begin. seq_lens: [N] keys of each.
    block_table: [N, most blocks]. sliding_window_size: keys that a query sees, itself one of them; -1 for all of them.
    """
    _refuse_quantized(kv_cache_dtype)
    if alibi_slopes is not None:
        raise Refused("batch-invariant mode has no attention with ALiBi slopes for vLLM's KV cache.")
    if dynamic_causal is not None:
        raise Refused("batch-invariant mode has no attention for vLLM whose requests are causal one by one.")
    starts = query_start_loc[: len(seq_lens) + 1]
    out, _ = kernel_set(query).packed_attention(
        query,
        key_cache.transpose(1, 2),
        value_cache.transpose(1, 2),
        starts,
        seq_lens,
        int((starts[1:] - starts[:-1]).max()),
        scale,
        is_causal=causal,
        window=sliding_window_size if sliding_window_size > 0 else None,
        soft_cap=softcap or None,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
        pages=block_table[: len(seq_lens)],
    )
    output.copy_(out)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Rotates each pair (x1, x2) of a head in place: ``x1 * cos - x2 * sin``, ``x2 * cos + x1 * sin``.

    query, key: [T, heads * head_size] or [T, heads, head_size]. cos_sin_cache: [positions, rotary_dim], cosines before sines.
    is_neox: x1 and x2 lie rotary_dim / 2 apart; else they are neighbours. Each product and each sum is rounded in the
    accumulator's dtype, and the result to that of query.
    """
    if rope_dim_offset or inverse:
        raise Refused("batch-invariant mode rotates the first dims of a head, and forwards, for vLLM.")
    wide = accumulator_dtype(query.dtype)
    rotary_dim = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions.flatten()].to(wide)[:, None].chunk(2, dim=-1)
    for x in (query, key):
        if x is None:
            continue
        rotated = x.view(len(cos), -1, head_size)[..., :rotary_dim]
        first, second = rotated.chunk(2, dim=-1) if is_neox else (rotated[..., ::2], rotated[..., 1::2])
        x1, x2 = first.to(wide, copy=True), second.to(wide, copy=True)
        first.copy_(x1 * cos - x2 * sin)
        second.copy_(x2 * cos + x1 * sin)


def greedy_argmax(logits: Tensor) -> Tensor:
    """The index of the largest logit of each row, the first one of equal ones."""
    return logits.argmax(-1)


def _refuse_quantized(kv_cache_dtype: str) -> None:
    if kv_cache_dtype != "auto":
        raise Refused(f"batch-invariant mode has no kernel for vLLM's KV cache in {kv_cache_dtype}; use auto.")


SCHEMAS = {
    "_C::cpu_attn_reshape_and_cache": (
        "Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, str isa, "
        'float k_scale=1., float v_scale=1., str kv_cache_dtype="auto") -> ()'
    ),
    "_C::cpu_attention_with_kv_cache": (
        "Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a!) output, Tensor query_start_loc, Tensor seq_lens, "
        "float scale, bool causal, Tensor? alibi_slopes, SymInt sliding_window_size, Tensor block_table, float softcap, "
        "Tensor scheduler_metadata, Tensor? s_aux, Tensor? dynamic_causal, float k_scale=1., float v_scale=1., "
        'str kv_cache_dtype="auto") -> ()'
    ),
    "_C::rotary_embedding": (
        "Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, Tensor cos_sin_cache, bool is_neox, "
        "int rope_dim_offset=0, bool inverse=False) -> ()"
    ),
    "_C::greedy_argmax": "Tensor logits) -> Tensor",
}
"""The arguments that these functions were written for. An operator of the name with others is refused."""


def has_known_arguments(overload: OpOverload) -> bool:
    """Whether the operator has the arguments that its function here was written for, by whatever names its aliases go."""
    name = overload.name()
    return _ALIASES.sub("Tensor", str(overload._schema)) == _ALIASES.sub("Tensor", f"{name}({SCHEMAS[name]}")


_ALIASES = re.compile(r"Tensor\([^()]*\)")
