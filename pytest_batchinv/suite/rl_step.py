"""A step of reinforcement learning, end to end: what the sampler says of a token, and what the trainer says of it.

    python -m pytest_batchinv.suite.rl_step --model tiny-qwen3 --dtype bf16

The sampler decodes a batch token by token, with a static cache, left padding and no gradients. The trainer computes the
logprobs of the same tokens again, packed, in micro-batches of other sizes, with gradients, and takes optimizer steps. After
each, both are asked again. On policy the ratio of the two probabilities is 1. In the mode it is 1 bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import StaticCache

from pytest_batchinv.mode import batch_invariant_mode, stock_torch
from pytest_batchinv.subjects.transformers import DTYPES, attention, caches
from pytest_batchinv.subjects.transformers.weights import build_preset

CLIP = 0.1
"""A ratio further from 1 than this is one that PPO's clipping would see."""


@dataclass(frozen=True)
class Step:
    """rows: sampled at once. micro_batch: rows that are packed into one sequence of the trainer. new_tokens: for each row."""

    rows: int = 64
    micro_batch: int = 4
    new_tokens: int = 12
    updates: int = 2
    learning_rate: float = 1e-3


class Rollout(NamedTuple):
    """Of each row its tokens (prompt and answer) and where the answer begins; logprobs of the answers [rows, new tokens]."""

    tokens: list[Tensor]
    answers: list[int]
    logprobs: Tensor


class Agreement(NamedTuple):
    """After so many updates: tokens, those with equal bits, the largest difference of logprobs, ratios outside of 1 +- CLIP."""

    updates: int
    tokens: int
    equal: int
    largest: float
    outside: int


def run(model: Any, how: Step, seed: int = 0) -> Iterator[Agreement]:
    """Samples, computes again and updates the model, ``how.updates`` times, and samples and computes again at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, foreach=True)
    for update in range(how.updates + 1):
        rollout = sample(model, _prompts(model, how.rows, seed), how.new_tokens, seed + update)
        again = train(model, rollout, how, optimizer if update < how.updates else None, seed)
        difference = (again - rollout.logprobs).abs()
        ratios = (again - rollout.logprobs).exp()
        yield Agreement(
            update,
            again.numel(),
            int((again.view(torch.int32) == rollout.logprobs.view(torch.int32)).sum()),
            float(difference.max()),
            int(((ratios < 1 - CLIP) | (ratios > 1 + CLIP)).sum()),
        )


@torch.no_grad()
def sample(model: Any, prompts: list[Tensor], new_tokens: int, seed: int) -> Rollout:
    """Decodes all prompts as one batch, token by token."""
    device, width = prompts[0].device, max(map(len, prompts))
    total = width + new_tokens
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    columns = torch.arange(total, device=device)
    visible = (columns[None, None] <= columns[None, :, None]) & (columns[None, None] >= padding[:, None, None])
    tokens = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    cache, logprobs = StaticCache(config=model.config, max_cache_len=total), []
    noise = torch.Generator().manual_seed(seed)
    start = 0
    for stop in range(width, total):
        logits = model(
            input_ids=tokens[:, start:],
            attention_mask=visible[:, None, start:stop],
            position_ids=(columns[start:stop] - padding[:, None]).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{caches.word_of(model): cache},
        ).logits
        of_last = torch.log_softmax(logits[:, -1].float(), -1)
        uniform = torch.rand(of_last.shape, generator=noise).to(device)
        chosen = (of_last - (-uniform.log()).log()).argmax(-1, keepdim=True)
        logprobs.append(of_last.gather(1, chosen))
        tokens, start = torch.cat([tokens, chosen], 1), stop
    whole = [row[width - len(prompt) :] for row, prompt in zip(tokens, prompts, strict=True)]
    return Rollout(whole, [len(prompt) for prompt in prompts], torch.cat(logprobs, 1))


def train(model: Any, rollout: Rollout, how: Step, optimizer: torch.optim.Optimizer | None, seed: int) -> Tensor:
    """The logprobs of the answers again, and an update by them: the ratio's gradient, weighted by an advantage a row."""
    advantages = torch.randn(len(rollout.tokens), generator=torch.Generator().manual_seed(seed)).to(rollout.logprobs.device)
    again = []
    for start in range(0, len(rollout.tokens), how.micro_batch):
        rows = range(start, min(start + how.micro_batch, len(rollout.tokens)))
        logprobs = packed_logprobs(model, [rollout.tokens[i] for i in rows], [rollout.answers[i] for i in rows])
        again.append(logprobs.detach())
        if optimizer is not None:
            ratios = (logprobs - rollout.logprobs[rows]).exp()
            (-(ratios * advantages[rows, None]).sum() / rollout.logprobs.numel()).backward()
    if optimizer is not None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(again)


def packed_logprobs(model: Any, rows: list[Tensor], answers: list[int]) -> Tensor:
    """The logprobs of each row's answer [rows, new tokens], the rows behind each other in one sequence."""
    device = rows[0].device
    lengths = [len(row) for row in rows]
    starts = [0, *accumulate(lengths)]
    number = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)).to(device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    visible = (number[:, None] == number[None]) & (positions[:, None] >= positions[None])
    packing = {}
    if model.config._attn_implementation == attention.NAME:
        columns = torch.full((len(rows), max(lengths)), -1)
        for place, length in enumerate(lengths):
            columns[place, :length] = torch.arange(starts[place], starts[place + 1])
        packing = {"packing": (columns.to(device), number * max(lengths) + positions)}
    logits = model(
        input_ids=torch.cat(rows)[None],
        attention_mask=visible[None, None],
        position_ids=positions[None],
        use_cache=False,
        **packing,
    ).logits
    logprobs = torch.log_softmax(logits[0].float(), -1)
    of_rows = []
    for row, answer, start, stop in zip(rows, answers, starts[:-1], starts[1:], strict=True):
        of_answer = logprobs[start + answer - 1 : stop - 1]
        of_rows.append(of_answer.gather(1, row[answer:, None])[:, 0])
    return torch.stack(of_rows)


def _prompts(model: Any, rows: int, seed: int) -> list[Tensor]:
    """Of 1 to 9 tokens, all different."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [1 + i % 9 for i in range(rows)]
    device = next(model.parameters()).device
    return [torch.randint(0, model.config.vocab_size - 1, (length,), generator=draw).to(device) for length in lengths]


def built(name: str, device: str, dtype: str, in_mode: bool) -> Any:
    """The preset with our attention for the mode, and with transformers' sdpa for stock torch."""
    attention.register()
    model: Any = build_preset(name, device, DTYPES[dtype])
    model.set_attn_implementation(attention.NAME if in_mode else "sdpa")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-qwen3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=[*DTYPES])
    parser.add_argument("--rows", type=int, default=Step.rows)
    arguments = parser.parse_args()
    print(f"{'':16}{'updates':>8}{'tokens':>8}{'equal bits':>12}{'largest':>12}  ratios outside of [0.9, 1.1]")
    for words, entered in (("stock torch", stock_torch), ("in the mode", batch_invariant_mode)):
        with entered():
            model = built(arguments.model, arguments.device, arguments.dtype, entered is batch_invariant_mode)
            for a in run(model, Step(rows=arguments.rows)):
                share = f"{a.outside} ({a.outside / a.tokens:.1%})"
                print(f"{words:16}{a.updates:8}{a.tokens:8}{a.equal:12}{a.largest:12.2g}  {share}", flush=True)


if __name__ == "__main__":
    main()
