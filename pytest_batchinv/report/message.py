"""A finding in words: for the error that a test fails with, and for the summary."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from pytest_batchinv.report.record import Breakpoints, Culprit, Finding, Record, Trace, TracedOp
from pytest_batchinv.shapes import BatchShape, Row, Steps, as_ranges
from pytest_batchinv.subjects.base import SubjectInfo

_MOST_LINES = 4
_LONGEST_NAME = 44
"""Of a kernel: Inductor puts every operator in it."""


_MODES = {
    "off": "off: this is torch as it is",
    "stock": "suspended, for the negative control",
    "elsewhere": "out of reach: another process computes",
}


def describe(record: Record) -> str:
    """All of a finding, as lines."""
    from pytest_batchinv import relations  # imports torch, which the summary has no need of

    assert record.finding is not None
    found = record.finding
    lines = [f"{subject_words(record.subject)}{_at_operator(found)}: {relations.of_letter(record.relation).meaning}."]
    lines += [f"  {title:<11} {text}" for title, text in _parts(record, found)]
    for section in found.sections:
        lines += [f"  {section.title:<11} {section.lines[0]}", *(" " * 14 + line for line in section.lines[1:])]
    lines += [f"  {'batch':<11} {found.case}", f"  {'replay':<11} {found.replay}"]
    return "\n".join(lines)


def subject_words(info: SubjectInfo) -> str:
    about = [info.dtype, f"attention {info.attention}" * bool(info.attention), info.compile_mode, info.device]
    return f"{short_name(info)} ({', '.join(filter(None, about))})"


def short_name(info: SubjectInfo) -> str:
    """Without Python's word for what was defined in a function."""
    return info.name.replace("<locals>.", "")


def _parts(record: Record, found: Finding) -> Iterator[tuple[str, str]]:
    yield "row", row_words(record.subject, found)
    yield "difference", difference_lines(found)[0]
    yield from (("", line) for line in difference_lines(found)[1:])
    if found.breakpoints is not None:
        yield "sizes", sizes_words(found.breakpoints)
    if found.trace is not None:
        yield from trace_parts(found.trace, found.sides)
    if record.mode != "on":
        yield "mode", _MODES[record.mode]


def _at_operator(found: Finding) -> str:
    cause = found.trace and found.trace.cause
    return f", {_short(found.trace.ops[cause.op].overload)}" if cause and found.trace else ""


def operator_line(found: Finding) -> str:
    """Where the bits part, in one line; empty where no trace tells."""
    cause = found.trace.cause if found.trace else None
    if found.trace is None or cause is None:
        return ""
    op = found.trace.ops[cause.op]
    line = f" ({op.source.rpartition('/')[2]})" if op.source else ""
    return f"parts at {_called(op)}{line}"


