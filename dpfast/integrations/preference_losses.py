"""Losses of preference pairs, ``[n]`` each: none of them looks at another pair.

They are those of TRL's ``DPOTrainer``, by its names. What TRL computes of a whole batch is not among them: the two
"aot" losses sort the scores of a batch. (Its "sft" is a mean over the tokens of the batch, and here over each pair's.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dpfast.refusals import LossCouplesError


class Scores(NamedTuple):
    """Log-probabilities of completions under policy and reference, all ``[n]`` for n pairs."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor  # of the completion
    rejected_tokens: Tensor
    chosen_mean: Tensor  # log-probability of a token


@dataclass(frozen=True)
class Preference:
    """Which loss pairs have: the arguments of TRL's ``DPOConfig``, by their names.

    Raises:
        ValueError: a loss that compares the pairs of a batch, or that is not known.
    """

    loss_type: Sequence[str] = ("sigmoid",)
    loss_weights: Sequence[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        for name in self.loss_type:
            if name.startswith("aot"):
                raise LossCouplesError(
                    f"loss_type={name!r} sorts the scores of a batch, so that one pair moves the gradients of all: use "
                    f"another one, such as 'sigmoid'"
                )
            if name not in LOSSES:
                raise LossCouplesError(
                    f"loss_type={name!r}: it is not known that it looks at one pair at a time: use one of "
                    f"{', '.join(sorted(LOSSES))}"
                )
        if self.f_divergence_type not in DIVERGENCES:
            raise LossCouplesError(
                f"f_divergence_type={self.f_divergence_type!r}: use one of {', '.join(sorted(DIVERGENCES))}"
            )

    @classmethod
    def of(cls, args: Any) -> Preference:
        """What a ``DPOConfig`` asks for."""
        found = {name: getattr(args, name) for name in cls.__dataclass_fields__ if hasattr(args, name)}
        return cls(**found)

    def losses(self, scores: Scores) -> Tensor:
        """``[n]``, the weighted sum of all that are asked for."""
        chosen = scores.chosen - scores.reference_chosen
        rejected = scores.rejected - scores.reference_rejected
        divergence = DIVERGENCES[self.f_divergence_type]
        found = _Ratios(chosen, rejected, divergence(chosen, self), divergence(rejected, self))
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        total = torch.zeros_like(chosen)
        for name, weight in zip(self.loss_type, weights, strict=True):
            total = total + weight * LOSSES[name](self, found, scores)
        return total


class _Ratios(NamedTuple):
    chosen: Tensor  # log-ratios of policy and reference
    rejected: Tensor
    chosen_score: Tensor  # what the divergence makes of them
    rejected_score: Tensor

    @property
    def delta(self) -> Tensor:
        return self.chosen_score - self.rejected_score


def _alpha_divergence(ratio: Tensor, of: Preference) -> Tensor:
    less_one = of.f_alpha_divergence_coef - 1
    if abs(less_one) < 1e-6:
        return ratio
    return torch.expm1((less_one * ratio).clamp(max=80.0)) / less_one


DIVERGENCES: dict[str, Callable[[Tensor, Preference], Tensor]] = {
    "reverse_kl": lambda ratio, of: ratio,
    "forward_kl": lambda ratio, of: 1 - torch.exp(-ratio),
    "js_divergence": lambda ratio, of: math.log(2) + F.logsigmoid(ratio),
    "alpha_divergence": _alpha_divergence,
}


def _per_token_delta(ratios: _Ratios, scores: Scores) -> Tensor:
    chosen = ratios.chosen_score / scores.chosen_tokens.clamp(min=1)
    return chosen - ratios.rejected_score / scores.rejected_tokens.clamp(min=1)


def _exo_pair(of: Preference, ratios: _Ratios, scores: Scores) -> Tensor:
    x, smoothing = of.beta * ratios.delta, of.label_smoothing
    won = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-smoothing))
    return won + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(smoothing))


def _nca_pair(of: Preference, ratios: _Ratios, scores: Scores) -> Tensor:
    chosen, rejected = of.beta * ratios.chosen, of.beta * ratios.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(of: Preference, ratios: _Ratios, scores: Scores) -> Tensor:
    x, flipped = of.beta * ratios.delta, of.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(x) + flipped * F.logsigmoid(-x)) / (1 - 2 * flipped)


def _sppo_hard(of: Preference, ratios: _Ratios, scores: Scores) -> Tensor:
    return (ratios.chosen - 0.5 / of.beta).square() + (ratios.rejected + 0.5 / of.beta).square()


def _discopop(of: Preference, ratios: _Ratios, scores: Scores) -> Tensor:
    x = of.beta * ratios.delta
    share = torch.sigmoid(x / of.discopop_tau)
    return -F.logsigmoid(x) * (1 - share) + torch.exp(-x) * share


LOSSES: dict[str, Callable[[Preference, _Ratios, Scores], Tensor]] = {
    "sigmoid": lambda of, ratios, scores: -F.logsigmoid(of.beta * ratios.delta),
    "hinge": lambda of, ratios, scores: torch.relu(1 - of.beta * ratios.delta),
    "ipo": lambda of, ratios, scores: (_per_token_delta(ratios, scores) - 1 / (2 * of.beta)).square(),
    "sigmoid_norm": lambda of, ratios, scores: -F.logsigmoid(of.beta * _per_token_delta(ratios, scores)),
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": lambda of, ratios, scores: (
        -F.logsigmoid(of.beta * ratios.chosen) - F.logsigmoid(-of.beta * ratios.rejected)
    ),
    "sppo_hard": _sppo_hard,
    "apo_zero": lambda of, ratios, scores: (
        1 - torch.sigmoid(of.beta * ratios.chosen) + torch.sigmoid(of.beta * ratios.rejected)
    ),
    "apo_down": lambda of, ratios, scores: (
        torch.sigmoid(of.beta * ratios.chosen) + 1 - torch.sigmoid(of.beta * (ratios.chosen - ratios.rejected))
    ),
    "discopop": _discopop,
    "sft": lambda of, ratios, scores: -scores.chosen_mean,
}
