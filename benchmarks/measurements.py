"""What a benchmark found, as data: points with their timings; JSON there and back, and CSV."""

import csv
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from timing import Timing

from pytest_batchinv.report.record import machine

SCHEMA = 1
OURS, STOCK = "ours", "torch"
T = TypeVar("T")


@dataclasses.dataclass
class Point:
    """One work at one size: the timings of all contenders in microseconds a call.

    baseline: the contender that ours is compared with. bytes_moved: the least the work must read and write, 0 if that is
    not asked for. distance: of our result from the baseline's, relative.
    """

    work: str
    dtype: str
    sizes: dict[str, int | str]
    timings: dict[str, Timing]
    baseline: str = STOCK
    bytes_moved: int = 0
    beyond_cache: bool = False
    distance: float = 0.0
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        return f"{self.work} {self.dtype} {sizes}".strip()

    def ratio(self, to: str | None = None) -> float:
        """Our time over that of another contender (the baseline)."""
        return self.timings[OURS].median_us / self.timings[to or self.baseline].median_us

    def excess_us(self) -> float:
        return self.timings[OURS].median_us - self.timings[self.baseline].median_us

    def gigabytes_per_second(self, contender: str) -> float:
        return self.bytes_moved / self.timings[contender].median_us / 1e3


@dataclasses.dataclass
class Result:
    """One case: its points, and what was left out of it and why.

    reduced: the options that make this another measurement than the one asked for (smaller sizes, another model), or "".
    cut: the items for which no time was left. not_run: what was left out for another reason, with that reason.
    """

    case: str
    reduced: str = ""
    points: list[Point] = dataclasses.field(default_factory=list)
    cut: list[str] = dataclasses.field(default_factory=list)
    not_run: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    machine: dict[str, str] = dataclasses.field(default_factory=dict)
    command: str = ""
    started: str = ""
    seconds: float = 0.0
    schema: int = SCHEMA

    @property
    def is_complete(self) -> bool:
        return not (self.cut or self.not_run or self.errors)

    def to_json(self) -> str:
        return json.dumps({"benchmark": self.case, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Raises ValueError where the text is JSON of something else, or of another version."""
        found = json.loads(text)
        if not isinstance(found, dict) or "benchmark" not in found:
            raise ValueError("this JSON is no benchmark's: it lacks the field 'benchmark'")
        if found.get("schema") != SCHEMA:
            raise ValueError(f"these results have schema {found.get('schema')!r}; this version reads {SCHEMA}")
        points = [
            Point(**{**point, "timings": {name: Timing(**timing) for name, timing in point["timings"].items()}})
            for point in found.pop("points")
        ]
        del found["benchmark"]
        return cls(points=points, **found)


class Budget:
    """Seconds that a case may take. ``clock`` counts seconds."""

    def __init__(self, seconds: float, clock=time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def affordable(self, items: Iterable[T], result: Result) -> Iterator[T]:
        """The items while time is left for one like the longest before; the others are named in ``result.cut``.

        An item is written by ``str``. It takes as long as its consumer takes to ask for the next.
        """
        longest = 0.0
        for item in items:
            if self.left() <= longest:
                result.cut.append(str(item))
                continue
            started = self._clock()
            yield item
            longest = max(longest, self._clock() - started)


def write(result: Result, folder: Path) -> None:
    """``CASE.json`` and ``CASE.csv`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result.case}.json").write_text(result.to_json(), encoding="utf-8")
    sizes = list(dict.fromkeys(name for point in result.points for name in point.sizes))
    with open(folder / f"{result.case}.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["work", "dtype", *sizes, "contender", "median_us", "q1_us", "q3_us", "repeats", "calls"]
            + ["ours_over_contender", "gigabytes_per_second", "gpu", "capability", "driver", "torch", "triton", "cuda"]
        )
        versions = [result.machine.get(name, "") for name in ("gpu", "capability", "driver", "torch", "triton", "cuda")]
        for point in result.points:
            for name, timing in point.timings.items():
                speed = f"{point.gigabytes_per_second(name):.1f}" if point.bytes_moved else ""
                times = [f"{value:.3f}" for value in (timing.median_us, timing.q1_us, timing.q3_us)]
                shape = [point.sizes.get(size, "") for size in sizes]
                ratio = f"{point.ratio(name):.4f}" if OURS in point.timings else ""
                rows.writerow(
                    [point.work, point.dtype, *shape, name, *times, timing.repeats, timing.calls, ratio, speed, *versions]
                )


def read(folder: Path) -> list[Result]:
    """The results in a folder; other JSON files there are passed over."""
    found = []
    for path in sorted(folder.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        if isinstance(data := json.loads(text), dict) and "benchmark" in data:
            found.append(Result.from_json(text))
    return found


def describe_machine(device: torch.device) -> dict[str, str]:
    """Versions and hardware, and the state of the clocks now, as far as they can be read."""
    facts: dict[str, Any] = {**machine(), "argv": " ".join(sys.argv), "device": str(device)}
    if device.type != "cuda":
        return {name: facts[name] for name in facts if name not in ("gpu", "gpu_count", "capability", "sm_count")}
    properties = torch.cuda.get_device_properties(device)
    facts |= {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "l2_bytes": str(properties.L2_cache_size),
    }
    return {**facts, **_from_nvidia_smi(device)}


_SMI = {
    "driver": "driver_version",
    "clock_sm": "clocks.sm",
    "clock_memory": "clocks.mem",
    "clock_sm_max": "clocks.max.sm",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def _from_nvidia_smi(device: torch.device) -> dict[str, str]:
    """Read only; empty where there is no nvidia-smi or it does not answer."""
    query = f"--query-gpu={','.join(_SMI.values())}"
    # By uuid: the index that torch counts with need not be nvidia-smi's.
    uuid = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        run = subprocess.run(["nvidia-smi", uuid, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(_SMI, values, strict=True)) if run.returncode == 0 and len(values) == len(_SMI) else {}
