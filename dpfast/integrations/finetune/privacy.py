"""How much noise a run adds, and its seed."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np

from dpfast.accounting.epsilon import noise_multiplier_for
from dpfast.data.unit import Unit
from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError
from dpfast.integrations.finetune.probe import steps_of_probe

# What a seed is used for, beside what DPTrainer makes of it: independent streams of one seed.
WEIGHTS, HELD_OUT = range(2, 4)


@dataclass(frozen=True)
class Plan:
    """What a run spends: its steps, and the noise of each.

    Attributes:
        expected_batch_size: what the noisy sum is divided by; as it was asked for, whatever the number of samples.
        probe_steps: of the steps, how many train the head alone; they come first, and cost what the others cost.
    """

    samples: int
    steps_per_epoch: int
    steps: int
    noise_multiplier: float
    delta: float
    expected_batch_size: int
    probe_steps: int = 0


def unit_of(config: FinetuneConfig) -> Unit:
    """What ε is for."""
    return Unit("preference pair" if config.dpo else "row", config.unit_column, config.rows_per_unit)


def plan_of(config: FinetuneConfig, samples: int, noise_multiplier: float | None = None) -> Plan:
    """Steps and noise for ``samples`` samples, or as many users; ``noise_multiplier`` if it is known from a checkpoint.

    Raises:
        FinetuneError: a batch larger than the data, a delta that promises nothing, an epsilon that cannot be met.
    """
    them = "samples" if config.unit_column is None else "users"
    if config.batch_size > samples:
        raise FinetuneError(f"--batch-size {config.batch_size}: there are {samples} {them}: give at most that")
    delta = config.target_delta or min(1e-5, 0.1 / samples)
    if delta >= 1 / samples:
        raise FinetuneError(f"--target-delta {delta:g}: with {samples} {them} it has to be below {1 / samples:.1g}")
    per_epoch = math.ceil(samples / config.batch_size)  # as DPTrainer has it
    epochs = config.epochs or (3 if config.train is not None else 20)
    steps = config.max_steps or max(1, round(epochs * per_epoch))
    probe_steps = steps_of_probe(config.probe_first, steps)
    if noise_multiplier is None:
        noise_multiplier = config.noise_multiplier
    if noise_multiplier is None:
        noise_multiplier = _noise_for(config.target_epsilon or 8.0, delta, 1 / per_epoch, steps, config.accountant)
    return Plan(samples, per_epoch, steps, noise_multiplier, delta, config.batch_size, probe_steps)


def _noise_for(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str) -> float:
    try:
        return noise_multiplier_for(
            target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps, accountant=accountant
        )
    except ValueError as error:
        raise FinetuneError(f"--target-epsilon {epsilon:g}: {error}") from error


def draw_seed() -> int:
    """128 bits of the operating system."""
    return secrets.randbits(128)


def number(seed: int, purpose: int) -> int:
    """63 bits, others for every purpose."""
    return int(np.random.SeedSequence(seed, spawn_key=(purpose,)).generate_state(1, np.uint64)[0]) & (1 << 63) - 1
