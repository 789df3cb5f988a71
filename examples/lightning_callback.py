"""Lightning, with privacy by one callback: ``python examples/lightning_callback.py``.

    pip install lightning

The ``LightningModule`` is as it would be without privacy. A sample is one row of the data set.
"""

import argparse
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpfast.integrations.lightning import DPCallback

DELTA = 1e-4


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)  # not self.layers(x): the samples are known where forward is called

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def rows(size: int) -> TensorDataset:
    """Whether a sum is positive."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 0).long())


def main(size: int, epochs: int) -> None:
    data, net = rows(size), Net()
    privacy = DPCallback(data, batch_size=128, max_grad_norm=1.0, target_epsilon=4.0, target_delta=DELTA, epochs=epochs)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    trainer = L.Trainer(
        callbacks=[privacy],
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, privacy.train_dataloader())
    x, y = data.tensors
    accuracy = (net(x).argmax(1) == y).float().mean().item()
    print(f"accuracy {accuracy:.1%}, epsilon {privacy.get_epsilon(delta=DELTA):.2f} at delta {DELTA}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch")
    main(*((256, 1) if parser.parse_args().smoke else (4096, 5)))
