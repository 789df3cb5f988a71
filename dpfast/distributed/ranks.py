"""How the processes of one training run share a private step, by ``torch.distributed``.

Every rank clips its own samples. What is added up over the ranks are clipped sums, never gradients, and the noise is
the same function of key, step, parameter and element on all of them: it is added once, whatever the number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from dpfast.refusals import RankLostError, RanksError

BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's buckets
T = TypeVar("T")


class Ranks:
    """One process, which has no others to share with."""

    rank, world_size = 0, 1
    sharded = False

    def most(self, count: int) -> int:
        """How many physical batches this rank has to run, where it has ``count`` of its own."""
        return count

    def from_rank(self, rank: int, value: T) -> T:
        """That rank's ``value``: nested Python objects and CPU tensors."""
        return value

    def gathered(self, values: Sequence[float]) -> list[list[float]]:
        """The ``values`` of every rank."""
        return [list(values)]

    def share(self, p: Any, clipped: Tensor) -> Tensor:
        """What this rank keeps of a parameter's clipped sum of one backward pass."""
        return clipped

    def totals(self, summed: Mapping[Any, Tensor]) -> Iterator[Mapping[Any, Tensor]]:
        """``summed``, each added up over the ranks, in parts: the first may be used while others are under way."""
        yield summed


class Replicated(Ranks):
    """Every rank has all parameters (``DistributedDataParallel``): one all-reduce of the clipped sums a step."""

    def __init__(self, group: Any = None):
        self.group = group if group is not None else dist.group.WORLD
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def from_rank(self, rank: int, value: T) -> T:
        held = [value]
        with _all_present("agreeing on a value"):
            dist.broadcast_object_list(held, group=self.group, group_src=rank)
        return held[0]

    def gathered(self, values: Sequence[float]) -> list[list[float]]:
        on_gpu = "nccl" in dist.get_backend(self.group)
        mine = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device() if on_gpu else "cpu")
        every = [torch.empty_like(mine) for _ in range(self.world_size)]
        with _all_present("comparing the ranks' steps"):
            dist.all_gather(every, mine, group=self.group)
        return torch.stack(every).tolist()

    def totals(self, summed: Mapping[Any, Tensor]) -> Iterator[Mapping[Any, Tensor]]:
        """All-reduces are started at once, a bucket each; a part is given out when its own has come in."""
        with _all_present("adding up the clipped sums"):
            started = [(bucket, *self._start(bucket)) for bucket in _buckets(summed)]
        for bucket, flat, work in started:
            with _all_present("adding up the clipped sums"):
                work.wait()
            parts = flat.split([total.numel() for total in bucket.values()])
            yield {p: part.view(total.shape) for (p, total), part in zip(bucket.items(), parts, strict=True)}

    def _start(self, bucket: Mapping[Any, Tensor]) -> tuple[Tensor, Any]:
        flat = torch.cat([total.reshape(-1) for total in bucket.values()]) if len(bucket) > 1 else None
        if flat is None:
            flat = next(iter(bucket.values())).view(-1)
        return flat, dist.all_reduce(flat, group=self.group, async_op=True)


class Sharded(Replicated):
    """Every rank has a shard of each parameter (``fully_shard``), and whole ones only while a layer runs.

    The ranks gather parameters together in every forward and backward, so they run equally many. Clipped sums of
    whole parameters are made one at a time and reduce-scattered at once: a rank keeps its shard's.
    """

    sharded = True

    def most(self, count: int) -> int:
        return int(max(row[0] for row in self.gathered([count])))

    def share(self, p: Any, clipped: Tensor) -> Tensor:
        parts = [Partial() for _ in p.placements]
        whole = DTensor.from_local(clipped, p.device_mesh, parts, run_check=False)
        with _all_present("adding up the clipped sums"):
            return whole.redistribute(placements=p.placements).to_local().contiguous()

    def totals(self, summed: Mapping[Any, Tensor]) -> Iterator[Mapping[Any, Tensor]]:
        yield summed


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def like(part: Tensor, p: Any) -> Tensor:
    """``part`` as this rank's part of a tensor that is spread as ``p`` is."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def first_element(p: Tensor) -> int:
    """Where in the whole parameter this rank's part begins, counted in elements."""
    if not isinstance(p, DTensor):
        return 0
    rows = p.shape[0] if p.dim() else 1
    for dim, placement in enumerate(p.placements):
        if isinstance(placement, Shard):  # torch.chunk's pieces
            begin = min(rows, p.device_mesh.get_local_rank(dim) * -(-rows // p.device_mesh.size(dim)))
            return begin * (p.numel() // rows if rows else 0)
    return 0


def _sharded(module: nn.Module) -> Sharded:
    meshes = {}
    for name, p in module.named_parameters():
        if not isinstance(p, DTensor):
            if p.requires_grad:
                raise RanksError(
                    f"module: parameter {name!r} is trained and not sharded: call fully_shard on the whole model too"
                )
            continue
        if sum(isinstance(s, Shard) for s in p.placements) != 1 or not all(
            isinstance(s, Replicate) or s == Shard(0) for s in p.placements
        ):
            raise RanksError(
                f"module: parameter {name!r} is placed as {p.placements}: the fused mode knows shards along "
                f"dimension 0, as fully_shard makes them by default"
            )
        meshes[p.device_mesh] = name
    if len(meshes) != 1:
        raise RanksError(f"module: its parameters lie on {len(meshes)} device meshes: shard the model over one")
    mesh = next(iter(meshes))
    if mesh.size() == dist.get_world_size():
        return Sharded()
    if mesh.ndim > 1:
        raise RanksError("module: a mesh of several dimensions has to hold all ranks")
    return Sharded(mesh.get_group())


def _buckets(summed: Mapping[Any, Tensor]) -> list[dict[Any, Tensor]]:
    """Sums of one dtype and device, up to :data:`BUCKET_BYTES` together, in the same order on every rank."""
    buckets: list[dict[Any, Tensor]] = []
    room: dict[Any, int] = defaultdict(int)
    current: dict[Any, dict[Any, Tensor]] = {}
    for p, total in summed.items():
        kind = (total.dtype, total.device)
        if kind not in current or room[kind] < total.nbytes:
            current[kind], room[kind] = {}, BUCKET_BYTES
            buckets.append(current[kind])
        current[kind][p] = total
        room[kind] -= total.nbytes
    return buckets


@contextmanager
def _all_present(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        raise RankLostError(
            f"{doing}: another rank did not take part ({cause}). It has died or is stuck; nothing of this step may be "
            f"used: start all ranks again from the last checkpoint"
        ) from error


def model_and_ranks(module: nn.Module) -> tuple[nn.Module, Ranks]:
    """The model itself, and how its ranks share it.

    ``DistributedDataParallel`` (and Opacus' class for it) has made the ranks' parameters equal; its own all-reduce, of
    gradients that nobody has clipped, must not run, so the model is taken out of it.
    """
    if isinstance(module, DistributedDataParallel):
        return module.module, Replicated(module.process_group)
    if isinstance(module, DifferentiallyPrivateDistributedDataParallel):
        return module.module, Replicated()
    if isinstance(module, FSDPModule):
        return module, _sharded(module)
    return module, Ranks()
