"""The subject for vLLM in this process: token ids in, raw logprobs of the prompt and of what follows out."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from pytest_batchinv import mode, vllm_plugin
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.base import NotRun, Observer, RowOutputs, Space, Span, Subject, SubjectInfo, observed
from pytest_batchinv.subjects.presets import is_preset
from pytest_batchinv.subjects.transformers.layout import row_tokens
from pytest_batchinv.subjects.vllm.engine import Answer, Engine, EngineError, Request, values

N_TOKENS = 8
"""Generated after each row, greedily."""
_DTYPES = {"fp32": ("float32", torch.float32), "bf16": ("bfloat16", torch.bfloat16), "fp16": ("float16", torch.float16)}
_LENGTHS = (1, 13, 5, 16, 17, 31, 33, 2, 7, 64, 65, 100, 128, 200, 257, 300, 3, 8, 15, 32, 48, 9, 27, 63)
_CONTENTS = ("random", "random", "extreme", "random", "repeated")
_MOST_ROWS, _LONGEST, _TOKENS_OF_A_STEP = 33, max(_LENGTHS), 8192
_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_BLOCK_SIZES = {"cpu": 32, "cuda": 16}
"""vLLM's own choice on a CPU is a block of 128 tokens, and the prefix cache holds whole blocks alone."""


@dataclass
class Load:
    """What was reached, as the engine's scheduler says."""

    at_once: int = 0
    batches: int = 0
    whole: int = 0
    chunked: int = 0
    chunks: int = 0
    hits: int = 0
    cached: int = 0
    decoded: int = 0
    preempted: int = 0

    def words(self) -> str:
        words = [
            f"up to {self.at_once} requests ran in one step; in {self.whole} of {self.batches} batches of several rows all did",
            f"{self.chunked} prompts were computed in {self.chunks} chunks" if self.chunked else "",
            f"{self.hits} prompts took {self.cached} tokens from the prefix cache" if self.hits else "",
            f"{self.decoded} given tokens were decoded one by one" if self.decoded else "",
            f"{self.preempted} requests were preempted" if self.preempted else "",
        ]
        return "vLLM's scheduler: " + "; ".join(filter(None, words))


