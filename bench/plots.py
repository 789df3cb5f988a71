"""The plots, in colours that stay apart for every kind of colour blindness (Okabe and Ito's) and in greyscale."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is wanted, never a window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from bench.methods import METHODS

COLOURS = {
    "nonprivate": "#999999",
    "nonprivate-compiled": "#666666",
    "dpfast": "#0072B2",
    "dpfast-compiled": "#56B4E9",
    "hooks": "#E69F00",
    "functorch": "#D55E00",
    "ghost": "#CC79A7",
    "fastdp": "#009E73",
    "flashdp": "#F0E442",
}
MARKS = dict(zip(COLOURS, "oxsP^v D*p".replace(" ", ""), strict=True))


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
    size = (13, 3.3 * len(tasks))
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
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _memory_text(one: Result) -> str:
    if one.memory_mib is None or one.memory_ratio is None:
        return one.memory_error or "non-private not measured"
    return f"{one.memory_ratio:.2f} ({one.memory_mib:.0f} MiB)"


CUT = 6.0  # longer bars end here; their figure is written at the end


def draw_ratios(groups: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: Path, note: str) -> None:
    """One panel a workload, one bar a method: step time over non-private with p20 to p80, of a summary's rows."""
    columns = min(3, len(groups))
    lines, tallest = -(-len(groups) // columns), max(len(its) for _, its in groups)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(5.4 * columns, (0.8 + 0.23 * tallest) * lines + 0.5),
        squeeze=False,
        layout="constrained",
    )
    far = max(row["time_ratio"]["p80"] for _, its in groups for row in its)
    for axes, (title, its) in zip(grid.flat, groups, strict=False):
        for place, row in enumerate(its):
            ratio, colour = row["time_ratio"], COLOURS[row["method"]]
            axes.barh(place, min(ratio["median"], CUT), color=colour, height=0.75, edgecolor="black", linewidth=0.3)
            axes.hlines(place, min(ratio["p20"], CUT), min(ratio["p80"], CUT), color="black", linewidth=1)
            end = min(max(ratio["p80"], ratio["median"]), CUT)
            text = f"{ratio['median']:.2f}" + ("" if row["variant"] == "plain" else f" ({row['variant']})")
            text = f"▸ {text}" if ratio["median"] > CUT else text
            axes.annotate(text, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)
        axes.set_title("\n".join(textwrap.wrap(title, 62)), fontsize=8, loc="left")
        axes.set_yticks(range(len(its)), [METHODS[row["method"]].title for row in its], fontsize=7.5)
        axes.set_ylim(tallest - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * min(far, CUT))
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=7.5)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    figure.supxlabel("step time, × non-private training", fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(note, 60 * columns)), fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclass
class Curve:
    """How one method's cost grows."""

    method: str
    points: list[tuple[float, float]]  # what grows, milliseconds
    remarks: list[str]  # at each point: how it was done; told where it changes


def draw_growth(panels: Sequence[tuple[str, str, Sequence[Curve]]], path: Path, note: str) -> None:
    """One panel a sweep (its title, what grows, its curves), both axes logarithmic."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(6.4 * columns, 4.2 * lines + 0.4), squeeze=False, layout="constrained"
    )
    for axes, (title, grows, curves) in zip(grid.flat, panels, strict=False):
        for curve in curves:
            colour, mark, label = COLOURS[curve.method], MARKS[curve.method], METHODS[curve.method].title
            axes.plot(
                *zip(*curve.points, strict=True), color=colour, marker=mark, markersize=5, linewidth=1.5, label=label
            )
            before = None
            for point, remark in zip(curve.points, curve.remarks, strict=True):
                if remark != before and remark:
                    axes.annotate(
                        remark,
                        point,
                        xytext=(0, -13),
                        textcoords="offset points",
                        fontsize=7.5,
                        color=colour,
                        ha="center",
                    )
                before = remark
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel(grows)
        axes.set_ylabel("step, ms")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle("\n".join(textwrap.wrap(note, 75 * columns)), fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
