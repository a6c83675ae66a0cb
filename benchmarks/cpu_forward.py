"""Time of a forward pass on the CPU in batch-invariant mode, as a ratio to stock torch in the same run.

``python benchmarks/cpu_forward.py``: tiny-qwen3, 16 rows of 32 tokens, fp32 and bf16, medians of alternating runs.
"""

import argparse
import json
import statistics
import time

import torch

from pytest_batchinv.mode import batch_invariant_mode
from pytest_batchinv.report.record import machine
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.transformers import TransformersSubject


def seconds(engine: TransformersSubject, shape: BatchShape, runs: int) -> float:
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        engine.logprobs(shape)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def ratio(dtype: str, rows: int, tokens: int, rounds: int) -> dict[str, float]:
    shape = BatchShape(tuple(Row(i, tokens) for i in range(rows)))
    stock = TransformersSubject("tiny-qwen3", device="cpu", dtype=dtype, attn="sdpa")
    with batch_invariant_mode():
        ours = TransformersSubject("tiny-qwen3", device="cpu", dtype=dtype)
        seconds(ours, shape, 3)
    seconds(stock, shape, 3)
    stock_times, our_times = [], []
    for _ in range(rounds):
        stock_times.append(seconds(stock, shape, 10))
        with batch_invariant_mode():
            our_times.append(seconds(ours, shape, 10))
    stock_time, our_time = statistics.median(stock_times), statistics.median(our_times)
    return {"stock_ms": stock_time * 1e3, "mode_ms": our_time * 1e3, "ratio": our_time / stock_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a JSON file for the figures")
    arguments = parser.parse_args()
    found = {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        for dtype in ("fp32", "bf16"):
            for rows, tokens in ((16, 32), (16, 1)):
                case = f"{dtype}, {rows} x {tokens} tokens, {threads} threads"
                found[case] = ratio(dtype, rows, tokens, rounds=5)
                print(f"{case:<36} stock {found[case]['stock_ms']:7.2f} ms   mode {found[case]['mode_ms']:7.2f} ms"
                      f"   ratio {found[case]['ratio']:.2f}")  # fmt: skip
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump({"machine": machine(), "cases": found}, file, indent=1)


if __name__ == "__main__":
    main()
