"""``x @ w.t()`` as linear layers have it, over stock ``torch.mm`` (cuBLAS with its default settings)."""

import dataclasses

import torch
from measurements import OURS, STOCK, Point
from timing import Contender

from cases import DTYPES, Bench, peers

WEIGHTS = ((4096, 4096), (4096, 12288), (12288, 4096), (1024, 3072), (4096, 151936))
"""(K, N)."""
ROWS = (1, 8, 32, 128, 512, 4096)


@dataclasses.dataclass(frozen=True)
class Product:
    dtype: str
    K: int
    N: int
    M: int

    def __str__(self) -> str:
        return f"mm {self.dtype} K={self.K} N={self.N} M={self.M}"


def run(bench: Bench) -> None:
    quick = bench.options.quick
    weights, rows = (((64, 96), (100, 77)), (1, 8)) if quick else (WEIGHTS, ROWS)
    gemm = bench.kernels.gemm
    contenders = (
        Contender(STOCK, lambda x, w: torch.mm(x, w.t())),
        Contender(OURS, lambda x, w: gemm(x[None], w.t()[None])[0]),
        *peers.contenders("mm"),
    )
    store = _Weights(bench)

    def measure(product: Product) -> None:
        dtype = DTYPES[product.dtype]
        M, K, N = product.M, product.K, product.N
        plan = bench.stopwatch.rotation((M * K + N * K) * dtype.itemsize)
        x = torch.empty(plan.sets, M, K, dtype=dtype, device=bench.device).normal_()
        w = store.get(K, N, dtype)[: plan.sets]
        found = bench.stopwatch.measure(contenders, list(zip(x, w, strict=True)), plan.rounds)
        point = Point(
            work="mm",
            dtype=product.dtype,
            sizes={"K": K, "N": N, "M": M},
            timings=found.timings,
            distance=found.distances[OURS],
            refused=found.refused,
        )
        bench.result.points.append(point)
        bench.check(point.label, product.dtype, point.distance)

    bench.plan((Product(name, K, N, M) for name in bench.options.dtypes for K, N in weights for M in rows), measure)


class _Weights:
    """The weights of one (K, N), made once for all M: as many as the smallest M rotates among."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._key, self._weights = bench, None, None

    def get(self, K: int, N: int, dtype: torch.dtype) -> torch.Tensor:
        if self._key != (K, N, dtype):
            self._weights = None  # first, so that two of them need not fit
            sets = self._bench.stopwatch.rotation((N + 1) * K * dtype.itemsize).sets
            weights = torch.empty(sets, N, K, dtype=dtype, device=self._bench.device)
            self._key, self._weights = (K, N, dtype), weights.normal_().mul_(K**-0.5)
        return self._weights
