"""Is what the kernels rely on true on this GPU? One bit pattern for all tiles, and for a row, whatever is around it.

    python benchmarks/class_check.py --out class-check.json
    python benchmarks/class_check.py --out class-check-sm80.json --ptx-of 80    # an A100's own instructions, on a later GPU

Each check compares bits and counts them ("near fp64" compares values). A count of mismatches above 0 means that the
tile tables in ``kernels/tiles.py`` must not be used on this GPU with these versions. The exit status is 1 then.

``TRITON_INTERPRET=1 python benchmarks/class_check.py --device cpu --tiny`` runs the script without a GPU. Its counts
mean nothing then: the interpreter leaves products to numpy, which has no one order, and takes bf16 for integers.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from pytest_batchinv.kernels import cuda, plans, reference, tiles
from pytest_batchinv.kernels.cuda import implicit_gemm, matmul, scaled
from pytest_batchinv.kernels.cuda.attention import plan as attention_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
import other_gpus
import summation_order

M_VALUES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128, 129, 200, 255, 256, 299, 300)
ROW_COUNTS = (1, 2, 3, 7, 16, 17, 64, 129, 1000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class Report:
    """Counts of comparisons and of mismatches by check, and where the first mismatches were."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.mismatches: list[dict[str, object]] = []
        self.cut_short: list[str] = []
        self.notes: list[str] = []

    def same(self, check: str, got: object, want: object, **where: object) -> None:
        """Compares bits, NaN with NaN too; each tensor of a tuple counts."""
        for index, (x, y) in enumerate(zip(_tuple(got), _tuple(want), strict=True)):
            count = self.counts.setdefault(check, [0, 0])
            count[0] += 1
            if x.shape != y.shape or x.dtype != y.dtype:
                raise AssertionError(f"{check}: compares {x.shape} {x.dtype} with {y.shape} {y.dtype}.")
            different = int((_bits(x) != _bits(y)).sum())
            if different:
                count[1] += 1
                where = {name: str(value) for name, value in where.items()}
                self.mismatches.append({"check": check, "output": index, **where, "different": different, "of": x.numel()})

    def near(self, check: str, got: object, want: object, eps: float = 0.0, **where: object) -> None:
        """An accuracy check, so that a kernel that is constantly wrong is not taken for an invariant one."""
        count = self.counts.setdefault(check, [0, 0])
        count[0] += 1
        for x, y in zip(_tuple(got), _tuple(want), strict=True):
            exact = y.double().nan_to_num(1e9)
            error = (x.double().nan_to_num(1e9) - exact).abs().max().item() / max(1.0, exact.abs().max().item())
            if error > 16 * max(torch.finfo(x.dtype).eps, eps):
                count[1] += 1
                where = {name: str(value) for name, value in where.items()}
                self.mismatches.append({"check": check, **where, "error": error})
                return

    def add(self, other: "Report") -> None:
        for check, (compared, mismatches) in other.counts.items():
            count = self.counts.setdefault(check, [0, 0])
            count[0] += compared
            count[1] += mismatches
        self.mismatches += other.mismatches
        self.cut_short += other.cut_short
        self.notes += other.notes


class Clock:
    """The time that a section may take; one that runs out says so instead of running on."""

    def __init__(self, report: Report, section: str, seconds: float) -> None:
        self.report, self.section, self.end = report, section, time.monotonic() + seconds

    def over(self) -> bool:
        if time.monotonic() < self.end:
            return False
        if self.section not in self.report.cut_short:
            self.report.cut_short.append(self.section)
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that the interpreter can bear")
    parser.add_argument("--seconds", type=float, default=150.0, help="how long all may take; sections share it")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="sections at a time, each a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS)
    )
    parser.add_argument(
        "--ptx-of", type=int, metavar="80", help="run the PTX that Triton generates for this older compute capability"
    )
    args = parser.parse_args()

    device = torch.device(args.device)
    report, seconds = Report(), {}
    started = time.monotonic()
    # Most of the time goes into compiling, one kernel after the other, so the sections share the GPU.
    context = multiprocessing.get_context("spawn")
    jobs = min(args.jobs, len(args.only))
    args.seconds /= math.ceil(len(args.only) / jobs)  # of one section
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        results = {name: pool.submit(run_section, name, args) for name in args.only}
        for name, result in results.items():
            try:
                mine, seconds[name] = result.result()
                report.add(mine)
            except Exception as error:  # the other sections' results are still of use
                report.counts[f"section {name}"] = [1, 1]
                report.mismatches.append({"check": f"section {name}", "error": repr(error)[:500]})

    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "kernels_compiled_for": args.ptx_of or "this GPU",
        "seed": args.seed,
        "tiny": args.tiny,
        "seconds": {**seconds, "all": round(time.monotonic() - started, 1)},
        "cut_short": report.cut_short,
        "checks": {name: {"compared": c, "mismatches": m} for name, (c, m) in report.counts.items()},
        "mismatches": report.mismatches[:200],
        "notes": report.notes,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    failed = sum(m for _, m in report.counts.values())
    for mismatch in report.mismatches[:20]:
        print(json.dumps(mismatch))
    print(f"{record['device']}, torch {record['torch']}, triton {record['triton']}, {record['seconds']['all']} s")
    if report.cut_short:
        print("out of time, so not all was checked:", ", ".join(report.cut_short))
    for note in report.notes:
        print(note)
    print(f"{'check':42} compared  mismatches")
    for name, (compared, mismatches) in report.counts.items():
        print(f"{name:42} {compared:8}  {mismatches:10}")
    return 1 if failed else 0


