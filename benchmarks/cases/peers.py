"""Other people's kernels for the same work, if they are installed. None is needed, and one that refuses is only noted."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from timing import Contender


def contenders(work: str) -> Iterator[Contender]:
    """The installed peers for this work; their calls take what our contenders for it take."""
    for package, make in _PEERS.get(work, {}).items():
        if importlib.util.find_spec(package) is not None:
            yield Contender(package, _imported_at_first_call(make), required=False)


def _imported_at_first_call(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """A peer that cannot be imported then refuses like one that cannot be called."""
    made: list[Callable[..., Any]] = []

    def call(*inputs):
        if not made:
            made.append(make())
        return made[0](*inputs)

    return call


def _batch_invariant_ops_mm():
    matmul_persistent = importlib.import_module("batch_invariant_ops.batch_invariant_ops").matmul_persistent
    return lambda x, w: matmul_persistent(x, w.t())


def _batch_invariant_ops_log_softmax():
    log_softmax = importlib.import_module("batch_invariant_ops.batch_invariant_ops").log_softmax
    return lambda x, weight, bias: log_softmax(x, dim=-1)


def _liger_rms_norm():
    rms_norm = importlib.import_module("liger_kernel.transformers.functional").liger_rms_norm
    return lambda x, weight, bias: rms_norm(x, weight, 1e-6, in_place=False)


def _liger_layer_norm():
    layer_norm = importlib.import_module("liger_kernel.transformers.functional").liger_layer_norm
    return lambda x, weight, bias: layer_norm(x, weight, bias, 1e-6)


def _flashinfer_rms_norm():
    rmsnorm = importlib.import_module("flashinfer").rmsnorm
    return lambda x, weight, bias: rmsnorm(x, weight, 1e-6)


def _flash_attn_prefill():
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    return lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)


def _flash_attn_decode():
    with_kvcache = importlib.import_module("flash_attn").flash_attn_with_kvcache
    return lambda q, k, v: with_kvcache(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _flashinfer_prefill():
    prefill = importlib.import_module("flashinfer").single_prefill_with_kv_cache
    return lambda q, k, v: prefill(*(x[0].transpose(0, 1) for x in _alone(q, k, v)), causal=True).transpose(0, 1)[None]


def _flashinfer_decode():
    decode = importlib.import_module("flashinfer").single_decode_with_kv_cache

    def call(q, k, v):
        query, keys, values = _alone(q, k, v)
        return decode(query[0, :, 0], keys[0].transpose(0, 1), values[0].transpose(0, 1))[None, :, None]

    return call


def _alone(q, k, v):
    if q.shape[0] != 1:
        raise ValueError("this peer's function takes one sequence; its batched form pages the keys")
    return q, k, v


_PEERS: dict[str, dict[str, Callable[[], Callable[..., Any]]]] = {
    "mm": {"batch_invariant_ops": _batch_invariant_ops_mm},
    "rms_norm": {"liger_kernel": _liger_rms_norm, "flashinfer": _flashinfer_rms_norm},
    "layer_norm": {"liger_kernel": _liger_layer_norm},
    "log_softmax": {"batch_invariant_ops": _batch_invariant_ops_log_softmax},
    "prefill": {"flash_attn": _flash_attn_prefill, "flashinfer": _flashinfer_prefill},
    "decode": {"flash_attn": _flash_attn_decode, "flashinfer": _flashinfer_decode},
}
