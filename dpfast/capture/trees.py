"""Tensors in what models take and return: nested tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with ``fn`` applied to every tensor; containers are copied, packed sequences are left alone."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, (PackedSequence, str, bytes)):
        return tree
    if isinstance(tree, Mapping):
        changed = {key: map_tensors(fn, value) for key, value in tree.items()}
        if type(tree) is dict:
            return changed
        twin: Any = copy.copy(tree)
        for key, value in changed.items():
            twin[key] = value
        return twin
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(fn, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(fn, value) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        twin = copy.copy(tree)
        for item in fields(tree):
            object.__setattr__(twin, item.name, map_tensors(fn, getattr(tree, item.name)))
        return twin
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in ``tree``, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def packed_sequences(tree: Any) -> list[PackedSequence]:
    """Packed sequences at the first two levels of a call's arguments."""
    return [
        x
        for part in tree
        for x in (part.values() if isinstance(part, Mapping) else part)
        if isinstance(x, PackedSequence)
    ]
