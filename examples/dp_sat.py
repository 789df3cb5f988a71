"""Sharpness-aware training at the price of DP-SGD: ``python examples/dp_sat.py``.

DP-SAT takes each step's gradients at the weights plus a short step along the last noisy gradient. That one has been
released already, so the ascent costs no privacy, and no second backward pass. The one changed argument is ``ascent=``.
A sample is one row.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast

DELTA = 1e-4


def rows(size: int, seed: int) -> TensorDataset:
    """Two classes, inside and outside of a sphere."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.square().sum(1) > 8).long())


def trained(ascent: dpfast.DPSAT | None, size: int, epochs: int) -> tuple[nn.Module, float]:
    """The model, and what it has spent."""
    torch.manual_seed(0)
    model, engine = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)), dpfast.PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(rows(size, seed=0), batch_size=128),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        ascent=ascent,
    )
    for _ in range(epochs):
        for x, y in loader:
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval(), engine.get_epsilon(DELTA)


def main(size: int, epochs: int) -> None:
    x, y = rows(1024, seed=1).tensors
    for name, ascent in (("DP-SGD", None), ("DP-SAT", dpfast.DPSAT(rho=0.03))):
        model, epsilon = trained(ascent, size, epochs)
        accuracy = (model(x).argmax(1) == y).float().mean().item()
        print(f"{name}: test accuracy {accuracy:.1%}, epsilon {epsilon:.2f} at delta {DELTA}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 10)))
