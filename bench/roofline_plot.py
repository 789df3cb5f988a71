"""The roofline: what a device can do at an arithmetic intensity, and what each kernel does there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is wanted, never a window
import numpy as np
from matplotlib import pyplot as plt

from bench.plots import caption

# Okabe and Ito's, in an order that keeps neighbours apart; a kernel's mark differs too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", ":", "-.")
NEAR = 11  # points from a kernel to its number, if there is room; farther away a line joins them
NUMBER, POINT = (13, 9), 8  # points that numbers keep from each other, and from any kernel


def draw_roofline(
    roofs: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], path: Path, note: str
) -> None:
    """Each kernel has a colour, a mark, and a number at its fastest point; the list beside the plot says what it is.

    Args:
        roofs: peaks by dtype.
        rows: of kernels, with ``name``, ``intensity``, ``flops_per_second`` and ``roofline``.
        note: where, when and with what they were measured.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(figsize=(12, 6.5), layout="constrained")
    low, high = min(row["intensity"] for row in rows), max(row["intensity"] for row in rows)
    ridge = max(roof["flops_per_second"] / roof["bytes_per_second"] for roof in roofs.values())
    x = np.geomspace(low / 3, max(high, ridge) * 4, 200)
    for (dtype, roof), style in zip(roofs.items(), STYLES, strict=False):
        y = np.minimum(roof["flops_per_second"], x * roof["bytes_per_second"])
        label = f"{dtype}: {roof['bytes_per_second'] / 1e9:,.0f} GB/s, {roof['flops_per_second'] / 1e9:,.0f} GFLOP/s"
        axes.plot(x, y, style, color="#666666", linewidth=1.4, label=label)
    for number, name in enumerate(names):
        mine = [row for row in rows if row["name"] == name]
        shares = [row["roofline"]["median"] for row in mine]
        best, worst = (f"{share:.0%}" for share in (max(shares), min(shares)))
        axes.scatter(
            [row["intensity"] for row in mine],
            [row["flops_per_second"]["median"] for row in mine],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKS[number % len(MARKS)],
            s=38,
            zorder=3,
            label=f"{number + 1}  {name}: {best if best == worst else f'{worst} to {best}'}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _label(axes, rows, names)
    axes.set_xlabel("arithmetic intensity, flops per byte (each input read once, each output written once)")
    axes.set_ylabel("flops per second")
    axes.set_title("kernels under the measured roofs, and their shares of them", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    caption(figure, note, 190)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(axes: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """A kernel's number near its fastest point, in the nearest place where no number and no point is."""
    axes.figure.canvas.draw()

    def place(row: Mapping[str, Any]) -> tuple[float, float]:
        at = axes.transData.transform((row["intensity"], row["flops_per_second"]["median"]))
        return tuple(at * 72 / axes.figure.dpi)  # in points, as an annotation's offset is

    points = [place(row) for row in rows]
    taken: list[tuple[float, float]] = []
    for number, name in enumerate(names):
        best = max((row for row in rows if row["name"] == name), key=lambda row: row["roofline"]["median"])
        x, y = place(best)
        for right, up in _offsets():
            at = (x + right, y + up)
            free = all(abs(at[0] - a) >= NUMBER[0] or abs(at[1] - b) >= NUMBER[1] for a, b in taken)
            if free and all(abs(at[0] - a) >= POINT or abs(at[1] - b) >= POINT for a, b in points):
                break
        taken.append(at)
        far = math.hypot(right, up) > NEAR
        axes.annotate(
            str(number + 1),
            (best["intensity"], best["flops_per_second"]["median"]),
            xytext=(right, up),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6} if far else None,
        )


def _offsets() -> Iterator[tuple[float, float]]:
    """Around a point, ever farther from it, to the right and below first."""
    for radius in range(NEAR, 120, 4):
        for angle in (0, -45, 45, 180, -135, 135, -90, 90):
            yield radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
