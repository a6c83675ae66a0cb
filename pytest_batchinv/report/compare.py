"""Two saved runs, of two machines or of two versions: what held in the first and does not in the second.

A gate for a change of versions: what was equal or caught must be so again, on as many batches, by as many covered operators.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeVar

from pytest_batchinv import letters
from pytest_batchinv.report.record import OpCoverage, Record
from pytest_batchinv.report.saved import Saved
from pytest_batchinv.report.words import MODES, WORDS, counted, machine_words, worst_verdict
from pytest_batchinv.shapes import as_ranges

GOOD = ("equal", "caught")
T = TypeVar("T")


class Key(NamedTuple):
    """What two checks must share to be compared. device: its type, without a number. mode: equal bits of torch as it is are
    no proof of the mode."""

    name: str
    kind: str
    dtype: str
    attention: str
    compile_mode: str
    device: str
    relation: str
    control: bool
    mode: str

    @property
    def words(self) -> str:
        about = ", ".join(filter(None, (self.dtype, self.attention, self.compile_mode, self.device)))
        relation = (
            f"the control of {self.relation}" if self.control else f"{self.relation} {letters.WORDS.get(self.relation, '')}"
        )
        return f"{self.name} ({about}), {relation.strip()}, {MODES[self.mode]}"


class Change(NamedTuple):
    """One sentence on one key. kind: worse fails the comparison; better and new do not."""

    kind: Literal["worse", "better", "new"]
    key: Key
    sentence: str


class Comparison(NamedTuple):
    """changes: in the order of the first run. same: checks that held in both."""

    changes: list[Change]
    same: int

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.kind == "worse"]


def compare(before: Saved, after: Saved, slack: float = 0.0) -> Comparison:
    """slack: by which share counts of batches, positions and pairs may be smaller. The sweep ends by time, so that a slower
    machine runs fewer; with 0 any smaller count is worse."""
    first, second = _by_key(before.records), _by_key(after.records)
    changes: list[Change] = []
    same = 0
    for key, records in first.items():
        found = [Change(*each) for each in _of_key(key, records, second.get(key, []), slack)]
        changes += found
        same += not any(change.kind == "worse" for change in found) and worst_verdict(records) in GOOD
    changes += [
        Change("new", key, f"was not checked before, is {WORDS[worst_verdict(records)]}")
        for key, records in second.items()
        if key not in first
    ]
    return Comparison(changes, same)


def lines(before: Saved, after: Saved, names: tuple[str, str], comparison: Comparison) -> Iterator[str]:
    """The result for a reader: the two runs, what is worse, what else changed, and at the end what it comes to."""
    for letter, name, saved in zip("AB", names, (before, after), strict=True):
        yield f"{letter}  {name}: {counted(len(saved.records), 'record')}"
        for place in dict.fromkeys(machine_words(record.machine) for record in saved.records):
            yield f"   on {place}"
        yield f"   fingerprint {', '.join(_fingerprints(saved)) or 'unknown'}"
    differing = sorted(
        name for name in before.machine.keys() | after.machine.keys() if before.machine.get(name) != after.machine.get(name)
    )
    for name in differing:
        yield f"   {name}: {before.machine.get(name, 'none')} in A, {after.machine.get(name, 'none')} in B"
    yield ""
    for kind, title in (("worse", "WORSE"), ("better", "better"), ("new", "new")):
        for change in comparison.changes:
            if change.kind == kind:
                yield f"{title:<7} {change.key.words}:"
                yield f"        {change.sentence}"
    if comparison.changes:
        yield ""
    checks = counted(comparison.same, "check")
    if comparison.worse:
        yield f"B is worse than A in {counted(len(comparison.worse), 'place')}; {checks} held in both."
    else:
        yield f"all that held in A holds in B: {checks}."


def _of_key(
    key: Key, before: list[Record], after: list[Record], slack: float
) -> Iterator[tuple[Literal["worse", "better"], Key, str]]:
    """Test by test where both runs have a test of that name; the others, which may have been renamed, together."""
    for one, other in _paired(before, after):
        if not other:
            tests = ", ".join(sorted({record.nodeid for record in one if record.nodeid}))
            yield "worse", key, f"is missing in B{f': {tests}' * bool(tests)}"
            continue
        was, now = worst_verdict(one), worst_verdict(other)
        if was in GOOD and now not in GOOD:
            why = next((record.error for record in other if record.verdict == now and record.error), "")
            yield "worse", key, f"was {WORDS[was]}, is {WORDS[now]}{f': {why}' * bool(why)}"
        elif now in GOOD and was not in GOOD:
            yield "better", key, f"was {WORDS[was]}, is {WORDS[now]}"
        if was in GOOD and now == "equal":
            yield from (("worse", key, sentence) for sentence in _shrunk(one, other, slack))
        yield from (("worse", key, sentence) for sentence in _operators(one, other))


def _paired(before: list[Record], after: list[Record]) -> Iterator[tuple[list[Record], list[Record]]]:
    one, other = _grouped(before, lambda record: record.nodeid), _grouped(after, lambda record: record.nodeid)
    for nodeid in [nodeid for nodeid in one if nodeid in other]:
        yield one.pop(nodeid), other.pop(nodeid)
    if one:
        yield [record for group in one.values() for record in group], [record for group in other.values() for record in group]


def _shrunk(before: list[Record], after: list[Record], slack: float) -> Iterator[str]:
    """What the second run compared less of, as sentences."""

    def fewer(was: int, now: int) -> bool:
        return now < was * (1 - slack)

    was, now = (sum(record.counts.examples for record in records) for records in (before, after))
    if fewer(was, now):
        yield f"ran {counted(was, 'batch', 'es')} in A, {now:,} in B"
    widest, other = _Covered(before), _Covered(after)
    if missing := widest.sizes - other.sizes:
        yield f"covered the batch sizes {as_ranges(missing)} in A, not in B"
    if layouts := widest.layouts - other.layouts:
        yield f"covered the layouts {', '.join(sorted(layouts))} in A, not in B"
    for what, count in widest.counts.items():
        if fewer(count, other.counts.get(what, 0)):
            yield f"covered {count:,} {what} in A, {other.counts.get(what, 0):,} in B"


class _Covered:
    """The words of the sweep, read again: "all sizes 1-300", "3 of 300 sizes (1-2, 9)", "99 of 99 pairs", "layouts left".

    Of several records what any of them covered. Other words, as of a replayed batch, are of no sweep.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.sizes: set[int] = set()
        self.layouts: set[str] = set()
        self.counts: dict[str, int] = {}
        for words in (words for record in records for words in record.covered):
            if sizes := re.fullmatch(r"all sizes (.+)|[\d,]+ of [\d,]+ sizes \((.+)\)", words):
                self.sizes |= set(_numbers(sizes[1] or sizes[2]))
            elif words.startswith("layouts "):
                self.layouts |= set(words.removeprefix("layouts ").split(", "))
            elif counts := re.fullmatch(r"([\d,]+) of [\d,]+(?: x [\d,]+)? (.+)", words):
                number = int(counts[1].replace(",", ""))
                self.counts[counts[2]] = max(number, self.counts.get(counts[2], 0))


