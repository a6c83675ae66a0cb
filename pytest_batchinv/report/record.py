"""Records: an immutable account of one check, JSON out and JSON in. The reports are made of them."""

from __future__ import annotations

import contextlib
import platform
import sys
from functools import cache
from importlib import metadata
from typing import Literal

import msgspec

from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import SubjectInfo

SCHEMA = 3

Verdict = Literal["equal", "differs", "shape_differs", "error", "refused", "interrupted", "not_run", "caught", "inconclusive"]
"""equal, differs: what was compared. shape_differs: a row's shape or dtype follows its batch. error: the subject or the check
raised. refused: the mode does not cover an operator of the subject. interrupted: it was ended from outside before a verdict.
not_run: no batch could run. Of a negative control: caught (stock torch varies here) or inconclusive."""

Mode = Literal["on", "off", "stock", "elsewhere"]
"""Whether batch-invariant mode was on in the check; stock: it was suspended, for a negative control; elsewhere: another process
computed, which the mode does not reach."""


class Breakpoints(msgspec.Struct, frozen=True):
    """The batch sizes at which a row's bits differ from those alone: ranges [first, last] of sizes up to ``bound``.

    tried: sizes that were run. Between two of them with equal bits no change was looked for.
    """

    ranges: tuple[tuple[int, int], ...]
    tried: int
    bound: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for first, last in self.ranges for size in range(first, last + 1))


class Section(msgspec.Struct, frozen=True):
    """One result of a diagnosis: it explains a finding, and never changes it."""

    title: str
    lines: tuple[str, ...]


Badge = Literal["order", "module", "content", "one side"]
"""How a pair of operators was found: by its place in two equal sequences; by its module, line and name; by the row's bytes;
or not at all, where only one of the two runs called it."""

Agreement = Literal["equal", "differs", "follows", "not compared"]
"""Of the row's bytes in what an operator gave on the two sides. differs: its inputs agreed. follows: an input differed already.
not compared: the row could not be found in it."""


