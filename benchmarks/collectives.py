"""Times the mode's all-reduce, whose order of additions is fixed, beside torch's own, over the same ranks in one run.

    python benchmarks/collectives.py --ranks 2 --out benchmarks/results/collectives.json
    python benchmarks/collectives.py --ranks 2 --device cpu --quick --out /tmp/collectives.json    # that it works; gloo

It starts its own ranks, one GPU each (NCCL, NVLink multicast off). For each size both are timed in turn: as CUDA graphs of many
calls, which hold the time of the GPUs alone, and as eager calls, with what Python and the dispatcher cost. A round lasts as
long as its slowest rank. ``ratio`` is the median over the rounds of ours / torch's; ``must`` is what it must not exceed.
"""

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pytest_batchinv.kernels import collectives, counters
from pytest_batchinv.mode import batch_invariant_mode, stock_torch
from pytest_batchinv.ranks import Start, World

KIB, MIB = 1 << 10, 1 << 20
SIZES = (KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB)
MUST = {KIB: 1.0, 64 * KIB: 1.0, MIB: 1.0, 64 * MIB: 1.5}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OURS, STOCK = "ours", "torch"
NAMES = (STOCK, OURS)


class InARank:
    """Called with ("graph" or "eager", nbytes, dtype, rounds, calls): microseconds of a call, by contender and round."""

    def __init__(self, rank: int, device: str) -> None:
        self.rank, self.device = rank, torch.device(device, rank) if device == "cuda" else torch.device(device)

    def __call__(self, request: tuple[str, int, str, int, int]) -> dict[str, list[float]] | None:
        how, nbytes, dtype, rounds, calls = request
        x = torch.full((nbytes // DTYPES[dtype].itemsize,), 2.0**-20, dtype=DTYPES[dtype], device=self.device)
        self._check(x)
        return {"graph": self._by_graphs, "eager": self._by_calls}[how](x, rounds, calls)

    def _check(self, x: torch.Tensor) -> None:
        """That each contender is what it is called."""
        for name in NAMES:
            with self._in(name), counters.counting_apart() as hits:
                distributed.all_reduce(x.clone())
            if (hits.get("c10d::allreduce_", 0) == 1) != (name == OURS):
                raise RuntimeError(f"{name} was answered by the wrong kernel: {hits}")

    def _in(self, name: str) -> Any:
        return batch_invariant_mode() if name == OURS else stock_torch()

    def _by_graphs(self, x: torch.Tensor, rounds: int, calls: int) -> dict[str, list[float]] | None:
        graphs = {}
        for name in NAMES:
            with self._in(name):
                for _ in range(3):
                    distributed.all_reduce(x)
                torch.cuda.synchronize()
                graphs[name] = torch.cuda.CUDAGraph()
                # NCCL's watchdog asks CUDA about events from a thread of its own.
                with torch.cuda.graph(graphs[name], capture_error_mode="thread_local"):
                    for _ in range(calls):
                        distributed.all_reduce(x)
        for graph in graphs.values():
            graph.replay()
        return self._timed(rounds, calls, {name: graph.replay for name, graph in graphs.items()}, dict.fromkeys(NAMES))

    def _by_calls(self, x: torch.Tensor, rounds: int, calls: int) -> dict[str, list[float]]:
        def run() -> None:
            for _ in range(calls):
                distributed.all_reduce(x)

        return self._timed(rounds, calls, dict.fromkeys(NAMES, run), {name: self._in for name in NAMES})

    def _timed(
        self, rounds: int, calls: int, runs: dict[str, Callable[[], None]], contexts: dict[str, Callable[[str], Any] | None]
    ) -> dict[str, list[float]]:
        """In turn. All ranks begin a measurement together."""
        found: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(rounds):
            for name in NAMES:
                enter = contexts[name]
                if enter is None:
                    found[name].append(self._seconds(runs[name]) / calls * 1e6)
                    continue
                with enter(name):
                    distributed.all_reduce(torch.ones(1, device=self.device))
                    found[name].append(self._seconds(runs[name]) / calls * 1e6)
        return found

    def _seconds(self, run: Callable[[], None]) -> float:
        self._wait()
        distributed.barrier()
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def in_a_rank(rank: int, world_size: int, device: str) -> InARank:
    return InARank(rank, device)


def point(answers: list[dict[str, list[float]]], how: str, nbytes: int, dtype: str, world_size: int) -> dict[str, Any]:
    """What one size came to: of each round the time of its slowest rank."""
    slowest = {name: [max(times) for times in zip(*(answer[name] for answer in answers), strict=True)] for name in NAMES}
    ratio = statistics.median(ours / stock for ours, stock in zip(slowest[OURS], slowest[STOCK], strict=True))
    quartiles = {name: statistics.quantiles(times, n=4, method="inclusive") for name, times in slowest.items()}
    must = MUST.get(nbytes) if how == "graph" else None
    return {
        "how": how,
        "bytes": nbytes,
        "dtype": dtype,
        "ranks": world_size,
        "shots": 2 if collectives.takes_two_shots(world_size, nbytes) else 1,
        "us": {name: {"q1": q1, "median": median, "q3": q3} for name, (q1, median, q3) in quartiles.items()},
        "ratio": ratio,
        "must": must,
        "verdict": "" if must is None else "met" if ratio <= must else "missed",
    }


def main(argv: list[str] | None = None) -> int:
    from measurements import describe_machine  # the ranks, which load this file by its path, have no use for it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two small sizes and few rounds; the times mean nothing")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    if given.device == "cuda" and given.ranks > torch.cuda.device_count():
        parser.error(f"{given.ranks} ranks need a GPU each, and torch sees {torch.cuda.device_count()}; --device cpu uses gloo")
    sizes = (KIB, 64 * KIB) if given.quick else SIZES
    rounds = 4 if given.quick else 30
    result = {
        "command": shlex.join([Path(sys.executable).name, "benchmarks/collectives.py", *(argv or sys.argv[1:])]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "reduced": "quick: its times mean nothing" if given.quick else "",
        "machine": describe_machine(torch.device(given.device)),
        "points": [],
    }
    world = World(given.ranks, Start(f"{Path(__file__).resolve()}:in_a_rank", (given.device,), given.device))
    try:
        for how in ("graph", "eager") if given.device == "cuda" else ("eager",):
            for nbytes in sizes:
                for dtype in DTYPES:
                    calls = max(2, min(50, 64 * MIB // nbytes)) if not given.quick else 2
                    answers = world.ask((how, nbytes, dtype, rounds if how == "graph" else min(rounds, 10), calls))
                    found = point(answers, how, nbytes, dtype, given.ranks)
                    result["points"].append(found)
                    given.out.write_text(json.dumps(result, indent=1) + "\n")
                    print(line(found), flush=True)
    finally:
        world.close()
    return 0


def line(found: dict[str, Any]) -> str:
    ours, stock = (found["us"][name]["median"] for name in (OURS, STOCK))
    must = "" if found["must"] is None else f" <= {found['must']}: {found['verdict']}"
    size = f"{found['bytes'] // KIB} KiB"
    times = f"ours {ours:9.1f} us, torch {stock:9.1f} us, ratio {found['ratio']:.2f}{must}"
    return f"{found['how']:5} {size:>10} {found['dtype']} {times}"


if __name__ == "__main__":
    sys.exit(main())
