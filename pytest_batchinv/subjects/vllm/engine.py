"""Drives vLLM's offline engine step by step: which tokens each step computes, and what the engine says that it computed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_batchinv import vllm_plugin

TOP = 8
"""Logprobs of each position besides that of its own token: those of the most likely tokens."""
_DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    vllm_plugin.NO_COMPILE_CACHE: "1",
}
"""Of vLLM's environment, unless it says otherwise: the worker in this process, threads bound to no core, no cache on disk."""


class EngineError(RuntimeError):
    """vLLM did not give what it was asked for. A sentence says what."""


@dataclass(frozen=True)
class Request:
    """prompt: its tokens. forced: those that it generates first. n_free: how many it then generates greedily. reads_cache:
    whether it may take keys of its prompt from the prefix cache."""

    prompt: Sequence[int]
    forced: Sequence[int] = ()
    n_free: int = 0
    reads_cache: bool = False


@dataclass(frozen=True)
class Answer:
    """positions: of each token after the first of the prompt, {token: (rank, logprob)}. generated: tokens. cached: tokens of
    the prompt whose keys came from the prefix cache."""

    positions: list[dict[int, tuple[int, float]]]
    generated: list[int]
    cached: int


@dataclass
class Steps:
    """What the engine's scheduler gave each step, as it says: tokens by request, in the order of the requests."""

    tokens: list[dict[int, int]] = field(default_factory=list)
    preempted: int = 0

    @property
    def most_at_once(self) -> int:
        return max(map(len, self.tokens), default=0)

    def of_request(self, index: int) -> list[int]:
        return [step[index] for step in self.tokens if index in step]


