"""Plots the results of ``run.py`` as PNG and SVG: ``python benchmarks/plot.py DIR`` (needs matplotlib).

One picture a case, beside its JSON file. A ratio below 1 means that ours takes less time. Every picture's caption names the
machine and the versions; dashed lines are the bounds that ``targets.py`` asks for.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import targets
from measurements import OURS, STOCK, Point, Result, read

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind eyes too
_BOUND = {"color": "#666666", "linestyle": "--", "linewidth": 1}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder with the JSON files; the pictures go there too")
    folder = parser.parse_args(argv).folder
    results = [result for result in read(folder) if result.points]
    if not results:
        print(f"there are no results in {folder}; run benchmarks/run.py --out {folder} first", file=sys.stderr)
        return 1
    for result in results:
        for path in plot(result, folder):
            print(path)
    return 0


def plot(result: Result, folder: Path) -> list[Path]:
    """Draws one case; returns the files. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "batchinv"}):
        figure = _PLOTS[result.case](result)
        reduced = f" (not the sizes asked for: {result.reduced})" if result.reduced else ""
        figure.text(0.01, 0.01, f"{targets.caption(result)}; {result.started}{reduced}", fontsize=7, color="#444444")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        paths = [folder / f"{result.case}.{kind}" for kind in ("png", "svg")]
        for path in paths:
            figure.savefig(path, dpi=150)
        pyplot.close(figure)
    return paths


def _gemm(result: Result):
    """Ratio by M, one line for each (K, N); peers dotted."""
    dtypes = list(dict.fromkeys(point.dtype for point in result.points))
    figure, panels = _panels(1, len(dtypes), width=6.5, height=4.5)
    for axes, dtype in zip(panels, dtypes, strict=True):
        points = [point for point in result.points if point.dtype == dtype]
        weights = list(dict.fromkeys((point.sizes["K"], point.sizes["N"]) for point in points))
        for (K, N), colour in zip(weights, _cycle(len(weights)), strict=True):
            mine = [point for point in points if (point.sizes["K"], point.sizes["N"]) == (K, N)]
            rows = [point.sizes["M"] for point in mine]
            axes.plot(rows, [point.ratio() for point in mine], "o-", color=colour, label=f"K={K}, N={N}")
            for peer in _peers(mine):
                have = [point for point in mine if peer in point.timings]
                times = [point.timings[peer].median_us / point.timings[STOCK].median_us for point in have]
                axes.plot([point.sizes["M"] for point in have], times, ":", color=colour, alpha=0.7)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.axhline(1.2, **_BOUND)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({point.sizes["M"] for point in points}), labels=sorted({p.sizes["M"] for p in points}))
        axes.set_xlabel("M (rows of x)")
        axes.set_ylabel("time / cuBLAS time")
        others = ", ".join(_peers(points))
        axes.set_title(f"x @ w.t(), {dtype}; dashed: bound of the worst" + (f"; dotted: {others}" if others else ""))
        axes.legend(fontsize=7, loc="upper left")
    return figure


