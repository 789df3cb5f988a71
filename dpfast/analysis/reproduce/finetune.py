"""A small pretrained encoder fine-tuned on film snippets: a linear probe, LoRA, everything, and a probe first.

Private training of each at several ε beside ordinary training; accuracy, calibration, time and memory. The learning
rates were chosen on held-out sentences, one seed at ε = 3 and without privacy; that choice is not accounted for.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from dpfast.analysis.plots import Curve, curves
from dpfast.analysis.reproduce import finetune_cost, reviews, sentences
from dpfast.analysis.reproduce.common import Job, Table, Verdict, mean_error, progress, written
from dpfast.analysis.reproduce.finetune_runs import DELTA, ROWS_AT_ONCE, Outcome, Sentences, Way, fine_tuned
from dpfast.analysis.reproduce.record import Record

LENGTH = 32  # tokens: what is longer is cut, what is shorter is padded
EPSILONS = (None, 8.0, 3.0, 1.0)
SHARE = 0.27  # of an epoch, of the ways that train the encoder: about 2,000 sentences
PROBE = Way("frozen", batch=512, epochs=10, plain_epochs=10, head_rate=1e-2, plain_head_rate=1e-3)
LORA = Way("adapters", 64, SHARE, SHARE, head_rate=1e-2, plain_head_rate=1e-3, rate=5e-3, plain_rate=2e-3)
EVERYTHING = Way("trained", 64, SHARE, SHARE, head_rate=2e-2, plain_head_rate=1e-3, rate=5e-4, plain_rate=2e-4)
WAYS = {
    "linear probe": PROBE,
    "LoRA": LORA,
    "everything": EVERYTHING,
    "probe first": replace(EVERYTHING, probe_first=0.2),
}
CASE = {"linear probe": "head on features", "LoRA": "LoRA", "everything": "everything"}  # of what steps cost
NORMS, NORMS_AT = (0.1, 1.0, 3.0, 10.0), 3.0
NEAR = 0.02  # of the accuracy without privacy
TURNS = 12
GOOD, BAD = ("fine", "warm", "clever", "lovely"), ("dull", "cold", "silly", "tired")


@dataclass(frozen=True)
class Source:
    """Where sentences and encoder are; what makes them in another process too."""

    data: Path | None
    model: Path | None
    quick: bool

    def load(self) -> tuple[Any, dict[str, TensorDataset], str]:
        """The encoder, the parts, and a line on the data.

        Raises:
            MissingData: one of them is not there; the text says how to get it.
        """
        found = reviews.divided(made_up(), 0) if self.quick else reviews.load(self.data)
        if self.quick:
            torch.manual_seed(0)
            encoder, tokenizer = sentences.made_up(found.train.texts)
        else:
            encoder, tokenizer = sentences.pretrained(self.model)
        parts = {}
        for name in reviews.SHARES:
            part: reviews.Texts = getattr(found, name)
            ids, mask = sentences.tokenised(tokenizer, part.texts, 8 if self.quick else LENGTH)
            parts[name] = TensorDataset(ids, mask, torch.tensor(part.labels))
        sizes = [len(part) for part in parts.values()]
        said = (
            f"{sizes[0]:,} snippets to train on, {sizes[1]:,} to choose by, {sizes[2]:,} to test on; {found.neutral} "
            f"left out as their score is within {reviews.NEUTRAL:g} of 0, and {found.repeated} that are there twice."
        )
        return encoder, parts, said

    def batch(self) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """The encoder and one physical batch: ids, mask, features, labels."""
        encoder, parts, _ = self.load()
        ids, mask, labels = parts["train"][:ROWS_AT_ONCE]
        return encoder, (ids, mask, sentences.features(sentences.Classifier(encoder), ids, mask), labels)


def made_up() -> list[tuple[float, str]]:
    """Scores and sentences that tell of nothing, for a run that needs no file."""
    draw, rows = random.Random(0), []
    for k in range(200):
        words = GOOD if k % 2 else BAD
        rows.append((2.0 if k % 2 else -2.0, f"a {draw.choice(words)} film {k % 25} of {draw.choice(words)} people"))
    return rows


def check(job: Job) -> None:
    """Refuse data or an encoder that is not there.

    Raises:
        MissingData: the text says how to get it.
    """
    if not job.quick:
        source = _source(job)
        reviews.load(source.data)
        sentences.located(source.model)


def _source(job: Job) -> Source:
    return Source(None if job.data == "reviews" else Path(job.data), job.model, job.quick)


def run(job: Job) -> list[Table | Verdict]:
    """Tables and the verdict; the plot and the record of the runs go to ``job.out``."""
    source = _source(job)
    encoder, parts, said = source.load()
    data = Sentences(encoder, parts)
    ways = {name: _length(way, job) for name, way in WAYS.items()}
    epsilons, norms = (EPSILONS[::2], NORMS[::3]) if job.quick else (EPSILONS, NORMS)
    settings = {"ways": {name: asdict(way) for name, way in ways.items()}, "data": data.digest()}
    record = Record(job.out, settings)
    if record.found:
        print(f"{record.found} runs are taken over from {record.path}")
    seeds = range(job.seeds)
    for norm, seed in progress([(norm, seed) for seed in seeds for norm in norms], "clipping norms"):
        way = replace(ways["linear probe"], norm=norm)
        record.outcome(f"R = {norm:g}, seed {seed}", partial(fine_tuned, data, way, NORMS_AT, seed))
    todo = [(name, epsilon, seed) for seed in seeds for name in ways for epsilon in epsilons]
    for name, epsilon, seed in progress(todo, "fine-tuning"):
        record.outcome(_key(name, epsilon, seed), partial(fine_tuned, data, ways[name], epsilon, seed))
    costs = finetune_cost.all_costs(source.batch, turns=3 if job.quick else TURNS, memory=not job.quick)
    found = {
        (name, epsilon): [record.outcomes[_key(name, epsilon, seed)] for seed in seeds]
        for name in ways
        for epsilon in epsilons
    }
    by_norm = {norm: [record.outcomes[f"R = {norm:g}, seed {seed}"] for seed in seeds] for norm in norms}
    _draw(found, list(ways), epsilons, job.out / "finetune.png")
    return [
        _table(found, ways, epsilons, costs, job.seeds, said),
        _norms(by_norm, job.seeds),
        finetune_cost.table(costs),
        _verdict(found, list(ways), epsilons, by_norm),
    ]


def _length(way: Way, job: Job) -> Way:
    """Longer or shorter runs of a way."""
    if job.quick:
        return replace(way, batch=16, epochs=0.3, plain_epochs=0.5)
    if job.full and way.encoder != "frozen":
        return replace(way, batch=256, epochs=5, plain_epochs=3)
    return way


def _key(name: str, epsilon: float | None, seed: int) -> str:
    return f"{name}, {_privacy(epsilon)}, seed {seed}"


def _privacy(epsilon: float | None) -> str:
    return "not private" if epsilon is None else f"ε = {epsilon:g}"


Found = Mapping[tuple[str, float | None], Sequence[Outcome]]


def _table(
    found: Found,
    ways: Mapping[str, Way],
    epsilons: Sequence[float | None],
    costs: finetune_cost.Costs,
    seeds: int,
    said: str,
) -> Table:
    table = Table(
        f"film snippets: accuracy / ECE, % ({seeds} seeds, mean ± standard error), and the cost of a step",
        ["what trains", *map(_privacy, epsilons), "time, memory", "Opacus"],
    )
    for name, way in ways.items():
        cells = []
        for epsilon in epsilons:
            outcomes = found[name, epsilon]
            cells.append(
                f"{written((one.accuracy for one in outcomes), scale=100)} / "
                f"{written((one.ece for one in outcomes), scale=100)}"
            )
        if way.probe_first:
            of: Mapping[str, finetune_cost.Cost] = finetune_cost.mixed(
                costs["head"], costs["everything"], way.probe_first
            )
        else:
            of = costs[CASE[name]]
        table.rows.append([name, *cells, *(finetune_cost.ratios(of, method) for method in ("dpfast", "Opacus"))])
    epochs = ", ".join(f"{x:g}" for x in sorted({way.epochs for way in ways.values() if way.encoder != "frozen"}))
    table.notes += [
        said,
        f"The probe sees the training part {ways['linear probe'].epochs:g} times, the other ways {epochs} times, with "
        f"and without privacy. Standard errors are of training alone: the seed is that of head, batches and noise.",
        f"δ = {DELTA:g}, for one snippet. Learning rates were chosen on the held-out part, which ε does not cover.",
        "Time and memory are ratios to ordinary training of the same way, for one batch of "
        f"{ROWS_AT_ONCE} snippets a step.",
    ]
    return table


def _norms(by_norm: Mapping[float, Sequence[Outcome]], seeds: int) -> Table:
    table = Table(
        f"linear probe at ε = {NORMS_AT:g} and one learning rate: what the clipping norm R does ({seeds} seeds, %)",
        ["R", "accuracy", "ECE"],
    )
    for norm, outcomes in by_norm.items():
        cells = (written((getattr(one, of) for one in outcomes), scale=100) for of in ("accuracy", "ece"))
        table.rows.append([f"{norm:g}", *cells])
    table.notes.append("Adam's update has no scale of its own, so that R changes how many snippets are clipped alone.")
    return table


def _verdict(
    found: Found, names: Sequence[str], epsilons: Sequence[float | None], by_norm: Mapping[float, Sequence[Outcome]]
) -> Verdict:
    means = {at: mean_error(one.accuracy for one in outcomes)[0] for at, outcomes in found.items()}
    private = [epsilon for epsilon in epsilons if epsilon is not None]
    best = {epsilon: max(names, key=lambda name: means[name, epsilon]) for epsilon in epsilons}
    top = means[best[None], None]
    seen = "; ".join(f"at ε = {x:g} {best[x]}, {100 * (means[best[x], x] - top):+.1f} points" for x in private)
    near = {name: [f"{x:g}" for x in private if means[name, None] - means[name, x] <= NEAR] for name in names}
    those = [f"{name} at ε = {', '.join(at)}" for name, at in near.items() if at]
    others = [name for name, at in near.items() if not at]
    (a, calm_a), (b, calm_b) = (
        [100 * mean_error(getattr(one, of) for one in by_norm[norm])[0] for of in ("accuracy", "ece")]
        for norm in (min(by_norm), max(by_norm))
    )
    calmer = calm_b < calm_a and a - b <= 100 * NEAR
    return Verdict(
        "Pretrained models that are fine-tuned privately come near what they reach without privacy (Yu et al. and Li "
        "et al., both ICLR 2022; RoBERTa-large on MNLI: 87.8 % at ε = 6.7, and 90.2 % without). Small clipping norms "
        "are most accurate and badly calibrated; large ones are similarly accurate and calibrate better (Bu et al., "
        "TMLR 2023).",
        f"Best without privacy is {best[None]}, {100 * top:.1f} %; {seen}. From R = {min(by_norm):g} to "
        f"R = {max(by_norm):g} the probe's accuracy goes from {a:.1f} to {b:.1f} %, its ECE from {calm_a:.1f} to "
        f"{calm_b:.1f}.",
        f"Within {100 * NEAR:g} points of the same way without privacy: {'; '.join(those) or 'none'}"
        + (f"; not {', '.join(others)}, at this length. " if others and those else ". ")
        + ("A large R calibrates better at a like accuracy, as they say." if calmer else "A large R did not help."),
    )


def _draw(found: Found, names: Sequence[str], epsilons: Sequence[float | None], path: Path) -> None:
    order = sorted(epsilons, key=lambda epsilon: epsilon or 1e9)
    panels: dict[str, dict[str, Curve]] = {"test accuracy, % (↑ better)": {}, "ECE, % (↓ better)": {}}
    for title, of in zip(panels, ("accuracy", "ece"), strict=True):
        for name in names:
            ends = [mean_error(100 * getattr(one, of) for one in found[name, epsilon]) for epsilon in order]
            panels[title][name] = Curve(
                list(range(len(order))), [mean for mean, _ in ends], [e if e == e else 0.0 for _, e in ends]
            )
    ticks = {float(k): "not private" if epsilon is None else f"{epsilon:g}" for k, epsilon in enumerate(order)}
    curves(panels, path, x_name="ε", ticks=ticks)
