"""Federated learning with NVFlare in which every client trains with dpfast: ``python examples/federated_nvflare.py``.

    pip install nvflare

The file is the job and, with ``--client``, the script that NVFlare runs at each site. A client makes its model private
once: the noise is for all rounds together, and the weights of each round are loaded into the private model. A sample is
a row of one client, and epsilon is what the server, and whoever sees the global model, can learn of it.
"""

import argparse
import tempfile
from pathlib import Path

import nvflare.client as flare
import torch
import torch.nn.functional as F
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import PrivacyEngine  # was: from opacus import PrivacyEngine

DELTA = 1e-3
CLIENTS = ("site-1", "site-2")


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def rows(partition: int, size: int = 256) -> TensorDataset:
    """A client's own data: whether a sum is positive."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(partition))
    return TensorDataset(x, (x.sum(1) > 0).long())


def client(rounds: int, target_epsilon: float) -> None:
    flare.init()
    model = ModuleValidator.fix(Net())
    ModuleValidator.validate(model, strict=True)
    engine = PrivacyEngine(accountant="rdp")
    private, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(rows(CLIENTS.index(flare.get_site_name())), batch_size=32),
        target_epsilon=target_epsilon,
        target_delta=DELTA,
        epochs=rounds,
        max_grad_norm=1.0,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        private._module.load_state_dict({name: torch.as_tensor(x) for name, x in received.params.items()}, strict=True)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
        scheduler.step()
        epsilon = engine.get_epsilon(DELTA)
        print(
            f"{flare.get_site_name()}, round {received.current_round}: epsilon {epsilon:.3f} at delta {DELTA}, "
            f"noise multiplier {optimizer.noise_multiplier:.3f}, batches of {optimizer.expected_batch_size}",
            flush=True,
        )
        params = {name: x.cpu() for name, x in private._module.state_dict().items()}
        flare.send(flare.FLModel(params=params, metrics={"epsilon": epsilon}))


def job(rounds: int, target_epsilon: float, folder: str) -> None:
    recipe = FedAvgRecipe(
        name="dpfast",
        model=Net(),
        min_clients=len(CLIENTS),
        num_rounds=rounds,
        train_script=__file__,
        train_args=f"--client --rounds {rounds} --epsilon {target_epsilon}",
    )
    run = recipe.execute(SimEnv(clients=[*CLIENTS], workspace_root=folder))
    saved = torch.load(next(Path(run.get_result()).rglob("FL_global_model.pt")), weights_only=True)
    model = Net()
    model.load_state_dict(saved["model"])
    x, y = rows(partition=len(CLIENTS)).tensors
    print(f"accuracy on rows of nobody: {(model(x).argmax(1) == y).float().mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=4.0, help="of all rounds together")
    parser.add_argument("--smoke", action="store_true", help="two rounds")
    parser.add_argument("--client", action="store_true", help="as a site of the job: NVFlare gives this")
    asked = parser.parse_args()
    if asked.client:
        client(asked.rounds, asked.epsilon)
    else:
        with tempfile.TemporaryDirectory() as folder:
            job(2 if asked.smoke else asked.rounds, asked.epsilon, folder)
