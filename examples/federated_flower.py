"""Federated learning with Flower in which every client trains with dpfast: ``python examples/federated_flower.py``.

    pip install 'flwr[simulation]'

A client makes a new engine for every message of the server. What it has spent stays in Flower's ``context.state``, as
the history of its accountant, so that epsilon counts over rounds. A sample is a row of one client, and epsilon is what
the server, and whoever sees the global model, can learn of it.
"""

import argparse

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import PrivacyEngine  # was: from opacus import PrivacyEngine

DELTA = 1e-3
CLIENTS = 2


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def rows(partition: int, size: int = 256) -> TensorDataset:
    """A client's own data: whether a sum is positive."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(partition))
    return TensorDataset(x, (x.sum(1) > 0).long())


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
    engine = PrivacyEngine(accountant="rdp")
    spent = context.state.get("spent")
    if spent is not None:
        history = [*zip(spent["noise_multiplier"], spent["sample_rate"], spent["steps"], strict=True)]
        engine.accountant.load_state_dict({"history": history, "mechanism": "rdp"})
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(rows(context.node_config["partition-id"]), batch_size=32),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(x), y).backward()
        optimizer.step()
    noise_multiplier, sample_rate, steps = (list(column) for column in zip(*engine.accountant.history, strict=True))
    context.state["spent"] = MetricRecord(
        {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate, "steps": steps}
    )
    metrics = {"epsilon": engine.get_epsilon(DELTA), "num-examples": len(loader.dataset)}
    content = {"arrays": ArrayRecord(private._module.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=message)


def largest(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Of the clients' epsilons the largest, where Flower would take the mean."""
    return MetricRecord({"epsilon": max(reply["metrics"]["epsilon"] for reply in replies)})


def server(rounds: int) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=CLIENTS,
            min_available_nodes=CLIENTS,
            train_metrics_aggr_fn=largest,
        )
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(net().state_dict()), num_rounds=rounds, train_config=ConfigRecord()
        )
        model = net()
        model.load_state_dict(result.arrays.to_torch_state_dict())
        x, y = rows(partition=CLIENTS).tensors
        for done, metrics in result.train_metrics_clientapp.items():
            print(f"round {done}: epsilon {metrics['epsilon']:.3f} at delta {DELTA}")
        print(f"accuracy on rows of nobody: {(model(x).argmax(1) == y).float().mean():.3f}")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="two rounds")
    asked = parser.parse_args()
    torch.manual_seed(0)
    run_simulation(
        server(2 if asked.smoke else asked.rounds),
        client,
        CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1}},
    )
