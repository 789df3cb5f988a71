"""What each of PyTorch's operators does to whose data is where.

A rule takes an :class:`Op` and returns the label of its outputs: one for all of them, or a list. The rules follow from
what an operator computes, whatever the values: an operator that lets samples meet does so behind a mask that is zero
today, too. Those of networks' own operators and of indexing stand in ``networks`` and ``indexing``. Operators without a
rule are tried alone: see :mod:`dpfast.separation.trial`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpfast.separation.labels import Drawn, Label, Labels, Lost, Met, Rows, Unwritten


class Op:
    """One call of an operator, its arguments by name."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], labels: Labels, module: str):
        self.name = func._schema.name.removeprefix("aten::")
        self.labels, self.module = labels, module
        self.a: dict[str, Any] = {}
        for k, argument in enumerate(func._schema.arguments):
            if k < len(args):
                self.a[argument.name] = args[k]
            else:
                self.a[argument.name] = kwargs.get(argument.name, argument.default_value)
        self.out: list[Tensor | None] = []  # as the operator returns them; None where one was not asked for

    def __getitem__(self, name: str) -> Label:
        """The label of a tensor argument."""
        x = self.a.get(name)
        return self.labels[x] if isinstance(x, Tensor) else None

    @property
    def shown(self) -> str:
        return self.name if "::" in self.name else f"aten.{self.name}"

    def met(self, summed: bool = False) -> Met:
        return Met(self.shown, self.module, summed)

    def lost(self) -> Lost:
        return Lost(self.shown, self.module)

    def given(self) -> list[Tensor]:
        """All tensor arguments, but for sparse ones: those are no sample's."""
        found: list[Tensor] = []
        for x in self.a.values():
            if isinstance(x, Tensor):
                found.append(x)
            elif isinstance(x, (list, tuple)):
                found += [y for y in x if isinstance(y, Tensor)]
        return [x for x in found if x.layout is torch.strided]


Rule = Callable[[Op], Any]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the operators of these names."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return add


def together(op: Op, found: Iterable[Label], linear: bool = False) -> Label:
    """The label of what is computed from places with these labels; ``Rows`` name dimensions of the output.

    ``linear``: it is a linear function of what has been summed over samples.
    """
    met = lost = drawn = None
    rows: Rows | None = None
    clash = False
    for label in found:
        if isinstance(label, Rows):
            both = label if rows is None else op.labels.merged(rows, label)
            clash |= both is None
            rows = both or label
        elif isinstance(label, Met):
            linear &= label.summed
            met = met or label
        elif isinstance(label, Lost | Unwritten):
            lost = lost or (label if isinstance(label, Lost) and not label.dims else op.lost())
        elif isinstance(label, Drawn):
            drawn = label
    if met is not None:
        return Met(met.op, met.module, linear and rows is None and lost is None)
    if clash:
        return op.met()
    return lost or rows or drawn


def moved(label: Label, dim: Callable[[int], int]) -> Label:
    """A label with its dimension renumbered."""
    return replace(label, dim=dim(label.dim)) if isinstance(label, Rows) and label.dim is not None else label


def shifted(label: Label, by: int) -> Label:
    """A label with ``by`` more dimensions before its own."""
    return moved(label, lambda d: d + by)


def broadcast(op: Op, x: Any, ndim: int) -> Label:
    """The label of an argument, by the dimensions of an output of ``ndim`` that it is broadcast to."""
    if not isinstance(x, Tensor):
        return None
    return shifted(op.labels[x], ndim - x.dim())


LINEAR = {"add", "sub", "rsub", "neg", "clone", "_to_copy", "copy", "lift_fresh_copy", "detach_copy"}


def pointwise(op: Op) -> Label:
    given = op.given()
    ndim = op.out[0].dim() if op.out and op.out[0] is not None else max((x.dim() for x in given), default=0)
    found = [broadcast(op, x, ndim) for x in given]
    name = op.name.removesuffix("_")
    linear = name in LINEAR
    if name in ("mul", "div"):
        sums = [k for k, label in enumerate(found) if isinstance(label, Met)]
        linear = sums == [0] or (name == "mul" and len(sums) == 1)
    return together(op, found, linear)


rule(
    "clone _to_copy tril triu native_dropout native_dropout_backward _fused_dropout rrelu_with_noise "
    "_unsafe_masked_index_ masked_fill masked_fill_ fill masked_scatter_backward_ hardtanh_backward "
    "quantize_per_tensor _assert_tensor_metadata dropout lift_fresh_copy binary_cross_entropy_with_logits_"
)(pointwise)


@rule("copy_")
def _copy(op: Op) -> Label:
    return broadcast(op, op.a["src"], op.a["self"].dim())


@rule("bernoulli_ normal_ uniform_ random_ exponential_ cauchy_ log_normal_ geometric_")
def draw(op: Op) -> Label:
    """In place of what was there; with probabilities that may be somebody's (``bernoulli_(p)``)."""
    return together(op, [op[name] for name in op.a if name != "self"]) or Drawn()


