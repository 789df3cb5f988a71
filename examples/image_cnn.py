"""A small CNN on handwritten digits, with privacy: ``python examples/image_cnn.py``.

The data comes with scikit-learn (``pip install scikit-learn``), so that nothing is downloaded. A sample is one image.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import PrivacyEngine  # was: from opacus import PrivacyEngine

DELTA = 1e-4


def digits() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Images ``[1, 8, 8]`` and labels: 1,500 to train on, the rest to test on."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    y = torch.tensor(data.target)[order]
    return TensorDataset(x[:1500], y[:1500]), (x[1500:], y[1500:])


def net() -> nn.Module:
    """GroupNorm where one would take BatchNorm, which normalises a sample by the others of its batch."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def main(epochs: int, target_epsilon: float) -> None:
    train, (x_test, y_test) = digits()
    model, engine = net(), PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
        data_loader=DataLoader(train, batch_size=256),
        target_epsilon=target_epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=1.0,
    )
    for epoch in range(1, epochs + 1):
        for x, y in loader:  # a Poisson sample of the images, of another size each time
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
        print(f"epoch {epoch}: test accuracy {accuracy:.1%}, epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--smoke", action="store_true", help="one epoch")
    asked = parser.parse_args()
    main(1 if asked.smoke else asked.epochs, asked.epsilon)
