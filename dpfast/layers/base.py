"""What a layer family has to say for its modules to be served by the fused mode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from dpfast import ops
from dpfast.capture.forms import Factored, Form, Instantiated, OuterProduct, PositionSum, Waiting
from dpfast.capture.tap import Call, Tap


class Layer:
    """A family of modules with one way to per-sample gradients. Stateless: everything comes with the call.

    ``run`` is the module's forward with its op on parameters replaced by ``tap(x, *params, spec=...)``; padding,
    reshaping and the like stay ordinary autograd. The other three define that op. ``x`` and ``G`` have the samples
    first: ``call.batch`` of them, each with ``len(x) / call.batch`` rows.
    """

    types: ClassVar[tuple[Any, ...]] = ()  # module classes; by full name where their library may not be there
    inherits: ClassVar[tuple[str, ...]] = ()  # methods besides forward that a subclass must have kept to be served
    least_dims: ClassVar[int] = 1  # dimensions of the smallest x that has a batch dimension
    saves: ClassVar[bool] = False  # forward leaves tensors in call.saved for the backward
    aliases: ClassVar[bool] = False  # the output may be a view of a parameter
    checks_each_use: ClassVar[bool] = False  # what one use shows of the samples says nothing of one with another spec
    needs_batch: ClassVar[bool] = False  # the op takes the dimension before the features for the batch (convolutions)

    def refusal(self, module: nn.Module) -> str | None:
        """Why this very module cannot be trained privately, and what to do; None if it can."""
        return None

    def exact_alone(self, module: Any) -> bool:
        """Whether a refused module is exact at a physical batch of one."""
        return True

    def is_by_last(self, spec: Any) -> bool:
        """Whether the op looks at the last dimension of ``x`` alone, whatever the order of the others."""
        return False

    def run(self, module: Any, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        """``module.forward``, its op going through ``tap``."""
        raise NotImplementedError

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        """The op's output."""
        raise NotImplementedError

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        """Gradient with respect to ``x``."""
        raise NotImplementedError

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form | Waiting]]:
        """Per-sample gradients of the parameters with an index in ``needed``."""
        raise NotImplementedError


def own(module: nn.Module, name: str) -> Any:
    """``module.name`` of a parameter, which costs an :class:`nn.Module` more time than a small product."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)


def by_sample(x: Tensor, batch: int, feature_dims: int = 1) -> Tensor:
    """``[rows, *, features]`` as ``[batch, T, features]``, samples first; ``feature_dims`` trailing ones are kept."""
    split = x.dim() - feature_dims
    if split == 2 and x.shape[0] == batch:
        return x
    return x.reshape(batch, math.prod(x.shape[:split]) // batch, *x.shape[split:])


def with_groups(x: Tensor, batch: int) -> Tensor:
    """``[rows, *, d]`` as ``[batch, 1, T, d]``, samples first, one group."""
    if x.dim() == 3 and x.shape[0] == batch:
        return x.unsqueeze(1)
    return x.reshape(batch, 1, math.prod(x.shape[:-1]) // batch, x.shape[-1])


def product_form(A: Tensor, G: Tensor, batch: int, rows: int, row: int = 0) -> OuterProduct | Factored:
    """``g_i = G_iᵀ A_i`` of ``A [rows, *, d]`` and ``G [rows, *, p]``, samples first."""
    if A.dim() == 2 and A.shape[0] == batch:
        return OuterProduct(A, G, rows, row)
    return Factored(with_groups(A, batch), with_groups(G, batch), rows, row)


def sum_positions(G: Tensor) -> Instantiated | PositionSum:
    """``Σ_t`` of ``[B, T, *]`` in float32, float64 for float64."""
    if G.shape[1] == 1 and G.dtype == ops.compute_dtype(G.dtype):
        return Instantiated(G.squeeze(1))
    return PositionSum(G.flatten(2) if G.dim() > 3 else G)


def sum_rows(G: Tensor, batch: int) -> Instantiated | PositionSum:
    """``Σ_t`` of ``[rows, *, d]``, samples first, as :func:`sum_positions`."""
    if G.dim() == 2 and G.shape[0] == batch and G.dtype == ops.compute_dtype(G.dtype):
        return Instantiated(G)
    return PositionSum(G if G.dim() == 3 and G.shape[0] == batch else by_sample(G, batch))
