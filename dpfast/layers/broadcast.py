"""Bare parameters that only broadcast over the batch: every sample gets a copy where it is used, without vmap.

While the model's forward runs, a :class:`BareParameter` stands for each of them as the attribute of its module. It
waits until it meets the batch: ``cls.expand(len(x), -1, -1)``, ``x + pos[:, :n]``, ``x * gamma.sigmoid()``. There a tap
makes copies ``[B, *shape]``. What flows back into copy i is ``g_i`` if the samples are kept apart from there on; the
check of the model shows that, as for every layer. Whatever else is done with the parameter raises
:class:`UnservedError`, before any backward, and vmap serves the module.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.traced_tap import TracedTap
from dpfast.layers.generic import Copies
from dpfast.refusals import LayoutError

Step = tuple[str, Callable[[Tensor], Tensor]]  # a name, and what is done to copies, samples first
# Computed place by place from the parameter and numbers.
BY_ELEMENT = frozenset(
    [
        "abs",
        "neg",
        "negative",
        "exp",
        "expm1",
        "log",
        "log1p",
        "sqrt",
        "rsqrt",
        "square",
        "reciprocal",
        "sigmoid",
        "tanh",
        "sin",
        "cos",
        "relu",
        "gelu",
        "silu",
        "softplus",
        "logsigmoid",
        "clamp",
        "pow",
        "float",
        "double",
        "half",
        "bfloat16",
        "to",
        "contiguous",
        "clone",
    ]
)
WITH_BATCH: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "add_": operator.iadd,
    "sub_": operator.isub,
    "mul_": operator.imul,
    "div_": operator.itruediv,
}
IN_PLACE = ("add_", "sub_", "mul_", "div_")
SAME = {
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "__truediv__": "div"},
    **{"__add__": "add", "__sub__": "sub", "__mul__": "mul", "__iadd__": "add_", "__isub__": "sub_"},
    **{"__imul__": "mul_", "__itruediv__": "div_", "__idiv__": "div_", "broadcast_to": "expand"},
}
# Called with both sides in the other order, as torch.compile does.
REFLECTED = {"__radd__": "add", "__rsub__": "sub", "rsub": "sub", "__rmul__": "mul", "__rdiv__": "div"}
REFLECTED |= {"__rtruediv__": "div", "__rpow__": "pow"}
UNSERVED = [
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__matmul__",
    "__rmatmul__",
    "__rpow__",
    "__floordiv__",
    "__rfloordiv__",
    "__mod__",
    "__rmod__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__contains__",
    "__array__",
]


class UnservedError(LayoutError):
    """A bare parameter is used in another way than to broadcast over the batch."""


class Broadcast(Copies):
    """The copies of a bare parameter; the use's ``spec`` says how they meet the batch."""

    aliases = True
    checks_each_use = True


