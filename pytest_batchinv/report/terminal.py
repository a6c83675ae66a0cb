"""The run on the terminal: header lines before it, a section after it. Made for 80 columns and a first-time reader."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, ItemsView, Iterable, Iterator, Mapping
from importlib import metadata
from itertools import chain
from typing import Any

from pytest_batchinv.options import RELATIONS
from pytest_batchinv.records import Record
from pytest_batchinv.report import Results
from pytest_batchinv.settings import Settings
from pytest_batchinv.shapes import TRIED_SIZES, as_ranges

MOST_OPS = 12
MOST_REASONS = 5
_VERDICTS = {"differs": "DIFFERS", "inconclusive": "INCONCLUSIVE", "error": "ERROR"}
_WORST_FIRST = ("error", "differs", "inconclusive", "caught", "equal")


def header(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is needed to repeat the run."""
    examples = "the one batch shape given" if settings.shape else f"{_count(settings.max_examples, 'example')} each"
    drawn = "derandomised, as CI is set" if environ.get("CI") else "drawn at random"
    return [
        f"batch invariance: on; {settings.model} ({settings.engine}), device {settings.device}, "
        f"dtype {settings.dtype}, attention {settings.attn}",
        f"batch invariance: relations {','.join(settings.relations)}; {examples}, {drawn}; "
        + ", ".join(_versions("torch", "triton")),
        *_patches(),
    ]


def _patches() -> Iterator[str]:
    """The patches by their state; of the refused ones why, since somebody has to act. Imports no torch."""
    from pytest_batchinv.patches import registry

    rows = registry.status()
    for state, group in _grouped([row for row in rows if row.state != "refused"], _patch_state):
        yield f"batch invariance: patches {state}: {', '.join(row.name for row in group)}"
    yield from (f"batch invariance: patch {row.name} REFUSED: {row.why}" for row in rows if row.state == "refused")


def _patch_state(row: Any) -> str:
    if row.state == "off" and row.numerics:
        return "off, as they change bits"
    return "with the mode" if (row.state, row.group) == ("off", "inductor") else row.state


def summary(results: Results) -> list[str]:
    """The section after the run: what was compared and found, by which operations, on what machine."""
    records = results.records
    if not records:
        return ["no test recorded a check"]
    checks = [record for record in records if record.relation != "N"]
    controls = [record for record in records if record.relation == "N"]
    return [
        *_tables(checks),
        *_differences(checks),
        *_controls(controls),
        *_operations(records),
        *_uncovered(records),
        *_not_run(records),
        *_nan(records),
        *_notes(records),
        *_machines(records),
    ]


def _tables(records: list[Record]) -> Iterator[str]:
    for subject, group in _grouped(records, _subject):
        yield subject
        yield "  " + _columns("compiled", "relation", "verdict", "examples", "rows", "compared")
        for (compile_mode, relation), same in _grouped(group, lambda record: (record.compile_mode, record.relation)):
            yield "  " + _columns(
                compile_mode or "-",
                _words(relation),
                _worst(same),
                f"{sum(record.examples for record in same):,}",
                f"{sum(record.rows for record in same):,}",
                _bytes(sum(record.compared_bytes for record in same)),
            )
        yield ""


def _columns(compile_mode: str, relation: str, verdict: str, examples: str, rows: str, compared: str) -> str:
    return f"{compile_mode:<15} {relation:<22} {verdict:<8} {examples:>8} {rows:>10} {compared:>9}"


def _differences(records: list[Record]) -> Iterator[str]:
    for record in records:
        if record.verdict in ("differs", "error"):
            yield f"{_VERDICTS[record.verdict]}: {_case(record)}"
            yield f"  in {record.nodeid}"
            yield from _difference(record.difference)
            if record.difference.get("shape"):
                yield f"  to repeat it, add --batchinv-shape '{record.difference['shape']}'"
            yield ""


def _difference(found: Mapping[str, Any]) -> Iterator[str]:
    """The first element that differs, the batch sizes that show it, and the batch."""
    if not found:
        return
    yield f"  {found['n_differ']:,} of {found['n_total']:,} values differ; the first at {list(found['index'])}:"
    distance = "" if found["ulp"] is None else f", {found['ulp']:,} ulp apart"
    yield f"  {found['expected']} ({found['expected_hex']}) against {found['actual']} ({found['actual_hex']}){distance}"
    if found.get("sizes"):
        yield f"  the bits change at batch sizes {as_ranges(found['sizes'], TRIED_SIZES)}"
    if found.get("shape"):
        shape = json.loads(found["shape"])
        layout = "packed" if shape["layout"] == "packed" else f"{shape['layout']} padding"
        yield f"  in a batch of {_count(len(shape['rows']), 'row')}, {layout}"


