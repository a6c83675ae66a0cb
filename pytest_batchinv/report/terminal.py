"""The run on the terminal: header lines before it, a section after it. Made for 80 columns and a first-time reader."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from itertools import chain
import os

from pytest_batchinv.options import RELATIONS
from pytest_batchinv.records import Record
from pytest_batchinv.report import Results
from pytest_batchinv.settings import Settings

WIDTH = 80
MOST_OPS = 12
MOST_EXAMPLES = 5
_VERDICTS = {"differs": "DIFFERS", "inconclusive": "INCONCLUSIVE", "error": "ERROR"}
_WORST_FIRST = ("error", "differs", "inconclusive", "caught", "equal")


def header(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is needed to repeat the run."""
    examples = "1 batch shape, given" if settings.shape else f"{settings.max_examples} examples each"
    drawn = "derandomised, as CI is set" if environ.get("CI") else "drawn at random"
    return [
        f"batch invariance: on; {settings.model} ({settings.engine}), device {settings.device}, "
        f"dtype {settings.dtype}, attention {settings.attn}",
        f"batch invariance: relations {','.join(settings.relations)}; {examples}, {drawn}; "
        + ", ".join(_versions("torch", "triton", "transformers", "hypothesis")),
    ]


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
        for (compile_mode, relation), same in _grouped(group, lambda r: (r.compile_mode, r.relation)):
            yield "  " + _columns(
                compile_mode or "-",
                f"{relation} {RELATIONS.get(relation, '')}",
                _worst(same),
                f"{sum(r.examples for r in same):,}",
                f"{sum(r.rows for r in same):,}",
                _bytes(sum(r.compared_bytes for r in same)),
            )
        yield ""


def _columns(compile_mode: str, relation: str, verdict: str, examples: str, rows: str, compared: str) -> str:
    return f"{compile_mode:<15} {relation:<22} {verdict:<12} {examples:>8} {rows:>8} {compared:>9}".rstrip()


def _differences(records: list[Record]) -> Iterator[str]:
    for record in records:
        if record.verdict in ("differs", "error"):
            yield f"{_VERDICTS[record.verdict]}: {_case(record)}, in {record.nodeid}"
            yield from (f"  {name}: {value}" for name, value in record.difference.items())
            yield ""


def _controls(records: list[Record]) -> Iterator[str]:
    for record in records:
        if record.verdict == "caught":
            yield f"negative control: stock torch was caught ({_case(record)})"
        elif record.verdict == "inconclusive":
            yield f"negative control: INCONCLUSIVE ({_case(record)}): no shape was found where stock torch varies here,"
            yield "  so equal bits above may be the merit of this machine and not of the mode"
        else:
            yield f"negative control: {_VERDICTS.get(record.verdict, record.verdict)} ({_case(record)})"
        yield f"  searched {record.examples:,} examples, {record.rows:,} rows, {_bytes(record.compared_bytes)}"
        yield from (f"  {name}: {value}" for name, value in record.difference.items())
    if records:
        yield ""


def _operations(records: list[Record]) -> Iterator[str]:
    hits = sum((Counter(record.hits) for record in records), Counter())
    if not hits:
        return
    yield f"operations replaced: {len(hits)} overloads, {hits.total():,} calls"
    yield from (f"  {count:>12,}  {name}" for name, count in hits.most_common(MOST_OPS))
    if len(hits) > MOST_OPS:
        rest = hits.most_common()[MOST_OPS:]
        yield f"  {sum(count for _, count in rest):>12,}  in {len(rest)} more"
    yield ""


def _uncovered(records: list[Record]) -> Iterator[str]:
    names = sorted(set(chain.from_iterable(record.unclassified_ops for record in records)))
    if names:
        yield f"NOT COVERED: {len(names)} operations ran as stock torch has them. They are neither replaced, nor known to"
        yield "work on each row by itself, so the mode vouches for nothing that passed through them:"
        yield from (f"  {name}" for name in names)
        yield ""


def _not_run(records: list[Record]) -> Iterator[str]:
    examples = [example for record in records for example in record.not_run]
    if examples:
        yield f"not run: {len(examples)} examples"
        yield from ("  " + "; ".join(example.values()) for example in examples[:MOST_EXAMPLES])
        if len(examples) > MOST_EXAMPLES:
            yield f"  and {len(examples) - MOST_EXAMPLES} more, in the record of --batchinv-report"
        yield ""


def _nan(records: list[Record]) -> Iterator[str]:
    rows = sum(record.nan_rows for record in records)
    if rows:
        yield f"NaN: {rows:,} rows held NaN; NaN counts as equal only to NaN of the same bits"
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
    return ", ".join(gpu + cpu + [facts.get("platform", "")] + versions)


def _subject(record: Record) -> str:
    where = ", ".join(word for word in (record.device, record.dtype, record.attn) if word)
    return f"{record.subject} on {where}" if where else record.subject


def _case(record: Record) -> str:
    words = (_subject(record), record.compile_mode, f"{record.relation} {RELATIONS.get(record.relation, '')}".strip())
    return ", ".join(word for word in words if word)


def _worst(records: list[Record]) -> str:
    verdict = min((record.verdict for record in records), key=_WORST_FIRST.index)
    return _VERDICTS.get(verdict, verdict)


def _grouped(records: Iterable[Record], key) -> Iterable:
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups.items()


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    return f"{count:,.1f} TB"


def _versions(*names: str) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} not installed"
