"""Per-sample gradients that stay in ``p.grad_sample``, for code that was written for Opacus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpfast.capture.forms import Form, written
from dpfast.ops import index_of


def gradients(forms: Sequence[Form], padding: Sequence[int] = ()) -> torch.Tensor:
    """What ``forms`` add up to, ``[B, *]``, without the rows ``padding``, which no sample is in."""
    samples = written(forms[0])
    for form in forms[1:]:
        samples = samples + written(form)
    if padding:
        rows = [row for row in range(len(samples)) if row not in padding]
        samples = samples.index_select(0, index_of(tuple(rows), samples.device))
    return samples


def keep_grad_sample(p: Any, samples: torch.Tensor) -> None:
    """Put ``g_i`` of a backward pass, ``[B, *]``, into ``p.grad_sample``; those of several passes are a list."""
    samples = samples.view(-1, *p.shape).to(p.dtype)
    before = getattr(p, "grad_sample", None)
    if before is None:
        p.grad_sample = samples
    else:
        p.grad_sample = [*(before if isinstance(before, list) else [before]), samples]


def all_grad_samples(params: Sequence[Any]) -> list[torch.Tensor]:
    """``p.grad_sample`` of every parameter, all passes in one tensor.

    Raises:
        ValueError: a parameter has none.
    """
    found = []
    for p in params:
        samples = getattr(p, "grad_sample", None)
        if samples is None:
            raise ValueError(
                "grad_samples: there are no per-sample gradients. The fused mode keeps those of a backward pass until "
                "zero_grad() if make_private is given keep_grad_samples=True; or use grad_sample_mode='hooks'"
            )
        found.append(torch.cat(samples) if isinstance(samples, list) else samples)
    return found
