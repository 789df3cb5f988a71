"""The tensors that a model is called with: along which dimension each has the samples, and what to replace them by."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dpfast.capture.trees import map_tensors, packed_sequences, tensors
from dpfast.separation.labels import Label, Labels, Lost

Axes = dict[tuple[int, int], int | None]  # by an input's place and number of dimensions: where its samples lie


def axis(x: Tensor, batch: int, batch_dim: int) -> int | None:
    """Along which dimension an input has the samples."""
    if x.dim() < 2 and not x.is_floating_point():
        return None
    return next((d for d in (batch_dim, 0) if x.dim() > d and x.shape[d] == batch), None)


def row_axis(x: Tensor, batch: int, batch_dim: int) -> int | None:
    """The same, where a vector of integers counts as one of each sample: a label, a length."""
    return 0 if x.dim() == 1 and len(x) == batch else axis(x, batch, batch_dim)


def label_inputs(labels: Labels, inputs: Any, batch_dim: int, axes: Axes) -> None:
    """Say whose the inputs of a model are; ``axes`` keeps along which dimension each had the samples in its first call.

    An edge list ``[2, E]`` is no input of two samples, when two are left.
    """
    for k, x in enumerate(tensors(inputs)):
        dim = axes.setdefault((k, x.dim()), row_axis(x, labels.batch, batch_dim))
        labels[x] = _label(labels, x, batch_dim, dim)
    for packed in packed_sequences(inputs):
        labels[packed.data] = labels.rows(0, packed_owners(packed))


def _label(labels: Labels, x: Tensor, batch_dim: int, dim: int | None) -> Label:
    if dim is not None and x.shape[dim] == labels.batch:
        return labels.in_order(dim, labels.batch)
    if x.dim() == 0 or x.shape[batch_dim if x.dim() > batch_dim else 0] == 1:
        return None  # all samples share it
    if x.dim() == 1 and not x.is_floating_point() and bool((x == torch.arange(len(x), device=x.device)).all()):
        return None  # positions
    return Lost(f"an input of shape {list(x.shape)} that has no batch dimension", "")


def packed_owners(packed: PackedSequence) -> np.ndarray:
    """The sample of each row of a packed sequence."""
    sizes = packed.batch_sizes.tolist()
    order = np.arange(sizes[0]) if packed.sorted_indices is None else packed.sorted_indices.cpu().numpy()
    return np.concatenate([order[:size] for size in sizes])


def unvarying(inputs: Any, batch: int, batch_dim: int, among: Container[int] | None = None) -> set[int]:
    """Which tensors (``among`` these) are the same for all samples of the batch: what they do, no check shows."""
    same = set()
    for k, x in enumerate(tensors(inputs)):
        d = axis(x, batch, batch_dim)
        if d is not None and (among is None or k in among):
            rows = x.detach().movedim(d, 0)
            if bool((rows == rows[:1]).all()):
                same.add(k)
    return same


def kind(args: Any, kwargs: Any, batch: int | None, batch_dim: int) -> Any:
    """What a check of one call shows of another: which inputs there are, their switches, and ignored targets (-100)."""
    return _switches((args, dict(sorted(kwargs.items())))), tuple(
        [(x.dim(), x.is_floating_point(), _ignored(x, batch, batch_dim)) for x in tensors((args, kwargs))]
    )


def _switches(tree: Any) -> Any:
    """Names, numbers and switches among the inputs; floats by their being there."""
    if isinstance(tree, Mapping):
        return tuple([(str(key), _switches(value)) for key, value in tree.items()])
    if isinstance(tree, (list, tuple)):
        return tuple([_switches(value) for value in tree])
    return tree if isinstance(tree, (bool, str, int)) or tree is None else type(tree).__name__


def _ignored(x: Tensor, batch: int | None, batch_dim: int) -> str:
    """Whether integers below zero, which losses ignore, are as many in every sample."""
    if batch is None or x.dtype not in (torch.int64, torch.int32) or x.numel() == 0:
        return ""
    below = x.detach() < 0
    if not bool(below.any()):
        return ""
    d = row_axis(x, batch, batch_dim)
    if d is None:
        return "some"
    counts = below.movedim(d, 0).reshape(batch, -1).sum(1)
    return "alike" if bool((counts == counts[0]).all()) else "some"


def by_length(inputs: Any, batch: int, batch_dim: int) -> Tensor:
    """Samples by a vector of lengths or a mask, the shortest first."""
    lengths = torch.zeros(batch)
    for x in tensors(inputs):
        if x.is_floating_point() or x.is_complex():
            continue
        x, d = x.detach(), axis(x, batch, batch_dim)
        if x.dim() == 1 and len(x) == batch:
            lengths = lengths + x.float().cpu()
        elif d is not None and bool(((x == 0) | (x == 1)).all()):
            lengths = lengths + x.movedim(d, 0).reshape(batch, -1).float().mean(1).cpu()
    return lengths.argsort(stable=True)


def may_be_offsets(inputs: Any, batch: int) -> bool:
    """Whether a vector may say where each sample begins in another vector, as ``nn.EmbeddingBag`` has it."""
    vectors = [x for x in tensors(inputs) if x.dim() == 1 and not x.is_floating_point()]
    return any(len(x) != batch for x in vectors) and any(
        len(x) == batch and not bool(x[0]) and bool((x[1:] >= x[:-1]).all()) for x in vectors
    )


def replaced(inputs: Any, samples: Tensor, batch: int, batch_dim: int, axes: Axes) -> Any:
    """``inputs`` with each of ``samples`` replaced by the first one that differs from it, in most of the tensors.

    A tensor in which that one does not differ takes the first that does. One-dimensional integers stay: offsets and
    lengths have a meaning that another sample's would break.
    """
    prints: list[np.ndarray | None] = []
    for k, x in enumerate(tensors(inputs)):
        d = axis(x, batch, batch_dim)
        if d is not None and axes.get((k, x.dim()), d) is None:
            d = None
        prints.append(None if d is None else _fingerprints(x.detach().movedim(d, 0)))
    sources = [np.arange(batch) for _ in prints]
    for sample in samples.tolist():
        differs = [None if each is None else each != each[sample] for each in prints]
        counts = sum((each.astype(int) for each in differs if each is not None), np.zeros(batch, dtype=int))
        most = int(counts.argmax())
        for source, each in zip(sources, differs, strict=True):
            if each is not None and each.any():
                source[sample] = most if each[most] else int(each.argmax())
    left = iter(zip(sources, prints, strict=True))

    def replace(x: Tensor) -> Tensor:
        source, each = next(left)
        d = axis(x, batch, batch_dim)
        if d is None or each is None:
            return x
        return x.detach().index_select(d, torch.from_numpy(source).to(x.device)).requires_grad_(x.requires_grad)

    return map_tensors(replace, inputs)


def noisy(inputs: Any) -> Any:
    """``inputs`` with other numbers of the same sizes: samples that were equal no longer are."""
    draw = torch.Generator().manual_seed(0)

    def other(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=draw).to(x)
        return (x + noise * x.detach().abs().mean().nan_to_num(1.0, 1.0, 1.0).clamp(1e-3, 1e3)).detach()

    return map_tensors(other, inputs)


def _fingerprints(rows: Tensor) -> np.ndarray:
    """A number for each row, the same for equal rows and hardly for others."""
    flat = rows.reshape(len(rows), -1)
    flat = torch.view_as_real(flat).flatten(1) if flat.is_complex() else flat
    weights = torch.rand(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (flat.double().nan_to_num(0.5) @ weights.to(flat.device)).cpu().numpy()


def kept_only(inputs: Any, keep: Tensor, batch: int, batch_dim: int, axes: Axes) -> Any:
    """``inputs`` of the samples ``keep``."""
    places = iter(range(len(tensors(inputs))))

    def rest(x: Tensor) -> Tensor:
        d = row_axis(x, batch, batch_dim)
        d = d if axes.get((next(places), x.dim()), d) is not None else None
        return x if d is None else x.detach().index_select(d, keep.to(x.device)).requires_grad_(x.requires_grad)

    return map_tensors(rest, inputs)
