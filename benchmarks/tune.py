"""Finds the fastest tile of ``gemm`` for each size, among those that give one bit pattern, and writes ``kernels/tiles.json``.

    python benchmarks/tune.py --write kernels/tiles.json --out tune.json

Every candidate computes every size, and its bits are compared with those of the first one: a candidate that differs
anywhere is named and taken nowhere. How long cuBLAS takes is recorded beside, and whether its bits are the same.
Only what was tuned is replaced in the file, for the architecture at hand. 16-bit dtypes share their tiles; the times are
those of bf16.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from pytest_batchinv.kernels import tiles
from pytest_batchinv.kernels.cuda import matmul
from pytest_batchinv.kernels.tiles import Tile

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).parent))
import other_gpus
from timing import Stopwatch, capture

SIZES = [  # K, N of linear layers: Qwen3 0.6B and 8B, Llama 3.1 8B, and the facts' own
    *((4096, 4096), (4096, 12288), (12288, 4096), (1024, 3072), (4096, 151936)),
    *((4096, 1024), (4096, 14336), (14336, 4096), (1024, 1024), (1024, 2048), (2048, 1024), (3072, 1024)),
]
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_RESULT = 1 << 29
SHARED_MEMORY_LEFT = 2048


def candidates(M: int, device: tiles.Device) -> list[Tile]:
    """Tiles worth trying for M rows: as tall as M asks for, or half, and as deep as shared memory allows."""
    found = []
    if M <= 32:
        for block_m in (16,) if M <= 16 else (16, 32):
            for block_n, block_k, warps, stages in (
                *((16, 128, 4, 6), (16, 256, 4, 4), (16, 256, 2, 5), (16, 512, 4, 3)),
                *((32, 64, 4, 8), (32, 128, 4, 5), (32, 128, 2, 6), (32, 256, 4, 4), (32, 256, 8, 4)),
                *((64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 8, 5), (64, 256, 8, 3)),
                *((128, 64, 4, 5), (128, 128, 8, 4), (128, 64, 8, 4)),
            ):
                found.append(Tile(block_m, block_n, block_k, warps, stages))
    if 32 <= M <= 128:
        for block_m, block_n, block_k, warps, stages in (
            *((32, 32, 128, 4, 5), (32, 64, 128, 4, 4), (64, 32, 128, 4, 4), (64, 64, 64, 4, 5), (64, 64, 128, 4, 4)),
            *((64, 128, 64, 4, 4), (64, 128, 128, 8, 3)),
        ):
            found.append(Tile(block_m, block_n, block_k, warps, stages))
    if M > 64:
        for block_m, block_n, block_k, warps, stages in (
            *((64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4)),
            *((128, 64, 64, 4, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4)),
        ):
            found.append(Tile(block_m, block_n, block_k, warps, stages))
    if M >= 32 and device.has_tma:
        for block_m, block_n, block_k, warps, stages, programs in (
            *((64, 32, 128, 4, 6, 2), (64, 64, 64, 4, 6, 3), (64, 64, 128, 4, 6, 1), (64, 64, 128, 4, 3, 2)),
            *((64, 128, 64, 4, 3, 2), (64, 128, 64, 4, 5, 2), (128, 64, 64, 4, 3, 2)),
            *((64, 128, 128, 4, 4, 1), (64, 128, 64, 4, 8, 1), (64, 128, 64, 4, 4, 2)),
            *((64, 256, 64, 4, 4, 1), (64, 256, 64, 4, 5, 1), (128, 64, 64, 4, 8, 1)),
            *((128, 128, 64, 4, 5, 1), (128, 128, 64, 4, 6, 1)),
            *((128, 64, 64, 4, 5, 2), (128, 64, 128, 8, 4, 1), (128, 128, 64, 4, 3, 2), (128, 128, 64, 8, 5, 1)),
            *((64, 192, 64, 4, 5, 1), (64, 192, 64, 4, 6, 1), (128, 192, 64, 4, 4, 1), (128, 192, 64, 8, 4, 1)),
            *((64, 96, 64, 4, 5, 2), (64, 96, 128, 4, 3, 2), (64, 96, 128, 4, 5, 1)),
            *((128, 128, 128, 8, 3, 1), (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (256, 128, 64, 8, 4, 1)),
        ):
            if block_m <= max(64, M):
                found.append(Tile(block_m, block_n, block_k, warps, stages, True, programs))
    return [tile for tile in found if _fits(tile, device)]


def _fits(tile: Tile, device: tiles.Device) -> bool:
    """Operands in flight, and what a TMA store needs."""
    store = tile.block_m * tile.columns_stored if tile.tma else 0
    needed = 2 * (tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k + store)
    return needed + SHARED_MEMORY_LEFT <= device.shared_memory


def product(a: torch.Tensor, out: torch.Tensor, tile: Tile, b: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """b -> nothing: out becomes a @ b, with this tile."""
    sizes = matmul.Sizes.of(a.shape, a.stride(), b.shape, b.stride())
    run = matmul.product(sizes, a.dtype, a.device, tile)
    return lambda b: run(a, b, None, out, 1.0, 1.0)


def _cublas(a: torch.Tensor, out: torch.Tensor, b: torch.Tensor) -> None:
    torch.mm(a[0], b[0], out=out[0])


def compile_all(capability: int, seconds: float) -> int:
    """Compiles what ``main`` will launch, into Triton's cache on the disk, on all cores. Returns how many tiles failed."""
    device = other_gpus.DEVICES[capability]
    jobs = sorted({(M, tile) for M in (1, 16, 32, 64, 4096) for tile in candidates(M, device)})
    jobs = sorted({(tile, M % tile.block_m == 0): (M, tile) for M, tile in jobs}.values())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        results = [pool.submit(_compile, capability, M, tile) for M, tile in jobs]
        done, late = concurrent.futures.wait(results, timeout=seconds)
        for result in late:
            result.cancel()
    failed = [result for result in done if result.exception()]
    for result in failed[:5]:
        print("does not compile:", repr(result.exception())[:200])
    return len(failed)


