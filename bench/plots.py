"""The plots, in colours that stay apart for every kind of colour blindness (Okabe and Ito's) and in greyscale."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is wanted, never a window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from bench.methods import METHODS

COLOURS = {
    "nonprivate": "#999999",
    "nonprivate-compiled": "#666666",
    "dpfast": "#0072B2",
    "dpfast-compiled": "#56B4E9",
    "dpfast-graphed": "#004B75",
    "dpfast-graphed-compiled": "#8C6BB1",
    "hooks": "#E69F00",
    "functorch": "#D55E00",
    "ghost": "#CC79A7",
    "fastdp": "#009E73",
    "opake": "#A65628",
    "flashdp": "#F0E442",
}
MARKS = dict(zip(COLOURS, "oxsPhX^vD<*p", strict=True))


@dataclass
class Result:
    """What is drawn of one method on one task."""

    method: str
    label: str
    milliseconds: float
    time_ratio: float
    time_spread: tuple[float, float]
    memory_mib: float | None
    memory_ratio: float | None
    memory_error: str | None
    scores: list[tuple[int, float]]
    epsilon: float | None


def _ratio_bars(
    axes: Axes,
    results: Sequence[Result],
    values: Sequence[float | None],
    texts: Sequence[str],
    spreads: Sequence[tuple[float, float]] | None = None,
) -> None:
    """Horizontal bars from the top down, p20 to p80 as a whisker, each with its figure written at its end."""
    ends = [value or 0.0 for value in values]
    for row, (one, value, text) in enumerate(zip(results, ends[:], texts, strict=True)):
        axes.barh(row, value, color=COLOURS[one.method], height=0.6)
        if spreads is not None:
            axes.hlines(row, *spreads[row], color="black", linewidth=1.2)
            ends[row] = max(value, spreads[row][1])
        axes.annotate(text, (ends[row], row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(results)), [one.label for one in results], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(1.0, *ends))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _curves(axes: Axes, results: Sequence[Result], score: str, note: str) -> None:
    """The test score as training went, each method with its mark and its epsilon."""
    for one in results:
        steps, values = zip(*one.scores, strict=True)
        name = one.label.split("\n")[0]
        axes.plot(
            steps,
            [100 * v for v in values] if score == "accuracy" else values,
            color=COLOURS[one.method],
            marker=MARKS[one.method],
            markersize=4.5,
            linewidth=1.6,
            label=name if one.epsilon is None else f"{name}, ε = {one.epsilon:.1f}",
        )
    axes.set_xlabel("step")
    axes.set_title("test accuracy, %" if score == "accuracy" else "test loss per byte, nats", fontsize=10)
    axes.legend(frameon=False, fontsize=8.5, title=note, title_fontsize=8.5, alignment="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def draw_demo(tasks: Sequence[tuple[str, str, Sequence[Result]]], path: Path, note: str) -> None:
    """One row a task: step time and memory as ratios to non-private, and the score."""
    size = (10.4, 3.1 * len(tasks))
    layout = ConstrainedLayoutEngine(hspace=0.09, wspace=0.04)
    figure, grid = plt.subplots(len(tasks), 3, figsize=size, squeeze=False, layout=layout)
    for (title, score, results), (time, memory, curve) in zip(tasks, grid, strict=True):
        time.set_title(f"{title}\n", loc="left", fontweight="bold", fontsize=11)
        _ratio_bars(
            time,
            results,
            [one.time_ratio for one in results],
            [f"{one.time_ratio:.2f} ({one.milliseconds:.0f} ms)" for one in results],
            [one.time_spread for one in results],
        )
        time.set_xlabel("step time, × non-private")
        _ratio_bars(memory, results, [one.memory_ratio for one in results], [_memory_text(one) for one in results])
        memory.set_yticklabels([])
        memory.set_xlabel("peak memory growth, × non-private")
        _curves(curve, results, score, note)
    figure.savefig(path, dpi=180)
    plt.close(figure)


def _memory_text(one: Result) -> str:
    if one.memory_mib is None or one.memory_ratio is None:
        return one.memory_error or "non-private not measured"
    return f"{one.memory_ratio:.2f} ({one.memory_mib:.0f} MiB)"


CUT = 6.0  # an axis that would be longer ends a third further on; bars that are longer than that run out of it
ROOM = 1.35  # of the longest bar, for the figure beside it
WIDTH = 4.6  # inches of a panel: two of them at README's width show eight points as ten pixels


def gap(row: Mapping[str, Any]) -> str:
    """What stands where a summary's row has no figure: the sort of its error, whose own words are in the report."""
    error = row.get("error")
    if error is None:
        return "not measured"
    if "out of memory" in error:
        return "out of memory"
    return next((sort for sort in ("wrong", "not checked") if error.startswith(sort)), "no figure")


