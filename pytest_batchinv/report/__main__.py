"""``python -m pytest_batchinv.report``: saved reports as a page, compared, merged, signed. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from pytest_batchinv.report import compare, html, json, saved, schema, signing

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
    _takes_slack(two, "B")
    two.set_defaults(run=_compare)

    several = commands.add_parser("merge", help="the records of several runs or hosts in one file")
    several.add_argument("records", type=Path, nargs="+", metavar="A.json")
    several.add_argument("-o", "--output", type=Path, required=True, metavar="C.json")
    several.set_defaults(run=_merge)

    signed = commands.add_parser("sign", help="a signed statement about a record, for a CI that cannot run the tests itself")
    signed.add_argument("record", type=Path, metavar="A.json")
    signed.add_argument("--key", type=Path, required=True, metavar="FILE", help="a private key of OpenSSH")
    signed.add_argument(
        "--over", nargs="+", default=(), metavar="PATH", help="files and folders that were tested, from the working directory"
    )
    signed.set_defaults(run=_sign)

    judged = commands.add_parser(
        "verify",
        help="exit status 1 where a record is not signed, edited, stale, not passed, or less than the baseline",
        description="Exit status 0: the record is signed, of these sources, and proves what the baseline proves. 1: it is not, "
        "for the reasons that are listed. 2: no answer.",
    )
    judged.add_argument("record", type=Path, metavar="A.json")
    judged.add_argument("--signers", type=Path, required=True, metavar="FILE", help="allowed signers, as ssh-keygen has them")
    judged.add_argument("--baseline", type=Path, metavar="B.json", help="all that holds in it has to hold in the record")
    judged.add_argument("--require", type=_version, nargs="+", default=(), metavar="NAME=VERSION", help="such as torch=2.13.0")
    judged.add_argument("--max-age", type=_days, metavar="DAYS", help="since it was signed")
    _takes_slack(judged, "the record")
    judged.set_defaults(run=_verify)

    fields = commands.add_parser("schema", help="what the JSON holds: a JSON Schema, or tables in Markdown")
    fields.add_argument("--markdown", action="store_true", help="the tables of docs/report.md")
    fields.set_defaults(run=_schema)
    return parser


def _takes_slack(parser: argparse.ArgumentParser, which: str) -> None:
    parser.add_argument(
        "--slack",
        type=_percent,
        default=0.0,
        metavar="PERCENT",
        help=f"by how much counts of batches, positions and pairs may be smaller in {which} (0). The sweep ends by time, so "
        "that a slower machine runs fewer. Batch sizes and layouts have no slack.",
    )


def _version(text: str) -> tuple[str, str]:
    name, is_given, version = text.partition("=")
    if not (name and is_given and version):
        raise argparse.ArgumentTypeError(f"{text!r} requires no version; write NAME=VERSION, such as torch=2.13.0")
    return name, version


def _days(text: str) -> timedelta:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days from 1 on")
    return timedelta(days=int(text))


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


def _sign(given: argparse.Namespace) -> int:
    path = signing.sign(given.record, saved.read(given.record), given.key, given.over)
    print(f"signed: {path}, {path}.sig")
    return 0


def _verify(given: argparse.Namespace) -> int:
    baseline = saved.read(given.baseline) if given.baseline else None
    words = {"baseline": baseline, "slack": given.slack, "require": dict(given.require), "max_age": given.max_age}
    try:
        print(f"{given.record}: {signing.verify(given.record, saved.read(given.record), given.signers, **words)}")
    except signing.Refused as refused:
        print(f"{given.record} is refused:", *(f"  {reason}" for reason in refused.reasons), sep="\n")
        return 1
    return 0


def _schema(given: argparse.Namespace) -> int:
    print(schema.markdown() if given.markdown else schema.json_schema())
    return 0


if __name__ == "__main__":
    sys.exit(main())
