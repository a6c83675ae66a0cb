"""``python -m pytest_batchinv.architectures [NAME ...]``: builds each architecture tiny, and asks it for relations in the mode.

One line an architecture: for each relation how many batches were equal and how many were not, and what was left out. With --out
the same as JSON lines, which are written as they come; --document makes docs/architectures.md of such files. A sample of the
sweep is run, spread over all of it, and no search.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.architectures.configs import names, tiny_model
from pytest_batchinv.architectures.document import document
from pytest_batchinv.relations import chosen
from pytest_batchinv.relations.base import Relation
from pytest_batchinv.search.runs import SubjectRuns
from pytest_batchinv.shapes import chosen_evenly
from pytest_batchinv.subjects.base import NotRun
from pytest_batchinv.subjects.transformers import DTYPES, TransformersSubject


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pytest_batchinv.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures, as transformers names them; all causal ones by default")
    parser.add_argument("--relations", default="R,I,L,C,D")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=9, help="batches for each relation")
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument(
        "--document", type=Path, nargs="+", metavar="LINES", help="write docs/architectures.md of these files, and ask nothing"
    )
    given = parser.parse_args(arguments)
    if given.document:
        lines = [json.loads(line) for path in given.document for line in path.read_text(encoding="utf-8").splitlines()]
        Path("docs/architectures.md").write_text(document(lines), encoding="utf-8")
        return 0
    relations = chosen(given.relations.split(","), parser.prog)
    if unknown := sorted(set(given.names) - set(names())):
        parser.error(f"transformers {transformers.__version__} has no causal architecture {', '.join(unknown)}")
    warnings.simplefilter("ignore")  # of the models themselves
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines = []
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(given.out.open("w", encoding="utf-8")) if given.out else None
        for name in given.names or names():
            lines.append(asked(name, relations, given.dtype, given.device, given.cases))
            _tell(lines[-1], out)
    print("\n".join(_summary(lines, relations)))
    return 0


def asked(name: str, relations: list[Relation], dtype: str, device: str, n_cases: int) -> dict[str, Any]:
    """One architecture: how many batches of each relation were equal, differed and could not be run, and why."""
    started = time.perf_counter()
    line: dict[str, Any] = {"architecture": name, "dtype": dtype, "versions": _versions()}
    try:
        with tempfile.TemporaryDirectory() as folder:
            tiny_model(name, DTYPES[dtype]).save_pretrained(folder)
            subject = TransformersSubject(folder, device=device, dtype=dtype)
        words = [sentence.partition(": ")[2] for sentence in subject.space.left_out]
        line |= {"attention": subject.info.attention, "layouts": subject.space.layouts, "caches": subject.space.caches}
        line["left_out"] = words
        with batch_invariant_mode():
            line["relations"] = {relation.letter: _of_relation(relation, subject, n_cases) for relation in relations}
    except Exception as error:  # an architecture that fails is a line of the table, and the next one follows
        line["error"] = re.sub(r"/\S*/tmp\w+", name, _words(error))
    return line | {"seconds": round(time.perf_counter() - started, 1)}


def _of_relation(relation: Relation, subject: TransformersSubject, n_cases: int) -> dict[str, Any]:
    if why := relation.obstacle(subject):
        return {"not_asked": why.replace(subject.info.name, "the model")}
    runs, found = SubjectRuns(subject), {"equal": 0, "differ": 0, "errors": 0}
    told: dict[str, Any] = {}
    for case in chosen_evenly(relation.cases(subject.space).first, n_cases):
        try:
            differences = [runs.compare(comparison) for comparison in relation.sides(runs, case)]
        except NotRun as why_not:
            told.setdefault("not_run", str(why_not))
            continue
        except Exception as error:
            found["errors"] += 1
            told.setdefault("first_error", f"{_words(error)}, at {case.to_json()}")
            continue
        broken = [difference for difference in differences if difference is not None]
        found["differ" if broken else "equal"] += 1
        if broken:
            told.setdefault("first_difference", f"{broken[0].difference}, at {case.to_json()}")
    return found | told


def _tell(line: dict[str, Any], out: TextIO | None) -> None:
    if out is not None:
        print(json.dumps(line), file=out, flush=True)
    if "error" in line:
        print(f"{line['architecture']:<28} {line['error'][:160]}", flush=True)
        return
    cells = (f"{letter} {_cell(found)}" for letter, found in line["relations"].items())
    left_out = f"  left out: {len(line['left_out'])}" if line["left_out"] else ""
    print(f"{line['architecture']:<28} {'  '.join(cells)}{left_out}", flush=True)


def _cell(found: dict[str, Any]) -> str:
    if "not_asked" in found:
        return "-"
    errors = f", {found['errors']} errors" if found["errors"] else ""
    return f"{found['equal']} equal" + (f", {found['differ']} DIFFER" if found["differ"] else "") + errors


def _summary(lines: list[dict[str, Any]], relations: list[Relation]) -> Iterator[str]:
    loaded = [line for line in lines if "error" not in line]
    yield f"{len(loaded)} of {len(lines)} architectures were loaded, {_versions()}"
    for letter in (relation.letter for relation in relations):
        found = [line["relations"][letter] for line in loaded]
        run = [cells for cells in found if "not_asked" not in cells]
        equal = sum(bool(cells["equal"]) and not cells["differ"] and not cells["errors"] for cells in run)
        differ = sum(bool(cells["differ"]) for cells in run)
        yield f"{letter}: {equal} equal, {differ} differ, {len(run) - equal - differ} other, {len(found) - len(run)} not asked"


def _versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


if __name__ == "__main__":
    sys.exit(main())
