"""Signed records: a run on a GPU machine, judged by a CI that has none.

A *statement* (``A.statement.json``) names the record by its SHA-256, the sources of the mode, and digests of files of one's
own; ``ssh-keygen -Y sign`` signs the statement (OpenSSH 8.2; the format is OpenSSH's PROTOCOL.sshsig). Whoever verifies trusts
the keys in a file of allowed signers, and nothing that the record says of itself.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from packaging.version import InvalidVersion, Version

from pytest_batchinv import sources
from pytest_batchinv.report import compare
from pytest_batchinv.report.json import replace
from pytest_batchinv.report.saved import Saved
from pytest_batchinv.report.words import WORDS, counted

NAMESPACE = "pytest-batchinv-record"
"""A signature for another purpose by the same key is none for a record."""


class Statement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is signed. sha256: of the record's bytes. sources: of kernels and patches. over: digest by path, of files that the
    run tested. signed: when, in UTC."""

    sha256: str
    sources: str
    over: dict[str, str] = {}
    signed: str


class Refused(ValueError):
    """The record proves nothing here; a sentence for each reason."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = tuple(reasons)


def statement_of(record: Path) -> Path:
    return record.with_suffix(".statement.json")


def sign(record: Path, saved: Saved, key: Path, over: Sequence[str]) -> Path:
    """Writes the statement and its signature beside the record, and gives the statement's path.

    key: a private key of OpenSSH, or a public one whose private half an agent holds. over: paths relative to the working
    directory. Raises ValueError where the record was made with other sources of the mode, or ssh-keygen refuses.
    """
    mode = _sources_in(saved)
    if mode != sources.of_the_mode():
        raise ValueError(f"{record} is of the mode's sources {mode}, not of {sources.of_the_mode()}: sign a run of these.")
    statement = Statement(
        sha256=_sha256(record),
        sources=mode,
        over={path: sources.digest_of_files(Path(path)) for path in over},
        signed=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = statement_of(record)
    replace(path, msgspec.json.format(msgspec.json.encode(statement), indent=1) + b"\n")
    signature = _signature(path)
    signature.unlink(missing_ok=True)  # ssh-keygen would ask whether to overwrite it
    _ssh_keygen("-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE, str(path))
    return path


def verify(
    record: Path,
    saved: Saved,
    signers: Path,
    *,
    baseline: Saved | None = None,
    slack: float = 0.0,
    require: Mapping[str, str] = {},
    max_age: timedelta | None = None,
) -> str:
    """Who signed the record and when, in words. Raises Refused with every reason for which it proves nothing here.

    signers: a file of allowed signers (ssh-keygen(1), ALLOWED SIGNERS). baseline: what has to hold in the record. require:
    versions by the names that a record's machine has. max_age: since it was signed.
    """
    path = statement_of(record)
    signer, signed = _signed(path, signers)
    try:
        statement = msgspec.json.decode(signed, type=Statement)
    except msgspec.DecodeError as error:
        raise Refused([f"{path} is no statement about a record: {error}."]) from None
    reasons = [
        *_edited(record, statement),
        *_stale(statement, saved, require, max_age),
        *_unproven(saved),
        *(_fewer(baseline, saved, slack) if baseline is not None else ()),
    ]
    if reasons:
        raise Refused(reasons)
    return f"signed by {signer} at {statement.signed}, sources {statement.sources}"


def _edited(record: Path, statement: Statement) -> Iterator[str]:
    if _sha256(record) != statement.sha256:
        yield f"{record} is not the file that was signed: it was edited, or belongs to another statement."


def _stale(statement: Statement, saved: Saved, require: Mapping[str, str], max_age: timedelta | None) -> Iterator[str]:
    here = sources.of_the_mode()
    for what, digest in (("the statement", statement.sources), ("the record", _sources_in(saved))):
        if digest != here:
            yield f"{what} is of the mode's sources {digest}, and those here are {here}: run the tests again with these."
    for name, digest in statement.over.items():
        try:
            now = sources.digest_of_files(Path(name))
        except ValueError:
            now = "not there"
        if now != digest:
            yield f"{name} was {digest} when the record was signed, and is {now}: run the tests again."
    machines = [record.machine for record in saved.records] or [saved.machine]
    for name, wanted in require.items():
        for has in dict.fromkeys(machine.get(name, "") for machine in machines):
            if not _is_version(has, wanted):
                yield f"the record was made with {name} {has or 'that it does not name'}, and {wanted} is required."
    age = datetime.now(UTC) - datetime.fromisoformat(statement.signed)
    if age < timedelta(minutes=-5):  # clocks differ
        yield f"the record was signed at {statement.signed}, which has not come yet."
    if max_age is not None and age > max_age:
        yield f"the record was signed {age.days} days ago, and {max_age.days} are allowed: run the tests again."


def _unproven(saved: Saved) -> Iterator[str]:
    if saved.outcome.get("exit_status") != 0:
        yield f"the run did not pass: its exit status is {saved.outcome.get('exit_status')}."
    if not saved.records:
        yield "the record holds no check."
    for record in saved.records:
        if record.verdict not in compare.GOOD:
            yield f"{record.subject.name}, relation {record.relation}: {WORDS[record.verdict]}."


def _fewer(baseline: Saved, saved: Saved, slack: float) -> Iterator[str]:
    for change in compare.compare(baseline, saved, slack).worse:
        yield f"worse than the baseline: {change.key.words}: {change.sentence}"
    was, now = (one.outcome.get("skipped") or 0 for one in (baseline, saved))
    if now > was:
        yield f"{counted(now, 'test')} skipped, and {was} in the baseline."


def _sources_in(saved: Saved) -> str:
    found = sorted({record.receipt.get("sources", "unknown") for record in saved.records})
    return ", ".join(found) or "unknown"


def _is_version(has: str, wanted: str) -> bool:
    """A local part ("+cu130") counts only where it is wanted."""
    try:
        version, other = Version(has), Version(wanted)
    except InvalidVersion:
        return has == wanted
    return version == other if other.local else Version(version.public) == Version(other.public)


def _signed(statement: Path, signers: Path) -> tuple[str, bytes]:
    """Who signed the statement, and the bytes that were signed."""
    signature = _signature(statement)
    for path, what in ((statement, "statement"), (signature, "signature"), (signers, "file of allowed signers")):
        if not path.is_file():
            raise Refused([f"there is no {what} {path}."])
    signed = statement.read_bytes()
    try:
        found = _ssh_keygen("-Y", "find-principals", "-s", str(signature), "-f", str(signers))
        principal = found.splitlines()[0]
        words = ("-Y", "verify", "-n", NAMESPACE, "-f", str(signers), "-I", principal, "-s", str(signature))
        _ssh_keygen(*words, text=signed)
    except ValueError as error:
        raise Refused([f"{statement} has no good signature by a key in {signers}: {error}"]) from None
    return principal, signed


def _ssh_keygen(*arguments: str, text: bytes | None = None) -> str:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise ValueError("there is no ssh-keygen on this machine; install OpenSSH.")
    run = subprocess.run([program, *arguments], input=text, capture_output=True, timeout=60)
    if run.returncode:
        raise ValueError((run.stderr or run.stdout).decode(errors="replace").strip().splitlines()[-1] + ".")
    return run.stdout.decode()


def _signature(statement: Path) -> Path:
    return statement.with_name(statement.name + ".sig")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