class BareParameter:
    """Stands for ``parameter``, and for what ``steps`` make of it alone, while the model's forward runs.

    It has those of a tensor's methods that are served, and raises :class:`UnservedError` for all others.
    """

    def __init__(self, owner: Any, tap: TracedTap, parameter: nn.Parameter, steps: tuple[Step, ...] = ()):
        self.owner, self.tap, self.parameter, self.steps = owner, tap, parameter, steps

    # ------------------------------------------------------------------ what is known without a batch

    @property
    def shape(self) -> torch.Size:
        return self._one().shape[1:] if self.steps else self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._one().dtype

    @property
    def device(self) -> torch.device:
        return self._one().device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[BareParameter]:
        return iter([self[k] for k in range(len(self))])

    def _one(self) -> Tensor:
        """``[1, *shape]``"""
        with torch.no_grad():
            return self._made(self.parameter.detach().unsqueeze(0))

    # ------------------------------------------------------------------ what is made of it alone

    def _then(self, name: str, step: Callable[[Tensor], Tensor]) -> BareParameter:
        return BareParameter(self.owner, self.tap, self.parameter, (*self.steps, (name, step)))

    def _made(self, copies: Tensor) -> Tensor:
        for _, step in self.steps:
            copies = step(copies)
        return copies

    def _place(self, dim: int, more: int = 0) -> int:
        """Where a dimension is in the copies, if there are ``more`` of them."""
        dims = self.dim() + more
        if not -dims <= dim < dims:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-dims}, {dims - 1}], but got {dim})"
            )
        return dim % dims + 1

    def __getitem__(self, index: Any) -> BareParameter:
        parts = index if isinstance(index, tuple) else (index,)
        if not all([_is_plain(part) for part in parts]):
            raise self.unserved("an index that is neither a number nor a slice")
        return self._then("index", lambda x: x[(slice(None), *parts)])

    def unsqueeze(self, dim: int) -> BareParameter:
        place = self._place(dim, 1)
        return self._then("unsqueeze", lambda x: x.unsqueeze(place))

    def squeeze(self, *dims: int) -> BareParameter:
        shape = self.shape
        places = [self._place(dim) for dim in dims] if dims else [k + 1 for k in range(len(shape)) if shape[k] == 1]
        return self._then("squeeze", lambda x: x.squeeze(tuple(places)))

    def reshape(self, *shape: Any) -> BareParameter:
        sizes = _sizes(shape)
        if not all([isinstance(size, (int, torch.SymInt)) for size in sizes]):
            raise self.unserved("a view as another dtype")
        return self._then("reshape", lambda x: x.reshape(x.shape[0], *sizes))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> BareParameter:
        start, end = self._place(start_dim), self._place(end_dim)
        return self._then("flatten", lambda x: x.flatten(start, end))

    def transpose(self, dim0: int, dim1: int) -> BareParameter:
        one, other = self._place(dim0), self._place(dim1)
        return self._then("transpose", lambda x: x.transpose(one, other))

    def permute(self, *dims: Any) -> BareParameter:
        places = [self._place(dim) for dim in _sizes(dims)]
        return self._then("permute", lambda x: x.permute(0, *places))

    def _by_element(self, name: str, func: Any, args: Any, kwargs: Any) -> BareParameter:
        if any([isinstance(x, (Tensor, BareParameter)) or x is True for x in (*args, *kwargs.values())]):
            raise self.unserved(f"{name} with a tensor, or in place")
        return self._then(name, lambda x: func(x, *args, **kwargs))

    # ------------------------------------------------------------------ where it meets the batch

    def expand(self, *sizes: Any) -> Any:
        return self._over_batch("expand", Tensor.expand, _sizes(sizes), -1)

    def expand_as(self, other: Tensor) -> Any:
        return self._over_batch("expand", Tensor.expand, list(other.shape), -1)

    def repeat(self, *sizes: Any) -> Any:
        return self._over_batch("repeat", Tensor.repeat, _sizes(sizes), 1)

    def _over_batch(self, name: str, method: Any, sizes: list[int], stays: int) -> Any:
        """``method`` with sizes of which the first is the batch's, unless it ``stays`` as it is."""
        shape, first = self.shape, sizes[0] if sizes else 0
        over_batch = len(sizes) > len(shape) or (len(shape) > 0 and shape[0] == 1 and self.tap.is_batch(first))
        if not over_batch and len(sizes) == len(shape) > 0 and first == stays:
            return self._then(name, lambda x: method(x, stays, *sizes))
        if len(sizes) < len(shape) or (len(sizes) == len(shape) and shape[0] != 1):
            raise self.unserved(f"a parameter of shape {list(shape)} expanded or repeated by {sizes}")
        return method(self._copies(name, first, len(sizes)), stays, *sizes[1:])

    def _beside(self, name: str, x: Tensor) -> Tensor:
        """A copy for every sample, to be broadcast with ``x``, which has the samples first."""
        shape = self.shape
        if x.dim() < len(shape) or (x.dim() == len(shape) and (not shape or shape[0] != 1)):
            raise self.unserved(f"a parameter of shape {list(shape)} with a tensor of shape {list(x.shape)}")
        return self._copies(name, x.shape[0], x.dim())

    def _copies(self, name: str, rows: int, dims: int) -> Tensor:
        """``[B, *]`` of ``dims`` dimensions, to be used with ``rows`` rows, which must be the samples."""
        if not self.tap.is_batch(rows):
            raise self.unserved(f"with {rows} rows, which are not the samples")
        spec = (*[step for step, _ in self.steps], name, self.dim(), dims)
        copies = self.tap(self.parameter.new_zeros(rows, *[1] * (dims - 1)), self.parameter, spec=spec)
        if self.tap.recorder.copied is not None:
            copies = self.tap.recorder.copied(copies)
        copies = self._made(copies)
        if copies.dim() > dims:
            return copies.squeeze(1)
        return copies.reshape(rows, *[1] * (dims - copies.dim()), *copies.shape[1:])

    def _with_batch(self, name: str, first: Any, second: Any) -> Any:
        op, in_place = WITH_BATCH[name], name in IN_PLACE
        other = second if first is self else first
        if isinstance(other, (int, float)) and not isinstance(other, bool) and not in_place:
            return self._then(name, lambda x: op(x, other) if first is self else op(other, x))
        if not isinstance(other, Tensor) or (in_place and first is self):
            raise self.unserved(f"{name} of it and a {type(other).__name__}")
        mine = self._beside(name, other)
        out = op(mine, other) if first is self else op(other, mine)
        if out.dtype != other.dtype and other.is_floating_point() and not self.dim():
            return out.to(other.dtype)  # what has no dimensions decides no dtype, and the copies have one
        return out

    # ------------------------------------------------------------------ what PyTorch calls

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = SAME.get(func.__name__, func.__name__)
        if name in REFLECTED and len(args) == 2:
            name, args = REFLECTED[name], (args[1], args[0])
            func = torch.pow if name == "pow" else func
        if name in WITH_BATCH and len(args) == 2 and not kwargs:
            self = args[0] if isinstance(args[0], BareParameter) else args[1]
            return self._with_batch(name, *args)
        if args and isinstance(args[0], BareParameter) and "out" not in kwargs:
            if name in BY_ELEMENT:
                return args[0]._by_element(name, func, args[1:], kwargs)
            if name in VIEWS:
                return VIEWS[name](*args, **kwargs)
        raise stand_ins((args, kwargs))[0].unserved(name)

    def unserved(self, how: str) -> UnservedError:
        """Its owner is not to be served like this."""
        self.owner.unserved = True
        return UnservedError(
            f"parameter {self.tap.name!r} is used where per-sample gradients cannot be taken ({how}): compute with it "
            f"in the model's forward alone"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the parameter, as that of a module has it: what stands for it is of this forward."""
        if self.steps:
            raise self.unserved("a copy of what was computed from it")
        return copy.deepcopy(self.parameter, memo)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "parameter" not in vars(self):
            raise AttributeError(name)
        if hasattr(Tensor, name):
            raise self.unserved(name)
        return getattr(self.parameter, name)

    def __neg__(self) -> Any:
        return self._then("neg", operator.neg)

    def __pow__(self, exponent: Any) -> Any:
        return self._by_element("pow", torch.pow, (exponent,), {})

    __hash__ = object.__hash__


def _method(name: str) -> Any:
    def method(self: BareParameter, *args: Any, **kwargs: Any) -> Any:
        return self._by_element(name, getattr(Tensor, name), args, kwargs)

    return method


def _binary(name: str, reflected: bool) -> Any:
    def method(self: BareParameter, other: Any) -> Any:
        return self._with_batch(name, other, self) if reflected else self._with_batch(name, self, other)

    return method


def _unserved(name: str) -> Any:
    def method(self: BareParameter, *args: Any) -> Any:
        raise self.unserved(name)

    return method


for _name in BY_ELEMENT:
    if hasattr(Tensor, _name):
        setattr(BareParameter, _name, _method(_name))
for _name in ("add", "sub", "mul", "div"):
    setattr(BareParameter, _name, _binary(_name, False))
    _operator = "truediv" if _name == "div" else _name
    setattr(BareParameter, f"__{_operator}__", _binary(_name, False))
    setattr(BareParameter, f"__r{_operator}__", _binary(_name, True))
for _name in UNSERVED:
    setattr(BareParameter, _name, _unserved(_name))
VIEWS = {
    name: getattr(BareParameter, name)
    for name in ("unsqueeze", "squeeze", "reshape", "flatten", "transpose", "permute", "expand")
}


def stand_ins(tree: Any) -> list[BareParameter]:
    """All that are in nested containers."""
    if isinstance(tree, BareParameter):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [found for part in parts for found in stand_ins(part)]


def _is_plain(index: Any) -> bool:
    return index is None or index is ... or (isinstance(index, (int, slice)) and not isinstance(index, bool))


def _sizes(given: tuple[Any, ...]) -> list[Any]:
    """Sizes or dimensions, as methods of tensors take them: one by one, or in one sequence."""
    return list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)
