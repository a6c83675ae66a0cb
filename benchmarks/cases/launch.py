"""What the Python side of an operator costs at M = 1: host time of a call, mode on and mode off, and inside a CUDA graph.

A chunk of calls is timed from an idle GPU, and no longer than its queue is, so the host never waits for it. Entering the
mode drops compiled code and changes the dispatcher, so the contenders take turns in blocks (off, on, off, on, ...). They
are short: a shared host may be slower by half for a second, which must not fall to one contender.
"""

import statistics
from collections.abc import Callable

import torch
from measurements import OURS, STOCK, Point
from timing import Timing, capture, relative_distance
from torch.nn import functional as F

from cases import Bench, ModeDidNothing
from pytest_batchinv.mode import Mode, batch_invariant_mode

CALLS, CHUNK, BLOCKS = 1000, 50, 10
GRAPH_CALLS = 20
EAGER, GRAPH, GRAPH_GPU = "eager call", "graph replay, host", "graph replay, GPU"


def run(bench: Bench) -> None:
    device, quick = bench.device, bench.options.quick
    calls = _calls(device, 64 if quick else 4096, 16 if quick else 128, 40 if quick else 1024)
    bench.result.notes.append(f"{CALLS} calls an operator, in chunks of {CHUNK}; {BLOCKS} blocks of each contender")
    blocks, chunk = (1, 2) if quick else (BLOCKS, CHUNK)
    chunks = 2 if quick else CALLS // CHUNK // BLOCKS
    if bench.budget.left() <= 0:
        bench.result.cut += calls
        return
    if not bench.stopwatch.on_gpu:
        bench.result.not_run.append(f"{GRAPH}: there are no CUDA graphs on {device}")

    samples = {name: {STOCK: [], OURS: []} for name in calls}
    graphs: dict[str, dict[str, torch.cuda.CUDAGraph]] = {name: {} for name in calls}
    outputs: dict[str, dict[str, torch.Tensor]] = {name: {} for name in calls}

    def block(contender: str, mode: Mode | None = None) -> None:
        for name, call in calls.items():
            hits = sum(mode.hits.values()) if mode else 0
            outputs[name][contender] = call()
            if mode and sum(mode.hits.values()) == hits:
                raise ModeDidNothing(f"a call of {name} did not reach the mode's table")
            samples[name][contender] += bench.stopwatch.host_us(call, chunks + 1, chunk)[1:]  # the first one warms up
            if bench.stopwatch.on_gpu and contender not in graphs[name]:
                graphs[name][contender] = capture(lambda call=call: [call() for _ in range(GRAPH_CALLS)])

    for _ in range(blocks):
        block(STOCK)
        with batch_invariant_mode() as mode:
            block(OURS, mode)

    for name in calls:
        distance = relative_distance(outputs[name][OURS], outputs[name][STOCK])
        bench.check(f"{name} at M=1", "bf16", distance)
        points = {EAGER: {key: Timing.of(values, 1) for key, values in samples[name].items()}}
        if bench.stopwatch.on_gpu:
            replays = {key: graph.replay for key, graph in graphs[name].items()}
            points[GRAPH] = _host_in_turn(bench, replays)
            points[GRAPH_GPU] = bench.stopwatch.alternate(replays, GRAPH_CALLS)
        for what, timings in points.items():
            point = Point(work=name, dtype="bf16", sizes={"what": what}, timings=timings, distance=distance)
            bench.result.points.append(point)


def _host_in_turn(bench: Bench, replays: dict[str, Callable[[], None]]) -> dict[str, Timing]:
    """Host time of one replay, divided by the calls in it."""
    samples = {key: [] for key in replays}
    for _ in range(10):
        for key, replay in replays.items():
            samples[key].append(statistics.median(bench.stopwatch.host_us(replay, 4, 5)))
    return {key: Timing.of(values, GRAPH_CALLS) for key, values in samples.items()}


def _calls(device: torch.device, width: int, head_dim: int, keys: int) -> dict[str, Callable[[], torch.Tensor]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    x, weight, bias, scale = randn(1, width), randn(width, width) * width**-0.5, randn(width), randn(width)
    heads, head_weights, head_biases = randn(8, 1, head_dim), randn(8, head_dim, keys) * head_dim**-0.5, randn(8, 1, keys)
    q, k, v = randn(1, 32, 1, head_dim), randn(1, 8, keys, head_dim), randn(1, 8, keys, head_dim)
    weight_t, seen = weight.t(), torch.arange(keys, device=device).lt(keys - 9).view(1, 1, 1, keys)
    return {
        "mm": lambda: torch.mm(x, weight_t),
        "addmm": lambda: torch.addmm(bias, x, weight_t),
        "linear": lambda: F.linear(x, weight, bias),
        "bmm": lambda: torch.bmm(heads, head_weights),
        "baddbmm": lambda: torch.baddbmm(head_biases, heads, head_weights),
        "mean": lambda: torch.mean(x, -1, keepdim=True),
        "sum": lambda: torch.sum(x, -1),
        "var": lambda: torch.var(x, -1),
        "logsumexp": lambda: torch.logsumexp(x, -1),
        "cumsum": lambda: torch.cumsum(x, -1),
        "softmax": lambda: torch.softmax(x, -1),
        "log_softmax": lambda: torch.log_softmax(x, -1),
        "rms_norm": lambda: F.rms_norm(x, (width,), scale, 1e-6),
        "layer_norm": lambda: F.layer_norm(x, (width,), scale, bias),
        "sdpa decode": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "sdpa decode, mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True),
    }
