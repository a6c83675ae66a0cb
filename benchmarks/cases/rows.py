"""Norms and softmax of rows, over stock torch's eager operators, and beside a copy of the same size.

bytes_moved counts each value read once and written once. All operators of one size share their inputs and are run in turn.
"""

import dataclasses
from types import ModuleType

import torch
from measurements import OURS, STOCK, Point
from timing import Contender
from torch.nn import functional as F

from cases import DTYPES, Bench, peers

WORKS = ("rms_norm", "layer_norm", "softmax", "log_softmax")
ROWS = (1, 16, 256, 2048, 8192)
COLS = (1024, 4096, 16384, 151936)
MAX_OUTPUT_BYTES = 3e9
BEYOND_CACHE = 4
"""From this many times the L2 cache on (read and written together), a size is large: only memory counts."""
COPY = "copy"
_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Rows:
    dtype: str
    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{', '.join(WORKS)} {self.dtype} rows={self.rows} cols={self.cols}"


def run(bench: Bench) -> None:
    quick = bench.options.quick
    sizes = [
        Rows(name, rows, cols)
        for name in bench.options.dtypes
        for cols in ((64, 100) if quick else COLS)
        for rows in ((1, 4) if quick else ROWS)
    ]
    affordable = []
    for size in sizes:
        out_bytes = size.rows * size.cols * DTYPES[size.dtype].itemsize
        if out_bytes > MAX_OUTPUT_BYTES:
            bench.result.not_run.append(f"{size}: a result has {out_bytes / 1e9:.1f} GB, more than 3")
        else:
            affordable.append(size)
    contenders = {work: _contenders(work, bench.kernels) for work in WORKS}
    together = [Contender(COPY, lambda x, weight, bias: x.clone(), work=COPY)]
    together += [_named(work, contender) for work, several in contenders.items() for contender in several]

    def measure(size: Rows) -> None:
        dtype = DTYPES[size.dtype]
        set_bytes = size.rows * size.cols * dtype.itemsize
        plan = bench.stopwatch.rotation(set_bytes)
        x = torch.empty(plan.sets, size.rows, size.cols, dtype=dtype, device=bench.device).normal_()
        weight, bias = torch.empty(2, size.cols, dtype=dtype, device=bench.device).normal_()
        found = bench.stopwatch.measure(together, [(one, weight, bias) for one in x], plan.rounds)
        for work, several in contenders.items():
            keys = {contender.name: _named(work, contender).name for contender in several}
            timings = {name: found.timings[key] for name, key in keys.items() if key in found.timings}
            point = Point(
                work=work,
                dtype=size.dtype,
                sizes={"rows": size.rows, "cols": size.cols},
                timings={**timings, COPY: found.timings[COPY]},
                bytes_moved=2 * set_bytes,
                beyond_cache=2 * set_bytes >= BEYOND_CACHE * bench.stopwatch.cache_bytes,
                distance=found.distances[keys[OURS]],
                refused={name: found.refused[key] for name, key in keys.items() if key in found.refused},
            )
            bench.result.points.append(point)
            bench.check(point.label, size.dtype, point.distance)

    bench.plan(affordable, measure)


def _named(work: str, contender: Contender) -> Contender:
    return dataclasses.replace(contender, name=f"{work}: {contender.name}", work=work)


def _contenders(work: str, kernels: ModuleType) -> list[Contender]:
    """Calls of (x [rows, cols], weight [cols], bias [cols]); bf16 in gives bf16 out, as stock torch has it."""
    stock = {
        "rms_norm": lambda x, weight, bias: F.rms_norm(x, weight.shape, weight, _EPS),
        "layer_norm": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, _EPS),
        "softmax": lambda x, weight, bias: torch.softmax(x, -1),
        "log_softmax": lambda x, weight, bias: torch.log_softmax(x, -1),
    }
    ours = {
        "rms_norm": lambda x, weight, bias: kernels.row_rms_norm(x, weight, _EPS),
        "layer_norm": lambda x, weight, bias: kernels.row_layer_norm(x, weight, bias, _EPS),
        "softmax": lambda x, weight, bias: kernels.row_softmax(x, False, x.dtype),
        "log_softmax": lambda x, weight, bias: kernels.row_softmax(x, True, x.dtype),
    }
    return [Contender(STOCK, stock[work]), Contender(OURS, ours[work]), *peers.contenders(work)]
