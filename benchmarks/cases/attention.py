"""Attention with 32 query heads and 8 key heads of 128: prefill over SDPA's flash, decode over the fastest of SDPA.

A backend that refuses grouped heads gets them repeated beforehand, outside of the time; the point's notes say so.
"""

import dataclasses
import warnings
from collections.abc import Callable

import torch
from measurements import OURS, Point
from timing import Contender, reason
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import DTYPES, Bench, peers

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
PREFILL = ((1, 8192), (16, 512))
"""(batch, tokens), causal."""
DECODE = tuple((batch, keys) for batch in (1, 64) for keys in (1024, 4096, 8192, 16384, 32768))
"""(batch, keys), one query a sequence."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MAX_REPEATED_BYTES = 8e9
"""Repeated key heads above this are left out, with a note."""
MAX_SLOWER = 4
"""A backend this many times slower than the fastest in one call is not timed further, with a note."""


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    work: str
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.work} {self.dtype} batch={self.batch} {self.names[1]}={self.length}"

    @property
    def names(self) -> tuple[str, str]:
        return ("batch", "tokens" if self.work == "prefill" else "keys")

    @property
    def is_causal(self) -> bool:
        return self.work == "prefill"

    @property
    def queries(self) -> int:
        return self.length if self.is_causal else 1


def run(bench: Bench) -> None:
    prefill, decode = (((1, 33), (2, 16)), ((1, 40), (3, 17))) if bench.options.quick else (PREFILL, DECODE)
    shapes = [
        Shape(name, work, batch, length)
        for name in bench.options.dtypes
        for work, sizes in (("prefill", prefill), ("decode", decode))
        for batch, length in sizes
    ]
    bench.plan(shapes, lambda shape: _measure(bench, shape))


def _measure(bench: Bench, shape: Shape) -> None:
    dtype = DTYPES[shape.dtype]
    values = shape.batch * HEAD_DIM * (HEADS * shape.queries + 2 * KEY_HEADS * shape.length)
    plan = bench.stopwatch.rotation(values * dtype.itemsize)
    sets = [_inputs(shape, dtype, bench.device) for _ in range(plan.sets)]
    attention, scale = bench.kernels.attention, HEAD_DIM**-0.5
    stock, refused, notes = _stock(bench, shape, sets)
    contenders = [
        *stock,
        Contender(OURS, lambda q, k, v: attention(q, k, v, None, shape.is_causal, scale)),
        *peers.contenders(shape.work),
    ]
    found = bench.stopwatch.measure(contenders, sets, plan.rounds)
    refused |= found.refused
    names = [contender.name for contender in stock if contender.name in found.timings]
    if not names:
        raise RuntimeError(f"no backend of SDPA that this is compared with runs here: {refused}")
    point = Point(
        work=shape.work,
        dtype=shape.dtype,
        sizes=dict(zip(shape.names, (shape.batch, shape.length), strict=True)),
        timings=found.timings,
        baseline=min(names, key=lambda name: found.timings[name].median_us),
        distance=found.distances[OURS],
        refused=refused,
        notes=notes,
    )
    bench.result.points.append(point)
    bench.check(point.label, shape.dtype, point.distance)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.empty(shape.batch, HEADS, shape.queries, HEAD_DIM, dtype=dtype, device=device).normal_()
    k, v = torch.empty(2, shape.batch, KEY_HEADS, shape.length, HEAD_DIM, dtype=dtype, device=device).normal_()
    return q, k, v


def _stock(bench: Bench, shape: Shape, sets: list) -> tuple[list[Contender], dict[str, str], list[str]]:
    """The backends of SDPA worth timing, why others are not, and notes. On a CPU: whatever SDPA picks there."""
    if not bench.stopwatch.on_gpu:
        return [Contender("sdpa", _sdpa(None, shape.is_causal))], {}, []
    # Flash is what prefill is compared with; it has no float32.
    backends = {"flash": BACKENDS["flash"]} if shape.is_causal and shape.dtype != "fp32" else BACKENDS
    runs, refused, notes = {}, {}, []
    for name, backend in backends.items():
        call = _sdpa(backend, shape.is_causal)
        try:
            runs[name] = (call, _once_us(call, sets))
        except RuntimeError as grouped:
            repeated_bytes = len(sets) * 2 * sets[0][1].nbytes * (HEADS // KEY_HEADS)
            if isinstance(grouped, torch.OutOfMemoryError) or repeated_bytes > MAX_REPEATED_BYTES:
                refused[name] = reason(grouped)
                continue
            try:
                call = _with_repeated_heads(call, sets)
                runs[name] = (call, _once_us(call, sets))
                notes.append(f"{name} refuses grouped heads: its key heads were repeated beforehand")
            except RuntimeError as error:
                refused[name] = reason(error)
    fastest = min((us for _, us in runs.values()), default=0.0)
    for name in [name for name, (_, us) in runs.items() if us > MAX_SLOWER * fastest]:
        refused[name] = f"not timed further: {runs.pop(name)[1] / fastest:.0f} times slower than the fastest in one call"
    return [Contender(name, call, required=False) for name, (call, _) in runs.items()], refused, notes


def _sdpa(backend: SDPBackend | None, is_causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)

    return call


def _with_repeated_heads(call: Callable, sets: list) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    group = HEADS // KEY_HEADS
    repeated = {id(k): tuple(x.repeat_interleave(group, 1) for x in (k, v)) for _, k, v in sets}
    return lambda q, k, v: call(q, *repeated[id(k)])


def _once_us(call: Callable, sets: list) -> float:
    """Microseconds of one call after a first one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the backends' reasons for refusing, one warning each
        call(*sets[0])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(*sets[-1])
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
