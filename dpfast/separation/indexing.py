"""Rules of the operators that pick rows: whose they are follows from the values of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfast.separation.labels import ORDERED, PICKED, Label, Labels, Lost, Met, Rows, Unwritten
from dpfast.separation.rules import RULES, Op, rule, shifted, together

__all__ = ["RULES"]

Index = tuple[int, Tensor, Label]  # the dimension that is indexed, by what, and whose the index is


def array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def of_coordinates(labels: Labels, label: Label, where: Tensor) -> Label:
    """Whose the rows of ``where [n, dims]`` are, coordinates in a tensor with this label."""
    if not isinstance(label, Rows) or label.dim is None:
        return label
    return labels.rows(0, label.owners.each[array(where[:, label.dim])], PICKED) if len(where) else None


def unmasked(op: Op, indices: Sequence[Any]) -> list[Index]:
    """Indices by dimension, masks as the coordinates that they pick."""
    found: list[Index] = []
    dim = 0
    for index in indices:
        if index is None:
            dim += 1
        elif index.dtype in (torch.bool, torch.uint8):
            where = index.nonzero()
            label = of_coordinates(op.labels, op.labels[index], where)
            found += [(dim + k, where[:, k], label) for k in range(index.dim())]
            dim += index.dim()
        else:
            found.append((dim, index, op.labels[index]))
            dim += 1
    return found


def picked(op: Op, ndim: int, label: Label, indices: list[Index]) -> Label:
    """The label of ``x[indices]``, for ``x`` of ``ndim`` dimensions and of this label.

    An index that other samples have decided may order the rows, all of them; it may not choose among them.
    """
    shape = torch.broadcast_shapes(*(index.shape for _, index, _ in indices))
    places = [dim for dim, _, _ in indices]
    at = places[0] if places == list(range(places[0], places[0] + len(places))) else 0
    before = {d: k for k, d in enumerate(d for d in range(ndim) if d not in places)}

    def out(d: int) -> int:  # where a dimension that is not indexed goes
        return before[d] + (len(shape) if before[d] >= at else 0)

    if isinstance(label, Lost):
        return label
    found: list[Label] = []
    for dim, index, own in indices:
        orders = isinstance(own, Met) and isinstance(label, Rows) and label.dim == dim and orders_all(index, label)
        if not orders:
            found.append(shifted(own, at + len(shape) - index.dim()))
    if isinstance(label, Rows) and label.dim in places:
        by, own = next((index, own) for dim, index, own in indices if dim == label.dim)
        each = np.broadcast_to(label.owners.each[array(by)], shape)
        by_data = max(label.by_data, level(own))
        label = shifted(of_elements(op, each, by_data), at)
    elif isinstance(label, Rows) and label.dim is not None:
        label = replace(label, dim=out(label.dim))
    return together(op, [label, *found])


def orders_all(index: Tensor, label: Rows) -> bool:
    return index.dim() == 1 and np.array_equal(np.sort(array(index)), np.arange(len(label.owners)))


def of_elements(op: Op, each: np.ndarray, by_data: int) -> Label:
    """The label of a tensor whose elements are of these samples."""
    if not each.size:
        return None
    for dim in range(each.ndim):
        along = each[tuple(slice(None) if d == dim else 0 for d in range(each.ndim))]
        if bool((each == along.reshape([-1 if d == dim else 1 for d in range(each.ndim)])).all()):
            return op.labels.rows(dim, along, by_data)
    return op.lost() if each.ndim else op.labels.rows(0, each.reshape(1), by_data)


def same_rows(one: Label, other: Label) -> bool:
    both = isinstance(one, Rows) and isinstance(other, Rows)
    return both and (one.dim, one.owners) == (other.dim, other.owners)  # type: ignore[union-attr]


def placed(op: Op, x: Tensor, label: Label, indices: list[Index], values: Label) -> Label:
    """The label of ``x`` after values were put at ``x[indices]``; ``values`` names dimensions of ``x[indices]``."""
    if isinstance(values, Lost):
        return values
    if isinstance(label, Rows):
        there = together(op, [picked(op, x.dim(), label, indices), values])
        return label if isinstance(there, Rows) else there
    owned = [own for _, _, own in indices]
    free = label is None or isinstance(label, Unwritten)
    if not free or not any(isinstance(own, Rows) for own in (*owned, values)):
        return together(op, [label, values, *owned])
    for dim in (*(dim for dim, _, _ in indices), *range(x.dim())):
        guess = op.labels.in_order(dim, x.shape[dim])
        if guess is not None:
            there = picked(op, x.dim(), guess, indices)
            if isinstance(there, Rows) and (values is None or same_rows(values, there)):
                return guess
    return _rowwise(op, x, indices, values) or together(op, [values, *owned, op.lost()])


def _rowwise(op: Op, x: Tensor, indices: list[Index], values: Label) -> Label:
    """The label of rows of nobody in ``x`` that got other rows by one vector of indices; None if that is not so."""
    (dim, index, own), *others = indices
    if others or index.dim() != 1 or not isinstance(values, Rows) or values.dim != dim:
        return None
    each, at = np.full(x.shape[dim], -1), array(index)
    each[at] = values.owners.each
    chosen = isinstance(own, Met | Lost) and not np.array_equal(np.sort(at), np.arange(len(each)))
    if chosen or not np.array_equal(each[at], values.owners.each):
        return None
    return op.labels.rows(dim, each, max(values.by_data, level(own)))


@rule("index _unsafe_index")
def index(op: Op) -> Label:
    indices = unmasked(op, op.a["indices"])
    return picked(op, op.a["self"].dim(), op["self"], indices) if indices else op["self"]


@rule("index_put index_put_ _index_put_impl_ _unsafe_index_put")
def index_put(op: Op) -> Label:
    x, values = op.a["self"], op.a["values"]
    indices = unmasked(op, op.a["indices"])
    ndim = x.dim() - len(indices) + len(torch.broadcast_shapes(*(index.shape for _, index, _ in indices)))
    return placed(op, x, op["self"], indices, shifted(op.labels[values], ndim - values.dim()))


@rule("index_select")
def index_select(op: Op) -> Label:
    x = op.a["self"]
    return picked(op, x.dim(), op["self"], [(op.a["dim"] % max(1, x.dim()), op.a["index"], op["index"])])


@rule("index_add index_add_ index_copy index_copy_")
def index_add(op: Op) -> Label:
    x = op.a["self"]
    at = [(op.a["dim"] % max(1, x.dim()), op.a["index"], op["index"])]
    return placed(op, x, op["self"], at, op["source"])


@rule("index_fill index_fill_")
def index_fill(op: Op) -> Label:
    x = op.a["self"]
    at = [(op.a["dim"] % max(1, x.dim()), op.a["index"], op["index"])]
    return placed(op, x, op["self"], at, op["value"])


def level(own: Label) -> int:
    """How far what an index picks follows from the samples' values, if this is the label of the index."""
    return PICKED if isinstance(own, Rows) else ORDERED if isinstance(own, Met | Lost) else 0


