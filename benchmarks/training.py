"""Measures gradients: our backward kernels beside torch's, and training steps with the mode on and off, in one run on one GPU.

    python -m benchmarks.training --parts attention,rows,dense,moe,bits,compiled,forward --out training.json

Each part prints a short table and adds to the JSON file; a part that fails says so there, and the next one runs. Figures are
medians of runs in turn (A B A B ...). ``tiles`` times tiles of the attention's two kernels. ``--device cpu --quick`` runs the
same code on tiny sizes, to see that it works; its times mean nothing.
"""

import argparse
import contextlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Contender, Stopwatch
from pytest_batchinv import BatchVarianceError, check_batch_invariant
from pytest_batchinv.kernels import operators
from pytest_batchinv.kernels.aten import norms, reductions, scatter
from pytest_batchinv.mode import batch_invariant_mode

Row = dict[str, Any]
STOCK, OURS = "stock", "ours"


class Run:
    """What a part is given: where, how large, and a stopwatch."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.stopwatch = Stopwatch(device, quick)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)

    def ratio(self, name: str, stock: Callable[..., object], ours: Callable[..., object], make: Callable[[], tuple]) -> Row:
        """Both over the same sets of inputs; each captured in a CUDA graph."""
        inputs = make()
        size = sum(x.nbytes for x in inputs if isinstance(x, Tensor))
        rotation = self.stopwatch.rotation(max(1, size))
        sets = [inputs, *(make() for _ in range(rotation.sets - 1))]
        contenders = [Contender(STOCK, stock, required=False), Contender(OURS, ours)]
        found = self.stopwatch.measure(contenders, sets, rotation.rounds)
        times = {name: timing.median_us for name, timing in found.timings.items()}
        row: Row = {"name": name, **{f"{key}_us": round(value, 2) for key, value in times.items()}}
        row["ratio"] = round(times[OURS] / times[STOCK], 3) if STOCK in times else None
        row |= {"distance": found.distances.get(OURS)} | ({"refused": found.refused} if found.refused else {})
        return row


# --- kernels ---------------------------------------------------------------------------------------------------------


def rows(run: Run) -> Iterator[Row]:
    """Backward kernels over torch's own, bf16."""
    n, wide, vocab = (64, 128, 500) if run.quick else (4096, 4096, 151_936)
    aten = torch.ops.aten

    def of_norm(is_layer_norm: bool, shape: tuple[int, int]) -> Callable[[], tuple]:
        def make() -> tuple:
            x, w = run.randn(*shape), run.randn(shape[1])
            if is_layer_norm:
                return run.randn(*shape), x, w, *torch.native_layer_norm(x, [shape[1]], w, w, 1e-6)[1:]
            return run.randn(*shape), x, w, x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()

        return make

    for shape in ((n, wide), (n * 8, 128), (n, 2 * wide)):
        size, cols = f"{shape[0]}x{shape[1]}", [shape[1]]
        yield run.ratio(
            f"rms_norm {size}",
            lambda g, x, w, r, cols=cols: aten._fused_rms_norm_backward(g, x, cols, r, w, [True, True]),
            lambda g, x, w, r, cols=cols: norms.fused_rms_norm_backward(g, x, cols, r, w, [True, True]),
            of_norm(False, shape),
        )
        yield run.ratio(
            f"layer_norm {size}",
            lambda g, x, w, m, r, cols=cols: aten.native_layer_norm_backward(g, x, cols, m, r, w, w, [True] * 3),
            lambda g, x, w, m, r, cols=cols: norms.native_layer_norm_backward(g, x, cols, m, r, w, w, [True] * 3),
            of_norm(True, shape),
        )
    for name, log, shape in (
        ("softmax", False, (n, wide)),
        ("log_softmax", True, (n, wide)),
        ("log_softmax", True, (n, vocab)),
    ):
        stock = aten._log_softmax_backward_data if log else aten._softmax_backward_data
        ours = reductions.log_softmax_backward if log else reductions.softmax_backward
        yield run.ratio(
            f"{name} {shape[0]}x{shape[1]}",
            lambda g, y, stock=stock: stock(g, y, -1, torch.bfloat16),
            lambda g, y, ours=ours: ours(g, y, -1, torch.bfloat16),
            lambda shape=shape, log=log: (
                run.randn(*shape),
                (torch.log_softmax if log else torch.softmax)(run.randn(*shape), -1),
            ),
        )

    def cross_entropy(backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(y: Tensor, target: Tensor, one: Tensor) -> Tensor:
            total = one * len(target)
            grad = aten.nll_loss_backward(one, y, target, None, 1, -100, total)
            return backward(grad, y, -1, torch.float32)

        return call

    def logprobs() -> tuple:
        y = torch.log_softmax(run.randn(n, vocab).float(), -1)
        return y, torch.randint(0, vocab, (n,), device=run.device), torch.ones((), device=run.device)

    yield run.ratio(
        f"cross_entropy {n}x{vocab} fp32", cross_entropy(aten._log_softmax_backward_data),
        cross_entropy(reductions.log_softmax_backward), logprobs,
    )  # fmt: skip
    for cols in (wide, 3 * wide):
        yield run.ratio(
            f"bias {n}x{cols}",
            lambda g: g.sum(0),
            lambda g: reductions.sum_dim(g, [0]),
            lambda cols=cols: (run.randn(n, cols),),
        )
    yield run.ratio(
        f"embedding {n}x{wide} of {vocab}",
        lambda g, i: aten.embedding_dense_backward(g, i, vocab, -1, False),
        lambda g, i: scatter.embedding_dense_backward(g, i, vocab, -1, False),
        lambda: (run.randn(n, wide), torch.randint(0, vocab, (n,), device=run.device)),
    )


ATTENTIONS = ((1, 8192), (4, 2048), (16, 512))


def attention(run: Run) -> Iterator[Row]:
    """Forward and backward over torch's flash attention: bf16, causal, 32 query heads, 8 key heads, head dim 128."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if run.device.type == "cuda" else SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.batchinv.attention(q, k, v, None, True, q.shape[-1] ** -0.5)[0]

    def step(attend: Callable[..., Tensor], backward: bool) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Any:
            with torch.set_grad_enabled(backward):
                out = attend(q, k, v)
                return torch.cat([g.flatten() for g in torch.autograd.grad(out, (q, k, v), grad)]) if backward else out

        return call

    for batch, length in ((1, 64),) if run.quick else ATTENTIONS:

        def make(batch: int = batch, length: int = length) -> tuple:
            q, k, v = (run.randn(batch, heads, length, 128).requires_grad_() for heads in (32, 8, 8))
            return q, k, v, run.randn(batch, 32, length, 128)

        for words, backward in (("fwd+bwd", True), ("fwd", False)):
            yield run.ratio(f"{words} {batch}x{length}", step(flash, backward), step(ours, backward), make)


def tiles(run: Run) -> Iterator[Row]:
    """The backward's two kernels by tile: microseconds of the whole backward with this tile for one of them."""
    from pytest_batchinv.kernels import plans
    from pytest_batchinv.kernels.cuda.attention import backward

    batch, length = 4, 2048
    q, k = run.randn(batch, 32, length, 128), run.randn(batch, 8, length, 128)
    out, lse = torch.ops.batchinv.attention(q, k, k, None, True, 0.09)
    chosen, expected = backward._tile, None
    candidates = [backward._Tile(*t) for own in (64, 128) for other in (32, 64, 128) for t in _warps_and_stages(own, other)]
    try:
        for of in ("keys", "queries"):
            for tile in candidates:
                backward._tile = lambda which, *a, of=of, tile=tile: tile if which == of else chosen(which, *a)
                plans.forget_plans()
                row: Row = {"name": f"{of} {tuple(tile)}"}
                try:
                    grads = backward.attention_backward(q, q, k, k, None, out, lse, True, 0.09)
                    expected = grads if expected is None else expected
                    row["same_bits"] = all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
                    row["us"] = round(
                        _median_us(lambda: backward.attention_backward(q, q, k, k, None, out, lse, True, 0.09)), 1
                    )
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:80]
                yield row
    finally:
        backward._tile = chosen
        plans.forget_plans()


