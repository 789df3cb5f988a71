"""The one way in which tables are written: those of ``doctor``, ``explain``, the benchmarks and what they report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def plain(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Columns for a terminal, under a line if there is a ``header``; cells are texts, and stay as they are."""
    return tabulate([*rows], header, tablefmt="simple" if header else "plain", disable_numparse=True)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal, too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(cells, header, tablefmt="github", disable_numparse=True)