@rule("gather take_along_dim")
def gather(op: Op) -> Label:
    x, index = op.a["self"], op.a["index"]
    label, dim = op["self"], op.a["dim"] % max(1, x.dim())
    if not isinstance(label, Rows) or label.dim is None:
        return together(op, [label, op["index"]])
    if label.dim == dim:
        return together(op, [of_elements(op, label.owners.each[array(index)], level(op["index"])), op["index"]])
    if index.shape[label.dim] != x.shape[label.dim]:
        label = op.labels.rows(label.dim, label.owners.each[: index.shape[label.dim]], label.by_data)
    return together(op, [label, op["index"]])


@rule("scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_")
def scatter(op: Op) -> Label:
    x, index = op.a["self"], op.a["index"]
    dim = op.a["dim"] % max(1, x.dim())
    own = together(op, [op["index"], op["src"], op["value"]])
    label = op["self"]
    if isinstance(label, Unwritten):
        label = None
    if isinstance(label, Rows) and label.dim == dim:
        there = together(op, [of_elements(op, label.owners.each[array(index)], 0), own])
        return label if isinstance(there, Rows) else there
    if isinstance(own, Rows) and own.dim == dim:
        guess = op.labels.in_order(dim, x.shape[dim]) if label is None else None
        if guess is None or guess.dim is None:
            return guess or op.lost()
        there = together(op, [of_elements(op, guess.owners.each[array(index)], 0), own])
        return guess if isinstance(there, Rows) else there
    if isinstance(own, Rows) and own.dim is not None and index.shape[own.dim] != x.shape[own.dim]:
        return op.lost()
    return together(op, [label, own])


@rule("nonzero argwhere")
def nonzero(op: Op) -> Label:
    assert op.out[0] is not None
    return of_coordinates(op.labels, op["self"], op.out[0])


@rule("masked_select")
def masked_select(op: Op) -> Label:
    x, mask = torch.broadcast_tensors(op.a["self"], op.a["mask"])
    label = pointwise_label(op, x.dim())
    return of_coordinates(op.labels, label, mask.nonzero()) if isinstance(label, Rows) else label


@rule("masked_scatter masked_scatter_")
def masked_scatter(op: Op) -> Label:
    return op.lost() if isinstance(op["source"], Rows) else pointwise_label(op, op.a["self"].dim())


def pointwise_label(op: Op, ndim: int) -> Label:
    return together(op, [shifted(op[name], ndim - op.a[name].dim()) for name in ("self", "mask")])


@rule("bucketize searchsorted")
def bucketize(op: Op) -> Label:
    edges = op["boundaries"] if "boundaries" in op.a else op["sorted_sequence"]
    return together(op, [op["self"], op.lost() if isinstance(edges, Rows) else edges])


@rule("_pack_padded_sequence")
def pack(op: Op) -> list[Label]:
    """Rows of all samples, a time step at a time; how many there are follows from the lengths."""
    label, first = op["input"], 0 if op.a["batch_first"] else 1
    if not isinstance(label, Rows) or label.dim != first:
        return [together(op, [label, op.lost()]), None]
    assert op.out[1] is not None
    sizes = array(op.out[1]).tolist()
    return [op.labels.rows(0, np.concatenate([label.owners.each[:size] for size in sizes]), ORDERED), None]


@rule("_pack_padded_sequence_backward")
def pack_backward(op: Op) -> Label:
    return unpacked(op, op["grad"])


@rule("_pad_packed_sequence")
def pad_packed(op: Op) -> list[Label]:
    return [unpacked(op, op["data"]), None]


def unpacked(op: Op, label: Label) -> Label:
    if not isinstance(label, Rows) or label.dim is None:
        return together(op, [label, op.lost()] if isinstance(label, Rows) else [label])
    count = int(op.a["batch_sizes"][0])
    return op.labels.rows(0 if op.a["batch_first"] else 1, label.owners.each[:count], ORDERED)


@rule("_unique2 unique_dim unique_consecutive bincount histc _histogramdd_bin_edges")
def counting(op: Op) -> Label:
    label = together(op, [op.labels[x] for x in op.given()])
    return op.met() if isinstance(label, Rows) and label.dim is not None else label
