"""``python -m pytest_batchinv.coverage``: scans this torch on this device, and writes the data and the document."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import torch

from pytest_batchinv.coverage import report, scan, states
from pytest_batchinv.coverage.samples import DTYPES, MissingPackage
from pytest_batchinv.kernels import scanned

DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"


class Unusable(ValueError):
    """What was asked for cannot be done, in a sentence."""


def main(arguments: list[str] | None = None) -> int:
    """0 where no sample is silent; 1 where one is, 2 where the scan cannot run."""
    options = _parser().parse_args(arguments)
    try:
        if options.compare:
            print("\n".join(report.difference(*map(_data, options.compare))))
            return 0
        if options.document:
            _write(DOCUMENT, report.document(report.stored()))
            return 0
        return _scan(options)
    except (Unusable, MissingPackage) as error:
        print(error, file=sys.stderr)
        return 2


def _scan(options: argparse.Namespace) -> int:
    wanted = options.again or options.only
    if unknown := set(wanted) - {scan.short_name(source) for source in scan.sources(wanted)}:
        raise Unusable(
            f"there are no samples of {', '.join(sorted(unknown))}; names are those of docs/coverage.md, without aten::"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Unusable("there is no GPU here that torch can use; scan the CPU with --device cpu")
    kept = _kept(options.cells, "--again" if options.again else "--resume") if options.again or options.resume else None
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
        signal.signal(number, signal.default_int_handler)
    start = time.monotonic()
    tell = _told(start) if not options.quiet else lambda line: None
    before = kept if options.resume else None
    found = scan.scan(options.device, options.dtypes, options.threads, wanted, tell, options.jobs, before)
    if options.again and kept is not None:
        kept = kept.without(scan.sources(options.again))
        kept.add(found)
        found = kept
    if options.cells:
        options.cells.write_bytes(msgspec.json.encode(found))
    return _finished(found, options, time.monotonic() - start)


def _kept(path: Path | None, option: str) -> states.Found:
    """The calls of an earlier scan. Raises Unusable."""
    needs = f"{option} needs --cells with the file of an earlier scan"
    if path is None:
        raise Unusable(needs)
    try:
        return msgspec.json.decode(path.read_bytes(), type=states.Found)
    except OSError as error:
        raise Unusable(f"{needs}: {path} cannot be read ({error.strerror})") from None
    except msgspec.DecodeError as error:
        raise Unusable(f"{needs}: {path} holds something else ({error})") from None


def _data(name: str) -> scanned.Scan:
    """Raises Unusable."""
    try:
        return scanned.Scan.from_json(Path(name).read_text())
    except OSError as error:
        raise Unusable(
            f"--compare needs two files of data, as in kernels/scans: {name} cannot be read ({error.strerror})"
        ) from None
    except (ValueError, TypeError) as error:
        raise Unusable(
            f"--compare needs two files of data, as in kernels/scans: {name} holds something else ({error})"
        ) from None


def _finished(found: states.Found, options: argparse.Namespace, seconds: float) -> int:
    """Writes what was found, and says what it comes to, and what is other than in the data before."""
    path: Path = options.out or scanned.path_of(options.device)
    new = scan.data(found, options.device, options.threads, options.dtypes)
    before = scanned.Scan.from_json(path.read_text()) if path.exists() else None
    print("\n".join(report.summary(new)))
    print(f"{seconds:.0f} s")
    if before is not None:
        print("\n".join(report.difference(before, new)))
    if options.only and not options.out:
        print("not written: this is a part of the operators; --out PATH writes it")
    else:
        _write(path, new.to_json())
        if not options.out and DOCUMENT.parent.exists():  # in a checkout
            _write(DOCUMENT, report.document(report.stored()))
    return 1 if new.silent else 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"written: {path}")


def _told(start: float) -> scan.Tell:
    def tell(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    return tell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pytest_batchinv.coverage", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", type=_dtypes, default=tuple(DTYPES), metavar="fp32,bf16,...", help=", ".join(DTYPES))
    parser.add_argument(
        "--threads", type=_threads, default=(1, 2), metavar="1,2", help="numbers of threads; rows alone run on the first"
    )
    parser.add_argument("--only", type=_names, default=(), metavar="add,softmax,...", help="these samples")
    parser.add_argument(
        "--again", type=_names, default=(), metavar="add,...", help="these samples once more, in place of theirs in --cells"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that measure; they share one GPU")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the data here, and no document")
    parser.add_argument("--cells", type=Path, metavar="PATH", help="write what every call showed, too")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted scan whose calls are in --cells")
    parser.add_argument("--quiet", action="store_true", help="tell nothing on the way")
    parser.add_argument("--document", action="store_true", help="write docs/coverage.md from the stored data, and scan nothing")
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="say what changed between two files of data")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"there is no dtype {', '.join(unknown)}; there are {', '.join(DTYPES)}")
    return names


def _threads(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers from 1 on, as in 1,2")
    return numbers


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
