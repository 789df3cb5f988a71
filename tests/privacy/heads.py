"""A small language model that makes its own losses, and the same one in plain PyTorch, for the oracle."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.losses import linear_cross_entropy
from dpfast.reference import cross_entropy, recomputed_head
from tests.helpers import F64, Run, run_fused
from tests.oracle import Verdict

B, T, D, V = 4, 5, 6, 70
KEEPS = [True, False]


class LM(nn.Module):
    """Losses ``[B]``; ``plain`` makes them as anybody would."""

    plain = False

    def __init__(self, keep: bool | None = None, bias: bool = True, tied: bool = False):
        super().__init__()
        self.embedding, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=bias)
        self.keep = keep
        if tied:
            self.head.weight = self.embedding.weight

    def hidden(self, ids: Tensor) -> Tensor:
        return 2 * self.body(self.embedding(ids)).tanh()

    def losses(self, hidden: Tensor, labels: Tensor, head: nn.Module | None = None) -> Tensor:
        head = self.head if head is None else head
        if self.plain:
            return plain_losses(head(hidden), labels)
        return linear_cross_entropy(hidden, head, labels, reduction="none", keep_logits=self.keep)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.losses(self.hidden(ids), labels)


def plain_losses(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.double() if logits.dtype == F64 else logits.float()
    each = F.cross_entropy(wide.transpose(1, 2), labels, reduction="none")
    return each.sum(1) / (labels != -100).sum(1).clamp_min(1)


def batch(size: int = B) -> tuple[Tensor, Tensor]:
    """Ids, some of them more than once, and labels: some ignored of sample 1, and all of sample 2."""
    ids, labels = torch.randint(0, V // 4, (size, T)), torch.randint(0, V, (size, T))
    labels[1:2, 3:], labels[2:3] = -100, -100
    return ids, labels


def added(losses: Tensor, _: Any) -> Tensor:
    return losses.sum()


def small_chunks(monkeypatch: Any) -> None:
    """Several chunks of positions, and of classes."""
    for module in (cross_entropy, recomputed_head):
        monkeypatch.setattr(module, "CHUNK", 3 * V)
    monkeypatch.setattr(recomputed_head, "LEAST_CLASSES", 16)


def plainly(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.plain = True
    return twin


def judge(model: nn.Module, inputs: tuple, max_grad_norm: Any = None, groups: Any = None, **kw: Any) -> Run:
    """Losses, norms and clipped sums against plain PyTorch, one sample at a time."""
    reference = plainly(model)
    verdict = Verdict(reference, inputs, None, added, max_grad_norm, groups)
    if not model.keep and verdict.dtype == F64:  # logits have no more digits than their gradient then
        verdict.certificate *= 4
    run = run_fused(model, (inputs, None), added, verdict.max_grad_norm, loss_reduction="sum", **kw)
    expected = reference(*inputs)
    rough = 0.05 if next(model.parameters()).dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(run.output.detach(), expected.detach(), rtol=rough, atol=rough)
    verdict.check_norms(run.norms)
    verdict.check_sums(run.sums)
    return run
