"""docs/architectures.md from the lines that the command wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Line = dict[str, Any]

_HEAD = """\
# Architectures

Written by `python -m pytest_batchinv.architectures --document`; do not edit. Each causal architecture of transformers was built
tiny from its configuration, with random weights, and asked for relations in the mode, in eager code. A sample of the sweep was
run, spread over all of it, and no search: `4` says that four batches were equal, and no more than that.

| in a cell | says |
|---|---|
| 4 | so many batches were equal |
| **1 of 4 differ** | so many batches were not; the note has the first difference |
| 3, 1 failed | so many could not be computed; the note has the first error |
| – | the relation cannot be asked: the model keeps no cache, or can do no such layout |
"""


def document(lines: Iterable[Line]) -> str:
    """lines: as ``--out`` has them, of one or several runs."""
    by_run: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        by_run.setdefault((line.get("versions", "versions that were not noted"), line["dtype"]), []).append(line)
    sections = ["\n".join(_section(*run, found)) for run, found in sorted(by_run.items())]
    return "\n".join([_HEAD, *sections])


def _section(versions: str, dtype: str, lines: list[Line]) -> Iterator[str]:
    loaded = [line for line in lines if "error" not in line]
    letters = list(dict.fromkeys(letter for line in loaded for letter in line["relations"]))
    yield f"## {dtype}, {versions}\n"
    yield f"{len(loaded)} of {len(lines)} architectures that were tried became tiny and were loaded.\n"
    yield "| relation | equal | differ | failed | cannot be asked |"
    yield "|---|---|---|---|---|"
    for letter in letters:
        found = [line["relations"][letter] for line in loaded if letter in line["relations"]]
        kinds = [_kind(cells) for cells in found]
        yield f"| {letter} | {' | '.join(str(kinds.count(kind)) for kind in ('equal', 'differ', 'failed', 'not asked'))} |"
    yield f"\n| architecture | attention | {' | '.join(letters)} | |"
    yield f"|---|---|{'---|' * len(letters)}---|"
    for line in sorted(loaded, key=lambda line: line["architecture"]):
        cells = " | ".join(_cell(line["relations"].get(letter, {"not_asked": ""})) for letter in letters)
        yield f"| {line['architecture']} | {line['attention']} | {cells} | {_escaped('; '.join(_notes(line)))} |"
    yield "\nNot loaded:\n"
    for line in sorted(lines, key=lambda line: line["architecture"]):
        if "error" in line:
            yield f"* {line['architecture']}: {_escaped(line['error'])}"
    yield ""


def _kind(cells: dict[str, Any]) -> str:
    if "not_asked" in cells:
        return "not asked"
    return "differ" if cells["differ"] else "failed" if cells["errors"] or not cells["equal"] else "equal"


def _cell(cells: dict[str, Any]) -> str:
    if "not_asked" in cells:
        return "–"
    ran = cells["equal"] + cells["differ"]
    failed = f", {cells['errors']} failed" if cells["errors"] else ""
    return (f"**{cells['differ']} of {ran} differ**" if cells["differ"] else str(cells["equal"])) + failed


def _notes(line: Line) -> Iterator[str]:
    yield from line["left_out"]
    for letter, cells in line["relations"].items():
        for said in ("first_difference", "first_error", "not_run"):
            if said in cells:
                yield f"{letter}: {cells[said]}"


def _escaped(text: str) -> str:
    """In a cell of a table, and not as HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