class Engine:
    """One ``vllm.LLM`` of the model at this path. Raises ValueError, with its name and vLLM's reason, where it cannot be made.

    in_this_process: False where VLLM_ENABLE_V1_MULTIPROCESSING puts its worker into another one, whose steps are not seen and
    cannot be told. options: for ``LLM``.
    """

    def __init__(self, name: str, model: str, **options: Any) -> None:
        vllm_plugin.prepare()
        import vllm

        from pytest_batchinv.subjects.vllm import in_worker

        with _environment():
            self.in_this_process = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
            try:
                self.llm = vllm.LLM(
                    model,
                    max_logprobs=TOP,
                    logprobs_mode="raw_logprobs",
                    skip_tokenizer_init=True,
                    enable_prefix_caching=True,
                    enable_chunked_prefill=True,
                    async_scheduling=False,
                    logits_processors=[in_worker.Forced],
                    worker_extension_cls=f"{in_worker.__name__}.{in_worker.WorkerState.__name__}",
                    **options,
                )
            except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
                raise ValueError(f"vLLM cannot run {name}: {_reason(error)}") from error
        self.vocabulary: int = self.llm.model_config.get_vocab_size()
        self.steps = Steps()
        self._ids: dict[str, int] = {}
        if self.in_this_process:
            self._scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
            self.block_size: int = self.llm.llm_engine.vllm_config.cache_config.block_size
            self._tokens_of_a_step: int = self._scheduler.max_num_scheduled_tokens
            self._watch(self._scheduler)

    def run(self, requests: Sequence[Request], chunks: Sequence[int] = ()) -> list[Answer]:
        """All requests at once. chunks: tokens of each prompt that the first steps compute, at most; then all that are left.

        ``steps`` tells what was computed. Raises EngineError for an answer that is none.
        """
        engine = self.llm.llm_engine
        self.steps, self._ids, given = Steps(), {}, {}
        left = iter(chunks)
        for index, request in enumerate(requests):
            params = self._params(request)
            self._ids[engine.add_request(str(index), {"prompt_token_ids": list(request.prompt)}, params)] = index
        try:
            while engine.has_unfinished_requests():
                if self.in_this_process:
                    self._bound(next(left, 0))
                for output in engine.step():
                    if output.finished:
                        given[output.request_id] = output
        except BaseException:
            engine.abort_request(list(self._ids), internal=True)
            raise
        finally:
            if self.in_this_process:
                self._bound(0)
        if len(given) != len(requests):
            raise EngineError(f"vLLM answered {len(given)} of {len(requests)} requests")
        return [_read(given[str(index)], request) for index, request in enumerate(requests)]

    def forget(self) -> None:
        """Empties the prefix cache. Raises EngineError."""
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not empty its prefix cache, so keys of an earlier run may be read")

    def worker_states(self) -> list[dict[str, Any]]:
        return list(self.llm.collective_rpc("batchinv_state"))

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams

        from pytest_batchinv.subjects.vllm.in_worker import FORCED

        return SamplingParams(
            temperature=0.0,
            max_tokens=len(request.forced) + request.n_free,
            ignore_eos=True,
            detokenize=False,
            logprobs=TOP,
            prompt_logprobs=TOP,
            skip_reading_prefix_cache=not request.reads_cache,
            extra_args={FORCED: list(request.forced)} if request.forced else None,
        )

    def _bound(self, chunk: int) -> None:
        """The next step computes at most so many tokens of each prompt; 0: all that are left.

        vLLM 0.32 bounds each prompt where there are several requests, and where there is one only the tokens of a step.
        """
        is_alone = sum(self._scheduler.get_request_counts()) == 1
        self._scheduler.scheduler_config.long_prefill_token_threshold = chunk
        self._scheduler.max_num_scheduled_tokens = chunk if chunk and is_alone else self._tokens_of_a_step

    def _watch(self, scheduler: Any) -> None:
        stock = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = stock(*args, **kwargs)
            scheduled = {self._ids[name]: n for name, n in output.num_scheduled_tokens.items() if name in self._ids}
            if scheduled:
                self.steps.tokens.append(scheduled)
            self.steps.preempted += len(output.preempted_req_ids or ())
            return output

        scheduler.schedule = schedule


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What of ``_DEFAULTS`` is not given is set inside."""
    missing = [name for name in _DEFAULTS if name not in os.environ]
    os.environ.update({name: _DEFAULTS[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _read(output: Any, request: Request) -> Answer:
    """Raises EngineError where tokens or logprobs are missing, are not those that were asked for, or are NaN."""
    completion, n = output.outputs[0], len(request.forced) + request.n_free
    generated = list(completion.token_ids)
    if list(output.prompt_token_ids) != list(request.prompt):
        raise EngineError("vLLM answered another prompt than the one that was asked")
    if len(generated) != n:
        raise EngineError(f"vLLM generated {len(generated)} tokens where {n} were asked for")
    if generated[: len(request.forced)] != list(request.forced):
        raise EngineError("vLLM generated other tokens than were forced on it")
    of_prompt, of_output = list(output.prompt_logprobs or ())[1:], list(completion.logprobs or ())
    if len(of_prompt) != len(request.prompt) - 1 or len(of_output) != n:
        raise EngineError(
            f"vLLM gave logprobs of {len(of_prompt)} tokens of the prompt and of {len(of_output)} generated ones, where "
            f"{len(request.prompt) - 1} and {n} were asked for"
        )
    cached = output.num_cached_tokens or 0
    if cached and not request.reads_cache:
        raise EngineError(f"vLLM took {cached} tokens from its prefix cache, which the request was not to read")
    tokens = [*request.prompt[1:], *generated]
    positions = [_checked(found, token) for found, token in zip([*of_prompt, *of_output], tokens, strict=True)]
    return Answer(positions, generated, cached)


def _checked(found: Any, token: int) -> dict[int, tuple[int, float]]:
    return {other: (entry.rank, entry.logprob) for other, entry in (found or {}).items()}


def values(position: dict[int, tuple[int, float]], token: int) -> tuple[list[float], list[int]]:
    """The logprobs of the token and of the ``TOP`` most likely ones, and these tokens. Raises EngineError."""
    ranked = {rank: (other, logprob) for other, (rank, logprob) in position.items()}
    if token not in position or any(rank not in ranked for rank in range(1, TOP + 1)):
        raise EngineError(f"vLLM gave {len(position)} logprobs of a token where its own and the {TOP} largest were asked for")
    top = [ranked[rank] for rank in range(1, TOP + 1)]
    logprobs = [position[token][1], *(logprob for _, logprob in top)]
    if any(logprob != logprob for logprob in logprobs):
        raise EngineError("vLLM gave a logprob that is NaN")
    return logprobs, [token, *(other for other, _ in top)]


def _reason(error: BaseException) -> str:
    """The first line of the error that caused it; of pydantic's what it is about, and why."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip().partition(" [type=")[0] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ": ".join(lines[1:3]) if "validation error" in lines[0] and len(lines) > 1 else lines[0]
