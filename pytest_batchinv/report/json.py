"""The saved form of a run: one JSON file with all its records."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pytest_batchinv.report.record import SCHEMA
from pytest_batchinv.report.results import Results
from pytest_batchinv.report.saved import Saved


def write(results: Results, path: Path) -> str:
    """Writes the file whole or not at all. Returns a line that says so. Raises OSError."""
    write_saved(contents(results), path)
    return f"record of this run: {path}"


def write_saved(saved: Saved, path: Path) -> None:
    replace(path, msgspec.json.format(msgspec.json.encode(saved), indent=1) + b"\n")


def replace(path: Path, content: bytes) -> None:
    """The old file stays until the new one is whole. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def contents(results: Results) -> Saved:
    # Not where it is written: records travel, and a folder of one machine tells another one nothing.
    settings = {name: value for name, value in vars(results.settings).items() if name != "report"}
    return Saved(
        schema=SCHEMA,
        machine=results.machine,
        settings=settings,
        outcome={"exit_status": results.exit_status, **results.outcomes},
        records=tuple(results.records),
    )
