"""One model, sharded over several processes: ``torchrun --nproc_per_node 2 examples/fsdp.py``.

``fully_shard`` comes before ``make_private``. Sums, noise and the optimizer's state are sharded as parameters are.
``BatchMemoryManager`` gives all ranks as many physical batches, as each of them gathers parameters. A sample is one
row.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from dpfast import BatchMemoryManager, PrivacyEngine
from dpfast.integrations.distributed import whole_state

DELTA = 1e-4


def rows(size: int) -> TensorDataset:
    """The same data on every rank: whether a sum is positive."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 0).long())


def main(size: int, epochs: int) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        data_loader=DataLoader(rows(size), batch_size=128),  # of all ranks together
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for _ in range(epochs):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=32, optimizer=optimizer) as batches:
            for x, y in batches:
                F.cross_entropy(private(x.to(device)), y.to(device)).backward()
                optimizer.step()
                optimizer.zero_grad()
    state = whole_state(model)  # all ranks take part; rank 0 has it, to be saved
    if dist.get_rank() == 0:
        finite = all(bool(x.isfinite().all()) for x in state.values())
        print(f"fsdp: {dist.get_world_size()} ranks, {len(state)} whole tensors, finite: {finite}", flush=True)
        print(f"fsdp: epsilon {engine.get_epsilon(DELTA):.3f} at delta {DELTA}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 5)))