def _controls(records: list[Record]) -> Iterator[str]:
    for record in records:
        searched = f"{_count(record.examples, 'example')}, {_count(record.rows, 'row')}, {_bytes(record.compared_bytes)}"
        if record.verdict == "caught":
            yield f"negative control: stock torch was caught, after {searched}"
        elif record.verdict == "inconclusive":
            yield f"negative control: INCONCLUSIVE: stock torch did not vary in {searched};"
            yield "  equal bits may come from this machine, not from the mode"
        else:
            yield f"negative control: {_worst([record])}, after {searched}"
        yield f"  {_case(record)}"
        yield from _difference(record.difference)
        yield ""


def _operations(records: list[Record]) -> Iterator[str]:
    hits = sum((Counter(record.hits) for record in records), Counter())
    if not hits:
        return
    yield f"operations replaced: {_count(len(hits), 'overload')}, {_count(hits.total(), 'call')}"
    yield from (f"  {count:>12,}  {name}" for name, count in hits.most_common(MOST_OPS))
    if len(hits) > MOST_OPS:
        rest = hits.most_common()[MOST_OPS:]
        yield f"  {sum(count for _, count in rest):>12,}  in {len(rest)} more"
    yield ""


def _uncovered(records: list[Record]) -> Iterator[str]:
    names = sorted(set(chain.from_iterable(record.unclassified_ops for record in records)))
    if names:
        yield f"NOT COVERED: {_count(len(names), 'operation')} ran as stock torch has them, neither replaced nor"
        yield "known to work on each row by itself; the mode does not vouch for what they touched:"
        yield from (f"  {name}" for name in names)
        yield ""


def _not_run(records: list[Record]) -> Iterator[str]:
    examples = [example for record in records for example in record.not_run]
    if examples:
        yield f"not run: {_count(len(examples), 'example')}"
        reasons = Counter(example.get("reason", "no reason given") for example in examples)
        yield from (f"  {_count(count, 'time')}: {reason}" for reason, count in reasons.most_common(MOST_REASONS))
        yield "  their batch shapes are in the file of --batchinv-report"
        yield ""


def _nan(records: list[Record]) -> Iterator[str]:
    rows = sum(record.nan_rows for record in records)
    if rows:
        yield f"NaN: {_count(rows, 'row')} held NaN; NaN counts as equal only to NaN of the same bits"
        yield ""


def _notes(records: list[Record]) -> Iterator[str]:
    notes = Counter(note for record in records for note in record.notes)
    for note, times in notes.items():
        yield f"note: {note}" + (f" ({times} times)" if times > 1 else "")
    if notes:
        yield ""


def _machines(records: list[Record]) -> Iterator[str]:
    for line in dict.fromkeys(_machine(record.machine) for record in records):
        yield f"machine: {line}"


def _machine(facts: dict[str, str]) -> str:
    gpu = [f"{facts['gpu']} ({facts.get('capability', '')})"] if "gpu" in facts else []
    cpu = [f"{facts.get('cpu') or 'unknown CPU'}, {facts.get('threads', '?')} threads"]
    versions = [f"{name} {facts[name]}" for name in ("python", "torch", "triton", "transformers") if name in facts]
    return ", ".join(word for word in (*gpu, *cpu, facts.get("platform"), *versions) if word)


def _subject(record: Record) -> str:
    where = ", ".join(word for word in (record.device, record.dtype, record.attn) if word)
    return f"{record.subject} on {where}" if where else record.subject


def _case(record: Record) -> str:
    compiled = record.compile_mode and f"compile mode {record.compile_mode}"
    return ", ".join(word for word in (_subject(record), compiled, _words(record.relation)) if word)


def _words(relation: str) -> str:
    return f"{relation} {RELATIONS[relation]}" if relation in RELATIONS else " + ".join(relation)


def _worst(records: list[Record]) -> str:
    verdict = min((record.verdict for record in records), key=_WORST_FIRST.index)
    return _VERDICTS.get(verdict, verdict)


def _grouped(records: Iterable[Record], key: Callable[[Record], Hashable]) -> ItemsView[Any, list[Record]]:
    groups: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups.items()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:,.1f} TB"


def _versions(*names: str) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} not installed"
