"""The subject for ``generate()`` of transformers: its own masks and caches, a batch padded on the left, greedy or sampled."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pytest_batchinv import sampling
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.base import NotRun, Observer, RowOutputs, Space, Span, Subject, SubjectInfo, observed
from pytest_batchinv.subjects.transformers import TransformersSubject
from pytest_batchinv.subjects.transformers.layout import lay_out
from pytest_batchinv.subjects.transformers.masks import padding_mask
from pytest_batchinv.subjects.transformers.probe import is_out_of_memory

N_TOKENS = 8
_LONGEST, _MOST_ROWS = 100, 65


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, by :func:`pytest_batchinv.sampling.sample`, with a seed that each row has from its identity."""

    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 0.95


class Generation(Subject):
    """What a model generates after each row, always ``n_tokens`` tokens, and the logits that it chose them from.

    It gives transformers a 2-d mask and no cache, and what is tested is transformers' own way from there. sampling: how tokens
    are drawn; None takes the likeliest. ``generate(do_sample=True)`` itself calls ``torch.multinomial``, whose numbers follow
    the place in the batch: so each row's token is drawn before, and is the only one left. Raises ValueError for a model that
    cannot pad on the left.
    """

    def __init__(self, subject: TransformersSubject, n_tokens: int = N_TOKENS, sampling: Sampling | None = None) -> None:
        space, info = subject.space, subject.info
        if "left" not in space.layouts:
            raise ValueError(
                f"{info.name} cannot pad on the left, which generate() asks for. {' '.join(space.left_out)}".strip()
            )
        self.subject, self.n_tokens, self.sampling = subject, n_tokens, sampling
        kind = "transformers generate" if sampling is None else "transformers sample"
        self.info = SubjectInfo(info.name, kind, info.device, info.dtype, info.attention)
        longest = min(_LONGEST, space.max_length)
        self.space = Space(
            palette=tuple(row for row in space.palette if row.length <= longest),
            layouts=("right",),
            max_rows=_MOST_ROWS,
            max_length=longest,
            max_tokens=space.max_tokens,
            lays_out=True,
        )
        self._config = GenerationConfig(
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,  # else a row that has ended would be shorter than in a batch
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )

    @torch.no_grad()
    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """The logits [n_tokens, vocabulary] and the tokens [n_tokens] of each row. Raises NotRun without enough memory."""
        if why := self.space.holds(case):
            raise NotRun(why)
        layout = lay_out(BatchShape(case.rows, "left"), self.subject.vocabulary, self.subject.outlier)
        tokens, rows = (torch.tensor(layer, device=self.info.device) for layer in (layout.tokens, layout.rows))
        try:
            with observed(observer):
                out = self.subject.model.generate(
                    input_ids=tokens,
                    attention_mask=padding_mask(rows),
                    generation_config=self._config,
                    logits_processor=self._drawing(case.rows, tokens.shape[1]),
                )
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise NotRun(f"out of memory: {len(case)} rows, {case.width} columns") from None
            raise
        return RowOutputs({"logits": torch.stack(out.logits, 1), "tokens": out.sequences[:, -self.n_tokens :]})

    def _drawing(self, rows: tuple[Row, ...], width: int) -> LogitsProcessorList:
        if self.sampling is None:
            return LogitsProcessorList()
        return LogitsProcessorList([_Drawn(rows, width, asdict(self.sampling), self.info.device)])

    def spans(self, case: BatchShape) -> list[Span]:
        return list(lay_out(BatchShape(case.rows, "left"), self.subject.vocabulary, self.subject.outlier).spans)


class _Drawn(LogitsProcessor):
    """Leaves the token that each row draws. position: how many tokens the row has generated."""

    def __init__(self, rows: tuple[Row, ...], width: int, options: dict[str, Any], device: str) -> None:
        self._seeds = torch.tensor([seed_of(row) for row in rows], device=device)
        self._width, self._options = width, options

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = sampling.sample(scores, self._seeds, input_ids.shape[1] - self._width, **self._options)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


def seed_of(row: Row) -> int:
    """A row's seed follows its identity, and so not its place."""
    return zlib.crc32(msgspec.json.encode(row))