def _compile(capability: int, M: int, tile: Tile) -> None:
    a = torch.empty(1, M, 4096, dtype=torch.bfloat16)
    b = torch.empty(1, 4096, 4096, dtype=torch.bfloat16).mT
    with other_gpus.compiling_for(capability):
        product(a, torch.empty(1, M, 4096, dtype=torch.bfloat16), tile, b)(b)


def tune(stopwatch: Stopwatch, K: int, N: int, rows: tuple[int, ...], differing: set[Tile]) -> Iterator[dict]:
    """Times and compares all candidates at every M; one record for each M."""
    device = stopwatch.device
    sets = stopwatch.rotation(2 * K * N).sets
    weights = [torch.randn(1, N, K, device=device, dtype=torch.bfloat16).mT for _ in range(sets)]
    for M in rows:
        if M * N > LARGEST_RESULT:
            continue
        rotation = stopwatch.rotation(2 * (K * N + M * K + M * N))
        a = torch.randn(1, M, K, device=device, dtype=torch.bfloat16)
        out, want = (torch.empty(1, M, N, device=device, dtype=torch.bfloat16) for _ in range(2))
        replays, same = {}, {}
        calls = {"cublas": functools.partial(_cublas, a, out)}
        calls |= {tile: product(a, out, tile, weights[0]) for tile in candidates(M, tiles.device_of(device))}
        for name, call in calls.items():
            try:
                out.fill_(torch.nan)
                call(weights[0])
                if name == "cublas":
                    cublas = out.clone()
                elif len(same) == 0:
                    want.copy_(out)
                    same[name] = True
                else:
                    same[name] = torch.equal(out.view(torch.int16), want.view(torch.int16))
                    if not same[name]:
                        differing.add(name)
                replays[name] = capture(functools.partial(_all, call, weights, rotation.rounds)).replay
            except Exception as error:
                print(f"M={M} K={K} N={N} {tuple(name)}: {repr(error)[:160]}")
        timings = stopwatch.alternate(replays, len(weights) * rotation.rounds)
        yield {
            "K": K,
            "N": N,
            "M": M,
            "cublas_us": timings["cublas"].median_us,
            "cublas_has_our_bits": torch.equal(cublas.view(torch.int16), want.view(torch.int16)),
            "tiles": sorted(
                ({"tile": tuple(tile), "us": timings[tile].median_us, "same_bits": same[tile]} for tile in same),
                key=lambda entry: entry["us"],
            ),
        }


def _all(call, weights: list[torch.Tensor], rounds: int) -> None:
    for _ in range(rounds):
        for b in weights:
            call(b)


Table = dict[tuple[int, int], dict[int, tuple[tuple, tuple]]]
"""(K, N) -> M -> (the fastest tile, the fastest without TMA)."""


