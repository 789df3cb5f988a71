"""A proof from the operators that a model keeps the samples of a batch apart.

The model runs as it is, forward and backward, and every operator is followed below autograd: the labels of its outputs
follow from those of its inputs (:mod:`dpfast.separation.rules`), whatever the values are. Shown for this sequence of
operators. Another one may come where Python decides by a value; the proof notes what is read, and tries the other
answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.separation import networks, rules, trial
from dpfast.separation.indexing import RULES  # with those of rules.py
from dpfast.separation.labels import Drawn, Label, Labels, Lost, Met, Rows, Unwritten
from dpfast.separation.rules import Op, Rule, together
from dpfast.separation.state import written_arguments

FACTORIES = ("new_", "rand", "normal", "zeros", "ones", "full", "arange", "empty", "scalar_tensor", "eye", "linspace")
READS = {"_local_scalar_dense", "equal", "is_nonzero", "allclose"}
# What takes values where no operator shows it:
LEAVES = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__)
MADE_OF = (torch.tensor, torch.as_tensor, torch.asarray)  # a list of tensors, among others
# What has as many rows as the samples' values pick:
PICKING = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "nonzero_static"}


@dataclass(frozen=True)
class Read:
    """A value that Python has read of a tensor with this label, ``kind`` its type; it can be ``answered`` otherwise."""

    label: Label
    kind: type
    module: str
    answered: bool = True
    shape: bool = False  # a number of rows


@dataclass
class _Plan:
    """What is known of an operator before it is called."""

    name: str
    rule: Rule | None
    written: tuple[str, ...]
    random: bool
    factory: bool


class Proof(TorchDispatchMode):
    """Follows whose data is where; ``base`` is what runs outside of all modules.

    ``answer`` changes what Python reads of random numbers or of the samples' values.

    Attributes:
        labels: of everything that was touched.
        reads: what Python has read that depends on samples or on chance.
        tried: operators without a rule, which were tried alone on random numbers.
    """

    def __init__(self, root: nn.Module, batch: int, answer: Callable[[Label, Any], Any] | None = None, base: str = ""):
        super().__init__()
        self.labels = Labels(batch)
        self.reads: list[Read] = []
        self.tried: set[str] = set()
        self.answer = answer
        self._names = {module: name or f"the model ({type(root).__name__})" for name, module in root.named_modules()}
        self._inside = [base or self._names[root]]
        self._plans: dict[Any, _Plan] = {}
        self._trials: dict[Any, list[Label] | None] = {}

    @property
    def module(self) -> str:
        return self._inside[-1]

    @contextlib.contextmanager
    def following(self) -> Iterator[Proof]:
        """Operators within are followed."""
        before = hooks.register_module_forward_pre_hook(
            lambda m, _: self._inside.append(self._names.get(m, self.module))
        )
        after = hooks.register_module_forward_hook(lambda m, *_: self._leave(), always_call=True)
        try:
            with self, _Leaving(self):
                yield self
        finally:
            before.remove()
            after.remove()
            del self._inside[1:]

    def _leave(self) -> None:
        if len(self._inside) > 1:
            self._inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._follow(func, args, kwargs, func(*args, **kwargs))

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = _plan(func)
        op = Op(func, args, kwargs, self.labels, self.module)
        if plan.name in READS:
            return self._read(op, out)
        given = op.given()
        theirs = {x.untyped_storage()._cdata for x in given}
        returned = [x if isinstance(x, Tensor) else None for x in _flat(out)]
        outputs = [x if x is not None and x.layout is torch.strided else None for x in returned]
        sparse = any(x is not y for x, y in zip(returned, outputs, strict=True))
        if sparse and any(isinstance(self.labels[x], Rows | Met | Lost) for x in given):
            self.reads.append(Read(op.lost(), int, self.module, answered=False))
        made = [x for x in outputs if x is not None and x.untyped_storage()._cdata not in theirs]
        written = [op.a[name] for name in plan.written if op.a.get(name) is not None]
        if not made and not written:
            return out  # views
        labelled = plan.random or plan.factory or any(self.labels[x] is not None for x in given)
        if not labelled:
            for x in made:
                self.labels[x] = None
            for x in written:
                self.labels.write(x, None, op.lost())
            return out
        self._picks(op)
        op.out = outputs if made else [x for x in written if isinstance(x, Tensor)]
        label = self._label(op, plan, func, args, kwargs)
        found = label if isinstance(label, list) else [label] * max(len(op.out), len(made), len(written))
        targets = outputs if made else written
        for x, its in zip(targets, found, strict=False):
            for each in [x] if x is None or isinstance(x, Tensor) else x:
                if each is None:
                    continue
                if each.untyped_storage()._cdata in theirs:
                    self.labels.write(each, its, op.lost())
                else:
                    self.labels[each] = its
        return out

    def _picks(self, op: Op) -> None:
        """How many rows are picked is a number of the samples that Python sees in a shape."""
        given = op.a.get("indices")
        masks = [x for x in given if x is not None and x.dtype is torch.bool] if isinstance(given, list) else []
        picking = [*(op.given() if op.name in PICKING else ()), *masks]
        found = [label for x in picking if isinstance(label := self.labels[x], Rows | Met | Lost)]
        if found:
            self.reads.append(Read(found[0], int, self.module, answered=False, shape=True))

    def _label(self, op: Op, plan: _Plan, func: Any, args: Any, kwargs: Any) -> Any:
        if plan.factory:
            if plan.name.startswith(("empty", "new_empty")):
                return Unwritten()
            given = {x for name, x in op.a.items() if isinstance(x, Tensor) and name not in ("self", "input")}
            return together(op, [self.labels[x] for x in given]) or (Drawn() if plan.random else None)
        if plan.rule is not None:
            label = plan.rule(op)
            return Drawn() if label is None and plan.random else label
        label = together(op, [self.labels[x] for x in op.given()])
        if isinstance(label, Rows):
            shown = None if plan.written else self._tried(label, func, args, kwargs)
            if shown is not None:
                self.tried.add(op.shown)
            return op.lost() if shown is None else shown
        return Drawn() if label is None and plan.random else label

    def _tried(self, label: Rows, func: Any, args: Any, kwargs: Any) -> list[Label] | None:
        def kind(x: Any) -> Any:
            return (x.shape, x.dtype, self.labels[x]) if isinstance(x, Tensor) else repr(x)

        key = func, tuple(kind(x) for x in _flat([*args, *kwargs.values()]))
        if key not in self._trials:
            self._trials[key] = trial.tried_alone(self.labels, label, func, args, kwargs)
        return self._trials[key]

    def _read(self, op: Op, value: Any) -> Any:
        label = together(op, [self.labels[x] for x in op.given()])
        if label is None:
            return value
        self.reads.append(Read(label, type(value), self.module))
        return value if self.answer is None else self.answer(label, value)

    def leaves(self, x: Tensor) -> None:
        """Values of ``x`` are taken where no operator shows it."""
        label = self.labels[x]
        if label is not None and not isinstance(label, Unwritten):
            kind = float if x.is_floating_point() or x.is_complex() else bool if x.dtype == torch.bool else int
            self.reads.append(Read(label, kind, self.module, answered=False))


class _Leaving(TorchFunctionMode):
    def __init__(self, proof: Proof):
        super().__init__()
        self.proof = proof

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MADE_OF and args and isinstance(args[0], (list, tuple)):
            for x in args[0]:
                if isinstance(x, Tensor):
                    self.proof.leaves(x)
        if func in LEAVES and not torch._C._functorch.is_functorch_wrapped_tensor(args[0]):
            self.proof.leaves(args[0])
        return func(*args, **(kwargs or {}))


def _plan(func: Any) -> _Plan:
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    shown = name if namespace == "aten" else schema.name
    written = tuple(argument for _, argument in written_arguments(func))
    found: Rule | None = None
    if namespace == "aten":
        found = RULES.get(name)
        if found is None and torch.Tag.pointwise in func.tags:
            found = rules.pointwise
    elif namespace == "dpfast":
        found = networks.each_first
    random = torch.Tag.nondeterministic_seeded in func.tags
    in_place = name.endswith("_") and bool(written)
    factory = not in_place and namespace == "aten" and (name.startswith(FACTORIES) or name.endswith("_like"))
    return _Plan(shown, found, written, random, factory)


def _flat(out: Any) -> Iterator[Any]:
    if isinstance(out, (list, tuple)):
        for x in out:
            yield from _flat(x)
    else:
        yield out
