"""The run on the terminal: header lines before it, a section after it. Made for a first-time reader; the end says it all."""

from __future__ import annotations

import os
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, ItemsView, Iterable, Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pytest_batchinv import letters
from pytest_batchinv.report import message
from pytest_batchinv.report.record import Record
from pytest_batchinv.report.results import Results
from pytest_batchinv.report.words import (
    MODES,
    WORDS,
    bytes_words,
    counted,
    machine_words,
    not_proven,
    proven,
    proven_words,
    worst_verdict,
)

if TYPE_CHECKING:
    from pytest_batchinv.plugin.settings import Settings

MOST_OPS = 8
MOST_REASONS = 5
WIDTH = 110


def header(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is needed to repeat the run."""
    examples = "the one batch shape given" if settings.shape else f"{counted(settings.max_examples, 'example')} each"
    drawn = "derandomised, as CI is set" if environ.get("CI") else "drawn at random"
    return [
        f"batch invariance: on; {settings.model} ({settings.engine}), device {settings.device}, "
        f"dtype {settings.dtype}, attention {settings.attn}",
        f"batch invariance: relations {','.join(settings.relations)}; {examples}, {drawn}; "
        + ", ".join(_versions("torch", "triton")),
        *_patches(),
    ]


def _patches() -> Iterator[str]:
    """The patches by their state; for the refused ones why, since somebody has to act. Imports no torch."""
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
    """The section after the run: what was found, by which operations, on what machine; at the end what it comes to."""
    records = results.records
    if not records:
        return ["no test recorded a check"]
    checks = [record for record in records if not record.control]
    controls = [record for record in records if record.control]
    return [
        *_tables(checks),
        *_failures(checks),
        *_controls(controls),
        *_operations(checks),
        *_unverified(checks),
        *_not_run(records),
        *_nan(checks),
        *_notes(records),
        *_conclusion(checks, controls),
    ]


def _tables(records: list[Record]) -> Iterator[str]:
    models = [record for record in records if record.subject.is_model]
    for (subject, mode), group in _grouped(models, lambda record: (_model(record), record.mode)):
        yield f"{subject}, {MODES[mode]}"
        for compile_mode, same in _grouped(group, lambda record: record.subject.compile_mode):
            yield f"  {compile_mode:<16}" + _verdicts(same) + _counts(same)
        yield ""
    functions = [record for record in records if not record.subject.is_model]
    by_case = _grouped(functions, lambda record: (record.mode, record.subject.device, record.subject.dtype))
    for (mode, device, dtype), group in by_case:
        subjects = _grouped(
            group, lambda record: (record.nodeid, message.short_name(record.subject), record.subject.compile_mode)
        )
        yield f"{counted(len(subjects), 'function')} of rows on {device}, {dtype}, {MODES[mode]}"
        alike: dict[str, list[tuple[str, list[Record]]]] = defaultdict(list)
        for (_, name, compile_mode), same in subjects:
            alike[_verdicts(same)].append((name if compile_mode == "eager" else f"{name} ({compile_mode})", same))
        for verdicts, members in alike.items():
            yield "  " + verdicts + _counts([record for _, same in members for record in same])
            names = ", ".join(sorted({name for name, _ in members}))  # of workers the records come in any order
            yield from textwrap.wrap(names, WIDTH, initial_indent="    ", subsequent_indent="    ")
        yield ""


def _verdicts(records: list[Record]) -> str:
    """ "R equal  S equal  I DIFFERS": the worst of each relation."""
    by_relation = _grouped(records, lambda record: record.relation)
    worst = {letter: WORDS[worst_verdict(group)] for letter, group in by_relation}
    return "  ".join(f"{letter} {worst[letter]:<7}" for letter in letters.in_order(worst))


def _counts(records: list[Record]) -> str:
    counts = [record.counts for record in records]
    seconds = sum(count.seconds for count in counts) or 1.0
    examples, rows = sum(count.examples for count in counts), sum(count.rows for count in counts)
    compared = bytes_words(sum(count.compared_bytes for count in counts))
    return f"  {examples:>7,} batches {rows:>9,} rows {compared:>9}, {examples / seconds:,.0f} batches/s"


def _failures(records: list[Record]) -> Iterator[str]:
    for record in records:
        if record.verdict in ("equal", "not_run"):
            continue
        relation = letters.titled(record.relation)
        yield f"{WORDS[record.verdict]}: {message.subject_words(record.subject)}"
        yield f"  {relation}, {MODES[record.mode]}, in {record.nodeid}"
        if record.error:
            yield from textwrap.wrap(record.error, WIDTH, initial_indent="  ", subsequent_indent="  ")
        if record.finding is None and record.case:
            yield f"  at the batch {record.case}"
        yield from _finding(record)
        yield ""


def _finding(record: Record) -> Iterator[str]:
    found = record.finding
    if found is None:
        return
    yield f"  row {message.row_words(record.subject, found)}"
    yield from (f"  {line}" for line in message.difference_lines(found))
    if line := message.operator_line(found):
        yield f"  {line}"
    if found.breakpoints is not None:
        yield f"  {message.sizes_words(found.breakpoints)}"
    if record.control:
        return
    for section in found.sections:
        yield from (f"  {section.title}: {line}" for line in section.lines)
    yield f"  to repeat it: {found.replay}"


def _controls(records: list[Record]) -> Iterator[str]:
    functions = [record for record in records if not record.subject.is_model]
    for (device, dtype), group in _grouped(functions, lambda record: (record.subject.device, record.subject.dtype)):
        caught = [record.subject.name for record in group if record.verdict == "caught"]
        functions_tried = counted(len(group), "function")
        text = f"negative control: on {device}, {dtype}, stock torch was caught in {len(caught)} of {functions_tried}"
        yield from textwrap.wrap(text + f": {', '.join(caught)}" * bool(caught), WIDTH, subsequent_indent="  ")
        yield ""
    for record in (record for record in records if record.subject.is_model):
        counts = record.counts
        searched = (
            f"{counted(counts.examples, 'batch', 'es')}, {counted(counts.rows, 'row')}, {bytes_words(counts.compared_bytes)}"
        )
        if record.verdict == "caught":
            yield f"negative control: stock torch was caught, after {searched}"
        elif record.verdict == "inconclusive":
            yield f"negative control: INCONCLUSIVE: stock torch did not vary in {searched};"
            yield "  equal bits may come from this machine, not from the mode"
        else:
            yield f"negative control: {WORDS[record.verdict]}, after {searched}: {record.error}"
        yield f"  {message.subject_words(record.subject)}"
        yield from _finding(record)
        yield ""


def _operations(records: list[Record]) -> Iterator[str]:
    hits = sum((Counter(record.hits) for record in records), Counter[str]())
    if not hits:
        return
    yield f"operations replaced: {counted(len(hits), 'overload')}, {counted(hits.total(), 'call')}"
    yield from (f"  {count:>12,}  {name}" for name, count in hits.most_common(MOST_OPS))
    if len(hits) > MOST_OPS:
        rest = hits.most_common()[MOST_OPS:]
        yield f"  {sum(count for _, count in rest):>12,}  in {len(rest)} more"
    yield ""


def _unverified(records: list[Record]) -> Iterator[str]:
    by_op: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name in record.unclassified_ops:
            by_op[name].add(record.subject.name)
    if by_op:
        yield f"UNVERIFIED: {counted(len(by_op), 'operator')} ran as stock torch has them, neither replaced nor known to work"
        yield "on each row by itself; the mode does not vouch for what they touched:"
        yield from (f"  {name}  in {', '.join(sorted(subjects))}" for name, subjects in sorted(by_op.items()))
        for why in sorted({record.ops.not_scanned for record in records if record.ops is not None} - {""}):
            yield from textwrap.wrap(why, WIDTH)
        yield ""
    for record in records:
        if record.ops is not None and record.ops.error:
            yield f"operators unknown: {record.subject.name}, {record.relation}: {record.ops.error}"


def _not_run(records: list[Record]) -> Iterator[str]:
    skipped = [skipped for record in records for skipped in record.not_run]
    if skipped:
        yield f"not run: {counted(len(skipped), 'batch', 'es')}"
        reasons = Counter(example.reason for example in skipped)
        yield from (f"  {counted(count, 'time')}: {reason}" for reason, count in reasons.most_common(MOST_REASONS))
        yield "  their batch shapes are in the file of --batchinv-report"
        yield ""
    for record in records:
        if record.verdict == "not_run":
            yield f"not run: {letters.titled(record.relation)} of {record.subject.name}: {record.error}"


def _nan(records: list[Record]) -> Iterator[str]:
    rows = sum(record.counts.nan_rows for record in records)
    if rows:
        yield f"NaN: {counted(rows, 'row')} held NaN; NaN counts as equal only to NaN of the same bits"
        yield ""


def _notes(records: list[Record]) -> Iterator[str]:
    notes = Counter(note for record in records for note in record.notes)
    for note, times in notes.items():
        yield f"note: {note}" + (f" ({times} times)" if times > 1 else "")
    if notes:
        yield ""


def _conclusion(checks: list[Record], controls: list[Record]) -> Iterator[str]:
    """What was proven, on what, and what was not."""
    equal = proven(checks)
    if equal:
        yield f"proven      {proven_words(equal)}"
        widest = max((r for r in equal if r.relation == "I"), key=lambda r: r.counts.examples, default=None)
        if widest is not None and widest.covered:
            first, *rest = widest.covered
            yield f"covered     {'; '.join([first.partition(' (')[0], *rest])} ({widest.subject.name}, the widest)"
    for line in dict.fromkeys(machine_words(record.machine) for record in checks + controls):
        yield from textwrap.wrap(line, WIDTH, initial_indent="on          ", subsequent_indent=" " * 12)
    fingerprints = ", ".join(dict.fromkeys(record.fingerprint for record in equal if record.fingerprint))
    if fingerprints:
        yield f"fingerprint {fingerprints}"
    if controls:
        caught = sum(record.verdict == "caught" for record in controls)
        yield f"control     the same search caught stock torch in {caught} of {counted(len(controls), 'subject')}"
    missing = not_proven(checks, controls)
    yield from textwrap.wrap("; ".join(missing), WIDTH, initial_indent="not proven  ", subsequent_indent=" " * 12)


def _model(record: Record) -> str:
    info = record.subject
    about = (f"{info.name} on {info.device}", info.dtype, f"attention {info.attention}" * bool(info.attention))
    return ", ".join(filter(None, about))


def _grouped(records: Iterable[Any], key: Callable[[Any], Hashable]) -> ItemsView[Any, list[Any]]:
    groups: dict[Hashable, list[Any]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups.items()


def _versions(*names: str) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} not installed"