def _warps_and_stages(own: int, other: int) -> Iterator[tuple[int, int, int, int]]:
    for warps in (4, 8):
        for stages in (1, 2, 3):
            yield own, other, warps, stages


def _median_us(call: Callable[[], object], repeats: int = 10) -> float:
    samples = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(samples[2:])


# --- training steps --------------------------------------------------------------------------------------------------


def _dense(run: Run) -> tuple[torch.nn.Module, Tensor]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "head_dim": 128}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 32768, "num_hidden_layers": 4}
    if run.quick:
        sizes |= {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "head_dim": 16,
            "num_key_value_heads": 2,
        }
        sizes |= {"vocab_size": 300, "num_hidden_layers": 2}
    return _built(run, Qwen3ForCausalLM, Qwen3Config(**sizes, tie_word_embeddings=False))


def _moe(run: Run) -> tuple[torch.nn.Module, Tensor]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "head_dim": 128}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 32768, "num_hidden_layers": 4, "num_experts": 128}
    if run.quick:
        sizes |= {"hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 16}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 300, "num_hidden_layers": 2, "num_experts": 8}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=2 if run.quick else 8, tie_word_embeddings=False)
    model, tokens = _built(run, Qwen3MoeForCausalLM, config)
    model.set_experts_implementation("grouped_mm")
    return model, tokens


def _built(run: Run, kind: type, config: Any) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(run.device):
            model = kind(config).train()
    finally:
        torch.set_default_dtype(torch.float32)
    batch, length = (2, 16) if run.quick else (4, 1024)
    return model, torch.randint(0, config.vocab_size, (batch, length), device=run.device)


def _step(model: torch.nn.Module, tokens: Tensor, run_model: Callable[..., Any], backward: bool) -> Callable[[], Tensor]:
    """A forward and its loss, and with backward the gradients of all weights."""

    def call() -> Tensor:
        with torch.set_grad_enabled(backward):
            logits = run_model(input_ids=tokens, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        if backward:
            loss.backward()
            model.zero_grad(set_to_none=True)
        return loss.detach()

    return call


def _on_and_off(
    run: Run, name: str, model: torch.nn.Module, tokens: Tensor, backward: bool = True, compiled: bool = False
) -> Row:
    """Milliseconds of a step in blocks (off, on, off, on), as it is called, and peak memory."""
    from pytest_batchinv.subjects.transformers import attention as ours

    ours.register()
    blocks, block = (1, 2) if run.quick else (3, 8)
    samples: dict[str, list[float]] = {"off": [], "on": []}
    losses, memory = {}, {}
    for _ in range(1 if compiled else blocks):
        for mode, taken in samples.items():
            model.set_attn_implementation(ours.NAME if mode == "on" else "sdpa")
            with batch_invariant_mode() if mode == "on" else contextlib.nullcontext():
                torch._dynamo.reset()
                step = _step(model, tokens, torch.compile(model, dynamic=False) if compiled else model, backward)
                for _ in range(3 if compiled else 2):
                    losses[mode] = float(step())
                if run.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(2 * block if compiled else block):
                    taken.append(_milliseconds(run, step))
                if run.device.type == "cuda":
                    memory[mode] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    times = {mode: statistics.median(taken) for mode, taken in samples.items()}
    row: Row = {"name": name, **{f"{mode}_ms": round(ms, 3) for mode, ms in times.items()}}
    return row | {"ratio": round(times["on"] / times["off"], 3), "loss": losses, "peak_gib": memory}


def _milliseconds(run: Run, call: Callable[[], object]) -> float:
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def dense(run: Run) -> Iterator[Row]:
    """Training step of 4 dense layers 4096/12288, vocabulary 32768, 4 x 1024 tokens, bf16, eager."""
    yield _on_and_off(run, "dense, forward and backward", *_dense(run))


def forward(run: Run) -> Iterator[Row]:
    """The forward of the same model alone, without gradients, eager."""
    yield _on_and_off(run, "dense, forward", *_dense(run), backward=False)


def compiled(run: Run) -> Iterator[Row]:
    """The same training step, compiled (dynamic=False)."""
    yield _on_and_off(run, "dense, compiled", *_dense(run), compiled=True)


def moe(run: Run) -> Iterator[Row]:
    """Training step of 4 layers of 128 experts, 8 a token, hidden 2048, 4 x 1024 tokens, grouped_mm, bf16, eager."""
    yield _on_and_off(run, "moe, forward and backward", *_moe(run))


# --- bits ------------------------------------------------------------------------------------------------------------


def bits(run: Run) -> Iterator[Row]:
    """Relation G in the mode on this device: operators of the suite, and models in both dtypes."""
    from pytest_batchinv.subjects.transformers import TransformersSubject
    from pytest_batchinv.suite.names import DTYPES, OPERATORS
    from pytest_batchinv.suite.operators import subject

    device = run.device.type
    names = OPERATORS[:2] if run.quick else OPERATORS
    models = ("tiny-qwen3",) if run.quick else ("wide-qwen3", "wide-llama", "tiny-qwen3-moe")
    makers = {f"{name} {dtype}": lambda n=name, d=dtype: subject(n, d, device) for name in names for dtype in DTYPES}
    makers |= {
        f"{model} {dtype}": lambda m=model, d=dtype: TransformersSubject(m, device=device, dtype=d)
        for model in models
        for dtype in ("bf16", "fp32")
    }
    for name, make in makers.items():
        row: Row = {"name": name}
        try:
            with batch_invariant_mode():
                (record,) = check_batch_invariant(make(), ("G",), max_examples=30)
            row |= {"verdict": record.verdict, "batches": record.counts.examples, "bytes": record.counts.compared_bytes}
            row["unverified"] = list(record.ops.unverified) if record.ops else None
        except BatchVarianceError as error:
            row |= {"verdict": "differs", "error": str(error)[:1500]}
        except Exception as error:
            row |= {"verdict": "error", "error": f"{type(error).__name__}: {error}"[:500]}
        yield row


PARTS = {p.__name__: p for p in (attention, rows, dense, moe, bits, compiled, forward, tiles)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="attention,rows,dense,moe,bits,compiled,forward", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - PARTS.keys()
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    run = Run(torch.device(arguments.device), arguments.quick)
    operators.operators()
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": _machine(run.device), "quick": arguments.quick, "parts": {}}
    failed = False
    with run.stopwatch.stream():
        for name in arguments.parts.split(","):
            part, found, started = PARTS[name], [], time.monotonic()
            print(f"\n{name}: {part.__doc__}", flush=True)
            result["parts"][name] = {"rows": found}
            try:
                for row in part(run):
                    found.append(row)
                    print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    failed |= row.get("verdict") in ("differs", "error")
            except Exception as error:
                traceback.print_exc()
                result["parts"][name]["error"], failed = f"{type(error).__name__}: {error}", True
            result["parts"][name]["seconds"] = round(time.monotonic() - started, 1)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
    return int(failed)


def _machine(device: torch.device) -> dict[str, str]:
    import transformers
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    raise SystemExit(main())