class VllmSubject(Subject):
    """model: a preset, a local path or a hub id. attn: "auto", or the name of one of vLLM's attention backends.

    Raises ValueError where vLLM is not there, is not of a known version, or cannot run the model.
    """

    def __init__(self, model: str, *, device: str, dtype: str, attn: str = "auto", compile_mode: str = "eager") -> None:
        self.version = vllm_plugin.check_version()
        if dtype not in _DTYPES:
            raise ValueError(f"vLLM has no dtype {dtype!r}; use one of {', '.join(_DTYPES)}")
        if compile_mode not in ("eager", "default"):
            raise ValueError(f"vLLM compiles in its own way alone, not in the mode {compile_mode!r}; use eager or default")
        self.own_mode = os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")
        self._was_on = mode.is_on()
        self._check_own_mode()
        _check_device(device)
        kind, longest = device.partition(":")[0], _LONGEST + N_TOKENS + 1
        self._folder, path = model_path(model, dtype)
        self._engine = Engine(
            model,
            path,
            dtype=_DTYPES[dtype][0],
            enforce_eager=compile_mode == "eager",
            seed=0,
            max_model_len=longest,
            max_num_seqs=_MOST_ROWS,
            max_num_batched_tokens=_TOKENS_OF_A_STEP,
            block_size=_BLOCK_SIZES[kind],
            kv_cache_memory_bytes=_CACHE_BYTES[kind],
            # Those of the largest batch, twice: a trace copies the whole cache with each operator that reads it.
            num_gpu_blocks_override=2 * _MOST_ROWS * -(-longest // _BLOCK_SIZES[kind]),
            **({} if attn == "auto" else {"attention_config": {"backend": attn}}),
        )
        steps_are_seen = self._engine.in_this_process
        self.info = SubjectInfo(model, "vllm", device, dtype, attn, compile_mode, elsewhere=not steps_are_seen)
        self._eager: VllmSubject = self
        self.load = Load()
        self.space = Space(
            palette=tuple(Row(i, length, _CONTENTS[i % len(_CONTENTS)]) for i, length in enumerate(_LENGTHS)),
            layouts=("right",),
            max_rows=_MOST_ROWS,
            max_length=_LONGEST,
            max_tokens=_TOKENS_OF_A_STEP,
            caches=("dynamic",) if steps_are_seen else (),
            lays_out=True,
            forgets=False,
            left_out=()
            if steps_are_seen
            else ("vLLM's worker is another process, so its steps cannot be told: no chunks, no decode",),
        )

    def in_compile_mode(self, compile_mode: str) -> VllmSubject:
        """The same model in this compile mode, in an engine of its own. Raises ValueError."""
        if compile_mode == self.info.compile_mode:
            return self
        if compile_mode == "eager":
            return self._eager
        info = self.info
        other = VllmSubject(info.name, device=info.device, dtype=info.dtype, attn=info.attention, compile_mode=compile_mode)
        other._eager = self._eager
        return other

    def in_eager_mode(self) -> VllmSubject:
        return self._eager

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """Of each row the raw logprobs of every token after its first one, of ``N_TOKENS`` generated ones, and of the most
        likely ones at each place, float32; and these tokens.

        A case in steps: its last steps of one token each are decoded, with the row's tokens forced on vLLM; those before are
        chunks of the prompt; a prefix is computed alone first, and read from the prefix cache. Raises EngineError, NotRun.
        """
        if why := self.space.holds(case):
            raise NotRun(why)
        self._check_own_mode()
        if self.info.compile_mode != "eager" and mode.is_on() != self._was_on:
            raise NotRun("vLLM has compiled this model once, with batch-invariant mode " + ("on" if self._was_on else "off"))
        plan = _Plan.of(case)
        rows = [row_tokens(row, self._engine.vocabulary, self._engine.vocabulary - 1) for row in case.rows]
        with observed(observer):
            filled = self._fill(rows, plan)
            answers = self._engine.run([plan.request(tokens) for tokens in rows], plan.chunks(self._cached(plan)))
        self._account(case, plan, rows, answers)
        return RowOutputs(
            rows=[_tensors(tokens, *pair) for tokens, pair in zip(rows, zip(answers, filled, strict=True), strict=True)]
        )

    def spans(self, case: BatchShape) -> list[Span]:
        """vLLM puts the tokens of all rows behind each other."""
        starts = [sum(row.length for row in case.rows[:i]) for i in range(len(case))]
        return [Span(0, start, start + row.length) for start, row in zip(starts, case.rows, strict=True)]

    def notes(self) -> tuple[str, ...]:
        load, self.load = self.load, Load()
        own = "on" if self.own_mode else "off"
        return (
            load.words() if self._engine.in_this_process else self._of_workers(),
            f"vLLM {self.version}, its own VLLM_BATCH_INVARIANT {own}",
        )

    def _of_workers(self) -> str:
        states = Counter(
            f"in batch-invariant mode, fingerprint {state['fingerprint']}" if state["is_on"] else "without batch-invariant mode"
            for state in self._engine.worker_states()
        )
        told = "; ".join(f"{n} worker{'s' * (n > 1)} {words}" for words, n in states.items())
        return f"vLLM computed in another process, which does not say how it batched: {told}"

    def _fill(self, rows: list[list[int]], plan: _Plan) -> list[Answer | None]:
        """Each row's prefix alone, for the prefix cache."""
        if not plan.prefix:
            return [None] * len(rows)
        if not self._cached(plan):
            raise NotRun(f"a prefix of {plan.prefix} tokens fills no block of {self._engine.block_size} in vLLM's prefix cache")
        self._engine.forget()  # other requests do not read the cache
        return [self._engine.run([Request(tokens[: plan.prefix], (tokens[plan.prefix],))])[0] for tokens in rows]

    def _cached(self, plan: _Plan) -> int:
        return plan.prefix // self._engine.block_size * self._engine.block_size if plan.prefix else 0

    def _account(self, case: BatchShape, plan: _Plan, rows: list[list[int]], answers: list[Answer]) -> None:
        """Adds up what was reached. Raises EngineError where it is not what was asked for, NotRun where there was no batch."""
        if not self._engine.in_this_process:
            return
        steps, load, cached = self._engine.steps, self.load, self._cached(plan)
        load.at_once = max(load.at_once, steps.most_at_once)
        load.preempted += steps.preempted
        if len(case) > 1:
            load.batches += 1
            load.whole += steps.most_at_once == len(case)
            if steps.most_at_once < 2:
                raise NotRun(f"no two of the {len(case)} requests ran in one step, so there was no batch")
        for index, (tokens, answer) in enumerate(zip(rows, answers, strict=True)):
            if answer.cached != cached:
                raise EngineError(f"vLLM took {answer.cached} tokens from its prefix cache, where {cached} were there to take")
            asked = plan.steps_of(len(tokens), cached)
            done = steps.of_request(index)[: len(asked)]
            if done != asked and not steps.preempted:
                raise EngineError(f"vLLM computed a prompt in chunks of {done} tokens, where {asked} were asked for")
            load.hits += cached > 0
            load.cached += cached
            load.chunked += len(asked) > 1
            load.chunks += len(asked) if len(asked) > 1 else 0
            load.decoded += len(tokens) - plan.prompt_length(len(tokens))

    def _check_own_mode(self) -> None:
        if self.own_mode and mode.is_on():
            raise ValueError(
                "VLLM_BATCH_INVARIANT is on, and batch-invariant mode too: both take the same operators of torch. Turn vLLM's "
                "off, or check it with the mode off: take the marker batch_invariant away."
            )


class _Plan(msgspec.Struct, frozen=True):
    """How a case is computed. ends: columns at which chunks of the prompts end. prompt: where the longest one ends; what comes
    after it is decoded."""

    ends: tuple[int, ...]
    prompt: int
    prefix: int

    @classmethod
    def of(cls, case: BatchShape) -> _Plan:
        if case.steps is None:
            return cls((), case.width, 0)
        starts = (case.steps.prefix, *case.steps.ends, case.width)
        last = len(starts) - 1
        while last > 0 and starts[last] - starts[last - 1] == 1:
            last -= 1
        prompt = max(starts[last], case.steps.prefix + 1)
        return cls(tuple(end for end in case.steps.ends if end < prompt), prompt, case.steps.prefix)

    def prompt_length(self, length: int) -> int:
        return min(length, self.prompt)

    def request(self, tokens: list[int]) -> Request:
        n = self.prompt_length(len(tokens))
        return Request(tokens[:n], tokens[n:], N_TOKENS, reads_cache=self.prefix > 0)

    def chunks(self, cached: int) -> list[int]:
        """Tokens of each step but the last, after those that the cache holds."""
        edges = [cached, *(end for end in self.ends if end > cached)]
        return [stop - start for start, stop in zip(edges, edges[1:], strict=False)]

    def steps_of(self, length: int, cached: int) -> list[int]:
        """Tokens of each step that computes the prompt of a row of this length."""
        stop = self.prompt_length(length)
        edges = [cached, *(end for end in self.ends if cached < end < stop), stop]
        return [b - a for a, b in zip(edges, edges[1:], strict=False)]


def _tensors(tokens: list[int], answer: Answer, filled: Answer | None) -> dict[str, torch.Tensor]:
    """A row's outputs [length - 1 + N_TOKENS, 1 + TOP].

    Of what came from the prefix cache vLLM computes no logprobs: these are those of the run that filled it.
    """
    positions = answer.positions
    if filled is not None:
        positions = [*filled.positions[: answer.cached], *positions[answer.cached :]]
    given = [*tokens, *answer.generated[-N_TOKENS:]][1:]
    found = [values(position, token) for position, token in zip(positions, given, strict=True)]
    return {
        "logprobs": torch.tensor([logprobs for logprobs, _ in found], dtype=torch.float32),
        "tokens": torch.tensor([top for _, top in found]),
    }


def model_path(model: str, dtype: str) -> tuple[tempfile.TemporaryDirectory[str] | None, str]:
    """Where vLLM loads it from: a preset is written to a folder of its own, which lives as long as what is returned."""
    if not is_preset(model):
        return None, model
    from pytest_batchinv.subjects.transformers.weights import build_preset

    folder = tempfile.TemporaryDirectory(prefix="batchinv-vllm-")
    built: Any = build_preset(model, "cpu", _DTYPES[dtype][1])
    built.save_pretrained(Path(folder.name, model))
    return folder, str(Path(folder.name, model))


def _check_device(device: str) -> None:
    from vllm.platforms import current_platform

    if current_platform.device_type != device.partition(":")[0]:
        raise ValueError(f"this vLLM is built for {current_platform.device_type or 'no device'}, not for {device}")
