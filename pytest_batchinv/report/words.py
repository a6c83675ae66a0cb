"""Words and numbers that the reports share. No torch, nothing of pytest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from pytest_batchinv import letters
from pytest_batchinv.report.record import Record

WORDS = {
    "equal": "equal",
    "differs": "DIFFERS",
    "shape_differs": "SHAPE DIFFERS",
    "error": "ERROR",
    "refused": "REFUSED",
    "interrupted": "INTERRUPTED",
    "not_run": "not run",
    "caught": "caught",
    "inconclusive": "INCONCLUSIVE",
}
WORST_FIRST = (
    "differs", "shape_differs", "error", "refused", "interrupted", "inconclusive", "not_run", "caught", "equal",
)  # fmt: skip
MODES = {
    "on": "in batch-invariant mode",
    "off": "with the mode off",
    "stock": "with the mode suspended",
    "elsewhere": "computed elsewhere",
}


def worst_verdict(records: Iterable[Record]) -> str:
    return min((record.verdict for record in records), key=WORST_FIRST.index)


def proven(checks: Iterable[Record]) -> list[Record]:
    """The equal checks in the mode, of subjects of which no relation broke in the same test."""
    checks = list(checks)
    broken = {(record.nodeid, record.subject) for record in checks if record.verdict not in ("equal", "not_run")}
    whole = [record for record in checks if (record.nodeid, record.subject) not in broken]
    return [record for record in whole if record.verdict == "equal" and record.mode in ("on", "elsewhere")]


def proven_words(equal: list[Record]) -> str:
    """ "0 bits differ in R, I: 2 subjects, 80 batches, 20.0 MB", of what ``proven`` gave."""
    relations = ", ".join(letters.in_order(record.relation for record in equal))
    subjects = len({(record.nodeid, record.subject) for record in equal})
    compared = bytes_words(sum(record.counts.compared_bytes for record in equal))
    batches = sum(record.counts.examples for record in equal)
    return f"0 bits differ in {relations}: {counted(subjects, 'subject')}, {batches:,} batches, {compared}"


def not_proven(checks: list[Record], controls: list[Record]) -> list[str]:
    """What was not proven, in a few words each."""
    failing = Counter(WORDS[record.verdict] for record in checks if record.verdict != "equal")
    words = [f"{count} {verdict}" for verdict, count in failing.items()]
    if off := sum(record.mode == "off" and record.verdict == "equal" for record in checks):
        words.append(f"{counted(off, 'equal check')} of torch as it is, with the mode off")
    if ops := {name for record in checks for name in record.unclassified_ops}:
        words.append(f"{counted(len(ops), 'unverified operator')}")
    if unsure := sum(record.verdict == "inconclusive" for record in controls):
        words.append(f"{counted(unsure, 'control')} INCONCLUSIVE")
    asked = {record.relation for record in checks}
    if others := [letter for letter in letters.WORDS if letter not in asked]:
        words.append(f"not asked: {', '.join(others)}")
    words.append("other machines")
    return words


def machine_words(facts: Mapping[str, str]) -> str:
    gpu = [f"{facts['gpu']} ({facts.get('capability', '')})"] if "gpu" in facts else []
    cpu = [f"{facts.get('cpu') or 'unknown CPU'}, {facts.get('threads', '?')} threads"]
    versions = [f"{name} {facts[name]}" for name in ("python", "torch", "triton", "transformers") if name in facts]
    return ", ".join(word for word in (*gpu, *cpu, facts.get("platform"), *versions) if word)


def counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else plural)


def bytes_words(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:,.1f} TB"
