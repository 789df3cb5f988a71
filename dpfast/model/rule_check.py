"""Whether a rule that a user has registered for a layer returns the layer's per-sample gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dpfast.capture.shift import swapped
from dpfast.capture.trees import map_tensors, tensors
from dpfast.layers.own_rules import as_form
from dpfast.refusals import RuleError
from dpfast.separation import kept

if TYPE_CHECKING:
    from dpfast.model.sampled_forward import SampledForward

MOST_ROWS = 8  # that are compared, one at a time
# A rule is wrong where it is off by more than this part of a row's gradient. Modules may compute in float32 inside.
ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
NOTHING = 1e-6  # of the largest gradient: what cancels to less is rounding


def widened(x: Tensor) -> Tensor:
    """``x`` of 16 bits in float32."""
    return x.float() if x.is_floating_point() and x.element_size() < 4 else x


def wrong_shape(given: Any, rows: int, parameter: Tensor) -> str:
    """What to say of something that stands for no per-sample gradients of ``parameter``."""
    if isinstance(given, Tensor):
        found = f"one of shape {list(given.shape)}"
    elif given is None:
        found = "none"
    elif sides := tensors(vars(given)) if hasattr(given, "__dict__") else []:
        found = f"a {type(given).__name__} of shapes {[list(x.shape) for x in sides]}"
    else:
        found = f"a {type(given).__name__}"
    return (
        f"was to return per-sample gradients of shape {[rows, *parameter.shape]} for a parameter, or a Product of "
        f"activations [{rows}, *, d] and backprops [{rows}, *, p] for a weight [p, d], and returned {found}"
    )


class RuleCheck:
    """Compares what the rule of a layer returns with autograd's gradients of its rows, one at a time.

    At the first backward of each kind, and at its 2nd, 4th, 8th, ... one: a first batch may have nothing of what a
    rule gets wrong. The layer's own forward is run again for it, in float64 where it can be, on rows of the real
    activations and with the backprops that have come.
    """

    def __init__(self, of: SampledForward):
        self.of = of
        self.seen: dict[Any, int] = {}

    def compare(
        self, given: Any, dim: int, needed: Sequence[int], G: Tensor, params: Sequence[Any], points: Sequence[Any]
    ) -> None:
        """Raise, if this is a backward to look at and the rule is wrong there; ``given`` is what the forward got.

        ``dim`` is the batch dimension, also of what it returned.

        Raises:
            RuleError: naming the layer, the parameter and how far off it is.
        """
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
            return  # a graph is recorded of a step that ran before, and was compared
        inputs = tensors(given)
        kind = tuple((x.dim(), x.dtype) for x in (*inputs, G)), tuple(needed), self.of.module.training
        count = self.seen.get(kind, 0) + 1
        if count & (count - 1) == 0:
            with _disable_current_modes():
                G = G.detach()
                some = G.flatten(1).ne(0).any(1).nonzero().flatten()
                if not len(some):
                    return  # nothing comes back that a rule could be wrong about
                spread = torch.linspace(0, len(some) - 1, min(len(some), MOST_ROWS), device=G.device)
                self._compare(given, dim, needed, G, params, points, some[spread.round().long()])
        self.seen[kind] = count

    def _compare(self, given: Any, dim: int, needed: Any, G: Tensor, params: Any, points: Any, index: Tensor) -> None:
        inputs = tensors(given)
        by_row = [k for k, x in enumerate(inputs) if x.dim() > dim and x.shape[dim] == len(G)]
        wrong = ""
        for cut in dict.fromkeys((tuple(by_row), tuple(by_row[:1]))):  # a mask may have as many rows by chance
            wrong = self._wrong(_Rows(given, cut, dim), needed, G, params, points, index)
            if not wrong:
                return
        raise RuleError(f"{self.of.what} {wrong} Mend the rule, or {self.of.without}")

    def _wrong(self, rows: _Rows, needed: Any, G: Tensor, params: Any, points: Any, index: Tensor) -> str:
        """How far the rule is off; an empty string if it is right."""
        failure = ""
        for dtype in dict.fromkeys((torch.float64, torch.float32, G.dtype)):
            try:
                with self._computing_in(dtype, params):
                    values = [p.detach().to(dtype) for p in points]
                    few = G.index_select(0, index).to(dtype)
                    expected = self._expected(rows, few, params, values, index)
                    found = self._found(rows, few, params, values, index)
            except (RuntimeError, TypeError) as error:  # an operator that has no such dtype
                failure = failure or str(error)
                continue
            most = max([float(expected[k].norm(dim=1).nan_to_num(0.0, 0.0).max()) for k in needed], default=0.0)
            for k in needed:
                off, size = (found[k] - expected[k]).norm(dim=1), expected[k].norm(dim=1)
                fits = (off <= ALLOWED[dtype] * size + NOTHING * most) | ~size.isfinite()
                if not bool(fits.all()):
                    row = int((~fits).nonzero()[0])
                    return (
                        f"is wrong for {[*self.of.own()][k]!r}: in row {int(index[row])} of the batch it is off "
                        f"by {float(off[row]):.3g} from the gradient of torch.autograd, whose norm is "
                        f"{float(size[row]):.3g}. A sum over positions may be missing, or the layer's forward draws "
                        f"random numbers, which no rule can know."
                    )
            return ""
        return f"could not be compared with torch.autograd, one row of the batch at a time: {failure}."

    def _expected(self, rows: _Rows, few: Tensor, params: Any, values: Any, index: Tensor) -> list[Tensor]:
        """Autograd's gradients of each parameter, ``[n, elements]`` in float64, a row at a time."""
        of = self.of
        by_row: list[list[Tensor]] = [[] for _ in params]
        for r in range(len(index)):
            own = [p.clone().requires_grad_() for p in values]
            args, kwargs = rows.picked(index[r : r + 1], few.dtype)
            with torch.enable_grad(), of.recorder.setting(paused=True), of.holding(params, own):
                out = of.plain(*args, **kwargs)
                out = out.movedim(rows.dim, 0)
                found = torch.autograd.grad(out, own, few[r : r + 1].to(out.dtype), allow_unused=True)
            for gradients, p, g in zip(by_row, own, found, strict=True):
                gradients.append((torch.zeros_like(p) if g is None else g).flatten().double())
        return [torch.stack(gradients) for gradients in by_row]

    def _found(self, rows: _Rows, few: Tensor, params: Any, values: Any, index: Tensor) -> list[Tensor]:
        """The same of the rule; NaN where it has returned nothing of use."""
        of, n = self.of, len(index)
        activations = of.samples_first(rows.picked(index, few.dtype), n, rows.dim)
        forms = [
            as_form(given, p, n, n)
            for given, p in zip(of.returned(activations, few, params, values), values, strict=True)
        ]
        nothing = few.new_full((n, 1), torch.nan)
        return [
            (nothing if form is None else form.instantiate().samples.reshape(n, -1)).double().expand(n, p.numel())
            for form, p in zip(forms, values, strict=True)
        ]

    @contextmanager
    def _computing_in(self, dtype: torch.dtype, params: Any) -> Iterator[None]:
        """The module, but for its own ``params``, is in ``dtype``; autocast is off, and nothing that happens stays."""
        module = self.of.module
        own = set(map(id, params))
        below = {p: p.detach().to(dtype) for p in module.parameters() if id(p) not in own and p.is_floating_point()}
        device = next(module.parameters()).device.type
        with kept(module), torch.random.fork_rng(), torch.autocast(device, enabled=False):
            for m in module.modules():
                for name, x in m._buffers.items():
                    if x is not None:
                        m._buffers[name] = x.to(dtype) if x.is_floating_point() else x.clone()
            with swapped(module.modules(), below):
                yield


class _Rows:
    """What a forward was called with, of which the tensors numbered in ``cut`` have a row each for all rows."""

    def __init__(self, given: Any, cut: Sequence[int], dim: int):
        self.given, self.cut, self.dim = given, set(cut), dim

    def picked(self, index: Tensor, dtype: torch.dtype) -> Any:
        """The same with the rows of ``index``, floating-point numbers in ``dtype``."""
        count = itertools.count()

        def one(x: Tensor) -> Tensor:
            x = x.detach()
            x = x.index_select(self.dim, index.to(x.device)) if next(count) in self.cut else x
            return x.to(dtype) if x.is_floating_point() else x

        return map_tensors(one, self.given)
