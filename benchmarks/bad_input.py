"""A long run of the fuzzer of ``tests/kernels/test_bad_input.py``: how many calls agreed with stock torch, by overload.

    python -P benchmarks/bad_input.py --device cpu --examples 100 --out benchmarks/results/bad-input-cpu.json

Each example is a list of calls. An overload with a disagreement is listed with its smallest call, and the exit status is 1.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import hypothesis
import torch

from pytest_batchinv import batch_invariant_mode

_CONTEXT = multiprocessing.get_context("spawn")
TESTS = Path(__file__).parents[1] / "tests/kernels/test_bad_input.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--examples", type=int, default=100, help="for each entry of the table, see the test file")
    parser.add_argument("--entries", help="of the table, by commas (default: all)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="entries at a time, each in a process")
    parser.add_argument("--seconds", type=float, help="what has not ended by then is named as not run (default: no limit)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    started = time.perf_counter()
    ran, outcomes, disagreements, not_run = Counter(), Counter(), {}, []
    names = _fuzzer().NAMES if options.entries is None else options.entries.split(",")
    unknown = sorted(set(names) - set(_fuzzer().NAMES))
    if unknown:
        parser.error(f"the table has no entry {', '.join(unknown)}; it has {', '.join(_fuzzer().NAMES)}.")
    slowest_first = sorted(names, key=lambda name: "attention" not in name)
    until = None if options.seconds is None else started + options.seconds
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        searches = {name: pool.submit(search, name, options.device, options.examples, until) for name in slowest_first}
        for name, result in searches.items():
            found = result.result()
            if found is None:
                not_run.append(name)
                continue
            mine, of_mine, disagreement = found
            ran, outcomes = ran + mine, outcomes + of_mine
            if disagreement:
                disagreements[name] = disagreement
            print(f"{name}: {sum(ran.values())} calls so far, {len(disagreements)} disagreements", flush=True)
    record = {
        "command": " ".join(["python", "-P", "benchmarks/bad_input.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _cpu(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "hypothesis": hypothesis.__version__},
        "seconds": round(time.perf_counter() - started),
        "calls": sum(ran.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "calls_by_overload": dict(sorted(ran.items())),
        "disagreements": disagreements,
        "not_run": not_run,
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    shown = ("device", "seconds", "calls", "outcomes", "disagreements", "not_run")
    print(json.dumps({key: record[key] for key in shown}, indent=1))
    return 1 if disagreements else 0


def search(name: str, device: str, examples: int, until: float | None) -> tuple[Counter, Counter, str | None] | None:
    """Calls by overload, their outcomes, and what disagreed; None if there was no time. In a process of its own.

    A call may end its process, by a signal or by leaving the device unusable: that disagrees, too.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_search_here, args=(name, device, examples, sender), daemon=True)
    process.start()
    sender.close()
    last = "before its first call"
    try:
        while receiver.poll(None if until is None else max(0.0, until - time.perf_counter())):
            kind, last = receiver.recv()
            if kind == "found":
                return last
    except EOFError:
        process.join()
        return Counter(), Counter(), f"the process ended with exit code {process.exitcode}, {last}"
    finally:
        process.kill()
    return None


def _search_here(name: str, device: str, examples: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    fuzzer, disagreement = _fuzzer(), None
    expect, outcome, mode = fuzzer.expect, fuzzer.outcome, ["with"]

    def told_expect(*args):
        mode.append("without")
        try:
            return expect(*args)
        finally:
            mode.pop()

    def told_outcome(call, *args, **kwargs):
        sender.send(("call", f"{mode[-1]} the mode, in {call}"))
        return outcome(call, *args, **kwargs)

    fuzzer.expect, fuzzer.outcome = told_expect, told_outcome
    with batch_invariant_mode():
        try:
            fuzzer.search(name, device, examples)
        except AssertionError as error:
            disagreement = str(error)
        except fuzzer.DeviceEnded as error:
            disagreement = f"the device ended: {error}"
    sender.send(("found", (fuzzer.ran, fuzzer.outcomes, disagreement)))


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
