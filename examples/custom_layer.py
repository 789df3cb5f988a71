"""A layer of one's own with a rule for its per-sample gradients: ``python examples/custom_layer.py``.

You may not need this: a module that dpfast does not know runs under ``torch.func.vmap``, which is exact. A rule is for
one that ``vmap`` cannot run or runs slowly. See docs/adding-a-layer.md. A sample is one row.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast

DELTA = 1e-4


class LowRankLinear(nn.Module):
    """``y = x (U V)ᵀ``."""

    def __init__(self, d: int, p: int, rank: int):
        super().__init__()
        self.V = nn.Parameter(torch.randn(rank, d) / d**0.5)
        self.U = nn.Parameter(torch.randn(p, rank) / rank**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.V.t()) @ self.U.t()


def low_rank(module: LowRankLinear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, dpfast.Product]:
    """Both weights have sums of outer products over positions, whose factors are all that is kept."""
    x, G = activations[0], backprops
    return {module.V: dpfast.Product(x, G @ module.U), module.U: dpfast.Product(x @ module.V.t(), G)}


def wrong(module: LowRankLinear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, dpfast.Product]:
    """Forgets that V's gradient comes through U."""
    first, *_ = low_rank(module, activations, backprops).values()
    return {
        **low_rank(module, activations, backprops),
        module.V: dpfast.Product(0 * first.activations, first.backprops),
    }


def train(size: int, epochs: int) -> None:
    model = nn.Sequential(LowRankLinear(16, 32, rank=4), nn.Tanh(), LowRankLinear(32, 2, rank=2))
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(0))
    engine = dpfast.PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        data_loader=DataLoader(TensorDataset(x, (x[:, :4].sum(1) > 0).long()), batch_size=128),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for _ in range(epochs):
        for x, y in loader:
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"trained, epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}")


def main(size: int, epochs: int) -> None:
    with dpfast.register_layer(LowRankLinear, low_rank):
        train(size, epochs)
    with dpfast.register_layer(LowRankLinear, wrong):
        try:
            train(size, epochs)
        except ValueError as error:  # a wrong rule is found out in the first batch
            print(f"refused: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 5)))
