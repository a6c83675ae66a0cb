"""What a scan comes to: a summary, the difference between two scans, and ``docs/coverage.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from pytest_batchinv.kernels import overloads, scanned, table
from pytest_batchinv.kernels.scanned import COVERED, NO_ROWS, RAISES, REFUSED, ROW_LOCAL, STATES, VARIES, Scan

UNVERIFIED = (VARIES, NO_ROWS, RAISES)
_MEANINGS = {
    COVERED: "the table answered, and every row kept its bits",
    ROW_LOCAL: "torch's own kernel ran, and every row kept its bits",
    REFUSED: "the mode raises",
    VARIES: "a row's bits changed with its batch, its place in memory or the number of threads: unverified",
    NO_ROWS: "no dimension of the samples was a batch of rows: unverified",
    RAISES: "torch raised, or the process ended, for the batches: unverified",
}


def stored() -> list[Scan]:
    """All scans that the package carries."""
    return [Scan.from_json(path.read_text()) for path in sorted(scanned.FOLDER.glob("*.json"))]


def summary(scan: Scan) -> list[str]:
    cells = _counts(scan.eager)
    return [
        f"torch {scan.torch} on {scan.device}: {len(scan.eager)} operators, {sum(cells.values())} cells: "
        + ", ".join(f"{cells[state]} {state}" for state in STATES),
        "whole samples as functions of rows: " + ", ".join(f"{n} {state}" for state, n in scan.functions.items()),
        f"{len(scan.silent)} silent: they vary, and no operator in them is unverified",
        *(f"  SILENT {line}" for line in scan.silent),
    ]


def difference(old: Scan, new: Scan) -> list[str]:
    """One line for each cell whose state changed, the worst changes first."""
    before, after = _by_cell(old.eager), _by_cell(new.eager)
    changed = [cell for cell in sorted({*before, *after}) if before.get(cell) != after.get(cell)]
    grouped: dict[tuple[str, str], list[str]] = {}
    for operator, dtype in changed:
        change = before.get((operator, dtype), "never seen"), after.get((operator, dtype), "never seen")
        grouped.setdefault(change, []).append(f"{operator} {dtype}")
    order = (VARIES, RAISES, NO_ROWS, "never seen", REFUSED, ROW_LOCAL, COVERED)
    lines = [f"{len(changed)} cells changed from torch {old.torch} on {old.device} to torch {new.torch} on {new.device}"]
    for (was, now), cells in sorted(grouped.items(), key=lambda item: order.index(item[0][1])):
        lines.append(f"  {was} -> {now}: {len(cells)}: {', '.join(cells)}")
    return lines


def never_seen(scan: Scan, device: str) -> list[str]:
    """aten's overloads with a kernel for the device that no sample reached, and that compute something."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    return sorted(name for name in names if name not in scan.eager and _computes_on(name, device))


def _computes_on(name: str, device: str) -> bool:
    key = "CUDA" if device == "cuda" else "CPU"
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key):
        return False
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
        return False  # it runs as others that are seen
    try:
        overload = scanned.overload_named(name)
    except AttributeError:  # of TorchScript alone
        return False
    return not scanned.computes_nothing(overload)


def document(scans: Iterable[Scan]) -> str:
    """The Markdown of ``docs/coverage.md``."""
    lines = [
        "# Coverage",
        "",
        f"Written by `{scanned.COMMAND}`; do not edit. Each cell is an aten overload in a dtype. In the mode, in eager",
        "code, each row was compared bit for bit, alone and in batches.",
        "",
        "| state | meaning |",
        "|---|---|",
        *(f"| {state} | {_MEANINGS[state]} |" for state in STATES),
        "| never seen | no sample reached it: unverified |",
        "",
    ]
    for scan in scans:
        lines += _section(scan)
    return "\n".join(lines).rstrip() + "\n"


def _section(scan: Scan) -> Iterator[str]:
    device = scan.device.partition("-")[0]
    settings = scan.settings
    yield f"## torch {scan.torch}, {scan.device}"
    yield ""
    yield (
        f"{len(scan.eager)} operators; batches of {', '.join(map(str, settings['sizes']))} rows; "
        f"{' and '.join(map(str, settings['threads']))} threads; "
        f"{', '.join(settings['dtypes'])}. Cells of other dtypes are unverified."
    )
    yield ""
    yield from _table_of_dtypes(scan)
    yield f"Whole samples, as functions of their rows: {', '.join(f'{n} {state}' for state, n in scan.functions.items())}. "
    yield f"Silent (they vary, and no operator in them is unverified): {len(scan.silent)}."
    yield ""
    yield from (f"* {line}" for line in (*scan.silent, "") if scan.silent)
    yield f"### not run: {len(scan.not_run)} samples"
    yield ""
    yield from (f"* {line}" for line in scan.not_run)
    yield ""
    names = _named(scan)
    for state in UNVERIFIED:
        yield f"### {state}: {len(names[state])} operators"
        yield ""
        yield from (_line(name, dtypes, scan.why.get(name, "")) for name, dtypes in names[state].items())
        yield ""
    yield f"### {REFUSED}: {len(names[REFUSED])} operators"
    yield ""
    yield ", ".join(f"`{name}`" for name in names[REFUSED]) or "none"
    yield ""
    yield from _unseen(scan, device)


def _table_of_dtypes(scan: Scan) -> Iterator[str]:
    counts: dict[str, Counter[str]] = {}
    for (_, dtype), state in _by_cell(scan.eager).items():
        counts.setdefault(dtype, Counter())[state] += 1
    yield "| dtype | " + " | ".join(STATES) + " |"
    yield "|---" * (len(STATES) + 1) + "|"
    for dtype in sorted(counts):
        yield f"| {dtype} | " + " | ".join(str(counts[dtype][state]) for state in STATES) + " |"
    yield ""


def _line(name: str, dtypes: str, why: str) -> str:
    return f"* `{name}` ({dtypes})" + (f": {why}" if why else "")


def _unseen(scan: Scan, device: str) -> Iterator[str]:
    entries = {*table.BACKEND_KERNELS, *(table.POINTWISE if device == "cpu" else ())}
    named = {o.name() for entry in entries if (o := overloads.overload_of(entry)) is not None}
    missing = sorted(named - scan.eager.keys())
    yield f"### in the table, and in no sample: {len(missing)}"
    yield ""
    yield ", ".join(f"`{name}`" for name in missing) or "none"
    yield ""
    if scan.torch == str(torch.__version__).partition("+")[0]:
        unseen = [name for name in never_seen(scan, device) if name not in named]
        yield f"### never seen: {len(unseen)} of aten's operators with a kernel of their own here"
        yield ""
        yield ", ".join(f"`{name.removeprefix('aten::')}`" for name in unseen)
        yield ""


def _named(scan: Scan) -> dict[str, dict[str, str]]:
    """state -> operator -> dtypes."""
    named: dict[str, dict[str, str]] = {state: {} for state in STATES}
    for operator, states in scan.eager.items():
        for state, dtypes in states.items():
            named[state][operator] = dtypes.replace(" ", ", ")
    return named


def _by_cell(cells: dict[str, dict[str, str]]) -> dict[tuple[str, str], str]:
    return {
        (operator, dtype): state
        for operator, states in cells.items()
        for state, dtypes in states.items()
        for dtype in dtypes.split()
    }


def _counts(cells: dict[str, dict[str, str]]) -> Counter[str]:
    return Counter(_by_cell(cells).values())
