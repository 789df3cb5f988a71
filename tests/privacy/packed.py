"""What tests of packed rows share: a private model of segments, and its judge, one segment at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.losses import segment_cross_entropy
from tests.helpers import SLACK, distance, make_private, sums_of
from tests.oracle import Verdict

LENGTHS = (5, 1, 4)
V = 50


def tokens(lengths: Sequence[int] = LENGTHS, seed: int = 0, least: int = 3) -> list[Tensor]:
    """Samples of so many tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(least, V, (n,), generator=draw) for n in lengths]


def packed(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """All in one row ``[1, total]``, with position ids."""
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.cat([none, *samples])
    return {"input_ids": ids[None], "position_ids": torch.cat([none, *(torch.arange(len(s)) for s in samples)])[None]}


class Logits(nn.Module):
    """A model's logits, called with ids and positions; for the oracle without positions, a sample alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **marks: Any) -> Any:
        out = self.model(input_ids=input_ids, **marks)
        return out.logits if hasattr(out, "logits") else out


class OneByOne(nn.Module):
    """For the oracle: sample i of ``number`` is run by itself, as a row of its own."""

    def __init__(self, model: nn.Module, samples: Sequence[Tensor]):
        super().__init__()
        self.model, self.samples = model, samples

    def forward(self, number: Tensor) -> Tensor:
        assert len(number) == 1
        sample = self.samples[int(number)][None]
        return segment_cross_entropy(self.model(sample), sample, position_ids=torch.arange(sample.shape[1])[None])


def judge(model: nn.Module, samples: Sequence[Tensor], C: float | None = None) -> Verdict:
    """What is right for ``samples``, each run alone."""
    number = torch.arange(len(samples))
    return Verdict(OneByOne(Logits(copy.deepcopy(model)), samples), (number,), number, lambda loss, _: loss, C)


class Segmented:
    """A private copy of ``model`` for packed rows."""

    def __init__(self, model: nn.Module, C: float, size: int = 4, loss_reduction: str = "sum", **kw: Any):
        self.model, self.reduction = copy.deepcopy(model), loss_reduction
        options = dict(units="packed", size=size, max_grad_norm=C, loss_reduction=loss_reduction)
        self.wrapped, self.optimizer, self.loader = make_private(self.model, **(options | kw))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = Logits(self.wrapped)(**batch)
        marks = {name: x for name, x in batch.items() if name in ("position_ids", "seq_idx")}
        if "cu_seq_lens_q" in batch:
            marks = {"cu_seqlens": batch["cu_seq_lens_q"]}
        return segment_cross_entropy(logits, batch["input_ids"], reduction=self.reduction, **marks)

    def backward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The clipped sums of one forward and backward, forgotten again."""
        self.loss(batch).backward()
        sums = {f"model.model.{name}": s for name, s in sums_of(self.model).items()}
        for p in self.model.parameters():
            p.summed_grad = p.grad = None
        return sums

    def nothing_summed(self) -> bool:
        return not any(s.any() for s in sums_of(self.model).values())


def examine(
    model: nn.Module,
    samples: Sequence[Tensor] | None = None,
    pack: Callable[[Sequence[Tensor]], dict[str, Tensor]] = packed,
    leave_out: bool = True,
    C: float | None = None,
    **kw: Any,
) -> Segmented:
    """Norms and sums against one sample at a time, and each one left out moves the sum by at most C."""
    samples = tokens() if samples is None else samples
    verdict = judge(model, samples, C)
    private = Segmented(model, verdict.max_grad_norm, **kw)
    whole = private.backward(pack(samples))
    verdict.check_norms(private.wrapped.per_sample_gradient_norms)
    verdict.check_sums(whole)
    if leave_out and len(samples) > 1:
        slack = SLACK if verdict.dtype == torch.float64 else 1 + 1e-5
        check_moves(private, samples, whole, verdict.max_grad_norm, pack, slack)
    return private


def check_moves(
    private: Segmented,
    samples: Sequence[Tensor],
    whole: dict[str, Tensor],
    C: float,
    pack: Callable[[Sequence[Tensor]], dict[str, Tensor]] = packed,
    slack: float = SLACK,
) -> None:
    for k in range(len(samples)):
        rest = private.backward(pack([s for j, s in enumerate(samples) if j != k]))
        moved = distance(whole, rest)
        assert moved <= C * slack, f"without sample {k} the clipped sum moved by {moved / C} C"