def run_section(name: str, args: argparse.Namespace) -> tuple[Report, float]:
    """What it found, and the seconds it took."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    report, begin = Report(), time.monotonic()
    clock = Clock(report, name, args.seconds)
    with torch.device(device), other_gpus.running_ptx_of(args.ptx_of) if args.ptx_of else nullcontext():
        SECTIONS[name](report, clock, args.tiny)
    return report, round(time.monotonic() - begin, 1)


# --- orders ----------------------------------------------------------------------------------------------------------


def check_order(dtype: torch.dtype, report: Report, clock: Clock, tiny: bool) -> None:
    """The order of additions itself, for every tile, number of rows and alignment; and how far it is from a chain."""
    count = 64 if tiny else 2048
    # The product carries the planted value, as float16 itself ends below it.
    scale = 2.0**12 if dtype == torch.float16 else 1.0
    large = summation_order.LARGE if dtype != torch.float64 else summation_order.LARGE_FLOAT64
    for K in (40,) if tiny else (40, 65, 256, 1000, 4096):
        places = summation_order.probes(K, count, seed=K)
        b = summation_order.planted(places, K, large / scale, 1 / scale).to(dtype).to(torch.zeros(()).device)
        _check_product_order(report, clock, b, scale, summation_order.survives_in_a_chain(places), {"dtype": dtype, "K": K})


def _check_product_order(report: Report, clock: Clock, b: Tensor, scale: float, chain: Tensor, where: dict) -> None:
    N, K = b.shape
    wanted = None
    for aligned in (True, False):
        w = _shifted(b[None], 0 if aligned else 1)
        for M in (1, 2, 16, 17, 64, 129, 300):
            a = _shifted(torch.full((1, M, K), scale, dtype=b.dtype), 0 if aligned else 1)
            for tile in tiles.gemm_class(b.dtype, b.device):
                if clock.over():
                    return
                if tile.tma and not _fit_tma(a, w.mT):
                    continue
                fitting = _fitting(tile, a)
                with _patched(matmul, "gemm_tile", lambda *args, tile=fitting: tile):
                    got = cuda.gemm(a, w.mT)[0]
                if wanted is None:
                    wanted = got[:1]
                    differs = int((wanted[0].cpu().bool() != chain).sum())
                    report.notes.append(f"order of a product, {where}: {differs} of {N} probes differ from one chain")
                where_here = {"M": M, "tile": tuple(tile), "aligned": aligned, **where}
                report.same("order: product", got, wanted.expand(M, N), **where_here)
                if not tile.tma and M in (2, 129):
                    ends = torch.tensor([M // 2, M // 2, M], dtype=torch.int32)
                    with _patched(matmul, "gemm_tile", lambda *args, tile=fitting: tile):
                        got = cuda.grouped_gemm(a[0], w.mT.expand(3, -1, -1), ends)
                    report.same("order: grouped product", got, wanted.expand(M, N), **where_here)


def check_attention_order(report: Report, clock: Clock, tiny: bool) -> None:
    """The order over the keys: all weights are 1, so the planted values are summed, for any queries and division of keys."""
    S, heads, D = (150, 2, 16) if tiny else (3000, 8, 128)
    places = summation_order.probes(S, heads * D)
    planted = summation_order.planted(places, S).view(heads, D, S).mT.to(torch.zeros(()).device)
    for dtype in (torch.bfloat16, torch.float32):
        v, k = planted[None].to(dtype), _randn(1, heads, S, D, dtype=dtype)
        wanted = None
        for Sq in (1, 5, 17) if tiny else (1, 5, 16, 17, 64, 65, 128, 700):
            q = torch.zeros(1, 4 * heads, Sq, D, dtype=dtype)
            seen = torch.ones(1, 4 * heads, Sq, S, dtype=torch.bool)
            for mask in (None, seen, torch.zeros(seen.shape, dtype=dtype)):
                for view in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: _shifted(x, 1)):
                    if clock.over():
                        return
                    got = cuda.attention(view(q), view(k), view(v), mask, False, 0.1)[0]
                    if wanted is None:
                        wanted = got[:, ::4, :1]
                        survived = (wanted != 0).mT.reshape(-1)[: len(places)].cpu()
                        differs = int((survived != summation_order.survives_in_a_chain(places)).sum())
                        report.notes.append(f"order of attention, {dtype}: {differs} of {len(places)} differ from one chain")
                    want = wanted.repeat_interleave(4, 1).expand(got.shape)
                    report.same("order: attention", got, want, dtype=dtype, queries=Sq, mask=mask is not None)


# --- products --------------------------------------------------------------------------------------------------------


def check_gemm(dtype: torch.dtype, report: Report, clock: Clock, tiny: bool) -> None:
    """All tiles of the table on one shape; then every M with the tile it gets, from any positions in the batch."""
    _check_long_grids(dtype, report, tiny)
    most = 40 if tiny else 300
    for _ in range(1 if tiny else 8):
        # A weight as linear layers have it, an odd one, one that is not transposed; other shapes at every turn.
        for aligned, transposed in ((True, True), (False, True), (True, False), (False, False)):
            if clock.over():
                return
            K, N = _gemm_sizes(dtype, aligned, tiny)
            a = _shifted(_randn(1, most, K, dtype=dtype), 0 if aligned else 1)
            b = _randn(1, N, K, dtype=dtype).mT if transposed else _randn(1, K, N, dtype=dtype)
            bias = _randn(N, dtype=dtype)
            where = {"dtype": dtype, "K": K, "N": N, "transposed": transposed, "aligned": aligned}
            _check_gemm_shape(report, clock, a, b, bias, where)


def _check_long_grids(dtype: torch.dtype, report: Report, tiny: bool) -> None:
    """More matrices, and more blocks of columns, than the second and third axis of a grid can have."""
    most, K = (50 if tiny else matmul.LONGEST_AXIS + 5000), 24
    a, b = _randn(most, 2, K, dtype=dtype), _randn(1, K, 40, dtype=dtype)
    want = cuda.gemm(a.view(1, 2 * most, K), b).view(most, 2, 40)
    report.same("gemm: a long batch", cuda.gemm(a, b.expand(most, -1, -1)), want, dtype=dtype, batch=most)
    b = _randn(1, 128 * most, K, dtype=dtype).mT
    halves = [cuda.gemm(a[:1], half) for half in b.split(64 * most, dim=2)]
    report.same("gemm: many columns", cuda.gemm(a[:1], b), torch.cat(halves, dim=2), dtype=dtype, N=128 * most)


def _check_gemm_shape(report: Report, clock: Clock, a: Tensor, b: Tensor, bias: Tensor, where: dict) -> None:
    most, N, dtype = a.shape[1], b.shape[2], a.dtype
    want = cuda.gemm(a, b)
    # As many roundings as a chain of K in the result's own dtype is away; 16 bits are rounded once, at its end.
    eps = math.sqrt(a.shape[2]) * torch.finfo(dtype).eps if dtype.itemsize >= 4 else 0.0
    report.near("gemm: near fp64", want, reference.gemm(a, b), eps=eps, **where)
    for tile in tiles.gemm_class(dtype, a.device):
        if clock.over():
            return
        if tile.tma and not _fit_tma(a, b):
            continue
        fitting = _fitting(tile, a)
        with _patched(matmul, "gemm_tile", lambda *args, tile=fitting: tile):
            report.same("gemm: tiles", cuda.gemm(a, b), want, tile=tuple(tile), **where)
            if _fit_tma(a[:, 5:6], b) or not tile.tma:
                report.same("gemm: tiles, one row", cuda.gemm(a[:, 5:6], b), want[:, 5:6], tile=tuple(tile), **where)
    order = torch.randperm(most)
    with_bias = cuda.gemm(a, b, bias.expand(1, most, N), 0.5, 2.0)
    for M in (M for M in M_VALUES if M <= most):
        if clock.over():
            return
        rows = order[:M]
        report.same("gemm: M first rows", cuda.gemm(a[:, :M], b), want[:, :M], M=M, **where)
        report.same("gemm: M last rows", cuda.gemm(a[:, most - M :], b), want[:, most - M :], M=M, **where)
        report.same("gemm: M rows in any order", cuda.gemm(a[:, rows], b), want[:, rows], M=M, **where)
        if M in (1, 17, 200):
            got = cuda.gemm(a[:, rows], b, bias.expand(1, M, N), 0.5, 2.0)
            report.same("gemm: alpha, beta, bias", got, with_bias[:, rows], M=M, **where)
    report.same("gemm: batch of 3", cuda.gemm(a.expand(3, -1, -1), b.expand(3, -1, -1))[2:], want, **where)
    strided = torch.zeros(1, most, 2 * a.shape[2], dtype=dtype)[:, :, ::2].copy_(a)
    report.same("gemm: strided a", cuda.gemm(strided, b), want, **where)
    report.same("gemm: transposed a", cuda.gemm(a.mT.contiguous().mT, b), want, **where)


def check_gemm_edges(dtype: torch.dtype, report: Report, clock: Clock, tiny: bool) -> None:
    """All tiles on products of one row, one column, one term, and of fewer terms than a block; every layout by turns."""
    sizes = ((1, 1), (1, 40), (5, 48), (20, 1), (24, 40), (63, 33), (72, 96), (130, 17))  # K, N
    for turn, (K, N) in enumerate(sizes[:3] if tiny else sizes):
        a, w, bias = _randn(1, 40, K, dtype=dtype), _randn(1, N, K, dtype=dtype), _randn(N, dtype=dtype)
        want = cuda.gemm(a, w.mT)
        report.near("gemm: near fp64", want, reference.gemm(a, w.mT), eps=torch.finfo(dtype).eps, dtype=dtype, K=K, N=N)
        want_with_bias = cuda.gemm(a, w.mT, bias.expand(1, 40, N), 0.5, 2.0)
        views = {
            "as they are": (a, w.mT),
            "b by rows": (a, w.mT.contiguous()),
            "shifted": (_shifted(a, 1), _shifted(w, 1).mT),
            "wider rows": (_wider(a), _wider(w).mT),
            "strided": (_strided(a), _strided(w).mT),
            "a by columns": (a.mT.contiguous().mT, _wider(w.mT.contiguous())),
        }
        # Each layout is another binary: the first for every size, the others by turns.
        names = ["as they are", *(name for i, name in enumerate(list(views)[1:]) if i % 2 == turn % 2)]
        for tile in tiles.gemm_class(dtype, a.device):
            for name in names:
                x, b = views[name]
                if clock.over():
                    return
                fitting = _fitting(tile, x)
                where = {"tile": tuple(tile), "dtype": dtype, "K": K, "N": N, "layout": name}
                with _patched(matmul, "gemm_tile", lambda *args, tile=fitting: tile):
                    for rows in (slice(0, 40), slice(39, 40)):
                        if tile.tma and not _fit_tma(x[:, rows], b):
                            continue
                        report.same("gemm: edges", cuda.gemm(x[:, rows], b), want[:, rows], rows=rows, **where)
                    if name == "as they are" and (not tile.tma or _fit_tma(x, b)):
                        got = cuda.gemm(x, b, bias.expand(1, 40, N), 0.5, 2.0)
                        report.same("gemm: edges, bias", got, want_with_bias, **where)


def check_tuned_sizes(dtype: torch.dtype, report: Report, clock: Clock, tiny: bool) -> None:
    """With a bias, and up to as many rows as make several tiles a program; some of them against these rows alone."""
    sizes = {(64, 48): (1, 40)} if tiny else next(iter(tiles.TUNED_GEMM.values()))
    for (K, N), row_counts in sizes.items():
        b, aligned = _randn(1, N, K, dtype=dtype).mT, _randn(N, dtype=dtype)
        for turn, M in enumerate(row_counts):
            if clock.over():
                return
            a, bias = _randn(1, M, K, dtype=dtype), _shifted(aligned, turn % 2)
            got = cuda.gemm(a, b, bias.expand(1, M, N), 0.5, 2.0)
            for rows in (slice(0, min(M, 7)), slice(M // 2, M // 2 + 16), slice(max(0, M - 33), M)):
                some = a[:, rows]
                want = cuda.gemm(some, b, bias.expand(1, some.shape[1], N), 0.5, 2.0)
                report.same("gemm: tuned sizes, bias", got[:, rows], want, dtype=dtype, K=K, N=N, M=M, rows=rows)


def check_grouped_gemm(report: Report, clock: Clock, tiny: bool) -> None:
    """Each group against ``gemm`` of its rows: a token's bits do not depend on who else went to its expert."""
    T, G, K, N = (40, 3, 64, 48) if tiny else (300, 8, 512, 384)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = _randn(T, K, dtype=dtype), _randn(G, N, K, dtype=dtype).mT
        for _ in range(2 if tiny else 6):
            if clock.over():
                return
            ends = torch.randint(0, T + 1, (G,)).sort().values.to(torch.int32)
            got, start = cuda.grouped_gemm(a, b, ends), 0
            for group, end in enumerate(ends.tolist()):
                if end > start:
                    want = cuda.gemm(a[None, start:end], b[None, group])[0]
                    report.same("grouped_gemm: as gemm", got[start:end], want, dtype=dtype, rows=end - start)
                start = end
            report.same("grouped_gemm: rows behind", got[start:], torch.zeros_like(got[start:]), dtype=dtype)


