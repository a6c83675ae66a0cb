"""The saved form of a run: one JSON file with all its records."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_batchinv.report.record import SCHEMA, Record
from pytest_batchinv.report.results import Results
from pytest_batchinv.report.saved import Saved
from pytest_batchinv.report.words import counted

if TYPE_CHECKING:
    from pytest_batchinv.plugin.settings import Settings


def write(results: Results, path: Path) -> str:
    """Writes the file whole or not at all. Returns a line that says so. Raises OSError."""
    write_saved(contents(results), path)
    scripts = write_scripts(results.records, path)
    return f"record of this run: {path}" + f", and {scripts}" * bool(scripts)


def write_scripts(records: Sequence[Record], path: Path) -> str:
    """Beside the report, a script of each operator at which bits part. Returns words that say where, "" for none."""
    traces = [(record, record.finding.trace) for record in records if record.finding is not None and record.finding.trace]
    scripts = {_script_name(record): trace.script for record, trace in traces if trace.script}
    if not scripts:
        return ""
    folder = path.with_name(f"{path.stem}-scripts")
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        replace(folder / name, text.encode())
    return f"{counted(len(scripts), 'script')} of the operators that vary, alone: {folder}"


def _script_name(record: Record) -> str:
    """Of the test and the relation, in characters that every file system takes."""
    return (
        re.sub(r"[^\w.-]+", "-", f"{record.nodeid.rpartition('/')[2] or record.subject.name}-{record.relation}").strip("-")
        + ".py"
    )


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


def settings_of(settings: Settings) -> dict[str, Any]:
    """Not where a report is written or read: records travel, and a folder of one machine tells another one nothing."""
    return {name: value for name, value in vars(settings).items() if name not in ("report", "resume")}


def contents(results: Results) -> Saved:
    return Saved(
        schema=SCHEMA,
        machine=results.machine,
        settings=settings_of(results.settings),
        outcome={"exit_status": results.exit_status, **results.outcomes},
        records=tuple(results.records),
    )
