"""The saved form of a run: one JSON file with all its records."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from pytest_batchinv.records import SCHEMA
from pytest_batchinv.report import Results


def write(results: Results, path: Path) -> str:
    """Writes the file whole or not at all. Returns a line that says so."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(contents(results), indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return f"record of this run: {path}"


def contents(results: Results) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "machine": results.machine,
        "settings": asdict(results.settings),
        "outcome": {"exit_status": results.exit_status, **results.outcomes},
        "records": [asdict(record) for record in results.records],
    }
