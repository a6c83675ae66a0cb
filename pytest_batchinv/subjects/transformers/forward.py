"""From a layout to logprobs: at once, or in steps with a cache of transformers between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pytest_batchinv.shapes import Steps
from pytest_batchinv.subjects.base import Observer, Part, RowOutputs, observed
from pytest_batchinv.subjects.gradients import trained
from pytest_batchinv.subjects.transformers import attention, caches, masks
from pytest_batchinv.subjects.transformers.attention import Packing
from pytest_batchinv.subjects.transformers.layout import BatchLayout
from pytest_batchinv.subjects.transformers.masks import Windows

Run = Callable[..., Tensor]


class Logprobs(nn.Module):
    """What is compiled: the model, and the logprobs of all positions that it computes. tokens: their ids, or embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cache_word = caches.word_of(model)

    def forward(
        self, tokens: Tensor, mask: Any, positions: Tensor | None, packing: Packing | None, cache: Any = None
    ) -> Tensor:
        words = {} if positions is None else {"position_ids": positions}
        words |= {} if packing is None else {"packing": packing}
        words |= {} if cache is None else {self.cache_word: cache}
        words |= {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        logits = self.model(attention_mask=mask, use_cache=cache is not None, **words).logits
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return torch.log_softmax(logits.to(wide), -1)


class Hidden(nn.Module):
    """What is compiled for a model without logits: the last hidden states of all positions, of an encoder-decoder those of its
    decoder, which gets the same tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, mask: Any, positions: Tensor | None, packing: Packing | None, cache: Any = None
    ) -> Tensor:
        decoder = {"decoder_input_ids": tokens, "decoder_attention_mask": mask} if self.model.config.is_encoder_decoder else {}
        return self.model(input_ids=tokens, attention_mask=mask, **decoder).last_hidden_state


@dataclass(frozen=True)
class Forward:
    """How layouts are run. run: ``Logprobs`` or ``Hidden``, or what torch.compile made of it. windows: None for a model that
    wants the 2-d mask. takes_positions: whether it is told positions."""

    model: nn.Module
    run: Run
    dtype: torch.dtype
    device: str
    attention: str
    takes_positions: bool
    is_compiled: bool
    windows: Windows | None

    @torch.no_grad()
    def rows(self, layout: BatchLayout, steps: Steps | None, observer: Observer | None = None) -> list[Tensor]:
        """Logprobs of each row of the layout: [length, vocabulary]."""
        batch = _Batch.of(layout, self)
        if steps is None:
            inputs = self._at_once(layout, batch)
            with observed(observer):
                out = self.run(*inputs)
        else:
            with observed(observer):
                out = self._in_steps(batch, steps)
        return [out[span.sequence, span.start : span.stop] for span in layout.spans]

    @torch.enable_grad()
    def gradients(self, layout: BatchLayout, observer: Observer | None) -> RowOutputs:
        """The gradient of each row's loss with respect to its embeddings, and those of the weights."""
        batch = _Batch.of(layout, self)
        tokens, *others = self._at_once(layout, batch)
        sequences, columns, targets = _next_tokens(layout, tokens)
        weights = trained(self.model)
        with observed(observer):
            embeddings = self.model.get_input_embeddings()(tokens)
            if self.is_compiled:  # Dynamo warns of an input that is no leaf
                embeddings = embeddings.detach().requires_grad_()
            logprobs = self.run(embeddings, *others)[sequences, columns, targets]
            of_embeddings, *of_weights = torch.autograd.grad(
                logprobs, [embeddings, *weights.values()], -torch.ones_like(logprobs), allow_unused=True
            )
        shared = {name: g.clone() for name, g in zip(weights, of_weights, strict=True) if g is not None}
        rows = [of_embeddings[span.sequence, span.start : span.stop].clone() for span in layout.spans]
        return RowOutputs(rows=[{"the gradient of its embeddings": row} for row in rows], shared=shared)

    def _at_once(self, layout: BatchLayout, batch: _Batch) -> tuple[Tensor, Any, Tensor | None, Packing | None]:
        inputs = (*batch.inputs(self), self._packing(layout))
        if layout.is_packed and self.attention == attention.NAME and self.is_compiled:
            _of_any_size(inputs)
        return inputs

    def _packing(self, layout: BatchLayout) -> Packing | None:
        if not layout.is_packed or self.attention != attention.NAME:
            return None
        columns, slots = (torch.tensor(layer, device=self.device) for layer in layout.packing())
        return columns, slots

    def _in_steps(self, batch: _Batch, steps: Steps) -> Tensor:
        """[sequences, columns, vocabulary], as the whole batch at once gives it."""
        n_columns = batch.tokens.shape[1]
        if steps.prefix:
            parts, cache = self._prefix(batch, steps)
        else:
            parts, cache = [], caches.new(steps, self.model.config, n_columns)
        starts, stops = (steps.prefix, *steps.ends), (*steps.ends, n_columns)
        for start, stop in zip(starts, stops, strict=True):
            parts.append(self._step(batch, start, stop, steps.rejected, cache))
        return torch.cat(parts, 1)

    def _prefix(self, batch: _Batch, steps: Steps) -> tuple[list[Tensor], Any]:
        """The columns of the prefix, and one cache of what each row has filled alone."""
        filled, parts = [], []
        for number in range(len(batch.tokens)):
            row, cache = batch.of_sequence(number), caches.new(steps, self.model.config, batch.tokens.shape[1])
            parts.append(self._step(row, 0, steps.prefix, steps.rejected, cache))
            filled.append(cache)
        return [torch.cat(parts)], caches.joined(filled, steps.prefix)

    def _step(self, batch: _Batch, start: int, stop: int, rejected: int, cache: Any) -> Tensor:
        """Computes the columns, and after them rejected tokens of another continuation, as far as there are columns."""
        ahead = min(stop + rejected, batch.tokens.shape[1])
        tokens, mask, positions = batch.inputs(self, slice(start, ahead), cache)
        if ahead > stop:
            tokens = tokens.clone()
            tokens[:, stop - start :] = (tokens[:, stop - start :] + 1) % self.model.config.get_text_config().vocab_size
        out = self.run(tokens, mask, positions, None, cache)[:, : stop - start]
        if rejected:
            cache.crop(stop - ahead)
        return out


@dataclass(frozen=True)
class _Batch:
    """A layout as tensors: tokens, the row of each, its position [sequences, columns]; visible: by kind of layer, or None."""

    tokens: Tensor
    rows: Tensor
    positions: Tensor
    visible: dict[str, Tensor] | None

    @classmethod
    def of(cls, layout: BatchLayout, forward: Forward) -> _Batch:
        layers = (layout.tokens, layout.rows, layout.positions)
        tokens, rows, positions = (torch.tensor(layer, device=forward.device) for layer in layers)
        windows = forward.windows
        return cls(tokens, rows, positions, None if windows is None else masks.visible(rows, positions, windows))

    def of_sequence(self, number: int) -> _Batch:
        one = slice(number, number + 1)
        visible = self.visible and {kind: mask[one] for kind, mask in self.visible.items()}
        return _Batch(self.tokens[one], self.rows[one], self.positions[one], visible)

    def inputs(self, forward: Forward, queries: slice = slice(None), cache: Any = None) -> tuple[Tensor, Any, Tensor | None]:  # noqa: B008
        """Tokens, mask and positions of these columns, after those that the cache holds."""
        positions = self.positions[:, queries] if forward.takes_positions else None
        return self.tokens[:, queries], self._mask(forward, queries, cache), positions

    def _mask(self, forward: Forward, queries: slice, cache: Any) -> Any:
        if self.visible is None:
            return masks.padding_mask(self.rows[:, : queries.stop])
        visible = self.visible
        if cache is not None:
            keys = caches.columns_of_keys(cache, forward.model.config, queries.stop - queries.start)
            visible = {kind: masks.of_columns(mask, queries, *keys[kind]) for kind, mask in visible.items()}
        form = masks.additive(forward.dtype) if forward.attention == "eager" else masks.boolean
        return masks.formed(visible, form)


def parts(steps: Steps, n_sequences: int, n_columns: int) -> list[Part]:
    """The forwards of ``Forward.rows`` in these steps, in order."""

    def part(sequences: range, start: int, stop: int) -> Part:
        ahead = min(stop + steps.rejected, n_columns)
        n_keys = n_columns + steps.spare if steps.cache == "static" else ahead
        return Part(sequences, range(start, stop), ahead - start, (n_keys,))

    prefixes = [part(range(i, i + 1), 0, steps.prefix) for i in range(n_sequences if steps.prefix else 0)]
    bounds = zip((steps.prefix, *steps.ends), (*steps.ends, n_columns), strict=True)
    return prefixes + [part(range(n_sequences), start, stop) for start, stop in bounds]


def _next_tokens(layout: BatchLayout, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's tokens are, as sequences and columns, and the token after each; after the last one comes the first."""
    sequences: list[int] = []
    columns: list[int] = []
    following: list[int] = []
    for span in layout.spans:
        places = range(span.start, span.stop)
        sequences += [span.sequence] * len(places)
        columns += places
        following += [*places[1:], places[0]]
    where = [torch.tensor(x, device=tokens.device) for x in (sequences, columns, following)]
    return where[0], where[1], tokens[where[0], where[2]]


def _of_any_size(*inputs: Any) -> None:
    """Tells Dynamo what engines that pack rows tell it, so that it makes no graph for the first sizes alone."""
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor):
            torch._dynamo.maybe_mark_dynamic(x, [dim for dim in range(x.dim()) if x.shape[dim] > 1])
