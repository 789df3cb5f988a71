"""Training forwards, as far as they must be known again: a sample counts once a step."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from dpfast.trees import tensors


class Given(NamedTuple):
    """An input: where it lies and what it was when the model saw it, without keeping it."""

    storage: StorageWeakRef  # while it is held, no other storage has its address
    version: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    itself: weakref.ref[Tensor]

    def overlaps(self, other: Given, dim: int) -> bool:
        """Whether some sample, along ``dim``, is in both."""
        if self.storage.cdata != other.storage.cdata or self.version != other.version:
            return False
        if (self.offset, self.shape, self.stride) == (other.offset, other.shape, other.stride):
            return True
        if self.stride != other.stride or self.stride[dim] != max(self.stride):
            return False
        row = self.stride[dim]
        begin, others = self.offset // row, other.offset // row
        return begin < others + other.shape[dim] and others < begin + self.shape[dim]

    def equals(self, other: Given, dim: int) -> bool:
        """Whether both are still there and hold the same rows; if all rows are equal, that says nothing."""
        mine, theirs = self.itself(), other.itself()
        if mine is None or theirs is None or (mine._version, theirs._version) != (self.version, other.version):
            return False
        alike = (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
        return alike and torch.equal(mine, theirs) and not torch.equal(mine, mine.narrow(dim, 0, 1).expand_as(mine))


class ForwardPass:
    """One training forward and the places of those of its inputs that have a batch dimension.

    An input that all samples share, and one that was expanded to the batch, says nothing of which samples these are.
    """

    def __init__(self, args: Any, kwargs: Any, batch: int | None, batch_dim: int):
        self.batch = batch
        self.samples: list[Any] = []  # as far as the loader has said
        self.given: list[Given] = []
        self.dims: list[int] = []
        for x in tensors((args, kwargs)):
            while torch._C._functorch.is_functorch_wrapped_tensor(x):  # torch.func.grad around the model
                x = torch._C._functorch.get_unwrapped(x)
            dim = batch_dim if x.dim() > max(batch_dim, 1) else 0
            plain = type(x) in (Tensor, Parameter) and x.layout == torch.strided and not x.is_inference()
            if plain and batch and x.dim() and x.shape[dim] == batch and x.numel() and (x.stride(dim) or batch == 1):
                storage = StorageWeakRef(x.untyped_storage())
                place = x._version, int(x.storage_offset()), x.shape, x.stride()
                self.given.append(Given(storage, *place, weakref.ref(x)))
                self.dims.append(dim)

    def shares_samples(self, other: ForwardPass, compare: bool) -> bool:
        """Whether all inputs that have a batch overlap with the other's, or (``compare``) are equal to them."""
        if self is other:
            return True
        if not self.given or len(self.given) != len(other.given):
            return False
        pairs = list(zip(self.given, other.given, self.dims, strict=True))
        if all(a.overlaps(b, dim) for a, b, dim in pairs):
            return True
        return compare and all(a.equals(b, dim) for a, b, dim in pairs)


def leaves_gradients(below: list[Any]) -> bool:
    """Within a backward pass: whether it leaves gradients behind, as ``torch.autograd.grad`` does not.

    ``below`` are nodes of the graph that it runs through. Every leaf under them gets its gradient in ``backward()``.
    """
    seen, stack = set(), list(below)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not hasattr(node, "variable"):
            stack += [child for child, _ in node.next_functions if child is not None]
            continue
        try:
            return bool(torch._C._will_engine_execute_node(node))
        except RuntimeError:  # a leaf that autograd.grad was asked for
            return False
    return True
