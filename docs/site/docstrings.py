"""Docstrings as Markdown: roles become code, and tables that are ruled by ``====`` become Markdown's."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):`~?([^`]+)`")
RULE = re.compile(r"^=+( +=+)+$")


def as_markdown(text: str) -> str:
    """``text`` without what is reStructuredText's alone."""
    lines, out = ROLE.sub(r"`\1`", text).splitlines(), []
    while lines:
        line = lines.pop(0)
        if RULE.match(line.strip()):
            columns = [match.start() for match in re.finditer("=+", line)]
            rows, lines = _rows(lines, columns)
            head, *rest = [f"{' ' * columns[0]}| {' | '.join(cells)} |" for cells in rows]
            out += [head, f"{' ' * columns[0]}|{'---|' * len(columns)}", *rest]
        else:
            out.append(line)
    return "\n".join(out)


def _rows(lines: list[str], columns: list[int]) -> tuple[list[list[str]], list[str]]:
    """The cells of a table whose columns begin at ``columns``, and the lines below it. Its first row is a header."""
    ends = [*columns[1:], None]
    rows: list[list[str]] = []
    rules = 0
    headed = sum(1 for line in lines[: lines.index("") if "" in lines else None] if RULE.match(line.strip())) > 1
    for number, line in enumerate(lines):
        if RULE.match(line.strip()):
            rules += 1
            if rules == 1 + headed:
                return ([[""] * len(columns), *rows] if not headed else rows), lines[number + 1 :]
            continue
        cells = [line[a:b].strip() for a, b in zip(columns, ends, strict=True)]
        if cells[0] or not rows:
            rows.append(cells)
        else:  # a line that goes on
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
    raise ValueError(f"a table without its last rule, of columns at {columns}")


class Docstrings(Extension):
    """For griffe: see mkdocs.yml."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
