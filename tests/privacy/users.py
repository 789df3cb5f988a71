"""What tests of units share: a private model of users, the whole data set in one batch, and its judge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests import oracle
from tests.helpers import SLACK, distance, engine_of, make_private, sums_of
from tests.oracle import LossFn, Verdict

IDS = [3, 1, 3, 0, 3, 1, 2, 3]  # of users with 4, 2, 1 and 1 rows, none of whose rows stand together


def everyone(dataset: Any, ids: Any, model: nn.Module, C: float, *, batch: int = 64, **kw: Any):
    """``make_private`` with a loader whose every batch has all users."""
    options = dict(poisson_sampling=True, sample_rate=1.0, expected_batch_size=1, units=ids, rows_per_unit=64)
    options |= dict(data_loader=DataLoader(dataset, batch_size=batch), max_grad_norm=C, engine=engine_of()) | kw
    return make_private(model, **options)


def rows_of(ids: Sequence[Any]) -> list[list[int]]:
    """The rows of each user, in the order of a batch: few rows first, then in order of the first row."""
    users: dict[Any, list[int]] = {}
    for row, user in enumerate(ids):
        users.setdefault(user, []).append(row)
    return sorted(users.values(), key=len)


class Users:
    """A private copy of ``model`` on the data set ``(*inputs, target)``, whose rows are of users ``ids``."""

    def __init__(self, model: nn.Module, inputs: tuple, target: Tensor, ids: Sequence[Any], C: float, **kw: Any):
        self.model = copy.deepcopy(model)
        dataset = TensorDataset(*inputs, target)
        self.wrapped, self.optimizer, self.loader = everyone(dataset, ids, self.model, C, **kw)

    def backward(self, loss: LossFn) -> dict[str, Tensor]:
        """The clipped sums of a batch of all users."""
        self.batch = next(iter(self.loader))
        *inputs, target = self.batch
        loss(self.wrapped(*inputs), target).backward()
        return sums_of(self.model)


def examine_users(
    model: nn.Module, inputs: tuple, target: Tensor, loss: LossFn, ids: Sequence[Any], leave_out: bool = True, **kw: Any
) -> Users:
    """Norms and sums against one user at a time, and each user left out moves the sum by at most C."""
    units = rows_of(ids)
    verdict = Verdict(model, inputs, target, loss, units=units)
    C = kw.pop("max_grad_norm", verdict.max_grad_norm)
    users = Users(model, inputs, target, ids, C, **kw)
    whole = users.backward(loss)
    verdict.check_norms(users.wrapped.per_sample_gradient_norms)
    verdict.check_sums(whole)
    for user in {*ids} if leave_out and len({*ids}) > 1 else ():
        keep = [row for row, its in enumerate(ids) if its != user]
        rest = oracle.take((inputs, target), keep)
        moved = distance(whole, Users(model, *rest, [ids[row] for row in keep], C, **kw).backward(loss))
        assert moved <= C * SLACK, f"without user {user} the clipped sum moved by {moved / C} C"
    return users
