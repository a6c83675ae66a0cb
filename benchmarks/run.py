"""Measures our kernels and the mode beside stock torch and the peers that are installed, in one run on one machine.

    python benchmarks/run.py --out DIR                        # all cases
    python benchmarks/run.py --out DIR --only gemm,rows --seconds 90
    python benchmarks/run.py --show DIR                       # the table again, from DIR's JSON files

Writes DIR/CASE.json and DIR/CASE.csv, and prints one table: each figure, what it must be, what was reached. What no time was
left for is named there. The exit status is 1 on errors (a kernel that fails or is wrong), not when a figure is missed.
``--device cpu --quick`` runs the same code on tiny sizes, to see that it works; its times mean nothing.
"""

import argparse
import datetime
import shlex
import sys
import time
import traceback
from pathlib import Path

import targets
import torch
from cases import DTYPES, SECONDS, Bench, Options, module_of
from measurements import Budget, Result, describe_machine, read, write
from timing import Stopwatch


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.show is not None:
        return show(arguments.show)
    options = _options(arguments)
    results = run(arguments.only, options, arguments.seconds, arguments.out)
    print("\n".join(targets.table(results)))
    return 1 if any(result.errors for result in results) else 0


def run(cases: list[str], options: Options, seconds: float | None, out: Path) -> list[Result]:
    """Runs the cases one by one and writes each result as soon as it is there.

    seconds: for all of them, shared by what is left and by ``SECONDS``; None gives each what ``SECONDS`` says.
    """
    whole = Budget(sum(SECONDS[case] for case in cases) if seconds is None else seconds)
    stopwatch = Stopwatch(options.device, options.quick)
    results = []
    with stopwatch.stream(), torch.no_grad():
        for index, case in enumerate(cases):
            share = SECONDS[case] / sum(SECONDS[later] for later in cases[index:])
            result = Result(case, reduced=_reduced(case, options), command=_command())
            result.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            started = time.monotonic()
            try:
                module_of(case).run(Bench(options, stopwatch, Budget(whole.left() * share), result))
            except Exception as error:
                traceback.print_exc()
                result.errors.append(f"{type(error).__name__}: {error}")
            result.seconds = round(time.monotonic() - started, 1)
            result.machine = describe_machine(options.device)  # now, so that the clocks are those under load
            write(result, out)
            print(f"{case}: {len(result.points)} points in {result.seconds:.0f} s -> {out / case}.json", flush=True)
            results.append(result)
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
    return results


def show(folder: Path) -> int:
    """Prints the table of a folder's results. The status is 1 where there are none."""
    results = read(folder)
    if not results:
        print(f"there are no results in {folder}; run benchmarks/run.py --out {folder} first", file=sys.stderr)
        return 1
    order = list(SECONDS)
    print("\n".join(targets.table(sorted(results, key=lambda result: order.index(result.case)))))
    return 0


def _reduced(case: str, options: Options) -> str:
    """The options that make this another measurement than the one asked for."""
    reasons = [f"on {options.device.type}"] if options.device.type != "cuda" else []
    reasons += ["--quick"] if options.quick else []
    if case == "forward":
        reasons += [f"--model {options.model}"] if options.model != Options.model else []
        reasons += [f"--layers {options.layers}"] if options.layers is not None else []
    return ", ".join(reasons)


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="the folder for the results")
    where.add_argument("--show", type=Path, help="print the table of the results in this folder, and measure nothing")
    parser.add_argument("--only", type=_names(SECONDS), default=list(SECONDS), help="cases, by commas (default: all)")
    parser.add_argument("--seconds", type=float, help=f"for all cases together (default: {sum(SECONDS.values())} for all)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", type=_names(DTYPES), default=["bf16"], help="by commas (default: bf16)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script out")
    forward = parser.add_argument_group("the case forward")
    forward.add_argument("--model", help=f"a preset (default: {Options.model}; with --quick tiny-qwen3)")
    forward.add_argument("--layers", type=int, help="keep the first N layers only")
    forward.add_argument(
        "--forwards", type=lambda text: text.split(","), default=[], help="prefill,decode-1,... (default: all)"
    )
    forward.add_argument("--no-compile", action="store_true", help="eager forwards only")
    return parser.parse_args(argv)


def _names(known):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def _options(arguments: argparse.Namespace) -> Options:
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("benchmarks/run.py: torch sees no GPU here; --device cpu --quick tries the script out")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return Options(
        device=device,
        dtypes=tuple(arguments.dtypes),
        quick=arguments.quick,
        model=arguments.model or ("tiny-qwen3" if arguments.quick else Options.model),
        layers=arguments.layers,
        compiled=not arguments.no_compile,
        forwards=tuple(arguments.forwards),
    )


if __name__ == "__main__":
    raise SystemExit(main())
