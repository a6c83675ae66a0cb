"""Records: what a check found, with its case, versions and machine. JSON only; the reports are made of them."""

import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from typing import Any

SCHEMA = 1
VERDICTS = ("equal", "differs", "caught", "inconclusive", "error")


@dataclass
class Record:
    """One check of one relation on one subject.

    verdict: "equal" or "differs"; for a negative control "caught" (stock torch varies here) or "inconclusive";
    "error" where the check itself could not be made. compared_bytes counts the bytes of both sides once.
    """

    subject: str
    relation: str
    verdict: str
    engine: str = ""
    device: str = ""
    dtype: str = ""
    attn: str = ""
    compile_mode: str = ""
    nodeid: str = ""
    examples: int = 0
    rows: int = 0
    compared_bytes: int = 0
    nan_rows: int = 0
    seconds: float = 0.0
    hits: dict[str, int] = field(default_factory=dict)
    not_run: list[dict[str, str]] = field(default_factory=list)
    unclassified_ops: list[str] = field(default_factory=list)
    difference: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"a verdict is one of {', '.join(VERDICTS)}, not {self.verdict!r}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})


_sink: ContextVar[Callable[[Record], None] | None] = ContextVar("batchinv_sink", default=None)


@contextlib.contextmanager
def collecting(sink: Callable[[Record], None]) -> Iterator[None]:
    """Hands every record emitted inside to ``sink``."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


def emit(record: Record) -> None:
    """Hands the record to whoever collects; outside a test of the plugin nobody does."""
    sink = _sink.get()
    if sink is not None:
        sink(record)


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
    facts["torch"] = torch.__version__
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
