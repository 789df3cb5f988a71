"""One private forward and backward, and the two questions asked of it: is it exact, is it within C?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests import oracle
from tests.oracle import LossFn, Verdict

SLACK = 1 + 1e-6  # of the sensitivity, in float64: the issue's own figure
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def loader_of(size: int, batch: int | None = None, **kw) -> DataLoader:
    """A loader for ``make_private``, which reads its length; the batches of a test are made by hand."""
    return DataLoader(TensorDataset(torch.zeros(max(size, 1), 1)), batch_size=batch or max(size, 1), **kw)


def engine_of(accountant: str = "rdp", **kw):
    import dpfast

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Secure RNG turned off")
        return dpfast.PrivacyEngine(accountant=accountant, **kw)


def make_private(model: nn.Module, *, size: int = 4, lr: float = 0.0, engine=None, optimizer=None, **kw):
    """What ``make_private`` returns: at σ = 0 and without Poisson sampling unless told."""
    options: dict[str, Any] = dict(noise_multiplier=0.0, max_grad_norm=1.0, poisson_sampling=False)
    options.update(kw)
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options.setdefault("data_loader", loader_of(size))
    return (engine or engine_of()).make_private(module=model, optimizer=optimizer, **options)


def follow(twin: nn.Module, model: nn.Module) -> nn.Module:
    """``twin``, a copy taken before ``make_private``, at the weights and ``requires_grad`` of ``model``."""
    with torch.no_grad():
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.copy_(q)
            p.requires_grad_(q.requires_grad)
    return twin


def sums_of(model: nn.Module) -> dict[str, Tensor]:
    """``{name: clipped sum}`` as the backward left it; a parameter that was not reached counts as zeros."""
    out = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            got = getattr(p, "summed_grad", None)
            out[name] = torch.zeros_like(p, dtype=F64) if got is None else got.detach().clone()
    return out


@dataclass
class Run:
    norms: Tensor
    sums: dict[str, Tensor]
    output: Any
    model: nn.Module  # the user's own module, wrapped in place
    wrapped: nn.Module
    optimizer: Any


def run_fused(
    model: nn.Module,
    batch: tuple[tuple, Any],
    loss: LossFn,
    max_grad_norm: float | Sequence[float] | Mapping[str, float],
    loss_reduction: str = "mean",
    clipping: str = "flat",
    **kw,
) -> Run:
    """Forward and backward in the fused mode at σ = 0, on a copy of ``model``."""
    model = copy.deepcopy(model)
    inputs, target = batch
    wrapped, optimizer, _ = make_private(
        model,
        size=oracle.batch_size(inputs, 0 if kw.get("batch_first", True) else 1),
        max_grad_norm=max_grad_norm,
        loss_reduction=loss_reduction,
        clipping=clipping,
        **kw,
    )
    output = wrapped(*inputs)
    loss(output, target).backward()
    norms = wrapped.per_sample_gradient_norms.detach().clone()
    return Run(norms, sums_of(model), output, model, wrapped, optimizer)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum((a[n].double() - b[n].double()).square().sum().item() for n in a) ** 0.5


def assert_sensitivity(
    model: nn.Module, batch: tuple[tuple, Any], loss: LossFn, max_grad_norm: float, sensitivity=None, **kw
) -> None:
    """Leave each sample out: the clipped sum moves by at most the sensitivity (C under flat clipping).

    In one private model, as whether samples meet in it takes most of a short run's time to find out; but in a fresh
    copy each time where a forward may write into buffers, and so would not be the same function again.
    """
    sensitivity = max_grad_norm if sensitivity is None else sensitivity
    batch_dim = 0 if kw.get("batch_first", True) else 1
    run = run_fused(model, batch, loss, max_grad_norm, **kw)
    n = oracle.batch_size(batch[0], batch_dim)
    for i in range(n):
        rest = oracle.take(batch, [j for j in range(n) if j != i], batch_dim)
        if any(True for _ in model.buffers()):
            sums = run_fused(model, rest, loss, max_grad_norm, **kw).sums
        else:
            run.optimizer.zero_grad()
            loss(run.wrapped(*rest[0]), rest[1]).backward()
            sums = sums_of(run.model)
        moved = distance(run.sums, sums)
        assert moved <= sensitivity * SLACK, f"without sample {i} the clipped sum moved by {moved / sensitivity} C"


def assert_exact(
    model: nn.Module,
    inputs: tuple,
    target: Any,
    loss: LossFn,
    max_grad_norm: float | None = None,
    **kw,
) -> Run:
    """Output, norms and clipped sums against the oracle, at the dtype of the model.

    In 16 bits, where a mean over the batch is refused, the loss is that mean times the batch size.
    """
    batch_dim = 0 if kw.get("batch_first", True) else 1
    if "loss_reduction" not in kw and any(p.dtype in (BF16, F16) for p in model.parameters()):
        loss, kw = times_batch(loss, batch_dim), kw | {"loss_reduction": "sum"}
    verdict = Verdict(model, inputs, target, loss, max_grad_norm, batch_dim=batch_dim)
    run = run_fused(model, (inputs, target), loss, verdict.max_grad_norm, **kw)
    if len(verdict.norms) and isinstance(run.output, Tensor):  # some of PyTorch's own layers refuse none
        with torch.no_grad():
            plain = copy.deepcopy(model)(*inputs)
        torch.testing.assert_close(run.output.detach(), plain, equal_nan=True, msg=lambda m: f"the output changed: {m}")
    verdict.check_norms(run.norms)
    verdict.check_sums(run.sums)
    return run


def assert_exact_or_refused(model: nn.Module, inputs: tuple, target: Any, loss: LossFn, name: str, **kw) -> None:
    """Where the issue allows a refusal: it must then name ``name``; silently wrong is never allowed."""
    try:
        run_fused(model, (inputs, target), loss, 1.0, **kw)
    except (ValueError, NotImplementedError, RuntimeError) as refusal:
        assert name in str(refusal), f"the refusal does not name {name!r}: {refusal}"
    else:
        assert_exact(model, inputs, target, loss, **kw)


def assert_refused(model: nn.Module, *words: str, **kw) -> None:
    """``make_private`` raises before training starts, and the message has all of ``words``."""
    with pytest.raises((ValueError, NotImplementedError)) as refusal:
        make_private(model, **kw)
    for word in words:
        assert word.lower() in str(refusal.value).lower(), f"{word!r} is not in: {refusal.value}"


def times_batch(loss: LossFn, batch_dim: int = 0) -> LossFn:
    """A mean over the batch as a sum."""
    return lambda output, target: loss(output, target) * oracle.batch_size((output,), batch_dim)


def mse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def sse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="sum")


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token style cross-entropy, the mean over the tokens of equally long samples."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def check_layer(
    model: nn.Module, inputs: tuple, dtype: torch.dtype, loss: LossFn = mse, empty: bool = True, **kw
) -> None:
    """The whole examination of a layer: exact as given, for a lone sample, for none; and within C.

    The target is random, as large as the outputs, so that norms differ between samples and about half of the
    samples are clipped.
    """
    batch_dim = 0 if kw.get("batch_first", True) else 1
    model = model.to(dtype)
    inputs = oracle.cast(inputs, dtype)
    with torch.no_grad():
        shape = copy.deepcopy(model)(*inputs).shape
    target = (2 * torch.randn(shape)).to(dtype)
    assert_exact(model, inputs, target, loss, **kw)
    for first in ([0], []) if empty else ([0],):
        x, y = oracle.take((inputs, target), first, batch_dim)
        assert_exact(model, x, y, loss, **kw)
    if dtype == F64:
        bound = Verdict(model, inputs, target, loss, batch_dim=batch_dim).max_grad_norm
        assert_sensitivity(model, (inputs, target), loss, bound, **kw)