def trace_parts(trace: Trace, sides: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """The operator at which the bits part, what cures it, and what else diverges; titles and lines."""
    if (cause := trace.cause) is not None:
        op = trace.ops[cause.op]
        if any(cause.numbers):
            one, other = cause.numbers
            yield "operator", f"{_called(op)} is called with {one} {sides[0]}, {other} {sides[1]}"
        else:
            yield "operator", f"{_called(op)} gave other bits for equal inputs"
        yield from (("", line) for line in _lines(op))
        distance = "" if op.ulp is None else f", {op.ulp:,} ulp"
        yield "", f"{op.n_differ:,} of {op.n_total:,} values{distance}: {op.shapes[0]} {sides[0]}, {op.shapes[1]} {sides[1]}"
        if cause.effect == "does not reach the output":
            yield "", "alone it does not change the output"
        if cause.sizes is not None and cause.sizes.ranges:
            yield "", f"its bits change at {as_ranges(cause.sizes.sizes)} rows of its own (1 to {cause.sizes.bound} were run)"
            for words, found in cause.elsewhere:
                sizes = f"at {as_ranges(found.sizes)}" if found.ranges else "at none"
                yield "", f"in {words} {sizes} of 1 to {found.bound}"
        if any(cause.kernels):
            yield from zip(("kernels", ""), map(_launches, cause.kernels, sides), strict=True)
        if cause.cure:
            yield "cure", cause.cure
        yield from _others(trace, cause)
    for line in trace.control_flow[:_MOST_LINES]:
        yield "path", line
    for note in trace.notes:
        yield "trace", note


def _lines(op: TracedOp) -> list[str]:
    """Of the user's program; for a fused kernel first the operators in it."""
    if not op.made_of:
        return [f"{op.source.rpartition('/')[2]}: {op.line}"] if op.source else []
    operators, *lines = op.made_of
    more = [f"and {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else []
    return [f"made of {operators}", *(line.rpartition("/")[2] for line in lines[:_MOST_LINES]), *more]


def _others(trace: Trace, cause: Culprit) -> Iterator[tuple[str, str]]:
    others = [culprit for culprit in trace.culprits if culprit is not cause]
    harmless = [culprit for culprit in others if culprit.effect == "does not reach the output"]
    for title, culprits, why in (
        ("also", [culprit for culprit in others if culprit not in harmless], ""),
        ("harmless", harmless, "other bits for equal inputs, which do not reach the output"),
    ):
        named = list(dict.fromkeys(_called(trace.ops[culprit.op]) for culprit in culprits))
        lines = [*named[:_MOST_LINES], *[f"and {len(named) - _MOST_LINES} more"] * (len(named) > _MOST_LINES)]
        yield from ((title if i == 0 else "", line) for i, line in enumerate(lines))
        if named and why:
            yield "", why


def _launches(kernels: tuple[str, ...], side: str) -> str:
    return f"{'; '.join(map(_short_kernel, kernels)) or 'none'} {side}"


def _short_kernel(kernel: str) -> str:
    """Without the arguments of a C++ template: "void f<int, float>(float*) <<<1, 2, 3>>>" is "f <<<1, 2, 3>>>"."""
    name, _, grid = kernel.rpartition(" <<<")
    return f"{re.split('[<(]', name.removeprefix('void '), maxsplit=1)[0]} <<<{grid}"


def _called(op: TracedOp) -> str:
    return f"{_short(op.overload)} in {op.module}" if op.module else _short(op.overload)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def row_words(info: SubjectInfo, found: Finding) -> str:
    case, row = BatchShape.from_json(found.case), msgspec.json.decode(found.row, type=Row)
    if info.is_model:
        what = f"id {row.id}, {row.length} tokens, {row.content}; at position {found.position} of {found.n_rows}"
        return ", ".join((what, *_layout_words(case), *_steps_words(case.steps)))
    return f"{row.id}, at position {found.position} of {found.n_rows}; {found.output}"


def _layout_words(case: BatchShape) -> Iterator[str]:
    opposite = f", {case.opposite_padding} of them on the other side" if case.opposite_padding else ""
    yield "packed" if case.layout == "packed" else f"{case.layout} padding to {case.width} columns{opposite}"
    if case.first_position:
        yield f"positions from {case.first_position} on"


def _steps_words(steps: Steps | None) -> Iterator[str]:
    if steps is None:
        return
    yield f"a {steps.cache} cache" + (f" with {steps.spare} spare keys" if steps.spare else "")
    if steps.prefix:
        yield f"a prefix of {steps.prefix} tokens from it"
    if steps.ends:
        yield f"in steps that end at column {as_ranges(steps.ends)}"
    if steps.rejected:
        yield f"{steps.rejected} tokens rejected after each"


def difference_lines(found: Finding) -> list[str]:
    one, other = found.sides
    if found.kind == "shape":
        return [f"{found.expected} {one} against {found.actual} {other}"]
    distance = "" if found.ulp is None else f", {found.ulp:,} ulp apart"
    return [
        f"{found.n_differ:,} of {found.n_total:,} values; the first at {list(found.index)}:",
        f"{found.expected} ({found.expected_hex}) {one}, {found.actual} ({found.actual_hex}) {other}{distance}",
    ]


def sizes_words(found: Breakpoints) -> str:
    tried = f"{found.tried} sizes from 1 to {found.bound} were run, changes between them bisected"
    return f"bits change at batch sizes {as_ranges(found.sizes)}; {tried}"