def table(records: list[dict], differing: set[Tile], before: Table) -> Table:
    """The table before with what was found; of tiles that differed nowhere, also where it was not measured again."""
    found = {size: dict(by_rows) for size, by_rows in before.items()}
    for record in records:
        good = [Tile(*entry["tile"]) for entry in record["tiles"] if Tile(*entry["tile"]) not in differing]
        plain = next(tile for tile in good if not tile.tma)
        found.setdefault((record["K"], record["N"]), {})[record["M"]] = (tuple(good[0]), tuple(plain))
    kept = {size: {M: pair for M, pair in by_rows.items() if not differing & set(pair)} for size, by_rows in found.items()}
    return {size: by_rows for size, by_rows in kept.items() if by_rows}


def write(path: Path, capability: int, found: Table) -> None:
    """The file ``kernels/tiles.json`` with this architecture's table replaced: one line for each K, N and M."""
    lines = [
        json.dumps(
            {"capability": of, "itemsize": itemsize, "K": K, "N": N, "M": M, "tile": best, "without_tma": best_without_tma}
        )
        for (of, itemsize), by_size in sorted({**tiles.TUNED_GEMM, (capability, 2): found}.items())
        for (K, N), by_rows in sorted(by_size.items())
        for M, (best, best_without_tma) in sorted(by_rows.items())
    ]
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n")


def _sizes(text: str) -> list[tuple[int, int]]:
    known = {f"{K}x{N}": (K, N) for K, N in SIZES}
    unknown = [size for size in text.split(",") if size not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no size {', '.join(unknown)}; choose from {','.join(known)}")
    return [known[size] for size in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="where the table goes")
    parser.add_argument("--out", type=Path, help="where every measurement goes, as JSON")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop between two (K, N) when they are over")
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="some K x N, by commas: 1024x3072,4096x4096 (default: all)")
    args = parser.parse_args()
    begin = time.monotonic()
    torch.manual_seed(0)
    stopwatch = Stopwatch(torch.device("cuda", torch.cuda.current_device()), min_repeats=8)
    capability = tiles.device_of(stopwatch.device).capability
    if capability in other_gpus.DEVICES:
        compile_all(capability, args.seconds / 2)
    print(f"compiled in {time.monotonic() - begin:.0f} s")

    records: list[dict] = []
    differing: set[Tile] = set()
    cut = []
    with stopwatch.stream(), contextlib.suppress(KeyboardInterrupt):
        for K, N in args.sizes:
            if time.monotonic() - begin > args.seconds:
                cut.append((K, N))
                continue
            records.extend(tune(stopwatch, K, N, ROWS, differing))
    record = {
        "device": torch.cuda.get_device_name(),
        "capability": capability,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": round(time.monotonic() - begin, 1),
        "not_reached": cut,
        "differing": sorted(map(tuple, differing)),
        "sizes": records,
    }
    if args.out:
        args.out.write_text(json.dumps(record) + "\n")
    if args.write and records:
        write(args.write, capability, table(records, differing, tiles.TUNED_GEMM.get((capability, 2), {})))
    show(record)
    return 1 if differing else 0


def show(record: dict) -> None:
    """The best tile's time over cuBLAS's, by K x N and M."""
    ratios: dict[tuple[int, int], dict[int, float]] = {}
    for size in record["sizes"]:
        ratio = size["tiles"][0]["us"] / size["cublas_us"]
        ratios.setdefault((size["K"], size["N"]), {})[size["M"]] = ratio
    rows = sorted({M for by_m in ratios.values() for M in by_m})
    print(f"{record['device']}, torch {record['torch']}, triton {record['triton']}: {record['seconds']} s; time / cuBLAS")
    print(f"{'K x N':>14}" + "".join(f"{M:>7}" for M in rows))
    for (K, N), by_m in ratios.items():
        print(f"{K:>6} x {N:<6}" + "".join(f"{by_m[M]:7.2f}" if M in by_m else "      –" for M in rows))
    for name, chosen in (("all", rows), ("M <= 32", [M for M in rows if M <= 32])):
        values = [by_m[M] for by_m in ratios.values() for M in chosen if M in by_m]
        if values:
            print(f"{name}: geometric mean {math.exp(sum(map(math.log, values)) / len(values)):.3f}, worst {max(values):.2f}")
    same = sum(size["cublas_has_our_bits"] for size in record["sizes"])
    print(f"cuBLAS has our bits in {same} of {len(record['sizes'])}; tiles that differ somewhere: {len(record['differing'])}")
    if record["not_reached"]:
        print("out of time, not reached:", record["not_reached"])


if __name__ == "__main__":
    raise SystemExit(main())
