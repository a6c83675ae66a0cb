"""The charts of a trace, drawn by matplotlib into SVG that follows the page: its font, its colours in light and in dark.

matplotlib, since it is the plotting library whose SVG stays small (tens of kB for 2,000 operators) and needs no script: those
that draw in the browser bring one to four MB of script along. Axes with logarithms are what it is for; the map of breakpoints,
a strip of cells, is drawn by the template. Nothing of pyplot: no state of the process is touched, and no window is opened.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from contextlib import AbstractContextManager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pytest_batchinv.report.record import Trace

# matplotlib wants colours; the page wants its own. Each of these stands for a variable of the style sheet.
INK, FAINT, BAD, ACCENT = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)", BAD: "var(--bad)", ACCENT: "var(--accent)"}
_SIZE = (4.6, 2.5)  # inches: at 360 px the page shows it at three quarters, and its text at 10 px


def growth(trace: Trace, name: str) -> str:
    """How far the two sides are apart at each operator, by its position: the largest distance in ulp, and the share of values
    that differ. Empty where nothing differs. name: what makes the ids of this chart its own in the page."""
    apart = [(position, op) for position, op in enumerate(trace.ops) if op.n_differ]
    if not apart:
        return ""
    with _style(name):
        figure = Figure(figsize=(_SIZE[0], _SIZE[1] * 1.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        measured = [(position, float(op.ulp)) for position, op in apart if op.ulp]
        upper.plot([position for position, _ in measured], [ulp for _, ulp in measured], ".", color=ACCENT, markersize=3)
        upper.set_yscale("log", base=2)
        upper.set_ylabel("ulp")
        shares = [100 * op.n_differ / op.n_total for _, op in apart if op.n_total]
        lower.plot([position for position, op in apart if op.n_total], shares, ".", color=ACCENT, markersize=3)
        lower.set_ylabel("% of values")
        lower.set_ylim(0, 105)
        lower.set_xlabel("position in the trace")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (upper, lower):
            for culprit in trace.culprits:
                axes.axvline(culprit.op, color=BAD, linewidth=1, linestyle="--")
            axes.set_xlim(-1, len(trace.ops))
            _tidy(axes)
        return _svg(figure, name, f"ulp and share of differing values at each of {len(trace.ops):,} positions of the trace")


def histogram(trace: Trace, name: str) -> str:
    """How many operators are how far apart, by the distance in ulp in each, in powers of two. Empty without any."""
    distances = Counter(math.floor(math.log2(op.ulp)) for op in trace.ops if op.ulp)
    if not distances:
        return ""
    with _style(name):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        powers = range(max(distances) + 1)
        axes.bar(powers, [distances[power] for power in powers], width=0.9, color=ACCENT)
        axes.set_xlabel("ulp of an operator, from 2ⁿ on")
        axes.set_ylabel("operators")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda power, _: _power_of_two(round(power))))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(axes)
        told = ", ".join(f"{distances[power]} from {2**power:,} ulp on" for power in powers if distances[power])
        return _svg(figure, name, f"operators by their largest distance: {told}")


def _power_of_two(power: int) -> str:
    return f"{2**power}" if 0 <= power < 10 else "2" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(max(power, 0)))


def _style(name: str) -> AbstractContextManager[None]:
    return rc_context(
        {
            "svg.fonttype": "none",  # text stays text, in the page's font
            "svg.hashsalt": name,  # the same ids in every run
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )


def _tidy(axes: Axes) -> None:
    axes.grid(True, axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an element for a page. title: plain words of ours, for who does not see it."""
    figure.patch.set_visible(False)
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px '[^\"]*?(; text-anchor|\")", r"font-size: \1px\2", text)
    named = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in named else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    opening = re.match(r"<svg [^>]*>", text)
    assert opening is not None, "matplotlib's SVG begins with its element"
    box = re.search(r'viewBox="[^"]*"', opening[0])
    assert box is not None, "matplotlib's SVG has a viewBox"
    return f'<svg role="img" aria-label="{title}" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]}>{text[opening.end() :]}'
