"""Tensors from elsewhere, which a recorded step would keep for all batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.capture.trees import tensors
from dpfast.refusals import RecordingError


class Strangers(TorchDispatchMode):
    """Refuses tensors that come from elsewhere, and may be of the samples: a graph would keep them for all batches."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.known: set[int] = set()
        self.ended = False  # what clips has constants of its own

    def start(self, known: Sequence[Tensor]) -> None:
        """A forward begins, which may use ``known``."""
        self.ended, self.known = False, set(map(_storage, known))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.ended:
            for x in tensors((args, kwargs)):
                if self.batch in x.shape and _storage(x) not in self.known:
                    raise RecordingError(
                        f"the loss or the model uses a tensor of shape {list(x.shape)} that is not in the batch, and "
                        f"may be of its samples: give it to the call, beside the others"
                    )
        out = func(*args, **(kwargs or {}))
        self.known.update(map(_storage, tensors(out)))
        return out


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
