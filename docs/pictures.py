"""Draws the pictures of docs/explanation.md: ``python docs/pictures.py``. Grey on nothing, for light and dark themes."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402

INK, ROW, OTHER = "#7f8790", "#2f81f7", "#c77b1e"
OUT = Path(__file__).parent / "_static"


def orders_of_a_sum() -> plt.Figure:
    """One chain over eight products, and the same eight split in two: other roundings, so other bits."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6))
    titles = "many rows: one chain over k", "few rows: k split in two, then added"
    for axis, splits, title in zip(axes, (1, 2), titles, strict=True):
        size = 8 // splits
        for k in range(8):
            axis.plot(k, 0, "o", color=ROW, markersize=7)
            axis.text(k, -0.55, f"$k_{k}$", ha="center", va="top", color=INK)
            end, step = k // size * size, k % size
            if step:
                axis.annotate("", (k, step * 0.6), (k, 0.15), arrowprops={"arrowstyle": "-", "color": INK})
                axis.plot(k, step * 0.6, "o", color=INK, markersize=4)
                start = (k - 1, (step - 1) * 0.6) if step > 1 else (end, 0)
                axis.plot([start[0], k], [start[1], step * 0.6], color=ROW if end == 0 else OTHER)
        if splits == 2:
            axis.plot([3, 7], [1.8, 3.2], color=INK)
            axis.plot([7, 7], [1.8, 3.2], color=INK)
            axis.plot(7, 3.2, "s", color=INK)
        axis.set(xlim=(-0.7, 7.7), ylim=(-1.4, 4.9))
        axis.set_title(title, color=INK, fontsize=10)
        axis.axis("off")
    return figure


def vector_tails() -> plt.Figure:
    """A row of five values in memory, alone and after another row: other lanes of a vector, or the scalar code of the tail."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 2.2))
    words = {"va": "top", "color": INK, "fontsize": 9}
    bracket = {"arrowstyle": "|-|,widthA=.25,widthB=.25", "color": INK}
    for axis, before, title in zip(axes, (0, 5), ("alone", "after another row"), strict=True):
        count = before + 5
        rest = count // 8 * 8  # where the tail begins
        for i in range(count):
            edge = ROW if i >= before else INK
            axis.add_patch(plt.Rectangle((i, 0), 0.9, 0.9, facecolor=edge if i < rest else "none", edgecolor=edge, alpha=0.6))
        for start in range(0, rest, 8):
            axis.annotate("", (start + 8, -0.25), (start, -0.25), arrowprops=bracket)
            axis.text(start + 4, -0.45, "one vector of 8: a polynomial", ha="center", **words)
        axis.text(rest, -0.45 if rest else -0.2, "the tail: the C library's function", ha="left", **words)
        axis.text(-0.3, 0.45, title, ha="right", va="center", color=INK, fontsize=10)
        axis.set(xlim=(-3.2, 17), ylim=(-1.3, 1.1))
        axis.axis("off")
    return figure


if __name__ == "__main__":
    for draw in (orders_of_a_sum, vector_tails):
        figure = draw()
        figure.tight_layout()
        figure.savefig(OUT / f"{draw.__name__.replace('_', '-')}.svg", transparent=True, metadata={"Date": None})
