"""``python -m pytest_batchinv.report``: saved reports as a page, compared, and merged. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_batchinv.report import compare, html, json, saved, schema

BAD_INPUT = 2
"""The exit status where no answer can be given, as argparse has it; 1 is the answer that something is worse."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
    except (ValueError, OSError) as error:
        print(f"pytest_batchinv.report {given.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pytest_batchinv.report", description="Work with the files that --batchinv-report wrote."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    page = commands.add_parser("html", help="one self-contained page of a saved run")
    page.add_argument("record", type=Path, metavar="A.json")
    page.add_argument("-o", "--output", type=Path, metavar="A.html", help="default: beside the record, ending in .html")
    page.set_defaults(run=_html)

    two = commands.add_parser(
        "compare",
        help="exit status 1 where something that held in A does not hold in B, or less of it was covered",
        description="Exit status 0: all that held in A holds in B. 1: something does not, and is listed. 2: no comparison.",
    )
    two.add_argument("before", type=Path, metavar="A.json")
    two.add_argument("after", type=Path, metavar="B.json")
    two.add_argument(
        "--slack",
        type=_percent,
        default=0.0,
        metavar="PERCENT",
        help="by how much counts of batches, positions and pairs may be smaller in B (0). The sweep ends by time, so that a "
        "slower machine runs fewer. Batch sizes and layouts have no slack.",
    )
    two.set_defaults(run=_compare)

    several = commands.add_parser("merge", help="the records of several runs or hosts in one file")
    several.add_argument("records", type=Path, nargs="+", metavar="A.json")
    several.add_argument("-o", "--output", type=Path, required=True, metavar="C.json")
    several.set_defaults(run=_merge)

    fields = commands.add_parser("schema", help="what the JSON holds: a JSON Schema, or tables in Markdown")
    fields.add_argument("--markdown", action="store_true", help="the tables of docs/report.md")
    fields.set_defaults(run=_schema)
    return parser


def _percent(text: str) -> float:
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no share in percent; give a number from 0 to below 100")
    return percent / 100


def _html(given: argparse.Namespace) -> int:
    if why := html.missing():
        raise ValueError(f"a page {why}")
    output = given.output or given.record.with_suffix(".html")
    html.write_saved(saved.read(given.record), output)
    print(f"page of this run: {output}")
    return 0


def _compare(given: argparse.Namespace) -> int:
    before, after = saved.read(given.before), saved.read(given.after)
    for path, one in ((given.before, before), (given.after, after)):
        if not one.records:
            raise ValueError(f"{path} holds no record, so there is nothing to compare. Run the tests with --batch-invariant.")
    found = compare.compare(before, after, given.slack)
    print("\n".join(compare.lines(before, after, (str(given.before), str(given.after)), found)))
    return 1 if found.worse else 0


def _merge(given: argparse.Namespace) -> int:
    names = [str(path) for path in given.records]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"{twice} is given more than once: give each run once.")
    merged = saved.merge({name: saved.read(path) for name, path in zip(names, given.records, strict=True)})
    json.write_saved(merged, given.output)
    print(f"{len(merged.records)} records of {len(merged.merged)} runs: {given.output}")
    return 0


def _schema(given: argparse.Namespace) -> int:
    print(schema.markdown() if given.markdown else schema.json_schema())
    return 0


if __name__ == "__main__":
    sys.exit(main())
