"""A private model that is called in a way of its own, examined: exact and within C, or refused by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.helpers import F64, SLACK, distance, make_private, sums_of
from tests.oracle import LossFn, Verdict

Call = Callable[..., Any]
TIGHT = 0.01  # a norm that clips every sample of these models


def plainly(model: nn.Module, *inputs: Any) -> Any:
    return model(*inputs)


class Called(nn.Module):
    """``call(model, *inputs)`` as a module, for the oracle: what it leaves out of ``inputs``, all samples share."""

    def __init__(self, model: nn.Module, call: Call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.model, *inputs)


class Private:
    """A private copy of ``model``, used for several batches in a row."""

    def __init__(self, model: nn.Module, max_grad_norm: float, call: Call = plainly, **kw: Any):
        self.model, self.call = copy.deepcopy(model), call
        self.wrapped, self.optimizer, _ = make_private(self.model, max_grad_norm=max_grad_norm, **kw)

    def backward(self, inputs: tuple, target: Any, loss: LossFn) -> dict[str, Tensor]:
        """The clipped sums of one forward and backward, forgotten again."""
        self.forget()
        self.output = self.call(self.wrapped, *inputs)
        loss(self.output, target).backward()
        sums = {f"model.{name}": s for name, s in sums_of(self.model).items()}
        self.forget()
        return sums

    def forget(self) -> None:
        for p in self.model.parameters():
            p.summed_grad = p.grad = None

    def nothing_summed(self) -> bool:
        return not any(s.any() for s in sums_of(self.model).values())


def examine(
    model: nn.Module, inputs: tuple, target: Any, loss: LossFn, call: Call = plainly, before: tuple | None = None, **kw
) -> Private:
    """Exact against the oracle, and in float64 each sample left out moves the clipped sum by at most C.

    ``before`` is another batch ``(inputs, target)``, which the same private model sees first. All samples clipped, and
    some only.
    """
    dim = 0 if kw.get("batch_first", True) else 1
    model, inputs, target = model.double(), oracle.cast(inputs, F64), oracle.cast(target, F64)
    for bound in (TIGHT, None):
        verdict = Verdict(Called(model, call), inputs, target, loss, bound, batch_dim=dim)
        private = Private(model, verdict.max_grad_norm, call, **kw)
        if before is not None:
            private.backward(*oracle.cast(before, F64), loss)
        whole = private.backward(inputs, target, loss)
        verdict.check_norms(private.wrapped.per_sample_gradient_norms)
        verdict.check_sums(whole)
        with torch.no_grad():
            expected = call(copy.deepcopy(model), *inputs)
        torch.testing.assert_close(oracle.map_tensors(Tensor.detach, private.output), expected)
        count = len(verdict.norms)
        for i in range(count):
            rest = oracle.take((inputs, target), [j for j in range(count) if j != i], dim)
            moved = distance(whole, private.backward(*rest, loss))
            allowed = verdict.max_grad_norm * SLACK
            assert moved <= allowed, f"without sample {i} the clipped sum moved by {moved / verdict.max_grad_norm} C"
    return private


def refuse(
    model: nn.Module, inputs: tuple, target: Any, loss: LossFn, match: str, call: Call = plainly, **kw: Any
) -> None:
    """Refused in forward or backward, in words that ``match``; nothing is summed up."""
    private = Private(model, TIGHT, call, **kw)
    with pytest.raises((ValueError, RuntimeError), match=match):
        loss(call(private.wrapped, *inputs), target).backward()
    assert private.nothing_summed()


def examine_or_refuse(model: nn.Module, inputs: tuple, target: Any, loss: LossFn, match: str, **kw: Any) -> None:
    """As :func:`examine`, but it may be refused in words that ``match``."""
    try:
        Private(model, TIGHT, **kw).backward(inputs, target, loss)
    except (ValueError, RuntimeError):
        refuse(model, inputs, target, loss, match, **kw)
    else:
        examine(model, inputs, target, loss, **kw)