def draw_ratios(groups: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: Path, note: str) -> list[Path]:
    """One panel a workload (its title, a summary's rows), one bar a method: step time over non-private.

    A method without a figure keeps its place. Returns what was written: nothing where there is nothing to show yet.
    """
    groups = [(title, [row for row in rows if row["method"] != "nonprivate"]) for title, rows in groups]
    groups = [(title, its) for title, its in groups if any("time_ratio" in row or row["error"] for row in its)]
    if not groups:
        return []
    columns = min(2, len(groups))
    lines, tallest = -(-len(groups) // columns), max(len(its) for _, its in groups)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(WIDTH * columns, (0.85 + 0.21 * max(tallest, 4)) * lines + 0.9),
        squeeze=False,
        layout="constrained",
    )
    far = max((row["time_ratio"]["p80"] for _, its in groups for row in its if "time_ratio" in row), default=1.0)
    end = ROOM * min(max(far, 1.0), CUT)
    for axes, (title, its) in zip(grid.flat, groups, strict=False):
        for place, row in enumerate(its):
            _ratio_bar(axes, place, row, end)
        axes.set_title("\n".join(textwrap.wrap(title, 46)), fontsize=8.5, loc="left")
        names = ["\n".join(textwrap.wrap(METHODS[row["method"]].title, 20)) for row in its]
        axes.set_yticks(range(len(its)), names, fontsize=8, linespacing=0.85)
        axes.set_ylim(tallest - 0.4, -0.6)
        axes.set_xlim(0, end)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    what = (
        "step time, × non-private training; bars: median, whiskers: p20–p80, ▸: longer than the axis, "
        "in brackets: another model variant"
    )
    figure.supxlabel("\n".join(textwrap.wrap(what, 52 * columns)), fontsize=9)
    caption(figure, note, 66 * columns)
    return _written(figure, path, dpi=180)


def _ratio_bar(axes: Axes, place: int, row: Mapping[str, Any], end: float) -> None:
    """A bar with its whisker and its figure, or in their place the word for why there is none."""
    if "time_ratio" not in row:
        axes.annotate(gap(row), (0, place), xytext=(4, 0), **_BESIDE, style="italic", color="#555555", bbox=_BLANK)
        return
    ratio, colour = row["time_ratio"], COLOURS[row["method"]]
    median, p20, p80 = (ratio[name] for name in ("median", "p20", "p80"))
    axes.barh(place, median, color=colour, height=0.75, edgecolor="black", linewidth=0.3)
    axes.hlines(place, p20, p80, color="black", linewidth=1)
    text = f"{median:.2f}" + ("" if row["variant"] == "plain" else f" ({row['variant']})")
    if max(p80, median) <= end / ROOM:
        axes.annotate(text, (max(p80, median), place), xytext=(4, 0), **_BESIDE)
        return
    text = f"{text} ▸" if median > end else text  # within the bar, as there is no room beside it
    axes.annotate(text, (min(median, end), place), xytext=(-4, 0), ha="right", **_BESIDE, bbox=_BLANK)


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8}
_BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # behind a text that something would cross


def caption(figure: Figure, note: str, width: int) -> None:
    """Where, when and with what: see :func:`bench.record.title_of`."""
    figure.suptitle("\n".join(textwrap.wrap(note.replace("`", ""), width, break_on_hyphens=False)), fontsize=7)


def _written(figure: Figure, path: Path, dpi: int) -> list[Path]:
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return [path]


@dataclass
class Curve:
    """How one method's cost grows."""

    method: str
    points: list[tuple[float, float]] = field(default_factory=list)  # what grows, milliseconds
    ways: list[str] = field(default_factory=list)  # at each point: how it was done; told where it changes
    gaps: list[str] = field(default_factory=list)  # why points are missing


def draw_growth(panels: Sequence[tuple[str, str, Sequence[Curve]]], path: Path, note: str) -> list[Path]:
    """One panel a sweep (its title, what grows, its curves), both axes logarithmic; returns as :func:`draw_ratios`."""
    panels = [panel for panel in panels if any(curve.points for curve in panel[2])]
    if not panels:
        return []
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(WIDTH * columns, 3.4 * lines + 0.6), squeeze=False, layout="constrained"
    )
    for axes, (title, grows, curves) in zip(grid.flat, panels, strict=False):
        for curve in curves:
            _growth_curve(axes, curve)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.margins(0.12, 0.15)  # room for the ways beside the axes
        axes.set_xticks(sorted({x for curve in curves for x, _ in curve.points}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel(grows)
        axes.set_ylabel("step, median, ms")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    caption(figure, note, 66 * columns)
    return _written(figure, path, dpi=180)


def _growth_curve(axes: Axes, curve: Curve) -> None:
    """A line with a mark at each point; the way above the first point that is done that way."""
    colour, label = COLOURS[curve.method], ", ".join([METHODS[curve.method].title, *dict.fromkeys(curve.gaps)])
    x, y = zip(*curve.points, strict=True) if curve.points else ((), ())
    axes.plot(x, y, color=colour, marker=MARKS[curve.method], markersize=5, linewidth=1.5, label=label)
    before, raised = "", False
    for point, way in zip(curve.points, curve.ways, strict=True):
        if way and way != before:
            axes.annotate(
                way,
                point,
                xytext=(-3, 18 if raised else 8),  # two that follow each other do not meet
                textcoords="offset points",
                fontsize=8,
                color=colour,
                ha="left",
                va="bottom",
                bbox=_BLANK,
                zorder=4,
            )
            raised = not raised
        before = way
