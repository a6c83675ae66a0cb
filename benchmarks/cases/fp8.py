"""``scaled_mm`` in float8_e4m3fn with a scale for each row and each column, over stock ``torch._scaled_mm``, into bf16."""

import dataclasses

import torch
from measurements import OURS, STOCK, Point
from timing import Contender

from cases import Bench
from cases.gemm import ROWS, WEIGHTS

LARGEST = 448.0
"""Of float8_e4m3fn. Scales bring each row's largest value to it, as quantisers of rows do."""


@dataclasses.dataclass(frozen=True)
class Product:
    K: int
    N: int
    M: int

    def __str__(self) -> str:
        return f"scaled_mm K={self.K} N={self.N} M={self.M}"


def run(bench: Bench) -> None:
    if bench.device.type == "cuda" and torch.cuda.get_device_capability(bench.device) < (8, 9):
        bench.result.not_run.append("this GPU has no products of 8-bit floats: they need compute capability 8.9 or more")
        return
    quick = bench.options.quick
    weights, rows = (((64, 96), (112, 80)), (1, 8)) if quick else (WEIGHTS, ROWS)
    scaled_gemm = bench.kernels.scaled_gemm
    contenders = (
        Contender(STOCK, lambda x, w, scale_x, scale_w: torch._scaled_mm(x, w.t(), scale_x, scale_w, out_dtype=torch.bfloat16)),
        Contender(OURS, lambda x, w, scale_x, scale_w: scaled_gemm(x, w.t(), scale_x, scale_w, None, torch.bfloat16)),
    )

    def measure(product: Product) -> None:
        M, K, N = product.M, product.K, product.N
        plan = bench.stopwatch.rotation(M * K + N * K)
        sets = [(*_quantised(M, K, bench.device), *_quantised(N, K, bench.device)) for _ in range(plan.sets)]
        given = [(x, w, scale_x, scale_w.t().contiguous()) for x, scale_x, w, scale_w in sets]
        found = bench.stopwatch.measure(contenders, given, plan.rounds)
        point = Point(
            work="scaled_mm",
            dtype="fp8",
            sizes={"K": K, "N": N, "M": M},
            timings=found.timings,
            distance=found.distances[OURS],
            refused=found.refused,
        )
        bench.result.points.append(point)
        bench.check(point.label, "bf16", point.distance)

    bench.plan((Product(K, N, M) for K, N in weights for M in rows), measure)


def _quantised(rows: int, K: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in 8 bits, and the scale of each."""
    x = torch.empty(rows, K, device=device).normal_().mul_(K**-0.25)
    scale = x.abs().amax(1, keepdim=True) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale
