"""What the project costs before and around the work: disk, import, pytest's start-up, and entering the mode.

``python benchmarks/costs.py --wheel dist/*.whl``: each pair is two processes, or two calls, in turn, so that a drift of the
machine hits both. Seconds are medians; a ratio is that of the medians, with the quartiles of the pairs' own ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from pytest_batchinv.report.record import machine

_EMPTY_TEST = "def test_nothing():\n    pass\n"
_COMPILE = """
import time
import torch
from pytest_batchinv.mode import batch_invariant_mode, stock_torch
from pytest_batchinv.subjects.transformers import TransformersSubject
from pytest_batchinv.shapes import BatchShape, Row

shape = BatchShape(tuple(Row(i, 32) for i in range(4)))
with {block}():
    subject = TransformersSubject("tiny-qwen3", device="cpu", dtype="fp32", attn={attention!r}, compile_mode={mode!r})
    started = time.perf_counter()
    subject.logprobs(shape)
    print(time.perf_counter() - started)
"""
_ENTER = """
import time
import torch
from pytest_batchinv import batch_invariant_mode

for _ in range(5):
    started = time.perf_counter()
    with batch_invariant_mode():
        entered = time.perf_counter()
    print(entered - started, time.perf_counter() - entered)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", help="the wheel whose size is told")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", help="a JSON file for the figures")
    arguments = parser.parse_args()
    found: dict[str, object] = {"machine": machine()}
    if arguments.wheel:
        found["wheel"] = sizes(Path(arguments.wheel))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_nothing.py").write_text(_EMPTY_TEST)
        pytest = (sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", folder)
        found["pytest with the plugin unused, over without it"] = in_turn(
            {"with": wall((*pytest,)), "without": wall((*pytest, "-p", "no:batchinv"))}, "with", "without", arguments.pairs
        )
    found["import pytest_batchinv, over import torch"] = in_turn(
        {name: wall((sys.executable, "-P", "-c", f"import {name}")) for name in ("pytest_batchinv", "torch")},
        *("pytest_batchinv", "torch"),
        arguments.pairs,
    )
    entries = [[float(x) for x in line.split()] for line in _output(_ENTER).splitlines()]
    found["enter the mode, seconds"] = {"first": entries[0][0], "later": statistics.median(x[0] for x in entries[1:])}
    found["leave it, seconds"] = statistics.median(x[1] for x in entries)
    for mode in ("default", "dynamic"):
        sides = {
            "mode": printed(_COMPILE.format(block="batch_invariant_mode", attention="auto", mode=mode)),
            "stock": printed(_COMPILE.format(block="stock_torch", attention="sdpa", mode=mode)),
        }
        pairs = max(3, arguments.pairs // 5)
        found[f"first compiled call of tiny-qwen3, {mode}, cold caches, over stock"] = in_turn(sides, "mode", "stock", pairs)
    print(json.dumps({name: value for name, value in found.items() if name != "machine"}, indent=1))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def sizes(wheel: Path) -> dict[str, int]:
    """Bytes of the wheel, and of the files in it."""
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
    return {"bytes": wheel.stat().st_size, "unpacked_bytes": sum(file.file_size for file in files), "files": len(files)}


def in_turn(sides: Mapping[str, Callable[[], float]], one: str, over: str, pairs: int) -> dict[str, float | int]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()  # reads the files into memory
    for number in range(pairs):
        for name in (one, over) if number % 2 else (over, one):
            taken[name].append(sides[name]())
    medians = {f"{name}_s": statistics.median(seconds) for name, seconds in taken.items()}
    ratios = [a / b for a, b in zip(taken[one], taken[over], strict=True)]
    q1, _, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {**medians, "ratio": medians[f"{one}_s"] / medians[f"{over}_s"], "q1": q1, "q3": q3, "pairs": pairs}


def wall(command: tuple[str, ...]) -> Callable[[], float]:
    """Seconds of a whole process."""

    def run() -> float:
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started

    return run


def printed(source: str) -> Callable[[], float]:
    """The seconds that a process prints last, with caches of compiled code of its own."""
    return lambda: float(_output(source).split()[-1])


def _output(source: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = (sys.executable, "-P", "-c", source)
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


if __name__ == "__main__":
    main()