class TracedOp(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One operator of a trace, on the two sides.

    index: of the call on either side, -1 where that side has none. module: the path of the module that called it. source:
    "file:line"; line: that line. shapes: of the output on either side, with dtype. produced_by: positions in the trace of the
    operators that gave its inputs. ulp: of the first two values that differ, None for what has no ulp. made_of: of a kernel
    that a compiler generated, the operators in it, and then the lines that they come from.
    """

    overload: str
    index: tuple[int, int]
    agreement: Agreement
    badge: Badge = "order"
    module: str = ""
    source: str = ""
    line: str = ""
    made_of: tuple[str, ...] = ()
    shapes: tuple[str, str] = ("", "")
    n_differ: int = 0
    n_total: int = 0
    ulp: int | None = None
    produced_by: tuple[int, ...] = ()


class Culprit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An operator whose inputs agreed in the row's bytes, and whose output did not.

    op: its position in the trace. calls: how many calls of it, from this line, diverged by themselves. inputs: shapes, strides
    and dtypes of its inputs on either side. numbers: the plain numbers that it was given on either side, where they are not the
    same: then it is not the operator that makes the difference, but the code that calls it. effect: whether the output differs
    where nothing else diverges. cure: what the mode's kernel does in its place, the rest being stock. sizes: at how many of its
    own rows its bits are others than for one. elsewhere: the same for its inputs in other dtypes and, on a CPU, with one
    thread. kernels: what ran on either side.
    """

    op: int
    calls: int
    inputs: tuple[tuple[str, ...], tuple[str, ...]]
    numbers: tuple[str, str] = ("", "")
    effect: Literal["causes", "does not reach the output", "not told"] = "not told"
    cure: str = ""
    sizes: Breakpoints | None = None
    elsewhere: tuple[tuple[str, Breakpoints], ...] = ()
    kernels: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


class Trace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The failing row on the two sides of a relation, operator by operator, in the order in which the second side ran them.

    ops: without those that computed nothing (views). culprits: in the order in which they ran. control_flow: what one side
    alone called before the first culprit, as sentences. notes: what the trace could not tell, as sentences. script: Python that
    shows the cause alone, without the subject and without this package; empty where there is none, and a note says why.
    """

    ops: tuple[TracedOp, ...]
    culprits: tuple[Culprit, ...] = ()
    control_flow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    script: str = ""

    @property
    def cause(self) -> Culprit | None:
        """The first culprit whose difference reaches the output; the first of all where none was seen to."""
        return next((culprit for culprit in self.culprits if culprit.effect == "causes"), (*self.culprits, None)[0])


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Two outputs that should be equal and are not, with the smallest case found that shows it.

    case: the batch shape as JSON. position, row: where in the case, and which row as JSON. sides: what the two outputs are.
    """

    case: str
    position: int
    n_rows: int
    row: str
    output: str
    sides: tuple[str, str]
    kind: str
    index: tuple[int, ...]
    expected: str
    actual: str
    expected_hex: str
    actual_hex: str
    ulp: int | None
    n_differ: int
    n_total: int
    breakpoints: Breakpoints | None = None
    trace: Trace | None = None
    sections: tuple[Section, ...] = ()
    replay: str = ""

    @property
    def batch(self) -> BatchShape:
        return BatchShape.from_json(self.case)


class OpCoverage(msgspec.Struct, frozen=True):
    """Operators that ran in the subject's forward, by how the mode vouches for them; calls by overload for ``covered``.

    bypassed: covered operators that ran, and that the table did not answer. not_scanned: that this torch and device have no
    data of the scan, and how it is made. error: why nothing is known.
    """

    covered: dict[str, int] = {}
    row_local: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    not_scanned: str = ""
    error: str = ""


class Counts(msgspec.Struct, frozen=True):
    """What was compared. compared_bytes counts the bytes of both sides once; forwards counts runs of the subject."""

    examples: int = 0
    rows: int = 0
    compared_bytes: int = 0
    nan_rows: int = 0
    forwards: int = 0
    seconds: float = 0.0

    def per_second(self, count: int) -> float:
        return count / self.seconds if self.seconds else 0.0


class Skipped(msgspec.Struct, frozen=True):
    """A case that could not be run, and why."""

    case: str
    reason: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One check of one relation on one subject.

    covered: what the sweep covered, as words. case: the finding's, or the one at which the subject raised. fingerprint: op
    table, versions, GPU and patches in one word; ``receipt`` has them apart. hits: calls that the table answered.
    """

    subject: SubjectInfo
    relation: str
    verdict: Verdict
    mode: Mode
    control: bool = False
    counts: Counts = Counts()
    covered: tuple[str, ...] = ()
    finding: Finding | None = None
    error: str = ""
    case: str = ""
    replayed: bool = False
    ops: OpCoverage | None = None
    hits: dict[str, int] = {}
    not_run: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int | None = None
    nodeid: str = ""
    machine: dict[str, str] = {}
    fingerprint: str = ""
    receipt: dict[str, str] = {}
    schema: int = SCHEMA

    @property
    def unclassified_ops(self) -> list[str]:
        """Operators that ran and that the mode does not vouch for."""
        return list(self.ops.unverified) if self.ops else []

    @property
    def compared_something(self) -> bool:
        return self.counts.compared_bytes > 0

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError for what is no record of this schema."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"not a record of schema {SCHEMA}: {error}") from None


@cache
def machine() -> dict[str, str]:
    """Versions and hardware, as strings. Imports torch; does not start CUDA where nothing has started it."""
    import torch

    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
    }
    for name in ("torch", "triton", "transformers", "hypothesis", "pytest", "pytest-batchinv"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    facts["torch"] = str(torch.__version__)  # a str of a class of its own, which JSON does not know
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_count"] = str(torch.cuda.device_count())
        facts["capability"] = f"sm_{properties.major}{properties.minor}"
        facts["sm_count"] = str(properties.multi_processor_count)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _cpu_name() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor()
