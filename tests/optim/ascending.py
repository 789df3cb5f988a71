"""A small model of every kind of layer, and the ascents' algorithms written plainly, in float64."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import dpfast
from dpfast import ops
from dpfast.noise.stream import NoiseStream
from tests.helpers import F64, loader_of, make_private

B, T, V, E = 6, 5, 7, 4
C = 0.5


class Block(nn.Module):
    """With a bare parameter: the generic path."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.gate = nn.LayerNorm(E), nn.Linear(E, E), nn.Parameter(torch.rand(E))

    def forward(self, h):
        return h + self.gate * torch.tanh(self.fc(self.norm(h)))


class Net(nn.Module):
    """Convolution, embedding tied to the head, layer norm, linear layers and a bare parameter."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.conv, self.emb, self.block = nn.Conv2d(1, E, 2), nn.Embedding(V, E), Block()
        self.fc, self.head = nn.Linear(E, E), nn.Linear(E, V, bias=False)
        self.head.weight = self.emb.weight
        self.reentrant = reentrant

    def last(self, h):
        return torch.tanh(self.fc(h))

    def forward(self, image, ids):
        h = self.emb(ids) + self.conv(image).mean((2, 3)).unsqueeze(1)
        if self.reentrant is None:
            return self.head(self.last(self.block(h)))
        h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.head(checkpoint(self.last, h, use_reentrant=self.reentrant))


def data(n: int = B, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 3, 3, dtype=dtype), torch.randint(V, (n, T))


def loss_of(logits: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    """The mean over a sample's tokens; over samples as told."""
    per_sample = F.cross_entropy(logits.flatten(0, 1).double(), ids.flatten(), reduction="none").view(-1, T).mean(1)
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


class Private:
    """A model made private; the noise repeats for the same ``seed``."""

    def __init__(self, model: nn.Module, make, seed: int = 3, **kw):
        self.model = model
        options = dict(noise_multiplier=1.0, max_grad_norm=C, data_loader=loader_of(B))
        options["noise_generator"] = torch.Generator().manual_seed(seed)
        options |= kw
        optimizer = make(model.parameters()) if callable(make) else make
        self.wrapped, self.optimizer, _ = make_private(model, optimizer=optimizer, **options)
        self.reduction = options.get("loss_reduction", "mean")

    def backward(self, batch) -> None:
        loss_of(self.wrapped(*batch), batch[1], self.reduction).backward()

    def step(self, *physical) -> None:
        """One logical batch of these physical ones; an empty one if there is none."""
        for k, batch in enumerate(physical):
            self.optimizer.zero_grad()
            self.optimizer.signal_skip_step(do_skip=k < len(physical) - 1)
            self.backward(batch)
            self.optimizer.step()
        if not physical:
            self.optimizer.zero_grad()
            self.optimizer.expect_no_samples()
            self.optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def run_of(steps, *args, **kw) -> list[Tensor]:
    """Weights after ``steps`` of a private run."""
    run = Private(*args, **kw)
    for batch in steps:
        run.step(batch) if batch is not None else run.step()
    return run.values()


class Plain:
    """DP-SGD with an ascent, sample by sample on a copy of the weights; ``shift`` is the rule, in one line each."""

    def __init__(self, model: nn.Module, make, noise_multiplier: float = 1.0, seed: int = 3, **rule):
        self.model, self.twin = copy.deepcopy(model), copy.deepcopy(model)
        self.params = list(self.model.parameters())
        self.optimizer = make(self.model.parameters())
        self.noise_multiplier = noise_multiplier
        self.stream = NoiseStream(torch.Generator().manual_seed(seed))
        self.rule = rule
        self.shift = [torch.zeros_like(p) for p in self.params]
        self.filtered: list[Tensor] | None = None

    def step(self, batch) -> None:
        with torch.no_grad():
            for q, p, s in zip(self.twin.parameters(), self.params, self.shift, strict=True):
                q.copy_(p + s)
        sums = [torch.zeros_like(p) for p in self.params]
        for k in range(0 if batch is None else len(batch[0])):
            one = [x[k : k + 1] for x in batch]
            gradients = torch.autograd.grad(loss_of(self.twin(*one), one[1]), list(self.twin.parameters()))
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            for total, g in zip(sums, gradients, strict=True):
                total += min(1, C / norm) * g
        noisy = [torch.empty_like(p) for p in self.params]
        noise = self.stream.next(self.noise_multiplier, C, sum(p.numel() for p in self.params), 1 / B)
        ops.noisy_grad_(sums, noisy, list(range(len(sums))), noise)
        if "kappa" in self.rule:
            kappa = self.rule["kappa"]
            old = self.filtered or noisy
            noisy = self.filtered = [(1 - kappa) * m + kappa * g for m, g in zip(old, noisy, strict=True)]
        before = [p.detach().clone() for p in self.params]
        for p, g in zip(self.params, noisy, strict=True):
            p.grad = g.clone()
        self.optimizer.step()
        back = [b - p.detach() for b, p in zip(before, self.params, strict=True)]
        if "kappa" in self.rule:
            self.shift = [-(1 - kappa) / kappa * x for x in back]
        else:
            along = noisy if "rho" in self.rule else back
            norm = math.sqrt(sum(float(x.square().sum()) for x in along))
            rho = self.rule.get("rho", self.rule.get("momentum_rho"))
            self.shift = [rho * x / norm if norm else x * 0 for x in along]

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


RHO = dpfast.DPSAT(0.3)


def sgd(params):
    return SGD(params, lr=0.3, momentum=0.9)


def started(ascent=RHO, model=None, make=sgd, steps: int = 2, **kw) -> Private:
    """A run that has a shift."""
    run = Private(Net().double() if model is None else model, make, ascent=ascent, **kw)
    for _ in range(steps):
        run.step(data())
    return run
