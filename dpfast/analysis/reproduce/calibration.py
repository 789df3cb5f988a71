"""Does a larger clipping norm R calibrate better? Bu et al. (arXiv 2106.07830) on small data and on Fashion-MNIST.

At fixed lr · R the noise in the weights is the same for every R; what R changes is how many samples are clipped. One
lr · R need not suit all R alike, so each R is also tried at the best of several, chosen on held-out samples.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from dpfast.analysis.calibration import BINS, MIN_COUNT
from dpfast.analysis.reproduce.calibration_plots import draw_maps, draw_norms, draw_reliability, draw_training
from dpfast.analysis.reproduce.calibration_runs import FLAT, STYLES, Choice, Plan, chosen, grid, tempered
from dpfast.analysis.reproduce.calibration_tables import comparison, map_table, on_choosing, temperatures
from dpfast.analysis.reproduce.calibration_verdicts import verdict
from dpfast.analysis.reproduce.common import Job, Table, Verdict, digits, hard
from dpfast.analysis.reproduce.datasets import MissingData, check_images, folder_of, idx_data

DIGITS, FASHION = "digits", "fashion-mnist"
LEAST_TEST = BINS * (MIN_COUNT - 1) + 1  # then a bin has enough for the MCE, wherever the confidences lie
QUICK_EPOCHS = 2
FULL_EPOCHS = 60  # of TensorFlow Privacy's MNIST tutorial, which the paper's runs on MNIST follow


def check(job: Job) -> None:
    """Refuse data that is not there, or too little to measure calibration with."""
    check_images(job.data)
    if job.data == DIGITS:
        return
    data = idx_data(folder_of(job.data), 0)
    if not len(data.holdout) or len(data.test) < LEAST_TEST:
        raise MissingData(
            f"--data {job.data}: {len(data.train) + len(data.holdout)} images to train on and {len(data.test)} to test "
            f"on: give at least 10, of which one is held out, and {LEAST_TEST}, so that a bin of the ECE is full enough"
        )


def run(job: Job) -> list[Table | Verdict]:
    """Tables and a verdict for each data set; plots go to ``job.out``."""
    report: list[Table | Verdict] = []
    for plan in plans(job):
        report += _report(plan, job)
    return report


def plans(job: Job) -> list[Plan]:
    """What is tried: made-up samples and digits, or a folder of images."""
    if job.data == DIGITS:
        found = [
            Plan("hard synthetic", hard, seeds=job.seeds),
            Plan("digits", digits, seeds=job.seeds, resplit=digits(0).resplit),
        ]
    else:
        folder = folder_of(job.data)
        name = "Fashion-MNIST" if job.data == FASHION else folder.resolve().name
        found = [
            Plan(
                name,
                partial(idx_data, folder),
                norms=(0.1, 1.0, 3.0, 20.0),
                products=(4.0, 8.0, 16.0, 32.0),
                fixed=8.0,
                epsilon=2.0,
                epochs=8,
                batch_size=1800,
                seeds=job.seeds,
            )
        ]
    if job.quick:
        last = found[-1]
        few = last.fixed, last.products[-1]
        return [replace(last, epochs=QUICK_EPOCHS, norms=last.norms[::3], products=few)]
    return [replace(plan, epochs=FULL_EPOCHS) for plan in found] if job.full else found


def _report(plan: Plan, job: Job) -> list[Table | Verdict]:
    found = grid(plan)
    fixed: Choice = {(style, norm): plan.fixed for style in STYLES for norm in plan.norms}
    best = chosen(plan, found)
    choices = {f"at lr · R = {plan.fixed:g} for every R": fixed, "with the lr chosen for each R": best}
    at_best = {norm: found[FLAT, norm, best[FLAT, norm]] for norm in plan.norms}
    scaled = {norm: [tempered(plan, run, seed) for seed, run in enumerate(runs)] for norm, runs in at_best.items()}
    tables = [comparison(plan, name, found, choice) for name, choice in choices.items()]
    tables[1].notes += on_choosing(plan, found, best)
    draw_reliability(plan, found, best, scaled[plan.norms[0]][0].temperature, job.out)
    draw_training(plan, found, fixed, best, job.out)
    draw_norms(plan, found, fixed, best, job.out)
    draw_maps(plan, found, job.out)
    return [
        *tables,
        map_table(plan, found),
        temperatures(plan, found, best, scaled),
        verdict(plan, found, choices),
    ]
