"""What runs inside vLLM: tokens that are forced on a request, and a worker's word about batch-invariant mode. Imports vLLM."""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "batchinv_forced"
"""In ``SamplingParams.extra_args``: the tokens that a request generates first, whatever its logits are."""


class Forced(AdapterLogitsProcessor):  # type: ignore[misc]
    """Teacher forcing while decoding. vLLM takes raw logprobs before logits are processed, so they are those of the model."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        forced = (params.extra_args or {}).get(FORCED)
        if not forced:
            return None

        def force(generated: list[int], logits: Any) -> Any:
            if len(generated) < len(forced):
                logits.fill_(-float("inf"))
                logits[forced[len(generated)]] = 0.0
            return logits

        return force


class WorkerState:
    """Mixed into vLLM's worker, in whose process it answers."""

    def batchinv_state(self) -> dict[str, Any]:
        """Whether the worker's process is in the mode, and how many calls the table has answered there."""
        from pytest_batchinv import mode
        from pytest_batchinv.kernels import counters

        return {"is_on": mode.is_on(), "fingerprint": mode.fingerprint(), "hits": sum(counters.hits().values())}
