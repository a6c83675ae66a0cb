"""What the results must show, and what they show: figures computed from points, and the table of them."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator

from measurements import OURS, Point, Result

MUST_DTYPE = "bf16"
"""The dtype for which figures are asked; those of others are told beside them."""
COPY_SHARE = 0.80
HOST_NOISE_US = 0.5
"""Two host times of one graph replay differ by less than this; a graph must cost nothing more than stock torch's."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """must: the bound, or None where the figure is told for information. worst: the point that it comes from, if one.

    points: how many it is made of; 0 where nothing was measured, and got is None then.
    """

    case: str
    what: str
    must: float | None
    got: float | None
    points: int
    at_least: bool = False
    worst: str = ""

    def verdict(self, result: Result) -> str:
        """met, missed, or why neither can be said. A part of the points can show a bound missed, and never met."""
        if self.got is None:
            return "not measured"
        if self.must is None:
            return ""
        if result.reduced:
            return f"not judged: {result.reduced}"
        met = self.got >= self.must if self.at_least else self.got <= self.must
        return "missed" if not met else "met" if result.is_complete else "incomplete"


def figures(result: Result) -> list[Figure]:
    """All figures of one case, in the order of its table."""
    return list(_FIGURES[result.case](result))


def table(results: Iterable[Result]) -> list[str]:
    """Lines: the machine, the figures, then what was cut, not run or wrong, case by case."""
    results = list(results)
    lines = sorted({caption(result) for result in results})
    rows = [("case", "figure", "must", "got", "points", "verdict")]
    for result in results:
        for figure in figures(result):
            sign = ">=" if figure.at_least else "<="
            must = "" if figure.must is None else f"{sign} {figure.must:.2f}"
            got = "-" if figure.got is None else f"{figure.got:.3f}"
            worst = f"at {figure.worst}" if figure.worst else ""
            verdict = "; ".join(part for part in (figure.verdict(result), worst) if part)
            rows.append((figure.case, figure.what, must, got, str(figure.points), verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[2:5], widths[2:], strict=True)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    for result in results:
        lines += [f"{result.case}: cut, as the time ran out: {label}" for label in result.cut]
        lines += [f"{result.case}: not run: {reason}" for reason in result.not_run]
        lines += [f"{result.case}: error: {error}" for error in result.errors]
    return lines


def caption(result: Result) -> str:
    """The machine and the versions, in a line."""
    facts = result.machine
    named = [f"{name} {facts[name]}" for name in ("driver", "cuda", "torch", "triton") if facts.get(name)]
    place = [facts["gpu"], facts.get("capability", "")] if facts.get("gpu") else [facts.get("cpu") or "unknown machine"]
    return ", ".join(part for part in [*place, *named] if part)


# --- the figures of each case -----------------------------------------------------------------------------------------


def _gemm(result: Result) -> Iterator[Figure]:
    for dtype, points in _by_dtype(result.points):
        must = dtype == MUST_DTYPE
        small = [point for point in points if int(point.sizes["M"]) <= 32]
        yield _mean("gemm", f"time / cuBLAS, {dtype}, geometric mean", 1.05 if must else None, points)
        yield _worst("gemm", f"time / cuBLAS, {dtype}, worst", 1.20 if must else None, points)
        yield _mean("gemm", f"time / cuBLAS, {dtype}, M <= 32, geometric mean", 1.00 if must else None, small)


def _fp8(result: Result) -> Iterator[Figure]:
    """Told, and not judged: no tile was tuned for 8 bits."""
    small = [point for point in result.points if int(point.sizes["M"]) <= 32]
    yield _mean("fp8", "time / stock scaled_mm, scales of rows, geometric mean", None, result.points)
    yield _worst("fp8", "time / stock scaled_mm, scales of rows, worst", None, result.points)
    yield _mean("fp8", "time / stock scaled_mm, scales of rows, M <= 32, geometric mean", None, small)


def _convolution(result: Result) -> Iterator[Figure]:
    for dtype, points in _by_dtype(result.points):
        must = 1.10 if dtype == MUST_DTYPE else None
        yield _mean("convolution", f"time / cuDNN, {dtype}, geometric mean", must, points)
        yield _worst("convolution", f"time / cuDNN, {dtype}, worst", None, points)
        for size in ("batch", "format"):
            for value in dict.fromkeys(point.sizes[size] for point in points):
                mine = [point for point in points if point.sizes[size] == value]
                words = f"batch {value}" if size == "batch" else value
                yield _mean("convolution", f"time / cuDNN, {dtype}, {words}, geometric mean", None, mine)


def _rows(result: Result) -> Iterator[Figure]:
    for dtype, points in _by_dtype(result.points):
        for work in ("rms_norm", "softmax", "log_softmax", "layer_norm"):
            must = dtype == MUST_DTYPE and work != "layer_norm"
            mine = [point for point in points if point.work == work]
            yield _mean("rows", f"{work} / stock torch, {dtype}, geometric mean", 1.00 if must else None, mine)
            large = [point for point in mine if point.beyond_cache]
            lowest = min(large, key=share_of_copy, default=None)
            yield Figure(
                "rows",
                f"{work}, {dtype}, share of the copy's GB/s, lowest of the large sizes",
                COPY_SHARE if must else None,
                None if lowest is None else share_of_copy(lowest),
                len(large),
                at_least=True,
                worst="" if lowest is None else lowest.label,
            )


def share_of_copy(point: Point) -> float:
    """Our GB/s over those of a copy of the same size, measured in turn with it."""
    return point.gigabytes_per_second(OURS) / point.gigabytes_per_second("copy")


def _attention(result: Result) -> Iterator[Figure]:
    against = {"prefill": ("flash", 1.25), "decode": ("the fastest of SDPA", 1.15)}
    for dtype, points in _by_dtype(result.points):
        for work, (other, bound) in against.items():
            mine = [point for point in points if point.work == work]
            yield _worst("attention", f"{work} / {other}, {dtype}, worst", bound if dtype == MUST_DTYPE else None, mine)
            yield _mean("attention", f"{work} / {other}, {dtype}, geometric mean", None, mine)


def _forward(result: Result) -> Iterator[Figure]:
    for kind, must in (("compiled", 1.05), ("eager", None)):
        for work in dict.fromkeys(point.work for point in result.points):
            mine = [point for point in result.points if point.work == work and point.sizes["kind"] == kind]
            must_here = must if all(point.dtype == MUST_DTYPE for point in mine) else None
            yield _worst("forward", f"{work}, {kind}, mode on / mode off", must_here, mine, told=False)


def _launch(result: Result) -> Iterator[Figure]:
    for what, bound, name in (
        ("eager call", 10.0, "host us of a call over stock"),
        ("graph replay, host", HOST_NOISE_US, "host us of a call in a CUDA graph over stock"),
    ):
        for point in result.points:
            if point.sizes["what"] == what:
                yield Figure("launch", f"{point.work} at M=1, {name}", bound, point.excess_us(), 1)
    for point in result.points:
        if point.sizes["what"] == "graph replay, GPU":
            yield Figure("launch", f"{point.work} at M=1, GPU time in a CUDA graph / stock", None, point.ratio(), 1)


_FIGURES: dict[str, Callable[[Result], Iterator[Figure]]] = {
    "gemm": _gemm,
    "rows": _rows,
    "attention": _attention,
    "launch": _launch,
    "forward": _forward,
    "fp8": _fp8,
    "convolution": _convolution,
}


def _by_dtype(points: list[Point]) -> Iterator[tuple[str, list[Point]]]:
    """The dtype that is asked for comes first, also where nothing of it was measured."""
    for dtype in dict.fromkeys([MUST_DTYPE, *(point.dtype for point in points)]):
        yield dtype, [point for point in points if point.dtype == dtype]


def _mean(case: str, what: str, must: float | None, points: list[Point]) -> Figure:
    got = statistics.geometric_mean(point.ratio() for point in points) if points else None
    return Figure(case, what, must, got, len(points))


def _worst(case: str, what: str, must: float | None, points: list[Point], told: bool = True) -> Figure:
    point = max(points, key=Point.ratio, default=None)
    got = None if point is None else point.ratio()
    return Figure(case, what, must, got, len(points), worst=point.label if point is not None and told else "")