@rule("bernoulli")
def coins(op: Op) -> Label:
    return Drawn() if op.a.get("p") is not None else together(op, [op["self"]]) or Drawn()


@rule("fill_ zero_ zero fill.Tensor")
def _fill(op: Op) -> Label:
    return op["value"]


def dims_of(op: Op, x: Tensor) -> list[int]:
    dims = op.a.get("dim", op.a.get("dims"))
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(x.dim()))
    return [d % max(1, x.dim()) for d in ([dims] if isinstance(dims, int) else dims)]


SUMS = {"sum", "mean", "nansum"}


@rule(
    "sum mean nansum amax amin max min prod var std var_mean std_mean logsumexp any all argmax argmin median nanmedian "
    "mode kthvalue norm linalg_vector_norm aminmax count_nonzero hash_tensor"
)
def reduce(op: Op) -> Label:
    x = op.a["self"] if "self" in op.a else op.a["input"]
    label = op.labels[x]
    if "other" in op.a:  # max and min of two
        return pointwise(op)
    summed = op.name in SUMS
    if isinstance(label, Met):
        return Met(label.op, label.module, label.summed and summed)
    dims = dims_of(op, x)
    if isinstance(label, Lost) and set(label.dims) & set(dims):
        return op.met(summed)
    if isinstance(label, Rows) and label.dim is not None:
        if label.dim in dims:  # a mean over rows that are picked divides by how many there are
            return op.met(summed and not (op.name == "mean" and label.by_data))
        if not op.a.get("keepdim"):
            return moved(label, lambda d: d - sum(k < d for k in dims))
    return together(op, [label])


@rule(
    "cumsum cumprod cummax cummin logcumsumexp _softmax _log_softmax softmax log_softmax sort argsort topk flip "
    "roll glu _softmax_backward_data _log_softmax_backward_data glu_backward _fft_r2c _fft_c2c _fft_c2r rot90 renorm "
    "cumsum_ "
    "cumprod_ unfold_backward logcumsumexp_ _safe_softmax"
)
def along(op: Op) -> Label:
    """Along some dimensions, and each index of the others by itself."""
    given = [x for x in op.given() if x.dim()]
    label = together(op, [op.labels[x] for x in op.given()])
    if any(isinstance(op.labels[x], Lost) and op.labels[x].dims for x in given):  # type: ignore[union-attr]
        return op.met()
    if not isinstance(label, Rows) or label.dim is None:
        return label
    x = max(given, key=Tensor.dim)
    dims = op.a.get("dim", op.a.get("dims", -1))
    inside = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    if op.name in ("roll", "rot90") and not dims:
        return op.met()
    return op.met() if label.dim in inside else label


@rule(
    "linalg_inv_ex linalg_solve_ex _linalg_solve_ex linalg_qr _linalg_eigh linalg_eig _linalg_svd linalg_cholesky_ex "
    "linalg_lu_factor_ex linalg_solve_triangular _linalg_det _linalg_slogdet linalg_householder_product matrix_exp "
    "linalg_matrix_exp cholesky_solve linalg_lstsq triangular_solve linalg_pinv"
)
def matrices(op: Op) -> Label:
    """Of the last two dimensions, for each index of the others."""
    found = []
    given = op.given()
    ndim = max(x.dim() for x in given)
    for x in given:
        label = op.labels[x]
        vectors = x.dim() == ndim - 1 and x.shape[:-1] == given[0].shape[: x.dim() - 1]
        if isinstance(label, Rows) and label.dim is not None and label.dim >= x.dim() - (1 if vectors else 2):
            return op.met()
        found.append(label if vectors else shifted(label, ndim - x.dim()))
    return together(op, found)


def product(op: Op, letters: str, *names: str) -> Label:
    """Of a sum of products, as in ``torch.einsum``: ``"nk,km->nm"``."""
    sides, _, result = letters.partition("->")
    found: list[Label] = []
    contracted = False
    for side, name in zip(sides.split(","), names, strict=True):
        label = op[name]
        if isinstance(label, Lost) and any(side[d] not in result for d in label.dims):
            return op.met(summed=True)
        if isinstance(label, Rows) and label.dim is not None:
            letter = side[label.dim]
            contracted |= letter not in result
            label = replace(label, dim=result.find(letter))
        found.append(label)
    of = together(op, found, linear=sum(isinstance(label, Met) for label in found) == 1)
    return op.met(summed=True) if contracted and isinstance(of, Rows) else of


PRODUCTS = {
    "mm": ("nk,km->nm", "self", "mat2"),
    "bmm": ("bnk,bkm->bnm", "self", "mat2"),
    "mv": ("nk,k->n", "self", "vec"),
    "dot": ("k,k->", "self", "tensor"),
    "vdot": ("k,k->", "self", "other"),
    "addmm": ("nk,km->nm", "mat1", "mat2"),
    "_addmm_activation": ("nk,km->nm", "mat1", "mat2"),
    "addmv": ("nk,k->n", "mat", "vec"),
    "addbmm": ("bnk,bkm->nm", "batch1", "batch2"),
    "baddbmm": ("bnk,bkm->bnm", "batch1", "batch2"),
    "addr": ("n,m->nm", "vec1", "vec2"),
    "ger": ("n,m->nm", "self", "vec2"),
}


