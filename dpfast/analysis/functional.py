"""A model and a loss as functions of one sample in float64, which the convergence analyses differentiate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dpfast.analysis.explain import pristine_copy
from dpfast.clipping.functions import clipping_function
from dpfast.clipping.thresholds import Clipping
from dpfast.model.private_model import FusedModule

GIB = 2.0**30
SHARE = 0.8  # of the memory that is free now, unless memory_limit says otherwise


class Problem:
    """A model, a loss and a batch, as functions of the trainable parameters.

    The model is copied, to the CPU, in float64 and in eval mode: dropout is off, batch normalisation uses its running
    statistics, so each sample's output is its own. The loss of a batch is the sum of its samples'.

    Args:
        model: plain or private; maps inputs ``[n, ...]`` to outputs ``[n, ...]``.
        loss_fn: a criterion, ``loss_fn(outputs, targets)``, with any reduction; it is called on batches of one.
        inputs, targets: ``[n, ...]``.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor] | None, inputs: Tensor, targets: Tensor | None):
        self.net = pristine_copy(model._module if isinstance(model, FusedModule) else model).cpu().double().eval()
        self.trainable = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("model: no parameter has requires_grad, so nothing is trained and there is no kernel")
        self.start = {name: p.detach().clone() for name, p in self.trainable.items()}
        rest = {name: p for name, p in self.net.named_parameters() if not p.requires_grad}
        self.rest = {name: p.detach() for name, p in (rest | dict(self.net.named_buffers())).items()}
        self.inputs = _double(inputs)
        if not len(self.inputs):
            raise ValueError(f"inputs of shape {list(inputs.shape)}: give at least one sample")
        self.targets = torch.empty(0) if targets is None else _double(targets)
        if targets is not None and len(targets) != len(inputs):
            raise ValueError(f"targets: {len(targets)} for {len(inputs)} samples; give one for each")
        self.loss_fn = loss_fn
        with torch.no_grad():
            self.outputs_per_sample = self.output(self.start, self.inputs[0]).numel()
            try:
                vmap(self.output, (None, 0))(self.start, self.inputs[:2])
            except RuntimeError as error:
                raise ValueError(
                    f"model: torch.func.vmap cannot run it ({str(error).splitlines()[0]}); recurrent layers have forms "
                    f"that it can, such as opacus.layers.DPLSTM"
                ) from error

    @property
    def samples(self) -> int:
        return len(self.inputs)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.start.values())

    def output(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The output of one sample, ``[c]``, whatever its own shape."""
        return self._call(parameters, x).reshape(-1)

    def outputs(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """``[n, c]``."""
        return vmap(self.output, (None, 0))(parameters, self.inputs)

    def losses(self, outputs: Tensor) -> Tensor:
        """Each sample's loss, ``[n]``, from outputs ``[n, c]``."""
        return vmap(self._loss_of_output)(outputs, self.targets)

    def loss_gradient(self, outputs: Tensor) -> Tensor:
        """``∂ℓ_i/∂f_i``, ``[n, c]``."""
        return vmap(grad(self._loss_of_output))(outputs, self.targets)

    def sample_gradients(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of each sample's loss, ``[n, *shape]`` by name."""

        def loss(at: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self._loss_of_output(self.output(at, x), y)

        return vmap(grad(loss), (None, 0, 0))(dict(parameters), self.inputs, self.targets)

    def _call(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out = functional_call(self.net, {**self.rest, **parameters}, (x.unsqueeze(0),))
        if not isinstance(out, Tensor) or out.shape[:1] != (1,):
            raise ValueError(
                f"model: its output on one sample is no tensor [1, ...] but {getattr(out, 'shape', type(out))}"
            )
        self._shape = out.shape
        return out

    def _loss_of_output(self, output: Tensor, target: Tensor) -> Tensor:
        assert self.loss_fn is not None
        return self.loss_fn(output.reshape(self._shape), target.unsqueeze(0)).sum()


def clipping_of(
    parameters: Mapping[str, nn.Parameter],
    max_grad_norm: float | Sequence[float] | Mapping[str, float] | None,
    clipping: str | Sequence[str],
    clipping_fn: Any,
) -> Clipping | None:
    """The clipping that ``make_private`` would use with these arguments; None for none (``max_grad_norm=None``)."""
    function = clipping_function(clipping_fn)
    if max_grad_norm is None:
        return None
    if clipping == "flat":
        found = Clipping.flat(max_grad_norm)  # type: ignore[arg-type]
    elif clipping == "per_layer":
        found = Clipping.per_layer(max_grad_norm, parameters)
    elif isinstance(clipping, Sequence) and not isinstance(clipping, str) and clipping:
        found = Clipping.equal_shares(max_grad_norm, clipping, parameters)  # type: ignore[arg-type]
    else:
        raise ValueError(f"clipping={clipping!r}: use 'flat', 'per_layer', or a list of parameter-name prefixes")
    found.function = function
    return found


def factors_of(clipping: Clipping | None, squared: Tensor) -> Tensor:
    """Clipping factors ``[groups, n]`` for squared norms ``[groups, n]``; ones without clipping."""
    if clipping is None:
        return torch.ones_like(squared)
    return clipping.factors(squared.contiguous(), torch.zeros_like(squared), 1.0)[0].double()


def check_memory(what: str, numbers: int, memory_limit: float | None, remedy: str) -> None:
    """Refuse ``numbers`` float64 numbers that do not fit.

    Args:
        memory_limit: GiB; 80 % of what is free if None.

    Raises:
        ValueError: says how many GiB it would take.
    """
    if memory_limit is not None and not (not isinstance(memory_limit, bool) and 0 < memory_limit < math.inf):
        raise ValueError(f"memory_limit={memory_limit!r}: give GiB, a positive finite number, or None")
    limit = SHARE * _free() if memory_limit is None else memory_limit * GIB
    if 8 * numbers > limit:
        raise ValueError(
            f"{what} would take {8 * numbers / GIB:.3g} GiB, and {limit / GIB:.3g} GiB may be used: {remedy}"
        )


def _free() -> float:
    """Bytes of memory that a program can still take."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return 4 * GIB  # cannot be told here


def _double(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    return x.double() if x.is_floating_point() else x
