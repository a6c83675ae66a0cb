"""The subject for ``generate()`` of transformers: greedy, its own masks and caches, a batch padded on the left."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NotRun, Observer, RowOutputs, Space, Span, Subject, SubjectInfo, observed
from pytest_batchinv.subjects.transformers import TransformersSubject
from pytest_batchinv.subjects.transformers.layout import lay_out
from pytest_batchinv.subjects.transformers.masks import padding_mask
from pytest_batchinv.subjects.transformers.probe import is_out_of_memory

N_TOKENS = 8
_LONGEST, _MOST_ROWS = 100, 65


class Generation(Subject):
    """What a model generates after each row, always ``n_tokens`` tokens, and the logits that it chose them from.

    It gives transformers a 2-d mask and no cache, and what is tested is transformers' own way from there. Raises ValueError for
    a model that cannot pad on the left.
    """

    def __init__(self, subject: TransformersSubject, n_tokens: int = N_TOKENS) -> None:
        space, info = subject.space, subject.info
        if "left" not in space.layouts:
            raise ValueError(
                f"{info.name} cannot pad on the left, which generate() asks for. {' '.join(space.left_out)}".strip()
            )
        self.subject, self.n_tokens = subject, n_tokens
        self.info = SubjectInfo(info.name, "transformers generate", info.device, info.dtype, info.attention)
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
                    input_ids=tokens, attention_mask=padding_mask(rows), generation_config=self._config
                )
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise NotRun(f"out of memory: {len(case)} rows, {case.width} columns") from None
            raise
        return RowOutputs({"logits": torch.stack(out.logits, 1), "tokens": out.sequences[:, -self.n_tokens :]})

    def spans(self, case: BatchShape) -> list[Span]:
        return list(lay_out(BatchShape(case.rows, "left"), self.subject.vocabulary, self.subject.outlier).spans)
