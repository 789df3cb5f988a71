"""Temperature scaling under differential privacy (Guo et al. 2017; Zhang et al., arXiv 2210.08248).

One number T divides all logits: accuracy stays, confidence changes. T is fitted by DP-SGD, through the fused mode, on
samples that the model was not trained on.

What the two releases, model and temperature, cost together:

=====================================  ==============================================  ==========================
samples of the two                     (ε, δ) of both together                          why
=====================================  ==============================================  ==========================
disjoint, split without looking        ``(max(ε_model, ε_T), max(δ_model, δ_T))``       parallel composition
the same, or overlapping               ``(ε_model + ε_T, δ_model + δ_T)``, or less if   sequential composition
                                       one accountant counts all steps of both
=====================================  ==============================================  ==========================

The first row holds though T is fitted on the model's outputs: a sample of the first split reaches T through the
private model alone (post-processing), one of the second through the fit alone. "Without looking" means that the side a
sample falls on does not depend on other samples: fixed beforehand, or by a hash of its identifier. A random permutation
of n samples moves others when one is added, and is covered for neighbours in which a sample is replaced by none only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast.analysis.calibration import check_outputs
from dpfast.engine import PrivacyEngine

LARGEST_LOG = math.log(100.0)  # a fitted T stays between 1/100 and 100


class TemperatureScaling(nn.Module):
    """Logits over a temperature, ``z / exp(log_temperature)``; the one parameter has shape ``[]``."""

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, logits: Tensor) -> Tensor:
        return logits * torch.exp(-self.log_temperature)

    @property
    def temperature(self) -> float:
        return math.exp(float(self.log_temperature.detach()))


@dataclass(frozen=True)
class TemperatureFit:
    """A temperature fitted by DP-SGD, and what it cost.

    Attributes:
        temperature: T; above 1 makes the model less sure.
        epsilon, delta: of the fit alone.
        steps: DP-SGD steps taken.
        noise_multiplier: standard deviation over sensitivity.
    """

    temperature: float
    epsilon: float
    delta: float
    steps: int
    noise_multiplier: float

    def total(self, epsilon: float, delta: float, *, disjoint: bool) -> tuple[float, float]:
        """(ε, δ) of model and temperature together; see the table at the top of this file.

        Args:
            epsilon, delta: what the model was trained with.
            disjoint: whether the fit saw none of the samples that the model was trained on.
        """
        if disjoint:
            return max(self.epsilon, epsilon), max(self.delta, delta)
        return self.epsilon + epsilon, self.delta + delta


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    *,
    target_delta: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    max_grad_norm: float = 4.0,
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 0.5,
    start: float = 1.0,
    accountant: str = "rdp",
    noise_generator: torch.Generator | None = None,
) -> TemperatureFit:
    """Fit a temperature by DP-SGD on Poisson batches; the mean of the second half of the iterates is returned.

    T stays between 1/100 and 100.

    The gradient of a sample's loss with respect to log T is ``(z_label − Σ_k p_k z_k) / T``: large, of either sign,
    where the model is surely wrong. Clipping cuts those off, and T then ends below the best one (seen on logits of
    standard deviation 4, best T = 2: 1.1 at C = 0.5, 1.5 at C = 1, 2.0 at C = 4). Averaging iterates is
    post-processing.

    Args:
        logits: ``[n, classes]`` (or ``[n]``, binary) of the private model on a split that it was not trained on.
        labels: ``[n]``.
        target_delta: δ of the fit.
        target_epsilon: ε of the fit; or give ``noise_multiplier``. One of the two.
        max_grad_norm: C, for the gradient with respect to log T.
        epochs, batch_size, learning_rate: of the DP-SGD run, whose learning rate falls to 0 as a half cosine.
        start: the first T.
        accountant: Opacus' name of it.
        noise_generator: repeats the noise, as in :meth:`dpfast.PrivacyEngine.make_private`; ``torch.manual_seed``
            repeats the batches.

    Returns:
        T with its ε.

    Raises:
        ValueError: names the argument: NaN logits, labels out of range, both or neither of ε and noise.
    """
    logits, labels = check_outputs(logits, labels)
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ValueError(
            f"target_epsilon={target_epsilon!r}, noise_multiplier={noise_multiplier!r}: give one of the two, not both"
        )
    sizes: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size}
    for name, whole in sizes.items():
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
            raise ValueError(f"{name}={whole!r}: give a whole number of at least 1")
    positive = {"learning_rate": learning_rate, "start": start, "target_delta": target_delta}
    for name, number in positive.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ValueError(f"{name}={number!r}: give a positive finite number")
    data = TensorDataset(logits.clamp(min=-1e4).float(), labels)  # −inf · 0 would be NaN in the gradient
    loader = DataLoader(data, batch_size=min(batch_size, len(data)))
    module = TemperatureScaling(start)
    optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate)
    engine = PrivacyEngine(accountant=accountant)
    common: dict[str, Any] = dict(module=module, optimizer=optimizer, data_loader=loader, max_grad_norm=max_grad_norm)
    common["noise_generator"] = noise_generator
    private: Callable[..., Any] = engine.make_private
    if target_epsilon is not None:
        common |= dict(target_epsilon=target_epsilon, target_delta=target_delta, epochs=epochs)
        private = engine.make_private_with_epsilon
    else:
        common["noise_multiplier"] = noise_multiplier
    model, optimizer, loader = private(**common)
    steps, seen = epochs * len(loader), []
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer.original_optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in range(epochs):
        for z, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(z), y).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():  # post-processing: noise alone must not carry T out of all range
                module.log_temperature.clamp_(-LARGEST_LOG, LARGEST_LOG)
            seen.append(float(module.log_temperature.detach()))
    kept = seen[len(seen) // 2 :]
    return TemperatureFit(
        math.exp(sum(kept) / len(kept)),
        float(engine.get_epsilon(target_delta)) if optimizer.noise_multiplier else math.inf,
        target_delta,
        len(seen),
        float(optimizer.noise_multiplier),
    )
