"""The same random numbers for a sample, whichever other samples there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Draws(TorchDispatchMode):
    """Notes every random operator of a pass, and plays it back in a pass of a part of the samples.

    Played back, an operator is called for all samples, from the same state of the generator; those that are left get
    their rows of what it gives. Where a dimension has several rows for each sample, a sample's lie beside each other.
    """

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.keep: Tensor | None = None  # the samples of the pass that is played back
        self._noted: list[tuple[Any, list[Tensor], list[Any]]] = []  # operator, states, sizes of its arguments
        self._next = 0

    def playing(self, keep: Tensor) -> Draws:
        """For a pass of the samples ``keep``."""
        self.keep, self._next = keep, 0
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if self.keep is None:
            self._noted.append((func, _states(), _sizes((args, kwargs))))
            return func(*args, **kwargs)
        if self._next >= len(self._noted) or self._noted[self._next][0] is not func:
            raise RuntimeError("other random numbers are drawn where there are fewer samples")
        _, states, sizes = self._noted[self._next]
        self._next += 1
        own = func(*args, **kwargs)  # for its shape
        _restore(states)
        whole_args, whole_kwargs = self._for_all((args, kwargs), sizes)
        everyone = func(*whole_args, **whole_kwargs)
        if func._schema.name.endswith("_"):
            return args[0].copy_(self._rows(everyone, own))
        return tree_map(lambda x, y: self._rows(x, y) if isinstance(x, Tensor) else x, everyone, own)

    def _for_all(self, given: Any, sizes: list[Any]) -> Any:
        """Arguments of the sizes that they had for all samples, with the kept samples' values in their rows."""
        left = iter(sizes)

        def whole(x: Any) -> Any:
            before = next(left)
            if not isinstance(x, Tensor):
                return before if isinstance(x, int) and not isinstance(x, bool) else x
            shape, stride = before  # numbers are drawn in the order of memory
            out = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device).zero_()
            different = [d for d, size in enumerate(shape) if x.shape[d] != size]
            if not different:
                return out.copy_(x)
            return out.index_copy_(different[0], self._index(shape[different[0]]).to(x.device), x.detach())

        return tree_map(whole, given)

    def _rows(self, everyone: Tensor, own: Tensor) -> Tensor:
        for d, size in enumerate(own.shape):
            if everyone.shape[d] != size:
                everyone = everyone.index_select(d, self._index(everyone.shape[d]).to(own.device))
        return everyone

    def _index(self, size: int) -> Tensor:
        assert self.keep is not None
        each = size // self.batch
        return (self.keep[:, None] * each + torch.arange(each)).flatten()


def _sizes(given: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(lambda x: found.append((x.shape, x.stride()) if isinstance(x, Tensor) else x), given)
    return found


def _states() -> list[Tensor]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
