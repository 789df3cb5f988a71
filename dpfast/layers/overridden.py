"""Subclasses of linear layers and embedding tables with a forward of their own, such as scaled word embeddings.

Their forward runs as it is; where it applies the base class's op to the module's own parameters, that op goes through
the tap. A forward that uses them in any other way is found out by the guards of the parameters, and the module is
served by the generic path instead: see :func:`dpfast.model.forwards.lend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpfast.capture.tap import Tap
from dpfast.layers.base import Layer
from dpfast.layers.embedding_tables import Embedding
from dpfast.layers.linear import Linear, Rows
from dpfast.refusals import SamplesMeetError


class Overridden(Layer):
    """The base class's layer, its op looked for in the module's own forward."""

    def run(self, module: Any, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        with _Tapped(self.tapped, module, tap):
            return type(module).forward(module, *args, **kwargs)

    def tapped(self, module: Any, tap: Tap, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """What ``func(*args, **kwargs)`` returns, through the tap; None if it is not the op on own parameters."""
        raise NotImplementedError


class OverriddenLinear(Overridden, Linear):
    types = ()

    def tapped(self, module: nn.Linear, tap: Tap, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        def own(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
            if weight is not module.weight or (bias is not None and bias is not module.bias):
                return None
            return tap(input, weight, bias, spec=Rows())

        return own(*args, **kwargs) if func is F.linear else None


class OverriddenEmbedding(Overridden, Embedding):
    types = ()

    def tapped(self, module: nn.Embedding, tap: Tap, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        def own(
            input: Tensor,
            weight: Tensor,
            padding_idx: int | None = None,
            max_norm: float | None = None,
            norm_type: float = 2.0,
            scale_grad_by_freq: bool = False,
            sparse: bool = False,
        ) -> Tensor | None:
            if weight is module.weight and (max_norm is not None or scale_grad_by_freq or sparse):
                raise SamplesMeetError(
                    f"embedding {tap.name!r} looks its rows up with max_norm, scale_grad_by_freq or sparse, which have "
                    f"no per-sample gradient: leave these options out"
                )
            if weight is not module.weight:
                return None
            return tap(input, weight, spec=padding_idx if padding_idx is None else padding_idx % len(weight))

        return own(*args, **kwargs) if func is F.embedding else None


class _Tapped(TorchFunctionMode):
    def __init__(self, tapped: Callable[..., Tensor | None], module: nn.Module, tap: Tap):
        super().__init__()
        self.tapped, self.module, self.tap = tapped, module, tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.tapped(self.module, self.tap, func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if found is None else found


OVERRIDDEN: dict[type[Layer], Layer] = {Linear: OverriddenLinear(), Embedding: OverriddenEmbedding()}
