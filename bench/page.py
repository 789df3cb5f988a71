"""``docs/benchmarks.md`` and README's table, from the records in ``bench/results``: ``python -m bench.page``.

Every figure on that page comes from a record, with the command, the machine and the date that the record has.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.command import TABLES
from bench.measure import ROOT, spread
from bench.methods import METHODS
from bench.plots import gap
from bench.record import read, title_of
from bench.workloads import VARIANTS
from dpfast import tables

PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
RECORDS = ROOT / "bench" / "results"
COMPARED = RECORDS / "models-cpu-20261130-041233.json"  # all methods on all models
SHOWN = ("dpfast", "hooks", "functorch", "ghost", "fastdp", "opake", "flashdp")
IN_README = {  # its models, by shorter names, and its methods
    "mlp": "MLP",
    "resnet18": "ResNet-18",
    "vit-s": "vision transformer",
    "gpt2": "GPT-2",
    "bert-base": "BERT classifier",
    "llama-1b": "Llama",
    "llama-1b-lora": "Llama, LoRA",
}
BEGIN, END = "<!-- from bench/results, by python -m bench.page -->", "<!-- end -->"
SECTIONS = {  # suites in the order of the page, with what each of them measures
    "models": "Whole training steps: forward, loss, backward, clipping, noise and update. Each method takes turns with "
    "the others in one loop, so that all of them meet the machine in the same state.",
    "packed": "Language models on samples of 16 to 256 tokens: packed into rows, or each padded to the longest. Ratios "
    "are to non-private training on the packed rows.",
    "distributed": "Two processes share one step.",
    "host": "Models of many tiny layers, where Python decides, and not arithmetic. The tables also count the operators "
    "that a step dispatches, and the operators for which the host would have to wait for a GPU.",
    "layers": "A step of one layer alone, and how its time grows with the sizes.",
    "kernels": "Single operators beside what the memory and the processor can do at best.",
}
INTRODUCTION = """# Benchmarks

Figures on this page are ratios to ordinary, non-private training of the same model on the same machine, unless a unit
says otherwise: 1.20 means that a private step takes 1.2 times as long, or grows memory 1.2 times as much. Brackets
hold the 20th and the 80th percentile. Before a method is timed on a model, its clipped sum is compared with one that
is computed in float64, one sample at a time. A method that is wrong has no figure.

**Nothing has been measured on a GPU yet.** `bench/gpu.sh` tests and measures everything there in one call.

This page is written by `python -m bench.page` from the records in `bench/results`. To measure your own machine run
`python -m dpfast bench` in a clone of the sources. `make bench-compare BASE=<commit>` says which operators became
slower since a commit."""


@functools.cache
def records() -> list[tuple[Path, dict[str, Any]]]:
    """All that are kept, by suite in the order of the page, the newest first."""
    found = [(path, read(path)) for path in sorted(RECORDS.glob("*.json"), reverse=True)]
    order = list(SECTIONS)
    return sorted(found, key=lambda one: order.index(one[1]["configuration"]["suite"]))


def page() -> str:
    """The text of ``docs/benchmarks.md``."""
    table, notes = compared(read(COMPARED), SHOWN)
    parts = [
        INTRODUCTION,
        "## All methods on all models\n\nStep time and growth of memory of each method.",
        title_of(read(COMPARED)),
        table,
        notes,
        f"![Step time of every method on every model](../bench/results/{COMPARED.stem}-ratios.png)",
    ]
    suite = ""
    for path, data in records():
        if data["configuration"]["suite"] != suite:
            suite = data["configuration"]["suite"]
            parts.append(f"## {suite.capitalize()}\n\n{SECTIONS[suite]}")
        machine = data["machine"]
        parts.append(f"### {machine['cpu']}, {machine['date'][:16].replace('T', ' ')}")
        parts.append(f"[The record](../bench/results/{path.name}).")
        parts.append(_under(importlib.import_module(TABLES[suite]).report(data)))
    return "\n\n".join(parts) + "\n"


def _under(report: str) -> str:
    """A report without its own title, and with its headings below the record's."""
    report = re.sub(r"\A## .*\n\n", "", report)
    return re.sub(r"^##+ ", "#### ", report, flags=re.M)


def compared(data: dict[str, Any], methods: Sequence[str], names: dict[str, str] | None = None) -> tuple[str, str]:
    """A table with a line for each model and a column for each method that was measured, and the notes to it."""
    measured = {row["method"] for part in data["suite"]["works"].values() for row in part["rows"]}
    methods = [method for method in methods if method in measured]
    letters: dict[str, str] = {}
    lines = []
    for name, part in data["suite"]["works"].items():
        if names is not None and name not in names:
            continue
        rows = {row["method"]: row for row in part["rows"]}
        cells = [_cell(rows.get(method), method, letters) for method in methods]
        lines.append([part["title"] if names is None else names[name], *cells])
    table = tables.markdown(["time, memory", *(METHODS[method].title for method in methods)], lines)
    notes = [f"({letter}) {VARIANTS[variant]}" for variant, letter in letters.items()]
    return table, f"{'; '.join(notes)}: as the model is written, the method cannot train it, or is wrong on it."


def _cell(row: dict[str, Any] | None, method: str, letters: dict[str, str]) -> str:
    if row is None:
        return ""
    if "time_ratio" not in row:
        return gap(row)
    ratio, memory = row["time_ratio"], row.get("memory_ratio")
    time = f"**{ratio['median']:.2f}**" if method == "dpfast" else f"{ratio['median']:.2f}"
    if method == "dpfast":
        time += spread(ratio).removeprefix(f"{ratio['median']:.2f}")
    text = f"{time}, {memory:.2f}" if memory is not None else time
    if row["variant"] == "plain":
        return text
    letter = letters.setdefault(row["variant"], chr(ord("a") + len(letters)))
    return f"{text} ({letter})"


def readme(text: str) -> str:
    """README's ``text`` with its table between the marks made anew."""
    data = read(COMPARED)
    table, notes = compared(data, ("dpfast", "hooks", "ghost", "fastdp"), IN_README)
    machine = data["machine"]
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['date'][:10]}, `{data['configuration']['command']}`"
    )
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{where}. {notes}\n\n{END}{after}"


def main() -> None:
    """Write both."""
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))


if __name__ == "__main__":
    main()