@rule(" ".join(PRODUCTS) + " mm_ addmm_ baddbmm_ addmv_ addr_ addbmm_")
def matmul(op: Op) -> Label:
    letters, *names = PRODUCTS[op.name.removesuffix("_")]
    label = product(op, letters, *names)
    if "self" not in names:
        label = together(op, [label, broadcast(op, op.a["self"], len(letters.partition("->")[2]))], linear=True)
    return label


@rule("linear")
def linear(op: Op) -> Label:
    weight = op["weight"]
    if weight is None or isinstance(weight, Drawn):
        x = op.a["input"]
        label = op["input"]
        if isinstance(label, Rows) and label.dim == x.dim() - 1:
            return op.met(summed=op.a["bias"] is None)
        return together(op, [label, op["bias"]], linear=True)
    return op.lost()


@rule("_cdist_forward _euclidean_dist")
def distances(op: Op) -> Label:
    x1, x2 = op.a["x1"], op.a["x2"]
    first = op.labels[x1]
    second = op.labels[x2]
    for x, label in ((x1, first), (x2, second)):
        if isinstance(label, Rows) and label.dim == x.dim() - 1:
            return op.met()
    ndim = max(x1.dim(), x2.dim())
    second = moved(broadcast(op, x2, ndim), lambda d: d + 1 if d == ndim - 2 else d)
    return together(op, [broadcast(op, x1, ndim), second])


@rule("cat stack")
def cat(op: Op) -> Label:
    parts: list[Tensor] = [x for x in op.a["tensors"] if x.shape != (0,)]
    new = op.name == "stack"
    ndim = parts[0].dim() + new
    dim = op.a["dim"] % ndim
    found = [moved(op.labels[x], lambda d: d + (new and d >= dim)) for x in parts]
    along_it = any(isinstance(label, Rows) and label.dim in (None, dim) for label in found)
    if not along_it or not all(label is None or isinstance(label, Rows | Drawn) for label in found):
        return together(op, found, linear=True)
    by_data = any(isinstance(label, Rows) and label.by_data for label in found)
    owners = joined(found, [1 if new else x.shape[dim] for x in parts], dim)
    return op.labels.rows(dim, owners, by_data) or op.lost()


def joined(found: Sequence[Label], sizes: Sequence[int], dim: int) -> Any:
    """The owners along ``dim`` of parts that lie beside each other there; nothing where one has others along others."""
    owners: list[int] = []
    for label, size in zip(found, sizes, strict=True):
        if not isinstance(label, Rows):
            owners += [-1] * size
        elif label.dim is None:
            owners += [int(label.owners.each[0])] * size
        elif label.dim == dim:
            owners += label.owners.each.tolist()
        else:
            return []
    return owners


@rule("repeat")
def repeat(op: Op) -> Label:
    x, times = op.a["self"], op.a["repeats"]
    label = broadcast(op, x, len(times))
    if isinstance(label, Rows) and label.dim is not None and times[label.dim] != 1:
        return op.labels.rows(label.dim, label.owners.each.tolist() * times[label.dim], label.by_data)
    return label


@rule("constant_pad_nd")
def pad(op: Op) -> Label:
    x, pads = op.a["self"], op.a["pad"]
    label = op["self"]
    if not isinstance(label, Rows):
        return together(op, [label], linear=True)
    sides = {x.dim() - 1 - k // 2 for k, n in enumerate(pads) if n}
    if label.dim is not None and label.dim not in sides:
        return label
    return label if not sides else (op.lost() if label.dim is not None else label)


@rule("select_backward slice_backward diagonal_backward")
def put_back(op: Op) -> Label:
    """Zeros, with the gradient in a part of them."""
    grad, sizes = op.a["grad_output"], op.a["input_sizes"]
    label = op["grad_output"]
    if op.name == "diagonal_backward":
        return together(op, [label]) if not isinstance(label, Rows) else op.lost()
    dim = op.a["dim"] % len(sizes)
    at = range(sizes[dim])
    at = (
        at[op.a["index"] :][:1] if op.name == "select_backward" else at[slice(op.a["start"], op.a["end"], op.a["step"])]
    )
    if op.name == "select_backward":
        label = moved(label, lambda d: d + (d >= dim))
    if not isinstance(label, Rows) or label.dim not in (None, dim):
        return together(op, [label], linear=True)
    owners = [-1] * sizes[dim]
    for k, place in enumerate(at):
        owners[place] = int(label.owners.each[0 if label.dim is None else k])
    everyone = op.labels.in_order(dim, sizes[dim])
    if everyone is None:
        return label if label.dim is None and grad.numel() else op.lost()
    if everyone.dim is None:
        return everyone  # of one sample, whatever its place
    fits = all(one in (-1, other) for one, other in zip(owners, everyone.owners.each.tolist(), strict=True))
    return everyone if fits else op.lost()
