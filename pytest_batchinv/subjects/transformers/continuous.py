"""The subject for continuous batching of transformers: ``generate_batch()``, which keeps keys and values in pages.

Its scheduler puts chunks of prompts and single tokens of other rows into one forward, as they come; a row alone and in a batch
goes through other forwards. Our attention takes its part in it (``paged_attention_forward``), where transformers' own ones read
the rows of a forward as one long sequence with a mask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NotRun, Observer, RowOutputs, Span, Subject, SubjectInfo, observed
from pytest_batchinv.subjects.transformers import TransformersSubject, attention
from pytest_batchinv.subjects.transformers.generation import N_TOKENS, space_of_prompts
from pytest_batchinv.subjects.transformers.layout import lay_out, row_tokens

TOKENS_AT_ONCE = 64
"""Of one forward: longer prompts come in chunks, and a batch of some rows in several forwards."""

_LONGEST, _MOST_ROWS, _PAGE = 100, 33, 16
_FIELDS = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
_PAGE_WORD = "page_size" if "page_size" in _FIELDS else "block_size"  # the second in transformers 5.17


@dataclasses.dataclass
class _Reached:
    """What the scheduler made of the batches. rows: most in one forward; mixed: forwards with parts of prompts beside single
    tokens; chunks: parts of prompts of more than one token."""

    forwards: int = 0
    rows: int = 0
    mixed: int = 0
    chunks: int = 0

    def add(self, n_queries: Tensor) -> None:
        several, one = int((n_queries > 1).sum()), int((n_queries == 1).sum())
        self.forwards += 1
        self.rows = max(self.rows, several + one)
        self.mixed += several > 0 and one > 0
        self.chunks += several

    def words(self) -> str:
        return (
            f"continuous batching: {self.forwards:,} forwards of up to {self.rows} rows, {self.mixed:,} with parts of prompts "
            f"beside single tokens, {self.chunks:,} parts of prompts"
        )


class ContinuousBatching(Subject):
    """What ``generate_batch()`` gives of each prompt: always ``n_tokens`` tokens, the likeliest ones, and their logprobs.

    All rows of a case are asked for at once, and pages of equal prompts are shared, as by default. Raises ValueError for a
    model that transformers does not batch so.
    """

    def __init__(self, subject: TransformersSubject, n_tokens: int = N_TOKENS) -> None:
        info, space = subject.info, subject.space
        if not hasattr(subject.model, "generate_batch") or subject.model.config.is_encoder_decoder:
            raise ValueError(f"transformers has no continuous batching for {type(subject.model).__name__}")
        if "packed" not in space.layouts:
            raise ValueError(f"{info.name} takes no packed rows, which generate_batch() makes of a batch")
        if ALL_ATTENTION_FUNCTIONS.get_interface(attention.PAGED_NAME, None) is not attention.paged_attention_forward:
            raise ValueError(f"this transformers does not find an attention by the name {attention.PAGED_NAME!r}")
        self.subject, self.n_tokens = subject, n_tokens
        self.info = SubjectInfo(info.name, "transformers continuous batching", info.device, info.dtype, info.attention)
        self.space = space_of_prompts(space, min(_LONGEST, space.max_length - n_tokens), _MOST_ROWS)
        self._generation = GenerationConfig(
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,  # no row ends before the others
        )
        self._reached = _Reached()

    @torch.no_grad()
    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """Tokens and their logprobs of each row, both [n_tokens]. Raises NotRun; RuntimeError for a request that failed."""
        if why := self.space.holds(case):
            raise NotRun(why)
        prompts = [row_tokens(row, self.subject.vocabulary, self.subject.outlier) for row in case.rows]
        with self._our_attention(), self._watched(observer), _errors() as said:
            results = self.subject.model.generate_batch(
                prompts,
                generation_config=self._generation,
                continuous_batching_config=self._config(case),
                progress_bar=False,
                warmup=False,
            )
        failed = [str(result.error) for result in results.values() if result.error is not None]
        if failed or len(results) != len(prompts):
            why = (failed or said or ["It does not say why."])[-1]
            raise RuntimeError(f"generate_batch() answered {len(results) - len(failed)} of {len(prompts)} prompts. {why}")
        return RowOutputs(
            {
                "tokens": torch.tensor([result.generated_tokens for result in results.values()]),
                "logprobs": torch.tensor([result.logprobs for result in results.values()]),
            }
        )

    def _config(self, case: BatchShape) -> ContinuousBatchingConfig:
        pages = sum(math.ceil((row.length + self.n_tokens) / _PAGE) + 1 for row in case.rows)
        words: dict[str, Any] = {
            _PAGE_WORD: _PAGE,
            "num_blocks": max(8, pages),
            "max_batch_tokens": TOKENS_AT_ONCE,
            "max_blocks_per_request": 0,  # a way of its own for batches without prompts, through flash_attn alone
            "use_cuda_graph": False,
            "use_async_batching": False,
            "return_logprobs": True,
            "auto_switch_to_flash": False,
        }
        return ContinuousBatchingConfig(**{word: value for word, value in words.items() if word in _FIELDS})

    @contextlib.contextmanager
    def _our_attention(self) -> Iterator[None]:
        """In place of the attention that the model was loaded with, if that is ours."""
        config = self.subject.model.config
        before = config._attn_implementation
        if before == attention.NAME:
            # Not by set_attn_implementation(), which looks for the package flash_attn.
            config._attn_implementation = attention.PAGED_NAME
        try:
            yield
        finally:
            config._attn_implementation = before

    @contextlib.contextmanager
    def _watched(self, observer: Observer | None) -> Iterator[None]:
        """The model's forwards with the observer, in the thread that computes them."""
        model, forward = self.subject.model, self.subject.model.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._reached.add(kwargs["cu_seq_lens_q"].diff())
            with observed(observer):
                return forward(*args, **kwargs)

        # transformers reads the parameters of forward().
        watched.__signature__ = inspect.signature(forward)
        model.forward = watched
        try:
            yield
        finally:
            del model.forward

    def notes(self) -> tuple[str, ...]:
        reached, self._reached = self._reached, _Reached()
        return (reached.words(),) if reached.forwards else ()

    def spans(self, case: BatchShape) -> list[Span]:
        return list(lay_out(BatchShape(case.rows, "packed"), self.subject.vocabulary, self.subject.outlier).spans)


@contextlib.contextmanager
def _errors() -> Iterator[list[str]]:
    """What transformers logs as errors, where it raises none. One is that it measures no memory on a CPU without psutil."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, kept = logging.getLogger("ContinuousBatchingLogger"), Kept(logging.ERROR)
    others, logger.handlers, logger.propagate = (logger.handlers, logger.propagate), [kept], False
    try:
        yield said
    finally:
        logger.handlers, logger.propagate = others