def check_scaled(report: Report, clock: Clock, tiny: bool) -> None:
    """Products of 8-bit floats: every number of rows up to 300, both tiles, scales of all kinds, groups as plain ones."""
    capability = tiles.device_of(torch.zeros(()).device).capability
    if torch.zeros(()).device.type == "cuda" and capability < 89:
        report.notes.append(f"scaled products: not run, as compute capability {capability / 10} has none of 8-bit floats")
        return
    most, e4m3, e5m2 = (70 if tiny else 300), torch.float8_e4m3fn, torch.float8_e5m2
    sizes = ((48, 400),) if tiny else ((256, 2048), (1024, 496), (384, 4096))
    mixes = ((e4m3, e4m3), (e4m3, e5m2), (e5m2, e4m3))
    for (N, K), dtypes, form in itertools.product(sizes, mixes, ("rows", "blocks", "blocks of columns")):
        where = {"N": N, "K": K, "dtypes": dtypes, "form": form}
        a, b = _randn(most, K, dtype=dtypes[0]), _randn(N, K, dtype=dtypes[1]).t()
        groups, columns = (1, N) if form == "rows" else (-(-K // 128), N if form == "blocks" else -(-N // 128))
        scale_a, scale_b, bias = torch.rand(most, groups) + 0.1, torch.rand(groups, columns) + 0.1, torch.randn(N)
        out_dtype = torch.float32  # so that no rounding of the result hides a bit
        whole = cuda.scaled_gemm(a, b, scale_a, scale_b, bias, out_dtype)
        exact = reference.scaled_gemm(a, b, scale_a, scale_b, bias, out_dtype)
        report.near("scaled gemm: near fp64", whole, exact, eps=1e-4, **where)
        for M in range(1, most + 1) if form == "rows" or tiny else (*range(1, 130, 7), 64, 65, 128, 129, 257):
            if clock.over():
                return
            first = most - M  # the last ones, so that a row has other places in its tile
            some = cuda.scaled_gemm(a[first:], b, scale_a[first:], scale_b, bias, out_dtype)
            report.same("scaled gemm: rows", some, whole[first:], M=M, **where)
        for block_m, tma in itertools.product((64, 128), {False, tiles.device_of(a.device).has_tma}):
            tile = tiles.Tile(block_m, 128, 128, block_m // 16, 3, tma)
            with _patched(scaled, "scaled_tile", lambda *args, tile=tile: tile):
                got = cuda.scaled_gemm(a, b, scale_a, scale_b, bias, out_dtype)
                report.same("scaled gemm: tiles", got, whole, tile=tuple(tile), **where)
        strided = cuda.scaled_gemm(_wider(a), b.contiguous(), scale_a, scale_b, bias, out_dtype)
        report.same("scaled gemm: strides", strided, whole, **where)
        if form == "rows":
            _check_scaled_groups(report, clock, a, b, scale_a, scale_b, where)


def _check_scaled_groups(report, clock, a, b, scale_a, scale_b, where) -> None:
    """Rows of groups, and groups of the summed dim, against the plain product; where one group has everything, and some."""
    (T, K), dtype = a.shape, torch.float32
    wide = b.t().float()  # which every device can turn round
    experts = torch.stack([wide, wide.flip(0)]).to(b.dtype).mT
    scales = torch.stack([scale_b[0], scale_b[0].flip(0)])
    for end in (0, 1, 63, 64, 65, T // 2, T):
        if clock.over():
            return
        offs = torch.tensor([min(end, T), T], dtype=torch.int32)
        got, start = cuda.scaled_grouped_gemm(a, experts, scale_a[:, 0], scales, offs, dtype), 0
        for group, stop in enumerate(offs.tolist()):
            if stop > start:
                mine = scale_a[start:stop], scales[group][None]
                want = cuda.scaled_gemm(a[start:stop], experts[group], *mine, None, dtype)
                report.same("scaled grouped gemm: as scaled gemm", got[start:stop], want, end=end, group=group, **where)
            start = stop
    for end in (0, 16, 100, 128, K // 2, K):
        offs = torch.tensor([min(end, K), K], dtype=torch.int32)
        both = scale_a[:, 0].expand(2, T), scales
        got, start = cuda.scaled_grouped_gemm_over_k(a, b, *both, offs, dtype), 0
        for group, stop in enumerate(offs.tolist()):
            mine = scale_a, scales[group][None]
            want = cuda.scaled_gemm(a[:, start:stop], b[start:stop], *mine, None, dtype)
            report.same("scaled grouped gemm over k: as scaled gemm", got[group], want, end=end, group=group, **where)
            start = stop


@contextmanager
def _convolving(form: tuple[tiles.Tile, bool]) -> Iterator[None]:
    """With this tile through pointers, or this run, wherever it fits."""
    tile, of_images = form
    with (
        _patched(implicit_gemm, "convolution_tile", lambda *args: tile),
        _patched(implicit_gemm, "convolution_run", lambda *args: (tile, of_images)),
        _patched(implicit_gemm, "pointwise_tile", lambda *args: tile._replace(block_m=64)),
        _patched(implicit_gemm, "_fits_tma", (lambda *args, fits=implicit_gemm._fits_tma: tile.tma and fits(*args))),
    ):
        yield


def _convolution_forms(dtype: torch.dtype, x: Tensor, terms: int) -> list[tuple[tiles.Tile, bool]]:
    """Tiles of products, and runs for TMA."""
    forms = [(_fitting(tile, x), False) for tile in tiles.GEMM_TILES[dtype]]
    if dtype.itemsize == 2 and tiles.device_of(x.device).has_tma and terms % 32 == 0:
        sizes = itertools.product((16, 32, 64, 128), (64, 128), (32, 64, 128), (3, 5), (False, True))
        runs = [(tiles.Tile(m, n, k, 4 if m < 128 else 8, s, True), images) for m, n, k, s, images in sizes if terms % k == 0]
        forms += [(_fitting(tile, x), images) for tile, images in runs]
    return forms


def check_convolution(report: Report, clock: Clock, tiny: bool) -> None:
    """Every tile, both formats, alone and in a batch, against the product of unfolded rows; channels last as torch has them."""
    batch, side = (2, 5) if tiny else (70, 14)
    layers: tuple[tuple[int, ...], ...] = (
        (64, 64, 3, 1, 1, 1),
        (3, 64, 7, 2, 3, 1),
        (48, 80, 3, 2, 1, 1),
        (128, 32, 1, 2, 0, 1),
        (64, 24, 1, 1, 0, 1),
    )
    layers += ((256, 256, 3, 1, 1, 1), (3, 40, 4, 4, 0, 1), (32, 32, 3, 1, 1, 32), (128, 64, 3, 1, 1, 2))
    formats = torch.contiguous_format, torch.channels_last
    for dtype, (channels, out, taps, stride, padding, groups) in itertools.product(DTYPES, layers[:3] if tiny else layers):
        where = {"dtype": dtype, "layer": (channels, out, taps, stride, padding, groups)}
        how = (stride,) * 2, (padding,) * 2, (1, 1), groups
        x, weight = _randn(batch, channels, side, side, dtype=dtype), _randn(out, channels // groups, taps, taps, dtype=dtype)
        bias = _randn(out, dtype=dtype)
        view = F.pad(x, [padding] * 4).unfold(2, taps, stride).unfold(3, taps, stride).unflatten(1, (groups, -1))
        rows = view.permute(1, 0, 3, 4, 5, 6, 2).reshape(groups, -1, taps * taps * channels // groups)
        kernel = weight.unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1).reshape(groups, rows.shape[2], -1)
        pixels = view.shape[3:5]
        product = cuda.gemm(rows, kernel, bias.view(groups, 1, -1).expand(groups, rows.shape[1], out // groups))
        want = product.view(groups, batch, *pixels, -1).permute(1, 0, 4, 2, 3).flatten(1, 2)
        report.near("convolution: near fp64", want, reference.convolution(x, weight, bias, *how), **where)
        for x_format, weight_format in itertools.product(formats, formats):
            given = x.to(memory_format=x_format), weight.to(memory_format=weight_format)
            for form in _convolution_forms(dtype, x, channels // groups):
                if clock.over():
                    return
                with _convolving(form):
                    for _ in range(3):  # a race need not show at once
                        got = cuda.convolution(*given, bias, *how)
                        report.same("convolution: as the product of rows", got, want, form=form, **where)
            for i in range(batch):
                report.same(
                    "convolution: alone", cuda.convolution(given[0][i : i + 1], given[1], bias, *how), want[i : i + 1], **where
                )
            if x.is_cuda:
                strides = F.conv2d(*given, bias, *how).stride()
                if got.stride() != strides:
                    report.notes.append(f"convolution {where} {x_format} {weight_format}: {got.stride()}, torch's {strides}")


def _gemm_sizes(dtype: torch.dtype, aligned: bool, tiny: bool) -> tuple[int, int]:
    """K and N: multiples of 64 and 16, or neither of any power of two above 1."""
    largest_k = 192 if tiny else 8192 if dtype.itemsize == 2 else 2048
    largest_n = 64 if tiny else 1024
    if aligned:
        return 64 * _between(1, largest_k // 64), 16 * _between(1, largest_n // 16)
    return 2 * _between(0, largest_k // 2 - 1) + 1, 2 * _between(0, largest_n // 2) + 1


def _fit_tma(a: Tensor, b: Tensor) -> bool:
    aligned = a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0
    return aligned and matmul.Sizes.of(a.shape, a.stride(), b.shape, b.stride()).fit_tma()


def _fitting(tile: tiles.Tile, a: Tensor) -> tiles.Tile:
    """The tile with as many stages as fit on the device, as the launcher would have it."""
    stage = (tile.block_m + tile.block_n) * tile.block_k * a.dtype.itemsize
    return tile._replace(num_stages=tiles._stages(tile.num_stages, stage, 0, a.device))


# --- rows ------------------------------------------------------------------------------------------------------------


def _columns(x: Tensor) -> Tensor:
    """Of every row the first, the middle and the last one."""
    return (torch.arange(3, device=x.device) * (x.shape[1] - 1) // 2).expand(x.shape[0], 3)


ROW_FUNCTIONS: dict[str, Callable[[ModuleType, Tensor, Tensor], object]] = {
    "row_sum": lambda s, x, w: s.row_sum(x, x.dtype),
    "row_mean": lambda s, x, w: s.row_mean(x, x.dtype),
    "row_mean_of_squares": lambda s, x, w: s.row_mean_of_squares(x, reference.accumulator_dtype(x.dtype)),
    "row_norm, p = 1": lambda s, x, w: s.row_norm(x, 1, x.dtype),
    "row_norm, p = 2": lambda s, x, w: s.row_norm(x, 2, x.dtype),
    "row_var_mean": lambda s, x, w: s.row_var_mean(x, 1.0, x.dtype),
    "row_logsumexp": lambda s, x, w: s.row_logsumexp(x, x.dtype),
    "row_softmax": lambda s, x, w: s.row_softmax(x, False, x.dtype),
    "row_softmax, log": lambda s, x, w: s.row_softmax(x, True, x.dtype),
    "row_logprobs": lambda s, x, w: s.row_logprobs(x, _columns(x), x.dtype),
    "row_cumsum": lambda s, x, w: s.row_cumsum(x, x.dtype),
    "row_layer_norm": lambda s, x, w: s.row_layer_norm(x, w[0], w[1], 1e-5),
    "row_rms_norm": lambda s, x, w: s.row_rms_norm(x, w[0], 1e-6),
}


def check_rows(report: Report, clock: Clock, tiny: bool) -> None:
    """The same rows alone, in batches, at odd addresses, with other strides."""
    most = 20 if tiny else 1000
    for n_cols in (64, 100) if tiny else (1, 64, 100, 128, 1000, 1024, 4096, 5000):
        for dtype in (torch.bfloat16, torch.float32):
            x, w = _randn(most, n_cols, dtype=dtype), _randn(2, n_cols, dtype=dtype)
            for name, call in ROW_FUNCTIONS.items():
                if clock.over():
                    return
                where = {"dtype": dtype, "n_cols": n_cols}
                want = _tuple(call(cuda, x, w))
                eps = 1e-6 if dtype == torch.float32 else 0.0
                report.near(f"{name}: near fp64", want, call(reference, x, w), eps=eps, **where)
                for count in (count for count in ROW_COUNTS if count <= most):
                    start = _between(0, most - count)
                    rows = slice(start, start + count)
                    expected = tuple(out[rows] for out in want)
                    report.same(f"{name}: rows", call(cuda, x[rows], w), expected, rows=count, **where)
                    odd = _shifted(x[rows], 1)
                    report.same(f"{name}: odd address", call(cuda, odd, w), expected, rows=count, **where)
                transposed = x[:17].T.contiguous().T
                report.same(f"{name}: transposed", call(cuda, transposed, w), tuple(out[:17] for out in want), **where)
                wide = torch.zeros(17, n_cols + 3, dtype=dtype)[:, 2 : n_cols + 2].copy_(x[:17])
                report.same(f"{name}: row stride", call(cuda, wide, w), tuple(out[:17] for out in want), **where)


def check_padding(report: Report, clock: Clock, tiny: bool) -> None:
    """Masked columns behind a row for softmax, zeros for sums, whatever follows for cumsum."""
    widths = (65, 128, 130) if tiny else (65, 127, 128, 129, 255, 256, 1000, 1024, 1025, 2048, 4096, 4097, 5000, 9000)
    for length in (3, 64, 128) if tiny else (1, 3, 17, 64, 96, 100, 128, 255, 1000, 1024, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            x = _randn(3, length, dtype=dtype)
            for width in (width for width in widths if width > length):
                if clock.over():
                    return
                where = {"dtype": dtype, "length": length, "width": width}
                masked = torch.nn.functional.pad(x, (0, width - length), value=-torch.inf)
                for log in (False, True):
                    got, want = cuda.row_softmax(masked, log, dtype)[:, :length], cuda.row_softmax(x, log, dtype)
                    report.same("padding: row_softmax", got, want, log=log, **where)
                got, want = cuda.row_logsumexp(masked, dtype), cuda.row_logsumexp(x, dtype)
                report.same("padding: row_logsumexp", got, want, **where)
                zeros = torch.nn.functional.pad(x, (0, width - length))
                report.same("padding: row_sum", cuda.row_sum(zeros, dtype), cuda.row_sum(x, dtype), **where)
                longer = torch.cat([x, _randn(3, width - length, dtype=dtype)], 1)
                got, want = cuda.row_cumsum(longer, dtype)[:, :length], cuda.row_cumsum(x, dtype)
                report.same("padding: row_cumsum", got, want, **where)


# --- attention -------------------------------------------------------------------------------------------------------


def check_attention(report: Report, clock: Clock, tiny: bool) -> None:
    shapes = [(torch.float32, 16, 16)] if tiny else [
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 64, 64),
        (torch.float16, 128, 128),
        (torch.float32, 64, 64),
        (torch.bfloat16, 80, 72),
        (torch.bfloat16, 256, 256),
        (torch.float32, 128, 128),
        (torch.float64, 64, 64),
    ]  # fmt: skip
    for dtype, D, DV in shapes:
        if clock.over():
            return
        H, Hkv, length = (2, 1, 40) if tiny else (8, 2, 1300)
        q, k = _randn(1, H, length, D, dtype=dtype), _randn(1, Hkv, length, D, dtype=dtype)
        v, scale = _randn(1, Hkv, length, DV, dtype=dtype), D**-0.5
        where: dict[str, object] = {"dtype": dtype, "D": D}
        want = cuda.attention(q, k, v, None, True, scale)
        eps = torch.finfo(dtype).eps  # the weights are rounded to it
        report.near("attention: near fp64", want, reference.attention(q, k, v, None, True, scale), eps=eps, **where)
        _check_attention_tiles(report, q, k, v, scale, want, where)
        _check_decode(report, clock, q, k, v, scale, want, where)
        for left in (1, 16, 37) if tiny else (0, 1, 37, 64, 212):
            for right in (0, 5) if tiny else (0, 1, 84):
                if clock.over():
                    return
                _check_padded(report, q, k, v, scale, want, left, right, where)


def check_few_programs(report: Report, clock: Clock, tiny: bool) -> None:
    """Some queries at once against each alone, where few programs divide the keys, or have more of them in flight."""
    lengths, counts = ((40,), (3,)) if tiny else ((130, 5000), (2, 8, 48))
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (16,) if tiny else (64, 128, 256)):
        for (H, key_heads), length, Sq in itertools.product(((8, 2), (64, 8), (32, 1)), lengths, counts):
            if clock.over():
                return
            q = _randn(1, H, Sq, D, dtype=dtype)
            k, v = _randn(1, key_heads, length, D, dtype=dtype), _randn(1, key_heads, length, D, dtype=dtype)
            seen = torch.arange(length) <= torch.arange(length - Sq, length)[:, None]
            for kind, mask in (("none", None), ("one mask", seen.expand(1, H, -1, -1)), ("each head", seen.repeat(1, H, 1, 1))):
                where = {"dtype": dtype, "D": D, "heads": (H, key_heads), "keys": length, "queries": Sq, "mask": kind}
                together = cuda.attention(q, k, v, mask, False, D**-0.5)
                for query in (slice(0, 1), slice(Sq // 2, Sq // 2 + 1), slice(Sq - 1, Sq)):
                    alone = cuda.attention(q[:, :, query], k, v, None if mask is None else mask[:, :, query], False, D**-0.5)
                    got = tuple(x[:, :, query] for x in together)
                    report.same("attention: few programs", got, alone, query=query.start, **where)


def _check_attention_tiles(report, q, k, v, scale, want, where) -> None:
    """Blocks of queries of every height, and heads packed into one tile or not."""
    chosen = tiles.attention_tile(q.dtype, max(q.shape[3], v.shape[3]), 1, q.device)
    heights = (16, 32, 64, 128) if q.dtype.itemsize == 2 and chosen.block_k <= 128 else (16, 32)
    for block_m in heights:
        warps = 8 if block_m * chosen.block_k >= 128 * 128 else 4
        tile = chosen._replace(block_m=block_m, num_warps=warps, num_stages=2)
        with _patched(attention_plan, "attention_tile", lambda *args, tile=tile, **_: tile):
            report.same("attention: tiles", cuda.attention(q, k, v, None, True, scale), want, block_m=block_m, **where)
    size = q.shape[2]
    mask = torch.ones(1, q.shape[1], size, size, dtype=torch.bool).tril()
    report.same("attention: a mask for each head", cuda.attention(q, k, v, mask, False, scale), want, **where)


DIVISIONS = ((0, 1), (1, 1), (1, 3), (8, 1), (8, 2))
"""How keys are divided among programs: blocks of a split (0: no splits), and splits of a program."""


def _divided(split_blocks: int, splits_per_program: int) -> Callable[..., attention_plan.Splits]:
    def division(programs: int, n_key_blocks: int, multiprocessors: int) -> attention_plan.Splits:
        num_splits = tiles.ceil_div(n_key_blocks, split_blocks) if split_blocks else 1
        return attention_plan.Splits(split_blocks, num_splits, splits_per_program)

    return division


def _check_decode(report, clock, q, k, v, scale, want, where) -> None:
    """One query at a time, from a cache that ends at it, and from a longer one; some queries at a time."""
    length = q.shape[2]
    for i in sorted({0, 1, 15, 31, 32, 63, 64, 127, 200, 511, 512, 513, 1023, 1024, length - 1}):
        if i >= length or clock.over():
            continue
        expected = tuple(out[:, :, i : i + 1] for out in want)
        step = cuda.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], None, False, scale)
        report.same("attention: decode == prefill", step, expected, position=i, **where)
        visible = (torch.arange(length) <= i).expand(1, q.shape[1], 1, length)
        for division in DIVISIONS:
            with _patched(attention_plan, "num_splits_heuristic", _divided(*division)):
                alone = cuda.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], None, False, scale)
                masked = cuda.attention(q[:, :, i : i + 1], k, v, visible, False, scale)
            report.same("attention: divisions", alone, expected, position=i, division=division, **where)
            report.same("attention: divisions, static cache", masked, expected, position=i, division=division, **where)
        step = cuda.attention(q[:, :, i : i + 1], k, v, visible, False, scale)
        report.same("attention: decode, static cache", step, expected, position=i, **where)
        chunk = min(7, length - i)
        mask = torch.ones(length, length, dtype=torch.bool).tril()[i : i + chunk].expand(1, q.shape[1], chunk, length)
        step = cuda.attention(q[:, :, i : i + chunk], k, v, mask, False, scale)
        expected = tuple(out[:, :, i : i + chunk] for out in want)
        report.same("attention: chunk of prefill", step, expected, position=i, **where)


def _check_padded(report, q, k, v, scale, want, left, right, where) -> None:
    """The sequence as one of three, padded on both sides, with the masks that models use; and with odd strides."""
    H, length, dtype = q.shape[1], q.shape[2], q.dtype
    size, here = left + length + right, slice(left, left + length)
    padded = [torch.randn(3, x.shape[1], size, x.shape[3] + 1).to(dtype)[..., 1:] for x in (q, k, v)]
    for x, y in zip(padded, (q, k, v), strict=True):
        x[1, :, here] = y[0]
    visible = torch.ones(3, 1, size, size, dtype=torch.bool).tril()
    visible[1] = False
    visible[1, 0, here, here] = True
    visible.tril_()
    zero = torch.zeros((), dtype=dtype)
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    hidden = torch.where(visible, zero, lowest)
    hidden[1, 0, :left] = -torch.inf  # what the padding's own queries see is of no interest
    masks = {"bool": visible, "-inf": torch.where(visible, zero, zero - torch.inf), "lowest": hidden}
    for kind, mask in masks.items():
        got = cuda.attention(*padded, mask.expand(3, H, size, size), False, scale)
        got = tuple(out[1:2, :, here] for out in got)
        report.same("attention: padding", got, want, left=left, right=right, mask=kind, **where)


def check_packed_attention(report: Report, clock: Clock, tiny: bool) -> None:
    """Rows of many lengths behind each other, and with their keys in pages: whole, in chunks, one query at a time."""
    lengths = [3, 40, 17] if tiny else [1, 700, 64, 513, 129, 1300]
    for dtype, options in (
        (torch.bfloat16, {}),
        (torch.bfloat16, {"window": 100}),
        (torch.float16, {"soft_cap": 20.0}),
        (torch.bfloat16, {"sinks": True}),
        (torch.float32, {"window": 70, "soft_cap": 30.0, "sinks": True}),
    ):
        H, Hkv, D = (2, 1, 16) if tiny else (8, 2, 64)
        if options.get("sinks") is True:
            options = {**options, "sinks": _randn(H, dtype=dtype)}
        where = {"dtype": dtype, "options": sorted(options)}
        rows = [tuple(_randn(n, h, D, dtype=dtype) for h in (H, Hkv, Hkv)) for n in lengths]
        alone = [_one_row(*row, options) for row in rows]
        for i, row in enumerate(rows):
            exact = reference.packed_attention(*row, _starts([len(row[0])]), _starts([len(row[0])]), 0, D**-0.5, **options)
            report.near("packed attention: near fp64", alone[i], exact, eps=torch.finfo(dtype).eps, row=i, **where)
        for queries in (None, 1, 7):  # all of a row, or its last ones
            if clock.over():
                return
            _check_packed(report, rows, alone, queries, options, where)


def _one_row(q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    starts = _starts([len(q)]), _starts([len(k)])
    return cuda.packed_attention(q, k, v, *starts, len(q), q.shape[2] ** -0.5, **options)


def _check_packed(report, rows, alone, queries, options, where) -> None:
    last = [q if queries is None else q[-queries:] for q, _, _ in rows]
    q, k, v = torch.cat(last), *(torch.cat([row[i] for row in rows]) for i in (1, 2))
    lengths = [len(k) for _, k, _ in rows]
    starts, most = _starts([len(q) for q in last]), max(len(q) for q in last)
    packed = cuda.packed_attention(q, k, v, starts, _starts(lengths), most, q.shape[2] ** -0.5, **options)
    page = 16
    n_pages = [-(-n // page) for n in lengths]
    order_of_pages = torch.randperm(sum(n_pages), dtype=torch.int64).to(torch.int32)
    table = torch.zeros(len(rows), max(n_pages), dtype=torch.int32)
    pool = [_randn(sum(n_pages), page, *x.shape[1:], dtype=x.dtype) for x in (k, v)]
    for i, (_, *keys_and_values) in enumerate(rows):
        mine = order_of_pages[sum(n_pages[:i]) : sum(n_pages[: i + 1])]
        table[i, : len(mine)] = mine
        for pages, x in zip(pool, keys_and_values, strict=True):
            slots = torch.arange(len(x))
            pages[mine[slots // page].long(), slots % page] = x
    lens = torch.tensor(lengths, dtype=torch.int32)
    paged = cuda.packed_attention(q, *pool, starts, lens, most, q.shape[2] ** -0.5, pages=table, **options)
    for i, (out, lse) in enumerate(alone):
        want = out[-len(last[i]) :], lse[:, -len(last[i]) :]
        here = slice(int(starts[i]), int(starts[i + 1]))
        for kind, got in (("packed", packed), ("paged", paged)):
            found = got[0][here], got[1][:, here]
            report.same(f"{kind} attention", found, want, row=i, queries=queries, **where)


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# --- the rest --------------------------------------------------------------------------------------------------------


def check_index_add(report: Report, clock: Clock, tiny: bool) -> None:
    """A row's sum among other rows, and alone with its own sources."""
    R, n, C = (10, 30, 20) if tiny else (300, 2400, 1030)
    for dtype in (torch.bfloat16, torch.float32):
        x, source, index = _randn(R, C, dtype=dtype), _randn(n, C, dtype=dtype), torch.randint(0, R, (n,))
        whole = cuda.index_add(x, index, source, 0.7)
        report.near("index_add: near fp64", whole, reference.index_add(x, index, source, 0.7), dtype=dtype, eps=1e-6)
        for row in range(0, R, max(1, R // 20)):
            if clock.over():
                return
            mine = (index == row).nonzero()[:, 0]
            alone = cuda.index_add(x[row : row + 1], torch.zeros_like(mine), source[mine], 0.7)
            report.same("index_add: row alone", alone, whole[row : row + 1], dtype=dtype, row=row)
            column = cuda.index_add(x[:, :1], index, source[:, :1], 0.7)
            report.same("index_add: column alone", column, whole[:, :1], dtype=dtype)


def check_graphs(report: Report, clock: Clock, tiny: bool) -> None:
    """Every launcher, captured in a CUDA graph and replayed: so none waits for the GPU."""
    if torch.zeros(()).device.type != "cuda":
        return
    bf16 = torch.bfloat16
    x, w = _randn(17, 300, dtype=bf16), _randn(2, 300, dtype=bf16)
    q, k = _randn(2, 4, 33, 64, dtype=bf16), _randn(2, 2, 70, 64, dtype=bf16)
    mask = (torch.rand(2, 1, 33, 70) > 0.3).expand(2, 4, 33, 70)
    a, b = _randn(1, 33, 300, dtype=bf16), _randn(1, 300, 64, dtype=bf16)
    offs = torch.tensor([7, 20, 33], dtype=torch.int32)
    experts, index = _randn(3, 300, 64, dtype=bf16), torch.randint(0, 17, (33,))
    calls: dict[str, Callable[[], object]] = {
        name: (lambda call=call: call(cuda, x, w)) for name, call in ROW_FUNCTIONS.items()
    }
    calls["gemm"] = lambda: cuda.gemm(a, b)
    calls["grouped_gemm"] = lambda: cuda.grouped_gemm(a[0], experts, offs)
    calls["attention"] = lambda: cuda.attention(q, k, k, mask, False, 0.125)
    calls["index_add"] = lambda: cuda.index_add(x, index, a[0], 1.0)
    for name, call in calls.items():
        if clock.over():
            return
        want = _tuple(call())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = _tuple(call())
        for _ in range(2):
            for out in got:
                out.zero_()
            graph.replay()
        torch.cuda.synchronize()
        report.same("CUDA graph", got, want, launcher=name)


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _shifted(x: Tensor, by: int) -> Tensor:
    """The same values, ``by`` elements behind an aligned address."""
    return x.new_empty(x.numel() + by)[by:].view(x.shape).copy_(x)


def _wider(x: Tensor) -> Tensor:
    """The same values, with room for eight more at the end of each row."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] + 8)[..., : x.shape[-1]].copy_(x)


def _strided(x: Tensor) -> Tensor:
    """The same values, every other one of wider rows."""
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), device="cpu"))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(INTEGERS[x.element_size()])


def _tuple(x: object) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@contextmanager
def _patched(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """The module with another value under that name; plans made with one are forgotten with the other."""
    with mock.patch.object(module, name, value):
        plans.forget_plans()
        yield
    plans.forget_plans()


SECTIONS: dict[str, Callable[[Report, Clock, bool], None]] = {
    **{f"order, {dtype}": functools.partial(check_order, dtype) for dtype in DTYPES},
    "order, attention": check_attention_order,
    **{f"gemm, {dtype}": functools.partial(check_gemm, dtype) for dtype in DTYPES},
    **{f"gemm edges, {dtype}": functools.partial(check_gemm_edges, dtype) for dtype in DTYPES},
    **{f"tuned sizes, {dtype}": functools.partial(check_tuned_sizes, dtype) for dtype in DTYPES[:2]},
    "grouped gemm": check_grouped_gemm,
    "scaled gemm": check_scaled,
    "convolution": check_convolution,
    "rows": check_rows,
    "padding": check_padding,
    "attention": check_attention,
    "attention of few programs": check_few_programs,
    "packed attention": check_packed_attention,
    "index_add": check_index_add,
    "graphs": check_graphs,
}

if __name__ == "__main__":
    raise SystemExit(main())
