"""What the page shows, as plain values: records are grouped and put into words here, and the template only places them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from pytest_batchinv import letters
from pytest_batchinv.report import message, words
from pytest_batchinv.report.record import Breakpoints, Culprit, Finding, Record, Section, Trace, TracedOp
from pytest_batchinv.subjects.base import SubjectInfo

MARKS = {"good": "✓", "bad": "✗", "unsure": "?", "none": "–", "absent": "–", "plain": "="}
SMALL_TRACE = 40  # operators up to which all layers are unfolded
LEVELS = 8  # of the intensity of a distance, each sixteen times the one before


class Cell(NamedTuple):
    """One relation of one subject. tone: good, bad, unsure, none, absent or plain; target: the id of what explains it."""

    word: str
    tone: str
    about: str = ""
    target: str = ""

    @property
    def mark(self) -> str:
        return MARKS[self.tone]


class Line(NamedTuple):
    """One subject in the table of verdicts. cells: in the order of the columns."""

    name: str
    about: str
    dtype: str
    mode: str
    operators: Cell
    cells: list[Cell]
    test: str


class Strip(NamedTuple):
    """A map of breakpoints: ranges of sizes that differ, as (first, how many)."""

    ranges: list[tuple[int, int]]
    bound: int
    words: str


class Layer(NamedTuple):
    """Neighbours in a trace that belong to one layer of the model. shut: folded when the page opens."""

    name: str
    ops: list[Row]
    shut: bool
    summary: str


class Row(NamedTuple):
    """One line of a trace. level: 0 to 8, the intensity of its distance."""

    position: int
    op: TracedOp
    level: int
    culprit: bool


class TraceView(NamedTuple):
    id: str
    trace: Trace
    layers: list[Layer]
    sides: tuple[str, str]
    summary: str
    culprits: list[CulpritView]


class CulpritView(NamedTuple):
    culprit: Culprit
    op: TracedOp | None
    strip: Strip | None
    elsewhere: list[tuple[str, Strip]]


class Item(NamedTuple):
    """A check that did not hold, or a control, with all that is known of it."""

    id: str
    tone: str
    word: str
    relation: str
    subject: str
    mode: str
    test: str
    facts: list[tuple[str, list[str]]]
    error: str
    strip: Strip | None
    sections: Sequence[Section]
    case: str
    replay: str
    trace: TraceView | None


class Operator(NamedTuple):
    name: str
    status: str
    tone: str
    calls: int
    subjects: str


class Place(NamedTuple):
    """A machine and the state of its code. receipt: what the fingerprint stands for."""

    id: str
    words: str
    fingerprint: str
    facts: list[tuple[str, str]]
    receipt: list[tuple[str, str]]


class Page(NamedTuple):
    tone: str
    headline: str
    proof: list[tuple[str, str]]
    about: list[tuple[str, str]]
    columns: list[tuple[str, str]]
    lines: list[Line]
    findings: list[Item]
    controls: list[Item]
    operators: list[Operator]
    skipped: list[tuple[str, list[str]]]
    notes: list[tuple[str, int]]
    places: list[Place]
    settings: list[tuple[str, str]]


def page(
    records: Sequence[Record], machine: Mapping[str, str], settings: Mapping[str, Any], outcome: Mapping[str, int | None]
) -> Page:
    checks = [record for record in records if not record.control]
    controls = [record for record in records if record.control]
    places = _places(records, machine)
    ids = {id(record): f"check-{number}" for number, record in enumerate(records, 1)}
    bad = [record for record in checks if record.verdict not in ("equal", "not_run")]
    tone, headline = _headline(checks, controls)
    return Page(
        tone=tone,
        headline=headline,
        proof=_proof(checks, controls, places),
        about=_about(checks, places, outcome),
        columns=[*((letter, letters.WORDS.get(letter, "")) for letter in _letters(checks)), ("N", "stock torch is caught")],
        lines=_lines(records, ids, places),
        findings=[_item(record, ids[id(record)]) for record in bad],
        controls=[_item(record, ids[id(record)]) for record in controls],
        operators=_operators(checks),
        skipped=_skipped(records),
        notes=list(Counter(note for record in records for note in record.notes).items()),
        places=places,
        settings=[(name, _plain(value)) for name, value in settings.items()],
    )


def _letters(checks: Iterable[Record]) -> list[str]:
    """The relations that were asked, in the order of this version, and after them any other one of the records."""
    asked = sorted({record.relation for record in checks})
    return [letter for letter in letters.WORDS if letter in asked] + [letter for letter in asked if letter not in letters.WORDS]


def _headline(checks: list[Record], controls: list[Record]) -> tuple[str, str]:
    """Its tone, and the one sentence that the run comes to."""
    broken = Counter(words.WORDS[record.verdict] for record in checks if record.verdict not in ("equal", "not_run"))
    if broken:
        return "bad", "Not proven: " + ", ".join(f"{count} {verdict}" for verdict, count in broken.items())
    proven = words.proven(checks)
    if not proven:
        return "unsure", "Nothing was proven: no check was equal in batch-invariant mode"
    unsure = sum(record.verdict != "caught" for record in controls)
    if unsure:
        return "unsure", f"{_sentence(words.proven_words(proven))}; but {words.counted(unsure, 'control')} caught nothing"
    return "good", _sentence(words.proven_words(proven))


def _proof(checks: list[Record], controls: list[Record], places: list[Place]) -> list[tuple[str, str]]:
    """What was proven, what was not, and on what."""
    proven = words.proven(checks)
    return [
        ("proven", words.proven_words(proven) if proven else "nothing"),
        ("not proven", "; ".join(words.not_proven(checks, controls))),
        *(("on", line) for line in dict.fromkeys(place.words for place in places)),
    ]


def _about(checks: list[Record], places: list[Place], outcome: Mapping[str, int | None]) -> list[tuple[str, str]]:
    lines = []
    widest = max((r for r in words.proven(checks) if r.relation == "I"), key=lambda r: r.counts.examples, default=None)
    if widest is not None and widest.covered:
        first, *rest = widest.covered
        lines.append(("covered", f"{'; '.join([first.partition(' (')[0], *rest])} ({widest.subject.name}, the widest)"))
    fingerprints = list(dict.fromkeys(place.fingerprint for place in places if place.fingerprint))
    lines.append(("fingerprint", ", ".join(fingerprints) or "none"))
    tests = ", ".join(f"{count} {name}" for name, count in outcome.items() if name != "exit_status")
    lines.append(("tests", f"{tests or 'none'}; exit status {outcome.get('exit_status')}"))
    return lines


def _lines(records: Sequence[Record], ids: Mapping[int, str], places: list[Place]) -> list[Line]:
    """A line for each subject, mode and machine; functions of rows, whose names may be alike, also by their tests.

    A control is in the line of the checks that it belongs to, where there are some. What did not hold comes first.
    """
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.control):
        test = "" if record.subject.is_model else record.nodeid
        about = (record.subject, _place_key(record))
        mode = record.mode
        if record.control:
            of_checks = next((key for key in groups if key[1:3] == about and key[3] != "stock" and key[0] in ("", test)), None)
            if of_checks is None and test:  # its control may be a test of its own
                of_checks = next((key for key in groups if key[1:3] == about and key[3] == "on"), None)
            if of_checks is not None:
                groups[of_checks].append(record)
                continue
        groups[(test, *about, mode)].append(record)
    columns = _letters(record for record in records if not record.control)
    lines = [_line(group, key[3], columns, ids, places) for key, group in groups.items()]
    return sorted(lines, key=_rank)


def _rank(line: Line) -> int:
    """How early a line comes: by its worst cell. A relation that was not asked says nothing."""
    return min(("bad", "unsure").index(cell.tone) if cell.tone in ("bad", "unsure") else 2 for cell in line.cells)


def _line(records: list[Record], mode: str, columns: list[str], ids: Mapping[int, str], places: list[Place]) -> Line:
    info = records[0].subject
    about = [info.kind, info.device, info.compile_mode, f"attention {info.attention}" * bool(info.attention)]
    if len(places) > 1:
        about.append(next(place.words.partition(",")[0] for place in places if place.id == _place_id(records[0], places)))
    checks = [record for record in records if not record.control]
    cells = [_cell([record for record in checks if record.relation == letter], ids) for letter in columns]
    cells.append(_cell([record for record in records if record.control], ids))
    tests = dict.fromkeys(record.nodeid for record in records if record.nodeid)
    if not info.is_model:  # their names may be alike
        about += dict.fromkeys(test.rpartition("::")[2] for test in tests)
    modes = {"on": "on", "off": "off", "stock": "suspended"}
    return Line(
        name=message.short_name(info),
        about=", ".join(filter(None, about)),
        dtype=info.dtype,
        mode=modes[mode],
        operators=_vouched(checks),
        cells=cells,
        test=", ".join(tests),
    )


def _cell(records: list[Record], ids: Mapping[int, str]) -> Cell:
    if not records:
        return Cell("not asked", "absent")
    worst = words.worst_verdict(records)
    shown = next(record for record in records if record.verdict == worst)
    batches = words.counted(sum(record.counts.examples for record in records), "batch", "es")
    has_item = shown.control or worst not in ("equal", "not_run")
    about = shown.error if worst == "not_run" else batches
    return Cell(words.WORDS[worst], _tone(shown), about, ids[id(shown)] if has_item else "")


def _tone(record: Record) -> str:
    if record.verdict == "equal":
        return "good" if record.mode in ("on", "elsewhere") else "plain"  # stock torch that was equal is no proof of the mode
    tones = {"caught": "good", "not_run": "none", "inconclusive": "unsure", "refused": "unsure", "interrupted": "unsure"}
    return tones.get(record.verdict, "bad")


def _vouched(records: list[Record]) -> Cell:
    """How the mode vouches for the operators of a subject: the worst, and how many of each."""
    ops = [record.ops for record in records if record.ops is not None]
    unknown = next((found.error for found in ops if found.error), "")
    counts = {
        "past the table": len({name for found in ops for name in found.bypassed}),
        "unverified": len({name for found in ops for name in found.unverified}),
        "row-local": len({name for found in ops for name in found.row_local}),
        "covered": len({name for found in ops for name in found.covered}),
    }
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if any(record.verdict == "refused" for record in records):
        return Cell("refused", "unsure", told)
    if unknown or not told:
        return Cell("unknown" if unknown else "not recorded", "none", unknown)
    worst = next(status for status, count in counts.items() if count)
    tone = "unsure" if worst in ("past the table", "unverified") else "good"
    return Cell(worst if tone == "unsure" else "covered", tone, told)


def _item(record: Record, name: str) -> Item:
    found = record.finding
    return Item(
        id=name,
        tone=_tone(record),
        word=words.WORDS[record.verdict],
        relation=letters.titled(record.relation),
        subject=message.subject_words(record.subject),
        mode=words.MODES[record.mode],
        test=record.nodeid,
        facts=list(_facts(record.subject, found)) if found is not None else [],
        error=record.error,
        strip=_strip(found.breakpoints) if found is not None and found.breakpoints is not None else None,
        sections=found.sections if found is not None else (),
        case=found.case if found is not None else record.case,
        replay=found.replay if found is not None and not record.control else "",
        trace=_trace(found.trace, f"{name}-op", found.sides) if found is not None and found.trace is not None else None,
    )


def _facts(info: SubjectInfo, found: Finding) -> Iterator[tuple[str, list[str]]]:
    try:
        row = message.row_words(info, found)
    except (ValueError, msgspec.DecodeError):  # of a record by another hand: the page shows what it says
        row = f"{found.row}, at position {found.position} of {found.n_rows}"
    yield "row", [row]
    yield "output", [found.output]
    yield "difference", message.difference_lines(found)
    if found.breakpoints is not None:
        yield "sizes", [message.sizes_words(found.breakpoints)]


def _strip(breakpoints: Breakpoints) -> Strip:
    ranges = [(first, last - first + 1) for first, last in breakpoints.ranges]
    return Strip(ranges, max(breakpoints.bound, 1), message.sizes_words(breakpoints))


def _trace(trace: Trace, name: str, sides: tuple[str, str]) -> TraceView:
    culprits = {culprit.op for culprit in trace.culprits}
    rows = [Row(position, op, level(op.ulp), position in culprits) for position, op in enumerate(trace.ops)]
    counts = Counter(op.agreement for op in trace.ops)
    told = ", ".join(f"{counts[word]:,} {word}" for word in ("equal", "differs", "follows", "not compared") if counts[word])
    return TraceView(
        id=name,
        trace=trace,
        layers=list(_layers(rows)),
        sides=sides,
        summary=f"{words.counted(len(rows), 'operator')}: {told}" if rows else "no operators",
        culprits=[_culprit(culprit, trace) for culprit in sorted(trace.culprits, key=lambda it: it is not trace.cause)],
    )


def _culprit(culprit: Culprit, trace: Trace) -> CulpritView:
    op = trace.ops[culprit.op] if 0 <= culprit.op < len(trace.ops) else None
    elsewhere = [(name, _strip(found)) for name, found in culprit.elsewhere]
    return CulpritView(culprit, op, _strip(culprit.sizes) if culprit.sizes is not None else None, elsewhere)


def _layers(rows: list[Row]) -> Iterator[Layer]:
    """Rows of one layer that follow each other. Unfolded where something differs by itself, and in a small trace."""
    groups: list[tuple[str, list[Row]]] = []
    for row in rows:
        name = layer_of(row.op.module)
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        groups[-1][1].append(row)
    for name, members in groups:
        counts = Counter(row.op.agreement for row in members)
        parts = [f"{counts[word]} {word}" for word in ("differs", "follows", "not compared", "equal") if counts[word]]
        shut = len(rows) > SMALL_TRACE and not counts["differs"] and not any(row.culprit for row in members)
        yield Layer(name or "outside of modules", members, shut, ", ".join(parts))


def layer_of(module: str) -> str:
    """ "model.layers.3.mlp.up_proj" -> "model.layers.3": up to the first number, or the whole path where there is none."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def level(ulp: int | None) -> int:
    """The intensity of a distance, on a scale of logarithms: 0 for none, 1 from 1 ulp, 2 from 16, 3 from 256, up to 8."""
    return 0 if not ulp else min(LEVELS, 1 + int(math.log2(ulp)) // 4)


def _operators(checks: Iterable[Record]) -> list[Operator]:
    """Each operator in the worst status that it had anywhere; those that the mode does not vouch for first."""
    calls: Counter[str] = Counter()
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in checks:
        ops = record.ops
        if ops is None:
            continue
        calls.update(ops.covered)
        states = {"past the table": ops.bypassed, "unverified": ops.unverified, "row-local": ops.row_local}
        for status, names in {**states, "covered": ops.covered}.items():
            for name in names:
                seen[status, name].add(message.short_name(record.subject))
    order = ("past the table", "unverified", "covered", "row-local")
    lines = []
    for status, name in sorted(seen, key=lambda key: (order.index(key[0]), key[1])):
        tone = "unsure" if status in ("past the table", "unverified") else "good"
        count = calls[name] if status == "covered" else 0
        lines.append(Operator(name, status, tone, count, ", ".join(sorted(seen[status, name]))))
    return lines


def _skipped(records: Iterable[Record]) -> list[tuple[str, list[str]]]:
    """Batches that could not be run, by reason: the commonest first."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for skipped in record.not_run:
            by_reason[skipped.reason].append(skipped.case)
        if record.verdict == "not_run":
            relation = letters.titled(record.relation)
            by_reason[record.error].append(f"all of {relation} of {message.subject_words(record.subject)}")
    return sorted(by_reason.items(), key=lambda reason: -len(reason[1]))


def _places(records: Sequence[Record], machine: Mapping[str, str]) -> list[Place]:
    first = {_place_key(record): record for record in reversed(records)}
    keys = list(dict.fromkeys(_place_key(record) for record in records))
    places = [
        Place(
            f"machine-{number}",
            words.machine_words(record.machine) if record.machine else "a machine that the record does not name",
            record.fingerprint,
            sorted(record.machine.items()),
            sorted(record.receipt.items()),
        )
        for number, record in enumerate((first[key] for key in keys), 1)
    ]
    return places or [Place("machine-1", words.machine_words(machine), "", sorted(machine.items()), [])]


def _place_key(record: Record) -> tuple[Any, ...]:
    return tuple(sorted(record.machine.items())), record.fingerprint


def _place_id(record: Record, places: list[Place]) -> str:
    facts = sorted(record.machine.items())
    return next(place.id for place in places if place.facts == facts and place.fingerprint == record.fingerprint)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
