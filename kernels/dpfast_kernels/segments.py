"""Where the samples of packed rows lie: tables in device memory, by which a program finds its sample and its part.

A kernel for samples ``[N, T, d]`` takes rows ``X [1, R, d]`` of positions besides, of several samples one behind the
other, and ``bounds [N, 2]``: the first position of each sample and its end.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from .common import cdiv


@triton.jit
def sample_at(bounds, n, there, T):
    """Row, first position and number of positions of sample n, of which bounds are only read if it is ``there``."""
    if bounds is None:
        return n, n * 0, T
    else:
        first = tl.load(bounds + 2 * n, mask=there, other=0)
        end = tl.load(bounds + 2 * n + 1, mask=there, other=0)
        return n * 0, first.to(tl.int64), end - first


class Segments:
    """Samples of rows ``[R, *]``: the first position and the end of each, in order, none reaching into the next one.

    Tables are made once for a device, and do not make the host wait for it.
    """

    def __init__(self, bounds: Sequence[tuple[int, int]]):
        self.bounds = tuple(bounds)
        self.lengths = [end - first for first, end in self.bounds]
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}
        assert all(n >= 0 for n in self.lengths) and (not bounds or bounds[-1][1] < 2**31), "positions take 32 bits"

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def mean(self) -> int:
        """Positions of a sample, for configurations; at least 1."""
        return max(1, sum(self.lengths) // max(1, len(self)))

    def places(self, device: torch.device) -> torch.Tensor:
        """``bounds [N, 2]``, int32."""
        return self._table("places", device, lambda: [n for both in self.bounds for n in both]).view(len(self), 2)

    def pairs(self, block: int) -> list[int]:
        """Of each sample the pairs (t, s) of tiles with t ≤ s."""
        tiles = [cdiv(n, block) for n in self.lengths]
        return [n * (n + 1) // 2 for n in tiles]

    def owners(self, block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each pair of tiles its sample, int32 [pairs]; and where each sample's begin, int32 [N + 1]."""

        def owners() -> list[int]:
            return [n for n, its in enumerate(self.pairs(block)) for _ in range(its)]

        firsts = self._table(f"firsts {block}", device, lambda: _ends(self.pairs(block)))
        return self._table(f"owners {block}", device, owners), firsts

    def blocks(self, block: int, device: torch.device) -> torch.Tensor:
        """How many blocks of positions the samples before each one have, one each at least: int32 [N + 1]."""
        return self._table(f"blocks {block}", device, lambda: _ends([max(1, cdiv(n, block)) for n in self.lengths]))

    def _table(self, name: str, device: torch.device, numbers: Callable[[], list[int]]) -> torch.Tensor:
        if (name, device) not in self._tables:
            made = torch.tensor(numbers(), dtype=torch.int32)
            if device.type == "cuda":
                made = made.pin_memory()
            self._tables[name, device] = made.to(device, non_blocking=True)
        return self._tables[name, device]


def _ends(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)]


OF_A_CASE = Segments([(start, start + 100) for start in range(0, 32_768, 128)])
"""What kernels are compiled for without a GPU."""
