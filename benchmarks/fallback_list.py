"""Compile time of a chain of custom operators by its depth, with and without the patch ``lazy_operator_text``.

``python benchmarks/fallback_list.py``: each operator takes the previous result twice. Up to torch 2.12 Inductor writes each one
out as text, with everything that it was made from: the time is exponential in the depth. A curve ends at the first depth that
takes longer than ``--most-seconds``. Nothing comes from a cache, and the first compilation, which imports, is not counted.
"""

import argparse
import json
import time

import torch
import torch._inductor.utils

from pytest_batchinv.patches.registry import applied, status
from pytest_batchinv.report.record import machine

NAMESPACE = "batchinv_benchmark"


def chain(library: torch.library.Library, name: str, depth: int):
    """``depth`` different operators, one after the other, each on the previous result twice. Tensor -> Tensor."""
    for i in range(depth):
        library.define(f"{name}_{i}(Tensor[] xs) -> Tensor", tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(f"{name}_{i}", lambda xs: xs[0] + xs[1], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}_{i}", lambda xs: torch.empty_like(xs[0]), lib=library)
    operators = [getattr(getattr(torch.ops, NAMESPACE), f"{name}_{i}") for i in range(depth)]

    def run(x: torch.Tensor) -> torch.Tensor:
        for operator in operators:
            x = operator([x, x])
        return x

    return run


def seconds(library: torch.library.Library, name: str, depth: int, device: str) -> float:
    function = torch.compile(chain(library, name, depth), fullgraph=True)
    torch._dynamo.reset()
    started = time.perf_counter()
    out = function(torch.ones(8, device=device))
    taken = time.perf_counter() - started
    assert torch.equal(out, torch.full_like(out, 2.0**depth))
    return taken


def curve(library, name: str, depths: list[int], most_seconds: float, device: str) -> dict[int, float]:
    seconds(library, f"{name}_first", 1, device)
    taken: dict[int, float] = {}
    for depth in depths:
        taken[depth] = seconds(library, f"{name}_{depth}", depth, device)
        print(f"{name:<8} depth {depth:>3}: {taken[depth]:7.2f} s", flush=True)
        if taken[depth] > most_seconds:
            break
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 16, 24, 40])
    parser.add_argument("--most-seconds", type=float, default=20, help="a curve ends after a depth that took longer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="a JSON file for the figures")
    arguments = parser.parse_args()
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    with torch._inductor.utils.fresh_cache():
        stock = curve(library, "stock", arguments.depths, arguments.most_seconds, arguments.device)
        with applied("inductor"):
            state = {row.name: row.state for row in status()}["lazy_operator_text"]
            ours = curve(library, "patched", arguments.depths, arguments.most_seconds, arguments.device)
    if arguments.out:
        found = {"machine": machine(), "device": arguments.device, "patch": state, "seconds": {"stock": stock, "patched": ours}}
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