def _numbers(ranges: str) -> Iterator[int]:
    """ "1-2, 9" -> 1, 2, 9; nothing for what is none."""
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", ranges):
        yield from range(int(first), int(last or first) + 1)


def _operators(before: list[Record], after: list[Record]) -> Iterator[str]:
    """Operators that the mode vouched for in the first run and does not in the second, as sentences."""
    known = [record.ops for record in before if record.ops is not None and not record.ops.error]
    ops = [record.ops for record in after if record.ops is not None]
    if known and (not ops or any(found.error for found in ops)):
        why = next((found.error for found in ops if found.error), "no operators were recorded")
        yield f"the operators that ran are known in A, not in B: {why}"
    was_covered = {name for found in known for name in found.covered}
    was_row_local = {name for found in known for name in found.row_local}
    states = {
        "row-local": {name for found in ops for name in found.row_local},
        "unverified": {name for found in ops for name in found.unverified},
        "past the table": {name for found in ops for name in found.bypassed},
    }
    for state, names in states.items():
        yield from (f"{name} was covered, is {state}" for name in sorted(names & was_covered) if not _was(known, state, name))
    yield from (f"{name} was row-local, is unverified" for name in sorted(states["unverified"] & was_row_local - was_covered))


def _was(known: list[OpCoverage], state: str, name: str) -> bool:
    """Whether some record of the first run had it in this state already."""
    fields = {"row-local": "row_local", "unverified": "unverified", "past the table": "bypassed"}
    return any(name in getattr(found, fields[state]) for found in known)


def _by_key(records: Iterable[Record]) -> dict[Key, list[Record]]:
    return _grouped(records, _key)


def _key(record: Record) -> Key:
    info = record.subject
    device = info.device.partition(":")[0]
    about = (info.name, info.kind, info.dtype, info.attention, info.compile_mode, device)
    return Key(*about, record.relation, record.control, record.mode)


def _grouped(records: Iterable[Record], key: Callable[[Record], T]) -> dict[T, list[Record]]:
    groups: dict[T, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(groups)


def _fingerprints(saved: Saved) -> list[str]:
    return list(dict.fromkeys(record.fingerprint for record in saved.records if record.fingerprint))
