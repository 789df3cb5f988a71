"""The calls of layers that one compiled graph makes, and the operator at its end that hands their forms over.

Inductor computes the layers itself: see :mod:`dpfast.capture.joint_graph`. What their backward passes would have
recorded one by one, ``clipped_in_graph`` gets for all of them at once, when the last backprop is there.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dpfast.capture import running_pass
from dpfast.capture.forms import Form, Waiting
from dpfast.capture.mean_in_16_bits import NARROW
from dpfast.capture.recorder import RowLayout, running_backward
from dpfast.capture.tap import Call, Tap, Use, accumulators, check_owners

# What a compiler may make of a layer, for whoever asks.
INSIDE = "a part of the graph"
AS_OPERATOR = "an operator that the compiler does not look into, as its backend is not Inductor"
OF_ANY_SIZE = "an operator that the compiler does not look into, as the graph is for batches of any size (see pad=True)"
IN_16_BITS = "an operator that the compiler does not look into, as float32 products may be made in less (tf32, bf16)"
AT_INDICES = (
    "an operator that the compiler does not look into, as the graph adds up at indices (max pooling, gather), which "
    "Inductor has been seen to read before it was done"
)
UNUSUAL = "an operator that the compiler does not look into, as its graph is used in another way than it was built for"
BESIDE = "outside of the graph"
# A graph that is replayed without Python would hand nothing over.
TAGS = (torch.Tag.cudagraph_unsafe,)
graphs: WeakValueDictionary[str, GraphCalls] = WeakValueDictionary()  # by what a compiler takes for a constant
with torch._C._AutoDispatchBelowAutograd():
    _BELOW_AUTOGRAD = torch._C._dispatch_tls_local_exclude_set()


class GraphCall(NamedTuple):
    """One call of a layer. What is given to the operator has its tensors at these places."""

    tap: Tap
    use: Use
    shared: bool  # the input was one row for all samples
    G: int
    x: int
    params: tuple[int | None, ...]
    saved: tuple[int, ...]
    layout: RowLayout | None

    def of(self, given: Sequence[Tensor], batch: int, layout: RowLayout | None = None) -> Call:
        """The call, as far as its forms need it."""
        call = Call(self.tap, self.use.spec, batch, layout, forward_pass=running_backward())
        call.saved = tuple([given[k] for k in self.saved])
        return call

    def points(self, given: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return tuple([None if k is None else given[k] for k in self.params])


class GraphCalls:
    """All calls in one compiled graph, for batches of one size."""

    def __init__(self, calls: Sequence[GraphCall], batch: int):
        self.calls, self.batch = list(calls), batch
        self.name = secrets.token_hex(8)  # of no other graph, in any process: compiled code is kept in files
        self.recorder: Any = calls[0].tap.recorder
        self.layouts = {call.layout for call in calls if call.layout is not None}
        self.replays: dict[Any, Any] = {}  # what the recorder has traced of its work on these forms
        self.trained = list(dict.fromkeys(each.use.params[k] for each in self.calls for k in each.use.all_trained()))
        graphs[self.name] = self
        self.recorder.graphs[self.name] = self

    def end(self, given: Sequence[Tensor]) -> None:
        """The backward pass through the graph has got so far that all backprops are there."""
        recorder = self.recorder
        for call in self.calls:
            check_owners(call.tap, call.use.params, call.points(given))
        if not (running_pass.is_whole() and recorder.can_end_at_once(self)):
            self._record(given)
            return
        if recorder.opens():
            recorder.open()
        if any([given[call.G].dtype in NARROW for call in self.calls]):
            for call in self.calls:
                call.tap.note_narrow(given[call.G])
        recorder.end_at_once(self, given)

    def forms(self, given: Sequence[Tensor]) -> dict[Any, list[Form | Waiting]]:
        """The forms of all parameters that a pass through the whole graph trains."""
        found: dict[Any, list[Form | Waiting]] = {}
        for each in self.calls:
            call, points = each.of(given, self.batch), each.points(given)
            for index, form in each.tap.layer.forms(
                call, each.use.all_trained(), given[each.G], given[each.x], *points
            ):
                found.setdefault(each.use.params[index], []).append(form)
        return found

    def _record(self, given: Sequence[Tensor]) -> None:
        """As the layers' own backward passes would have."""
        recorder = self.recorder
        source = "" if self.name in recorder.sources else self.name  # another run of the graph is not it alone
        with recorder.setting(source=source):
            for each in self.calls:
                G, x = given[each.G], given[each.x]
                rows = 1 if each.shared else x.shape[0]
                batch, layout = recorder.resolve_rows(each.tap, rows, x.dim(), self.batch, each.use.spec)
                call, owned = each.of(given, batch, layout), each.use.params
                with as_autograd_sees():
                    needed = each.use.reached(each.tap.name, accumulators(owned))
                keep = partial(own_memory, given=(G, x, *call.saved))
                call.record(owned, needed, G, x, each.points(given), keep)


_library = torch.library.Library("dpfast", "FRAGMENT")
_library.define("clipped_in_graph(Tensor token, Tensor[] given, str name) -> Tensor", tags=TAGS)


def _clipped_in_graph(token: Tensor, given: Sequence[Tensor], name: str) -> Tensor:
    graphs[name].end(given)
    return torch.zeros_like(token)


_library.impl("clipped_in_graph", _clipped_in_graph, "CompositeExplicitAutograd")
torch.library.register_fake(
    "dpfast::clipped_in_graph", lambda token, given, name: torch.empty_like(token), lib=_library
)


def as_autograd_sees() -> Any:
    """Tensors as autograd sees them, which an operator runs below."""
    excluded = torch._C._dispatch_tls_local_exclude_set() - _BELOW_AUTOGRAD
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def own_memory(form: Form, given: Sequence[Tensor]) -> Form:
    """The form with memory of its own: the graph uses that of its tensors again when the operator is done."""
    theirs = {x.untyped_storage()._cdata for x in given}
    held = {item.name: getattr(form, item.name) for item in fields(form)}
    shared = {
        name: _copy(x) for name, x in held.items() if isinstance(x, Tensor) and x.untyped_storage()._cdata in theirs
    }
    return replace(form, **shared) if shared else form  # type: ignore[arg-type]


def _copy(x: Tensor) -> Tensor:
    """A copy that is made when either is written to: whatever writes asks a tensor for its address first.

    On a GPU a replayed CUDA graph does not ask.
    """
    if x.device.type != "cpu":
        return x.clone()
    try:
        return torch._lazy_clone(x)
    except RuntimeError:  # memory that is not PyTorch's own, as that of an array
        return x.clone()
