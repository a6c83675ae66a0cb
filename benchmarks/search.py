"""Does the search find what is planted, how soon, and does it cry wolf? And how many batches a second does it run?

    python benchmarks/search.py --out search.json

Planted functions of rows over pools of several sizes and many seeds: how many were found, and the longest time. Invariant
functions over many seeds: how many were called variant. tiny-qwen3 in the mode: batches and rows a second, one thread.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from pytest_batchinv import BatchVarianceError, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.report.record import machine
from pytest_batchinv.subjects.rows import RowsSubject

POOLS = (4, 20, 40, 150, 320)
PLANTED: dict[str, Callable[[int], planted.Planted]] = {
    "exactly 64 rows": lambda n: planted.at_exactly(64, n),
    "exactly 256 rows": lambda n: planted.at_exactly(256, n),
    "200 rows or more": lambda n: planted.from_size(200, n),
    "row 7 at position 3": lambda n: planted.row_at_position(min(7, n - 1), 3, n),
    "row 11 right after row 4": lambda n: planted.row_right_after(min(11, n - 1), min(4, n - 2), n),
}


def is_caught(make: Callable[[], planted.Planted], seed: int) -> tuple[bool, float]:
    fn, pool = make()
    started = time.perf_counter()
    try:
        check_batch_invariant(RowsSubject(fn, [pool]), ("I",), seed=seed)
    except BatchVarianceError:
        return True, time.perf_counter() - started
    return False, time.perf_counter() - started


def planted_faults(seeds: int) -> list[dict[str, object]]:
    found = []
    is_caught(lambda: planted.from_size(2), 0)  # what is imported and looked up once
    for name, make in PLANTED.items():
        for n_rows in POOLS:
            results = [is_caught(lambda make=make, n=n_rows: make(n), seed) for seed in range(seeds)]
            times = [seconds for _, seconds in results]
            row = {"fault": name, "pool": n_rows, "seeds": seeds, "found": sum(hit for hit, _ in results)}
            found.append(row | {"longest_s": max(times), "median_s": sorted(times)[len(times) // 2]})
            print(f"{name:<26} pool {n_rows:>3}: {row['found']} of {seeds} seeds, at most {max(times):.2f} s", flush=True)
    return found


def false_alarms(seeds: int) -> dict[str, int]:
    alarms = {}
    for name, make in planted.INVARIANT.items():
        alarms[name] = sum(is_caught(make, seed)[0] for seed in range(seeds))
        print(f"invariant: {name}: {alarms[name]} of {seeds} seeds called variant", flush=True)
    return alarms


def throughput(examples: int) -> dict[str, float]:
    from pytest_batchinv.subjects.transformers import TransformersSubject

    subject = TransformersSubject("tiny-qwen3", device="cpu", dtype="fp32")
    with batch_invariant_mode():
        (record,) = check_batch_invariant(subject, ("I",), max_examples=examples, seed=0)
    counts = record.counts
    print(f"tiny-qwen3: {counts.examples} batches, {counts.per_second(counts.examples):.1f} batches/s", flush=True)
    return {
        "batches": counts.examples,
        "batches_per_s": counts.per_second(counts.examples),
        "rows_per_s": counts.per_second(counts.rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--invariant-seeds", type=int, default=300)
    parser.add_argument("--examples", type=int, default=500, help="drawn batches of tiny-qwen3")
    parser.add_argument("--out", help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "machine": machine(),
        "planted": planted_faults(arguments.seeds),
        "false_alarms": false_alarms(arguments.invariant_seeds),
        "invariant_seeds": arguments.invariant_seeds,
        "throughput": throughput(arguments.examples),
    }
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
