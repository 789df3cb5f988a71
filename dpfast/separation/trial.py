"""An operator without a rule is tried alone, on random numbers, with some of the samples replaced by others.

Rows that stay when all samples but their own are replaced are that sample's. Random numbers show more than a model's
own values: no mask is zero among them. It is a trial all the same, and counts as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpfast.separation.labels import Label, Labels, Rows
from dpfast.separation.passes import seed_torch


def tried_alone(labels: Labels, rows: Rows, func: Any, args: Any, kwargs: Any) -> list[Label] | None:
    """Labels of the outputs, as a trial shows them; None if it shows nothing. All inputs of samples are ``rows``."""
    labelled = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and labels[x] is not None]
    if rows.dim is None or not all(x.is_floating_point() for x in labelled):
        return None  # integers cannot be drawn: they mean something
    draw = torch.Generator().manual_seed(0)
    given = tree_map(lambda x: _random(x, draw), (args, kwargs))
    try:
        whole = _outputs(func, *given)
        found: list[Label] = [_sized(labels, rows, x) for x in whole]
        if any(label is None for label in found):
            return None
        for part in _parts(labels.batch):
            stays = ~torch.isin(torch.from_numpy(rows.owners.each), part)
            others = tree_map(
                lambda x, given_x, stays=stays: _replaced(labels, x, given_x, stays, draw), (args, kwargs), given
            )
            for k, (x, y) in enumerate(zip(whole, _outputs(func, *others), strict=True)):
                if not _same(x, y) and not _kept(x, y, found[k], stays):
                    return None
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return None  # it wants other values than random ones: nothing was shown
    return found


def _parts(batch: int) -> list[Tensor]:
    """Sets of samples, and what is not in them, such that any two samples are parted by one of the sets."""
    samples = torch.arange(batch)
    digits = [(samples >> k) & 1 for k in range(max(1, (batch - 1).bit_length()))]
    return [samples[digit == bit] for digit in digits for bit in (0, 1)]


def _random(x: Any, draw: torch.Generator) -> Any:
    if not isinstance(x, Tensor):
        return x
    if not x.is_floating_point():
        return x.detach().clone()
    return torch.randn(x.shape, generator=draw).to(x)


def _replaced(labels: Labels, x: Any, given: Any, stays: Tensor, draw: torch.Generator) -> Any:
    """``given``, random numbers in place of ``x``, with new ones in the rows that do not stay."""
    label = labels[x] if isinstance(x, Tensor) else None
    if not isinstance(label, Rows) or label.dim is None or not x.is_floating_point():
        return given
    kept = stays.view([-1 if d == label.dim else 1 for d in range(x.dim())]).to(x.device)
    return torch.where(kept, given, 4 * torch.randn(x.shape, generator=draw).to(x))


def _outputs(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.random.fork_rng(), torch.no_grad():
        seed_torch(0)
        out = func(*args, **kwargs)
    return [x for x in ([out] if isinstance(out, Tensor) else out) if isinstance(x, Tensor)]


def _sized(labels: Labels, rows: Rows, x: Tensor) -> Label:
    """The rows along the dimension of ``x`` that is as long, the same one if it may be."""
    size = len(rows.owners)
    dims = [rows.dim] if rows.dim is not None and rows.dim < x.dim() and x.shape[rows.dim] == size else []
    dims += [d for d in range(x.dim()) if x.shape[d] == size]
    return labels.rows(dims[0], rows.owners.each) if dims else None


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y)


def _kept(x: Tensor, y: Tensor, label: Label, stays: Tensor) -> bool:
    """Whether the rows that stay are the same to rounding."""
    if x.shape != y.shape or not isinstance(label, Rows) or label.dim is None:
        return False
    index = stays.nonzero().squeeze(1).to(x.device)
    x, y = (side.index_select(label.dim, index) for side in (x, y))
    if not x.is_floating_point():
        return torch.equal(x, y)
    error = 64 * torch.finfo(x.dtype).eps * float(torch.nan_to_num(x).abs().max()) if x.numel() else 0.0
    return torch.allclose(x, y, rtol=0.0, atol=error, equal_nan=True)
