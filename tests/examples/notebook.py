"""Runs a notebook's cells in this interpreter: ``python -m tests.examples.notebook examples/notebooks/*.ipynb``.

nbclient would start a kernel for it, with some thirty packages. These cells print and end in values, and draw nothing.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any


def outputs_of(source: str, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """What Jupyter would show below a cell: what was printed, and the value of its last line."""
    tree, last, printed = ast.parse(source), None, io.StringIO()
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), shared)
        value = None if last is None else eval(compile(last, "<cell>", "eval"), shared)
    shown: list[dict[str, Any]] = []
    if text := printed.getvalue():
        shown.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(True)})
    if value is not None and not hasattr(value, "_ipython_display_"):
        data = {"text/plain": repr(value).splitlines(True)}
        shown.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return shown


def run(path: Path) -> dict[str, Any]:
    """The notebook as it is after all of its cells have run, in their order."""
    book, shared = json.loads(path.read_text()), {"__name__": "__main__"}
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["outputs"], cell["execution_count"] = outputs_of("".join(cell["source"]), shared), number
        for one in cell["outputs"]:
            one |= {"execution_count": number} if "execution_count" in one else {}
    return book


def texts(cell: dict[str, Any]) -> str:
    """All that is shown below a cell."""
    return "".join(line for one in cell["outputs"] for line in one.get("text") or one["data"]["text/plain"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:]:
        try:
            book = run(Path(name))
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        Path(name).write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
