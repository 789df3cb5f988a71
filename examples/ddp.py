"""Several processes with one model each: ``torchrun --nproc_per_node 2 examples/ddp.py``.

The model goes into ``DistributedDataParallel`` before ``make_private``. The ranks share out one Poisson batch, each
clips its own samples, and the clipped sums are added up once a step: epsilon is that of one process on all samples.
A sample is one row.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dpfast import PrivacyEngine

DELTA = 1e-4


def rows(size: int) -> TensorDataset:
    """The same data on every rank: whether a sum is positive."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 0).long())


def main(size: int, epochs: int) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2)).to(device)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=DistributedDataParallel(model),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        data_loader=DataLoader(rows(size), batch_size=128),  # of all ranks together
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for _ in range(epochs):
        for x, y in loader:
            F.cross_entropy(private(x.to(device)), y.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(others, weights)
    if dist.get_rank() == 0:
        alike = all(torch.equal(weights, other) for other in others)
        print(f"ddp: {len(others)} ranks, {'the same' if alike else 'DIFFERENT'} weights to the bit", flush=True)
        print(f"ddp: epsilon {engine.get_epsilon(DELTA):.3f} at delta {DELTA}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 5)))
