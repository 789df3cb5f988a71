"""Clipping in the middle of a backward pass: a group whose forms are all there is summed, and what they keep is freed.

Norms of a group need the gradients of its own parameters and no others. The head of a language model as a group of its
own so frees its backprops, the largest of all tensors, before the layers below it run their backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpfast.capture.forms import Form, Waiting, memory_of
from dpfast.clipping.at_once import is_fixed
from dpfast.clipping.closing import Setting, weighted, whole_forms
from dpfast.clipping.norms import squared_norms
from dpfast.clipping.sums_of_forms import clipped_sums
from dpfast.clipping.thresholds import Clipping
from dpfast.ops import index_of
from dpfast.refusals import PassChangedError

if TYPE_CHECKING:
    from dpfast.capture.tap import Call

LEAST = 1 << 24  # bytes that forms of a group keep: to free less is not worth a look


@dataclass
class Summed:
    """A form whose clipped sum is made; of its per-sample gradients the norms are left.

    A sample that another group loses later on, for a norm that is not finite, is in this group's sum already, clipped.
    """

    squared: Tensor
    bound: Tensor
    summed: Tensor

    @property
    def batch(self) -> int:
        return len(self.squared)

    def kept(self) -> tuple[Tensor, ...]:
        return ()

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        return self.squared, self.bound

    def clipped_sum(self, factors: Tensor) -> Tensor:
        """The sum, made with the factors that the same norms lead to once more."""
        return self.summed


class EarlySums:
    """What the running backward pass has summed up before its end."""

    def __init__(self) -> None:
        self.thresholds: dict[nn.Parameter, list[float]] = {}  # with which the parameters were clipped that are summed
        self.used_again: set[nn.Parameter] = set()  # parameters that a pass has used after it had summed them

    def forget(self) -> None:
        """The pass ends."""
        self.thresholds = {}

    def refuse_more(self, params: Iterable[nn.Parameter], names: Mapping[nn.Parameter, str]) -> None:
        """Parameters get gradients: none of those that are summed may.

        Raises:
            ValueError: one is; the next pass clips it at its end.
        """
        again = [p for p in params if p in self.thresholds]
        if again:
            self.used_again.update(again)
            raise PassChangedError(
                f"parameter {names[again[0]]!r} was used once more in a backward pass, after its sum was made to free "
                f"memory. Nothing of it was summed. From now on the parameter is clipped at the end of a pass: run the "
                f"forward and the backward of this batch again"
            )

    def check_thresholds(self, clipping: Clipping) -> None:
        """At the end of a pass.

        Raises:
            ValueError: the thresholds are not what they were.
        """
        if any(thresholds != clipping.thresholds for thresholds in self.thresholds.values()):
            raise PassChangedError(
                "max_grad_norm was changed within a backward pass, part of which had been clipped: change it between "
                "steps. Nothing of the pass was summed"
            )

    def groups(
        self, call: Call, held: Mapping[nn.Parameter, list[Form | Waiting]], clipping: Clipping, model: nn.Module
    ) -> list[dict[nn.Parameter, list[Form | Waiting]]]:
        """Of what one ``call`` of a layer has recorded, the forms that can be summed up now: those of whole groups.

        A parameter that has another owner, or whose layer was called twice, may have other gradients yet.
        """
        if sum([memory_of(form) for forms in held.values() for form in forms]) < LEAST or not is_fixed(clipping):
            return []
        if call.of is None or call.of.calls[call.tap.name] != 1 or not self.used_again.isdisjoint(held):
            return []
        uses = [p for module in model.modules() for p in module._parameters.values() if p in held]
        if len(uses) > len(held) or any(len(forms) != 1 for forms in held.values()):
            return []
        found: dict[int, dict[nn.Parameter, list[Form | Waiting]]] = {}
        for p, forms in held.items():
            found.setdefault(clipping.group_of(p), {})[p] = forms
        return [recorded for group, recorded in found.items() if clipping.members(group) <= recorded.keys()]


def summed_up(
    recorded: Mapping[Any, list[Form | Waiting]], setting: Setting, padding: Sequence[int]
) -> dict[Any, Summed]:
    """The clipped sums of one group, of which ``recorded`` has all parameters; rows in ``padding`` are of no sample."""
    clipping = setting.clipping
    params = list(recorded)
    device, group = params[0].device, clipping.group_of(params[0])
    forms = whole_forms(recorded, setting)
    norms = [squared_norms([its], [group], len(clipping.thresholds)).to(device) for its in forms]  # others' are 0
    squared, bounds = torch.stack(norms).sum(0)
    factors, _ = clipping.factors(squared, bounds, setting.scales.of_norms)
    if padding:
        factors.index_fill_(1, index_of(tuple(padding), device), 0.0)
    parts, owners = weighted(params, forms, [group] * len(params), factors, setting.scales.of_weights)
    sums = {owners[k]: summed for k, summed in clipped_sums(parts)}
    return {p: Summed(its[0, group], its[1, group], sums[p]) for p, its in zip(params, norms, strict=True)}
