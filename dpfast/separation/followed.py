"""A proof along one pass of a private model: of what its layers hand over, returns and leaves behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dpfast.capture.forms import Form
from dpfast.capture.recomputed import Recomputed
from dpfast.capture.recorder import Recorder
from dpfast.capture.refusals import listed
from dpfast.separation.inputs import label_inputs
from dpfast.separation.labels import PICKED, Drawn, Label, Lost, Met, Rows, Unwritten
from dpfast.separation.proof import Proof, Read
from dpfast.separation.state import Numbers, attributes
from dpfast.separation.texts import left

SIDES = ("samples", "ids", "A", "G", "x")  # of forms: what they hold of samples


class Followed(Proof):
    """Follows a pass of ``module``; ``earlier`` are tensors that an earlier forward has left, by name.

    What ``public`` parameters and buffers hold when the forward ends is released as it is.

    Attributes:
        met: by where samples meet, the layers in whose gradients they do.
        lost: what cannot be followed, and where.
        reached: parameters and buffers that samples are in when the forward ends.
        picked: layers that got rows that the samples' values pick.
        drew: Python's or numpy's random numbers were drawn.
        numbers: that modules have as attributes when the forward ends.
    """

    def __init__(
        self,
        recorder: Recorder,
        module: nn.Module,
        batch_dim: int,
        *,
        earlier: Mapping[str, list[Tensor]] | None = None,
        answer: Callable[[Label, Any], Any] | None = None,
        base: str = "",
        public: Callable[[str], bool] = lambda name: False,
    ):
        assert recorder.batch_size is not None
        super().__init__(module, recorder.batch_size, answer, base)
        self.public = public
        self.recorder, self.root, self.batch_dim, self.earlier = recorder, module, batch_dim, earlier or {}
        self.axes = recorder.input_axes
        self.met: dict[str, set[str]] = {}
        self.lost: set[str] = set()
        self.forward_reads = -1  # how many values Python had read when the forward ended
        self.reached: dict[str, Label] = {}
        self.drew = False
        self.numbers: Numbers = []
        self.picked: set[str] = set()
        self._between: Any = None
        self.returned = base or "what the model returns"

    @contextmanager
    def following(self) -> Iterator[Proof]:
        before = _outside_of_torch()
        with super().following(), self.recorder.setting(copied=self._copied):
            yield self
        after = _outside_of_torch()
        self.drew = before != after
        if self._between not in (None, after):
            self.lost.add("Python's or numpy's random numbers in a backward")

    def _copied(self, copies: Tensor) -> Tensor:
        """Copies of a parameter ``[B, *shape]`` with memory of their own: each is as good as its sample's data."""
        copies = copies.clone(memory_format=torch.contiguous_format)
        self.labels[copies] = self.labels.in_order(0, len(copies))
        return copies

    def label(self, batch: Any) -> None:
        """Say whose the tensors of a batch are."""
        label_inputs(self.labels, (batch,), self.batch_dim, {})

    def starts(self, args: Any, kwargs: Any) -> None:
        """The pass begins, with these inputs."""
        label_inputs(self.labels, (args, kwargs), self.batch_dim, self.axes)
        for x in _others((args, kwargs)):
            self.lost.add(f"an argument of the model that is no tensor, of type {type(x).__name__}")
        for name, tensors in self.earlier.items():
            for x in tensors:
                self.labels[x] = Met("what an earlier forward has left", name)

    def sees(self, name: str, form: Form) -> None:
        """A layer's form: its rows must be the samples', in their order."""
        sides = form.of_samples() if isinstance(form, Recomputed) else [getattr(form, side, None) for side in SIDES]
        for x in sides:
            if isinstance(x, Tensor):
                self._note(name, self.labels[x], self.labels.in_order(0, x.shape[0]))

    def returns(self, outputs: list[Tensor], cotangents: list[Tensor]) -> None:
        """The forward ends; gradients of what it returns are the samples' as the outputs are."""
        held = [*self.root.named_parameters(), *self.root.named_buffers()]
        labels = {name: self.labels[x] for name, x in held if not self.public(name)}
        self.reached = {name: label for name, label in labels.items() if isinstance(label, Rows | Met | Lost)}
        self.forward_reads = len(self.reads)
        self._between = _outside_of_torch()
        for x, cotangent in zip(outputs, cotangents, strict=True):
            label = self.labels[x]
            if isinstance(label, Met) and label.summed:
                continue  # a sum over the samples of what each gives by itself, as of losses
            self._note(self.returned, label, None)
            self.labels[cotangent] = label if isinstance(label, Rows | Met) else None

    def _note(self, where: str, label: Label, expected: Label) -> None:
        if isinstance(label, Met):
            self.met.setdefault(str(label), set()).add(where)
        elif isinstance(label, Lost | Unwritten):
            self.lost.add(str(label) if isinstance(label, Lost) else "memory that no operator has written to")
        elif isinstance(label, Rows) and label.by_data == PICKED and where != self.returned:
            self.picked.add(where)
        elif isinstance(label, Rows) and label.by_data:
            self.lost.add(f"rows of {where} that are picked or ordered by the samples' values")
        elif isinstance(label, Rows) and expected is not None and label != expected:
            self.lost.add(f"rows of {where} that are not the samples' in their order")

    def why(self) -> str:
        """What samples leave behind, or why they are not kept apart; empty if nothing shows it."""
        if self.reached:
            first = next(iter(self.reached.values()))
            return left(self.reached, None if isinstance(first, Rows) else first)
        for where, layers in self.met.items():
            names = listed(sorted(layers - {self.returned} or layers))
            return f"gradients of several samples meet in {names}: {where} does that"
        if self.picked:
            return (
                f"the samples' values pick the rows that {listed(sorted(self.picked))} get, and another batch has "
                f"others"
            )
        decided = [read for read in self.reads_of_samples(self.forward_reads) if read.kind is not int]
        if self.forward_reads >= 0 and decided:
            return f"gradients of several samples meet in a backward, in which Python decides by {decided[0].label}"
        return ""

    def reads_of_samples(self, since: int = 0) -> list[Read]:
        """What Python has read of the samples' values, but for the first ``since`` reads."""
        return [read for read in self.reads[since:] if not isinstance(read.label, Drawn)]

    def left(self) -> dict[str, list[Tensor]]:
        """Tensors of samples that modules hold as plain attributes, for the next forward perhaps."""
        free = (type(None), Drawn, Unwritten)
        held = attributes(self.root)
        return {name: its for name, its in held.items() if any(not isinstance(self.labels[x], free) for x in its)}


PLAIN = (str, bytes, bool, int, float, complex, torch.dtype, torch.device, torch.Size, PackedSequence, Enum)


def _others(tree: Any) -> list[Any]:
    """What is neither a tensor, nor a container of them, nor a plain value: it may hold tensors that nobody follows."""
    if tree is None or isinstance(tree, (Tensor, *PLAIN)):
        return []
    if isinstance(tree, Mapping):
        return [x for value in tree.values() for x in _others(value)]
    if isinstance(tree, (list, tuple)):
        return [x for value in tree for x in _others(value)]
    if is_dataclass(tree) and not isinstance(tree, type):
        return [x for value in vars(tree).values() for x in _others(value)]
    return [tree]


def _outside_of_torch() -> Any:
    """The state of Python's and numpy's global generators."""
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2:]
