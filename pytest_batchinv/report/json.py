"""The saved form of a run: one JSON file with all its records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from pytest_batchinv.report.record import SCHEMA
from pytest_batchinv.report.results import Results


def write(results: Results, path: Path) -> str:
    """Writes the file whole or not at all. Returns a line that says so. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(contents(results)), indent=1) + b"\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return f"record of this run: {path}"


def contents(results: Results) -> dict[str, Any]:
    # Not where it is written: records travel, and a folder of one machine tells another one nothing.
    settings = {name: value for name, value in vars(results.settings).items() if name != "report"}
    return {
        "schema": SCHEMA,
        "machine": results.machine,
        "settings": settings,
        "outcome": {"exit_status": results.exit_status, **results.outcomes},
        "records": results.records,
    }
