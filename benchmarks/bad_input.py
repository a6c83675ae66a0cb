"""A long run of the fuzz of ``tests/kernels/test_bad_input.py``: the calls that break a promise, by entry of the table.

    python -P benchmarks/bad_input.py --device cpu --examples 2000 --out benchmarks/results/bad-input-cpu.json

The exit status is 1 where a call broke a promise.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import hypothesis
import torch

TESTS = Path(__file__).parents[1] / "tests/kernels/test_bad_input.py"


def main() -> int:
    fuzz = _fuzz()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--examples", type=int, default=1000, help="calls of each entry (default: 1000)")
    parser.add_argument("--entries", nargs="+", choices=fuzz.NAMES, default=fuzz.NAMES, metavar="ENTRY", help="default: all")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, help="a file for the record, as JSON")
    options = parser.parse_args()

    def search(name: str) -> tuple[Counter[str], list[str]]:
        child = fuzz.Child(options.device, options.examples)
        try:
            return child.search(name)
        finally:
            child.close()

    started, outcomes, faults = time.perf_counter(), Counter(), {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for name, (counts, found) in zip(options.entries, pool.map(search, options.entries), strict=True):
            outcomes += counts
            if found:
                faults[name] = found
            print(f"{name}: {len(found)} faults in {sum(counts.values())} calls", flush=True)
    record = {
        "command": " ".join(["python", "-P", "benchmarks/bad_input.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _cpu(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "hypothesis": hypothesis.__version__},
        "seconds": round(time.perf_counter() - started),
        "calls": sum(outcomes.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "faults": faults,
    }
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if faults else 0


def _fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_bad_input", TESTS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
