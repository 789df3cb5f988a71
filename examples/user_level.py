"""Training that protects users, not rows: ``python examples/user_level.py``.

Each user has written several messages, and some have written many. A user's messages are clipped as one, Poisson
sampling draws users, and epsilon is what the model can say of all that one user has written.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dpfast

WORDS, LENGTH = 50, 8


class Messages(Dataset):
    """Rows as a table of messages has them: whose each is, its words, and whether it is a complaint."""

    def __init__(self, users: int):
        draw = torch.Generator().manual_seed(0)
        counts = torch.randint(1, 20, (users,), generator=draw)
        self.users = torch.arange(users).repeat_interleave(counts)
        self.words = torch.randint(WORDS, (len(self.users), LENGTH), generator=draw)
        self.complaint = (self.words < 5).any(1).long()  # who complains uses one of five words

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, row: int) -> dict:
        return {"user_id": int(self.users[row]), "words": self.words[row], "complaint": self.complaint[row]}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 32), nn.Linear(32, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embedding(words)).relu().amax(1))


def main(users: int, epochs: int) -> None:
    torch.manual_seed(0)
    data, model = Messages(users), Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = dpfast.PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=64),  # users
        target_epsilon=8.0,
        target_delta=1e-4,
        epochs=epochs,
        max_grad_norm=1.0,
        units="user_id",
        rows_per_unit=8,
    )
    for _ in range(epochs):
        with dpfast.BatchMemoryManager(data_loader=loader, max_physical_batch_size=128, optimizer=optimizer) as parts:
            for batch in parts:
                loss = F.cross_entropy(model(batch["words"]), batch["complaint"])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        right = (model(data.words).argmax(1) == data.complaint).double().mean()
    epsilon = engine.get_epsilon(1e-4)
    print(f"{len(data)} messages of {users} users; {100 * right:.0f} % right")
    print(f"user-level epsilon {epsilon:.2f} at delta 0.0001")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--users", type=int, default=2000)
    arguments.add_argument("--epochs", type=int, default=10)
    arguments.add_argument("--smoke", action="store_true", help="few users and one epoch")
    given = arguments.parse_args()
    main(200 if given.smoke else given.users, 1 if given.smoke else given.epochs)
