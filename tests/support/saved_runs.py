"""Records and reports, made by hand."""

from pytest_batchinv.report.record import SCHEMA, Counts, OpCoverage, Record
from pytest_batchinv.report.saved import Saved
from pytest_batchinv.subjects.base import SubjectInfo

COVERED = (
    "all sizes 1-300",
    "1,280 of 40 x 32 positions",
    "1,560 of 1,560 pairs",
    "40 of 40 rows repeated",
    "layouts left, right",
)
OPS = OpCoverage(covered={"aten::mm": 3}, row_local=("aten::add",))


def record(relation="I", verdict="equal", name="m", **words):
    about = {"kind": "transformers", "device": "cuda:0", "dtype": "bf16", "attention": "sdpa", "compile_mode": "eager"}
    info = SubjectInfo(name=name, **{field: words.pop(field, value) for field, value in about.items()})
    words.setdefault("counts", Counts(examples=412, compared_bytes=1))
    words.setdefault("machine", {"cpu": "a", "torch": "2.13.0"})
    words.setdefault("nodeid", f"t.py::{relation}")
    common = {"subject": info, "relation": relation, "verdict": verdict, "mode": "on", "covered": COVERED, "ops": OPS}
    return Record(**{**common, "fingerprint": "f1", **words})


def run(*records, **words):
    return Saved(**{"schema": SCHEMA, "machine": records[0].machine if records else {}, "records": records, **words})
