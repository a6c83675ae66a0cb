"""A long run of the fuzzer of ``tests/kernels/test_bad_input.py``: how many calls agreed with stock torch, by overload.

    python -P benchmarks/bad_input.py --device cpu --examples 100 --out benchmarks/results/bad-input-cpu.json

Each example is a list of calls. An overload with a disagreement is listed with its smallest call, and the exit status is 1.
"""

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import hypothesis
import torch

from pytest_batchinv import batch_invariant_mode

TESTS = Path(__file__).parents[1] / "tests/kernels/test_bad_input.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--examples", type=int, default=100, help="for each entry of the table, see the test file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    fuzzer, started, disagreements = _fuzzer(), time.perf_counter(), {}
    with batch_invariant_mode():
        for name in fuzzer.NAMES:
            try:
                fuzzer.search(name, options.device, options.examples)
            except AssertionError as error:
                disagreements[name] = str(error)
            print(f"{name}: {sum(fuzzer.ran.values())} calls so far, {len(disagreements)} disagreements", flush=True)
    record = {
        "command": " ".join(["python", "-P", "benchmarks/bad_input.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _cpu(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "hypothesis": hypothesis.__version__},
        "seconds": round(time.perf_counter() - started),
        "calls": sum(fuzzer.ran.values()),
        "outcomes": dict(sorted(fuzzer.outcomes.items())),
        "calls_by_overload": dict(sorted(fuzzer.ran.items())),
        "disagreements": disagreements,
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("device", "seconds", "calls", "outcomes", "disagreements")}, indent=1))
    return 1 if disagreements else 0


def _fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_bad_input", TESTS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.ran, module.outcomes = Counter(), Counter()
    return module


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
