"""Where a run takes place: one process, or several under torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError


@dataclass(frozen=True)
class Place:
    """This process among the others, and its device."""

    rank: int
    world_size: int
    device: torch.device
    started: bool = False  # whether the process group is ours to end

    def from_first(self, value: Any) -> Any:
        """``value`` of rank 0."""
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()


def take_place(config: FinetuneConfig) -> Place:
    """Join the other ranks, where torchrun started this process; pick the device."""
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if config.fsdp and not dist.is_torchelastic_launched():
        raise FinetuneError("--fsdp shards over ranks: start with torchrun --nproc-per-node N -m dpfast finetune ...")
    kind = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise FinetuneError(f"--device {kind}: torch sees no CUDA device here")
    device: torch.device | None
    try:
        device = torch.device(kind)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise FinetuneError(f"--device {kind}: give cpu or cuda")
    if device.index:
        raise FinetuneError(f"--device {kind}: give cuda, and choose the GPU by CUDA_VISIBLE_DEVICES={device.index}")
    if world_size == 1 and not config.fsdp:
        return Place(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(dist.get_rank(), dist.get_world_size(), device, started)


def sharded(model: nn.Module) -> nn.Module:
    """``fully_shard`` for each block (the members of the longest list of modules), then for the rest."""
    from torch.distributed.fsdp import fully_shard

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in max(lists, key=len, default=()):  # type: ignore[arg-type]
        fully_shard(block)
    fully_shard(model)
    return model