def _convolution(result: Result):
    """Ratio by layer, one line for each batch and format."""
    figure, (axes,) = _panels(1, 1, width=9, height=4.5)
    layer = ("channels", "out", "side", "taps", "stride")
    names = list(dict.fromkeys(tuple(point.sizes[of] for of in layer) for point in result.points))
    kinds = list(dict.fromkeys((point.dtype, point.sizes["batch"], point.sizes["format"]) for point in result.points))
    for kind, colour in zip(kinds, _cycle(len(kinds)), strict=True):
        mine = [point for point in result.points if (point.dtype, point.sizes["batch"], point.sizes["format"]) == kind]
        places = [names.index(tuple(point.sizes[of] for of in layer)) for point in mine]
        label = f"{kind[0]}, batch {kind[1]}, {kind[2]}"
        axes.plot(places, [point.ratio() for point in mine], "o-", color=colour, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axhline(1.1, **_BOUND)
    labels = [f"{c}>{out}, {side}, {taps}x{taps}/{stride}" for c, out, side, taps, stride in names]
    axes.set_xticks(range(len(names)), labels=labels, rotation=60, ha="right", fontsize=6)
    axes.set_ylabel("time / cuDNN time")
    axes.set_title("convolutions: channels, side of the image, taps and stride; dashed: bound of the mean")
    axes.legend(fontsize=7)
    return figure


def _fp8(result: Result):
    """Ratio to stock torch by rows, a line for each (K, N)."""
    figure, (axes,) = _panels(1, 1, width=6.0, height=4.0)
    for K, N in dict.fromkeys((point.sizes["K"], point.sizes["N"]) for point in result.points):
        mine = [point for point in result.points if (point.sizes["K"], point.sizes["N"]) == (K, N)]
        axes.plot([point.sizes["M"] for point in mine], [point.ratio() for point in mine], "o-", label=f"K={K}, N={N}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("M (rows of x)")
    axes.set_ylabel("time / torch._scaled_mm's")
    axes.set_title("scaled_mm in float8_e4m3fn, scales of rows")
    axes.legend(fontsize=7, loc="upper left")
    return figure


def _rows(result: Result):
    """Above: ratio to stock torch by rows and columns. Below: GB/s as a share of a copy of the same size."""
    points = [point for point in result.points if point.dtype == result.points[0].dtype]
    works = list(dict.fromkeys(point.work for point in points))
    figure, panels = _panels(2, len(works), width=3.6, height=3.4)
    above, below = panels[: len(works)], panels[len(works) :]
    for work, top, bottom in zip(works, above, below, strict=True):
        mine = [point for point in points if point.work == work]
        _heatmap(top, mine, Point.ratio, "time / stock torch", (0.5, 1.0, 2.0), "RdYlGn_r")
        top.set_title(f"{work}, {mine[0].dtype}")
        _heatmap(bottom, mine, targets.share_of_copy, "GB/s / copy's GB/s", (0.0, 0.8, 1.0), "RdYlGn")
    return figure


def _heatmap(axes, points: list[Point], value: Callable[[Point], float], title: str, limits, colours: str) -> None:
    from matplotlib.colors import TwoSlopeNorm

    rows = sorted({int(point.sizes["rows"]) for point in points})
    cols = sorted({int(point.sizes["cols"]) for point in points})
    cells = [[float("nan")] * len(cols) for _ in rows]
    for point in points:
        cells[rows.index(point.sizes["rows"])][cols.index(point.sizes["cols"])] = value(point)
    axes.imshow(cells, cmap=colours, norm=TwoSlopeNorm(limits[1], limits[0], limits[2]), aspect="auto")
    axes.grid(False)
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            axes.text(column, row, "–" if cell != cell else f"{cell:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(cols)), labels=cols, rotation=30)
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.set_xlabel(f"columns — {title}")
    axes.set_ylabel("rows")


def _attention(result: Result):
    """Time of each contender, and ours over the baseline above its bar."""
    bounds = {"prefill": 1.25, "decode": 1.15}
    works = [work for work in bounds if any(point.work == work for point in result.points)]
    most = max(sum(point.work == work for point in result.points) for work in works)
    figure, panels = _panels(1, len(works), width=max(6.5, 0.9 * most), height=4.2)
    for axes, work in zip(panels, works, strict=True):
        points = [point for point in result.points if point.work == work]
        labels = [_attention_label(point) for point in points]
        _bars(axes, points, labels, unit=1e3)
        _logarithmic(axes)
        axes.margins(y=0.15)
        axes.set_ylabel("ms a call")
        axes.set_title(f"{work}; above ours: over {'flash' if work == 'prefill' else 'the fastest'} (bound {bounds[work]})")
    return figure


def _attention_label(point: Point) -> str:
    (_, batch), (what, length) = point.sizes.items()
    return f"batch {batch}\n{length} {what}\n{point.dtype}"


def _forward(result: Result):
    """Time of a forward, mode off and on, compiled and eager."""
    kinds = list(dict.fromkeys(point.sizes["kind"] for point in result.points))
    figure, panels = _panels(1, len(kinds), width=5.5, height=4.2)
    for axes, kind in zip(panels, kinds, strict=True):
        points = [point for point in result.points if point.sizes["kind"] == kind]
        labels = [f"{p.work}\n{p.sizes['batch']} x {p.sizes['tokens']}\npast {p.sizes['past']}" for p in points]
        _bars(axes, points, labels, unit=1e3, names={STOCK: "mode off", OURS: "mode on"})
        _logarithmic(axes)
        axes.margins(y=0.15)
        axes.set_ylabel("ms a forward")
        bound = " (bound 1.05)" if kind == "compiled" else ""
        axes.set_title(f"{kind}, {points[0].sizes['layers']} layers, {points[0].dtype}; above: on / off{bound}")
    return figure


def _launch(result: Result):
    """Host time of a call, mode off and on; and of a call in a CUDA graph where there are graphs."""
    whats = list(dict.fromkeys(point.sizes["what"] for point in result.points))
    figure, panels = _panels(len(whats), 1, width=12.0, height=3.4)
    for axes, what in zip(panels, whats, strict=True):
        points = [point for point in result.points if point.sizes["what"] == what]
        labels = [point.work.replace(" ", "\n") for point in points]
        _bars(axes, points, labels, unit=1.0, names={STOCK: "mode off", OURS: "mode on"}, excess=True)
        axes.margins(y=0.12)
        axes.set_ylabel("us a call")
        axes.set_title(f"{what}, M=1; above: on - off, us")
    return figure


def _logarithmic(axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _bars(axes, points: list[Point], labels: list[str], unit: float, names: dict | None = None, excess: bool = False) -> None:
    """Groups of bars, one a contender, with quartiles; above ours the ratio to the baseline (or the excess in us)."""
    contenders = list(dict.fromkeys(name for point in points for name in point.timings))
    width = 0.8 / len(contenders)
    for index, (name, colour) in enumerate(zip(contenders, _cycle(len(contenders)), strict=True)):
        have = [(place, point) for place, point in enumerate(points) if name in point.timings]
        at = [place + (index - (len(contenders) - 1) / 2) * width for place, _ in have]
        timings = [point.timings[name] for _, point in have]
        heights = [timing.median_us / unit for timing in timings]
        low = [max(timing.median_us - timing.q1_us, 0) / unit for timing in timings]
        high = [max(timing.q3_us - timing.median_us, 0) / unit for timing in timings]
        axes.bar(at, heights, width, yerr=(low, high), color=colour, label=(names or {}).get(name, name), ecolor="#333333")
        if name == OURS:
            for x, height, above, (_, point) in zip(at, heights, high, have, strict=True):
                said = f"{point.excess_us():+.1f}" if excess else f"{point.ratio():.2f}"
                axes.annotate(said, (x, height + above), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(points)), labels=labels, fontsize=7)
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=7)


def _panels(rows: int, columns: int, width: float, height: float):
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(rows, columns, figsize=(max(width * columns, 7), height * rows), squeeze=False)
    return figure, list(panels.flat)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _peers(points: list[Point]) -> list[str]:
    return [name for name in dict.fromkeys(n for p in points for n in p.timings) if name not in (OURS, STOCK)]


_PLOTS = {
    "gemm": _gemm,
    "rows": _rows,
    "attention": _attention,
    "launch": _launch,
    "forward": _forward,
    "fp8": _fp8,
    "convolution": _convolution,
}


if __name__ == "__main__":
    raise SystemExit(main())
