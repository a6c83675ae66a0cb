"""A whole forward of a model with random weights, to the logprobs of the last token: mode on over mode off.

Prefill has no cache and no padding, decode reads and writes a static cache. Stock torch runs transformers' sdpa, the mode
our attention. Compiled: both with ``dynamic=False``, each captured in a CUDA graph after compiling, and the graphs replayed
in turn, so entering the mode (which drops compiled code) is outside of the time, as is compiling. Eager: as it is called,
without a graph, in blocks (off, on, off, on).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from measurements import OURS, STOCK, Point
from timing import Timing, capture, relative_distance
from torch import Tensor, nn
from transformers import StaticCache

from cases import DTYPES, Bench, ModeDidNothing
from pytest_batchinv.mode import batch_invariant_mode
from pytest_batchinv.subjects.transformers import attention, caches
from pytest_batchinv.subjects.transformers.weights import build_preset

COMPILED, EAGER = "compiled", "eager"
MAX_DISTANCE = 0.1
"""Of the logprobs, relative: what rounding may add up to over all layers."""
_BLOCKS, _BLOCK = 2, 10
_ATTENTION = {STOCK: "sdpa", OURS: attention.NAME}
_DOORS = {COMPILED: "batchinv", EAGER: "aten"}


@dataclasses.dataclass(frozen=True)
class Forward:
    """past: tokens in the cache before; 0 for a prefill without a cache."""

    name: str
    batch: int
    tokens: int
    past: int = 0
    room: int = 0

    def __str__(self) -> str:
        return self.name


FORWARDS = (
    Forward("decode-1", 1, 1, past=1024, room=1152),
    Forward("prefill", 4, 1024),
    Forward("decode-64", 64, 1, past=1024, room=1152),
    Forward("decode-8", 8, 1, past=1024, room=1152),
)
QUICK = (Forward("prefill", 2, 8), Forward("decode-2", 2, 1, past=4, room=16))


def run(bench: Bench) -> None:
    options = bench.options
    known = QUICK if options.quick else FORWARDS
    unknown = set(options.forwards) - {forward.name for forward in known}
    if unknown:
        raise ValueError(
            f"there is no forward {', '.join(sorted(unknown))}; --forwards takes {', '.join(f.name for f in known)}"
        )
    forwards = [forward for forward in known if not options.forwards or forward.name in options.forwards]
    kinds = (COMPILED, EAGER) if options.compiled else (EAGER,)
    bench.result.not_run += [f"{f}: left out by --forwards" for f in known if f not in forwards]
    bench.result.not_run += [] if options.compiled else ["compiled forwards: left out by --no-compile"]
    dtype = options.dtypes[0]
    started = time.monotonic()
    attention.register()
    model = build_preset(options.model, str(bench.device), DTYPES[dtype])
    if options.layers is not None:
        _cut(model, options.layers)
    bench.result.notes.append(
        f"{options.model}, {model.config.num_hidden_layers} layers, built in {time.monotonic() - started:.0f} s"
    )
    # All compiled ones first: they are what the promise is about. A plan for each kind, as eager ones need less time.
    for kind in kinds:
        items = [_Item(forward, kind) for forward in forwards]
        bench.plan(items, lambda item: _measure(bench, model, item, dtype))


@dataclasses.dataclass(frozen=True)
class _Item:
    forward: Forward
    kind: str

    def __str__(self) -> str:
        return f"{self.forward} {self.kind}"


def _cut(model: nn.Module, layers: int) -> None:
    have = model.config.num_hidden_layers
    if not 1 <= layers <= have:
        raise ValueError(f"--layers is from 1 to {have} for this model, not {layers}")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.layer_types = model.config.layer_types[:layers]


def _measure(bench: Bench, model: nn.Module, item: _Item, dtype: str) -> None:
    forward = item.forward
    step = _Step(model, forward, bench.device, DTYPES[dtype])
    time_it = _compiled if item.kind == COMPILED else _eager
    timings, distance, notes = time_it(bench, model, step)
    point = Point(
        work=forward.name,
        dtype=dtype,
        sizes={
            "kind": item.kind,
            "batch": forward.batch,
            "tokens": forward.tokens,
            "past": forward.past,
            "layers": model.config.num_hidden_layers,
        },
        timings=timings,
        distance=distance,
        notes=notes,
    )
    bench.result.points.append(point)
    bench.check(point.label, dtype, distance, MAX_DISTANCE)


class _Step:
    """One forward of the model on inputs of its own; ``rewind`` takes the cache back to where it was."""

    def __init__(self, model: nn.Module, forward: Forward, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._past, self._cache = model, forward.past, None
        self._tokens = torch.randint(0, model.config.vocab_size - 1, (forward.batch, forward.tokens), device=device)
        if forward.past:
            self._cache = _filled_cache(model.config, forward, device, dtype)

    def rewind(self) -> None:
        for layer in self._cache.layers if self._cache is not None else ():
            layer.cumulative_length.fill_(self._past)

    def run(self, logprobs: Callable[..., Tensor]) -> Tensor:
        return logprobs(self._model, self._tokens, self._cache)


def _logprobs(model: nn.Module, tokens: Tensor, cache: StaticCache | None) -> Tensor:
    """float32 logprobs of the last token of each row: [B, vocabulary]. This is what is compiled."""
    logits = model(input_ids=tokens, use_cache=cache is not None, logits_to_keep=1, **{caches.word_of(model): cache}).logits
    return torch.log_softmax(logits[:, -1].float(), -1)


def _filled_cache(config, forward: Forward, device: torch.device, dtype: torch.dtype) -> StaticCache:
    cache = StaticCache(config=config, max_cache_len=forward.room)
    cache.early_initialization(forward.batch, config.num_key_value_heads, config.head_dim, dtype, device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def _compiled(bench: Bench, model: nn.Module, step: _Step) -> tuple[dict[str, Timing], float, list[str]]:
    """Replays of CUDA graphs of the compiled forwards, in turn. On a CPU, where there are no graphs: in blocks."""
    if not bench.stopwatch.on_gpu:
        return _in_blocks(bench, model, step, COMPILED, blocks=1, make=_compile)
    graphs, outs, kept, notes = {}, {}, [], []
    for contender in (STOCK, OURS):
        with _contending(model, contender, _DOORS[COMPILED]):
            compiled_before, started = len(kept), time.monotonic()
            run = _compile(kept)
            for _ in range(2):
                step.rewind()
                out = step.run(run)
            torch.cuda.synchronize()
            outs[contender] = out.clone()
            notes.append(f"{contender}: {len(kept) - compiled_before} graphs, compiled in {time.monotonic() - started:.0f} s")
            step.rewind()
            graphs[contender] = capture(lambda run=run: step.run(run))
    replays = {name: graph.replay for name, graph in graphs.items()}
    timings = bench.stopwatch.alternate(replays, before=step.rewind)
    return timings, relative_distance(outs[OURS], outs[STOCK]), notes


def _compile(kept: list) -> Callable[..., Tensor]:
    """``_logprobs``, compiled by Inductor. What it makes is kept: CUDA graphs point into it after Dynamo has dropped it
    (Triton unloads the kernels that nobody holds from 3.7 on)."""

    def inductor(graph, inputs):
        from torch._inductor.compile_fx import compile_fx  # looked up now: the mode wraps it

        kept.append(compile_fx(graph, inputs))
        return kept[-1]

    return torch.compile(_logprobs, backend=inductor, dynamic=False)


def _eager(bench: Bench, model: nn.Module, step: _Step) -> tuple[dict[str, Timing], float, list[str]]:
    blocks = 1 if bench.options.quick else _BLOCKS
    return _in_blocks(bench, model, step, EAGER, blocks, make=lambda kept: _logprobs)


def _in_blocks(
    bench: Bench, model: nn.Module, step: _Step, kind: str, blocks: int, make: Callable[[list], Callable[..., Tensor]]
) -> tuple[dict[str, Timing], float, list[str]]:
    samples, outs = {STOCK: [], OURS: []}, {}
    for _ in range(blocks):
        for contender, taken in samples.items():
            with _contending(model, contender, _DOORS[kind]):
                run = make([])
                step.rewind()
                outs[contender] = step.run(run)
                step.rewind()
                taken += bench.stopwatch.samples_us(
                    lambda run=run: step.run(run), 2 if bench.options.quick else _BLOCK, before=step.rewind
                )
    timings = {name: Timing.of(taken, 1) for name, taken in samples.items()}
    return timings, relative_distance(outs[OURS], outs[STOCK]), [f"{blocks} blocks of each"]


@contextlib.contextmanager
def _contending(model: nn.Module, contender: str, door: str) -> Iterator[None]:
    """The contender's attention, and the mode for ours. No code compiled before is used.

    door: how names of ``Mode.hits`` begin in this kind of forward. Raises ModeDidNothing where only our attention did.
    """
    model.set_attn_implementation(_ATTENTION[contender])
    torch._dynamo.reset()
    if contender == STOCK:
        yield
        return
    with batch_invariant_mode() as mode:
        yield
        # transformers calls our attention by name, mode or no mode.
        if not any(name.startswith(f"{door}::") and "attention" not in name for name in mode.hits):
            raise ModeDidNothing(f"no operator of the forward reached the mode's table; its hits are {mode.hits}")
