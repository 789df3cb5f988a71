"""Plots of calibration and convergence, as PNG or SVG files.

Lines and bars are in Okabe and Ito's colours, which stay apart for every kind of colour blindness, and each line has a
mark of its own; heat maps are in cividis, which looks alike to all, with the figures written in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dpfast.analysis.calibration import CalibrationReport

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-", "-.", "-", "--", "-.")  # so that a line shows under another that it coincides with
FORMATS = (".png", ".svg")
PALE = 0.35  # opacity of what few samples decide


@dataclass(frozen=True)
class Curve:
    """A line: ``y`` over ``x``, with a standard error at each point if there are several seeds."""

    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


def check_path(path: str | os.PathLike[str]) -> Path:
    """``path`` if a plot can be written there: its ending is known, its folder exists."""
    found = Path(path)
    if found.suffix.lower() not in FORMATS:
        raise ValueError(f"path={str(path)!r}: end it in {' or '.join(FORMATS)}")
    if not found.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: the folder {str(found.parent)!r} does not exist; make it first")
    return found


def reliability_diagram(reports: Mapping[str, CalibrationReport], path: str | os.PathLike[str]) -> Path:
    """Accuracy over confidence, bin by bin, one panel a report; below it how many samples each bin holds.

    A bar's height is the bin's accuracy, at its mean confidence it should reach the diagonal; what is missing (or too
    much) is hatched. Bins with fewer samples than the report's ``min_count`` are pale.

    Args:
        reports: panel titles to reports, six at most for a readable page.
        path: ends in .png or .svg.
    """
    where = check_path(path)
    if not reports:
        raise ValueError("reports={}: give at least one report to draw")
    figure = _figure(2.5 * len(reports) + 0.6, 4.4)
    grid = figure.subplots(2, len(reports), squeeze=False, sharex=True, height_ratios=[3.2, 1])
    most = max(float(report.bins.counts.max()) / report.samples for report in reports.values())
    for (title, report), above, below in zip(reports.items(), grid[0], grid[1], strict=True):
        _reliability(above, report)
        above.set_title(title, fontsize=10, pad=36)
        left = report.bins.edges[:-1].tolist()
        width = report.bins.edges.diff().tolist()
        below.bar(left, (report.bins.counts / report.samples).tolist(), width, align="edge", color="#555555", lw=0)
        below.set_ylim(0, 1.08 * most)
        below.set_xlabel("confidence")
    handles = [
        Patch(facecolor=COLOURS[0], label="accuracy"),
        Patch(facecolor="none", edgecolor=COLOURS[5], hatch="////", linewidth=0.6, label="gap to confidence"),
        Patch(
            facecolor=COLOURS[0], alpha=PALE, label=f"fewer than {min(r.min_count for r in reports.values())} samples"
        ),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    grid[0][0].set_ylabel("accuracy")
    grid[1][0].set_ylabel("share")
    for axes in grid[:, 1:].flat:
        axes.set_yticklabels([])
    return _save(figure, where)


def _reliability(axes: Axes, report: CalibrationReport) -> None:
    bins = report.bins
    rows = zip(bins.edges[:-1], bins.edges.diff(), bins.counts, bins.accuracy, bins.confidence, strict=True)
    for left, width, count, right, sure in (map(float, row) for row in rows):
        if not count:
            continue
        alpha = 1.0 if count >= report.min_count else PALE
        axes.bar(left, right, width, align="edge", color=COLOURS[0], alpha=alpha, edgecolor="white", linewidth=0.5)
        axes.bar(
            left,
            sure - right,
            width,
            bottom=right,
            align="edge",
            fill=False,
            edgecolor=COLOURS[5],
            hatch="////",
            linewidth=0.6,
            alpha=alpha,
        )
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.9, linestyle=":")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    _bare(axes)
    text = "\n".join(
        f"{name} {100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}]"
        for name, one in (("acc", report.accuracy), ("ECE", report.ece), ("MCE", report.mce))
    )
    axes.annotate(text, (0.5, 1), (0, 4), "axes fraction", "offset points", ha="center", va="bottom", fontsize=7.5)


def heat_maps(
    panels: Mapping[str, Sequence[Sequence[float]]],
    rows: Sequence[float],
    columns: Sequence[float],
    path: str | os.PathLike[str],
    *,
    row_name: str = "R (clipping norm)",
    column_name: str = "learning rate",
    figures: str = ".1f",
) -> Path:
    """One map a measure over two settings, such as accuracy, ECE and MCE over R × lr, the figures written in.

    Args:
        panels: titles to ``[rows][columns]`` values; NaN is drawn as a gap.
        rows, columns: the settings; the first row is drawn at the bottom.
        figures: format of the figures.
    """
    where = check_path(path)
    for title, values in panels.items():
        if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
            raise ValueError(f"panels[{title!r}]: give {len(rows)} rows of {len(columns)} values, as rows and columns")
    figure = _figure(0.75 * len(columns) * len(panels) + 1.4, 0.52 * len(rows) + 1.3)
    for k, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), k + 1)
        image = axes.imshow(values, cmap="cividis", origin="lower", aspect="auto")
        known = [x for row in values for x in row if x == x]
        middle = (min(known) + max(known)) / 2 if known else 0.0
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value == value:
                    colour = "black" if value > middle else "white"
                    axes.text(j, i, f"{value:{figures}}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(columns)), [f"{x:g}" for x in columns])
        axes.set_yticks(range(len(rows)), [f"{x:g}" for x in rows] if k == 0 else [""] * len(rows))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(column_name)
        if k == 0:
            axes.set_ylabel(row_name)
        figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).outline.set_visible(False)  # type: ignore[operator]
    return _save(figure, where)


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    path: str | os.PathLike[str],
    *,
    x_name: str = "epoch",
    y_name: str = "",
    log: str | Mapping[str, str] = "",
    legend: int | Sequence[int] = 1,
    guides: Mapping[str, Mapping[str, Curve]] | None = None,
    ticks: Mapping[float, str] | None = None,
) -> Path:
    """Lines with marks and bands of one standard error, one panel a measure; for training curves and the like.

    Args:
        panels: titles to ``{name: curve}``; a name keeps its colour and mark in all panels.
        x_name, y_name: of the axes; that of the vertical one is written at the first panel.
        log: axes to draw logarithmically: "", "x", "y" or "xy"; for all panels, or by panel.
        legend: the panel that holds the legend, from 1; or several, each with one of its own lines.
        guides: dotted lines without marks, in the panel of that title.
        ticks: what stands at which places of the horizontal axis, where these are no numbers.
    """
    where = check_path(path)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure = _figure(3.3 * len(panels) + 0.2, 3.1)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, curve in lines.items():
            k = names.index(name)
            style = {name: of[k % len(of)] for name, of in (("color", COLOURS), ("marker", MARKS), ("ls", DASHES))}
            style["label"] = name
            every = max(1, len(curve.x) // 10)
            axes.plot(curve.x, curve.y, markersize=4, linewidth=1.5, markevery=every, **style)  # type: ignore[arg-type]
            if curve.error is not None:
                ends = [[y + sign * e for y, e in zip(curve.y, curve.error, strict=True)] for sign in (-1, 1)]
                axes.fill_between(curve.x, ends[0], ends[1], color=style["color"], alpha=0.18, linewidth=0)
        for name, curve in (guides or {}).get(title, {}).items():
            axes.plot(curve.x, curve.y, color="black", linestyle=":", linewidth=1, label=name)
        scales = log if isinstance(log, str) else log.get(title, "")
        for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if letter in scales:
                getattr(axes, f"set_{letter}scale")("log")
                low, high = sorted(axis.get_view_interval())
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,), numticks=9))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        if ticks is not None:
            axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_name)
        _bare(axes)
    figure.axes[0].set_ylabel(y_name)
    for panel in [legend] if isinstance(legend, int) else legend:
        figure.axes[panel - 1].legend(frameon=False, fontsize=8)
    return _save(figure, where)


def spectra(panels: Mapping[str, Sequence[complex]], path: str | os.PathLike[str]) -> Path:
    """Eigenvalues in the complex plane, one panel a matrix, each divided by its largest magnitude.

    Axes are linear within 1e-6 of 0 and logarithmic beyond. Circles have a positive real part, crosses a negative one;
    a grey square is zero up to rounding.
    """
    where = check_path(path)
    figure = _figure(2.7 * len(panels) + 0.3, 2.9)
    for k, (axes, (title, values)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True)
    ):
        largest = max((abs(value) for value in values), default=1.0) or 1.0
        kinds = ((1, COLOURS[0], "o"), (0, COLOURS[6], "s"), (-1, COLOURS[5], "x"))
        for sign, colour, mark in kinds:
            part = [z for z in (value / largest for value in values) if _sign(z) == sign]
            axes.plot([z.real for z in part], [z.imag for z in part], mark, color=colour, markersize=4, alpha=0.7)
        for axis in (axes.set_xscale, axes.set_yscale):
            axis("symlog", linthresh=1e-6, linscale=0.5)
        axes.set(xlim=(-2, 2), ylim=(-2, 2))
        ticks = [-1, -1e-3, 0, 1e-3, 1]
        labels = ["−1", "−10⁻³", "0", "10⁻³", "1"]
        axes.set_xticks(ticks, labels, fontsize=7.5)
        axes.set_yticks(ticks, labels if k == 0 else [""] * 5, fontsize=7.5)
        axes.minorticks_off()
        axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
        axes.axvline(0, color="#999999", linewidth=0.6, zorder=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("real part")
        _bare(axes)
    figure.axes[0].set_ylabel("imaginary part")
    return _save(figure, where)


def _sign(z: complex) -> int:
    """Of the real part; 0 for what is zero up to rounding."""
    return 0 if abs(z) < 1e-9 else 1 if z.real > 0 else -1


def _figure(width: float, height: float) -> Figure:
    """A figure of its own canvas: no window, no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    with matplotlib.rc_context({"svg.hashsalt": "dpfast"}):  # the same file for the same plot
        dateless = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=130, metadata=dateless)
    return path
