"""An audit before the first step: ``python examples/audit_model.py``.

``check_sensitivity`` leaves the samples of a real batch out one at a time, in training mode, and follows every operator
of model and loss. It tells whether one sample can move the clipped sum by more than it may, and where samples meet.
Here it looks at three models, or losses, of which two would break the guarantee.
"""

import argparse

import torch
from torch import Tensor, nn

import dpfast


class Centred(nn.Module):
    """Subtracts the mean of the batch: what one sample is compared with are the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x - x.mean(0))


class Contrastive(nn.CrossEntropyLoss):
    """Pushes samples apart from each other as well, so that each one's gradient depends on all."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output, target) - torch.pdist(output).mean()


def main(size: int) -> None:
    torch.manual_seed(0)
    batch = torch.randn(size, 8), torch.randint(2, (size,))
    plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2))
    for title, model, loss in (
        ("layers that look at one sample each", plain, nn.CrossEntropyLoss()),
        ("a mean over the batch in the model", Centred(), nn.CrossEntropyLoss()),
        ("a loss that compares samples", plain, Contrastive()),
    ):
        report = dpfast.check_sensitivity(model, loss, batch, max_grad_norm=1.0)
        print(f"== {title}: {'passed' if report.ok else 'NOT PRIVATE'}\n{report}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a batch of four samples")
    main(4 if parser.parse_args().smoke else 16)
