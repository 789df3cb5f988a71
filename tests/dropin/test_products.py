"""The calls that products and federated frameworks make of Opacus, one class for each."""

import contextlib

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.utils.batch_memory_manager import wrap_data_loader
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from tests import oracle
from tests.helpers import SLACK, make_private, mse

DELTA = 1e-5


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def data(n=24):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(n, 4), torch.randint(2, (n,)))


def loader(batch=8, n=24):
    return DataLoader(data(n), batch_size=batch)


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def private(model, engine, batches=None, **kw):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = dict(module=model, optimizer=optimizer, data_loader=batches or loader())
    return engine.make_private(**given, **({"noise_multiplier": 1.0, "max_grad_norm": 1.0} | kw))


class TestFlower:
    """A new engine for every message of the server; weights come and go as state dicts."""

    def test_epsilon_counts_over_rounds(self):
        weights, spent, epsilons = net().state_dict(), None, []
        for _ in range(3):
            model = net()
            model.load_state_dict(weights, strict=True)
            engine = dpfast.PrivacyEngine(accountant="rdp")
            if spent is not None:
                engine.accountant.load_state_dict(spent)
            model, optimizer, batches = private(model, engine)
            assert len(batches.dataset) == 24
            train(model, optimizer, batches)
            weights = (model._module if hasattr(model, "_module") else model).state_dict()
            assert list(weights) == list(net().state_dict())
            spent = engine.accountant.state_dict()
            epsilons.append(engine.get_epsilon(DELTA))
        whole = RDPAccountant()
        for _ in range(9):
            whole.step(noise_multiplier=1.0, sample_rate=1 / 3)
        assert epsilons[-1] == pytest.approx(whole.get_epsilon(DELTA))
        assert epsilons == sorted(set(epsilons))


class TestNVFlare:
    """One engine over all rounds; between them the global weights are loaded into the private model."""

    def test_one_budget_for_all_rounds(self):
        model = ModuleValidator.fix(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))
        assert ModuleValidator.validate(model, strict=False) == []
        engine, rounds = dpfast.PrivacyEngine(accountant="rdp"), 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, batches = engine.make_private_with_epsilon(
            module=model, optimizer=optimizer, data_loader=loader(), max_grad_norm=1.0,
            target_epsilon=4.0, target_delta=DELTA, epochs=rounds,
        )  # fmt: skip
        assert optimizer.noise_multiplier > 0 and optimizer.expected_batch_size == 8
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        for done in range(rounds):
            state = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
            model.load_state_dict(state, strict=True)
            train(model, optimizer, batches)
            scheduler.step()
            assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** (done + 1)
            assert all(p.any() for p in model.parameters())
        assert 3.5 < engine.get_epsilon(DELTA) <= 4.0


class TestMostly:
    """It asks whether a model is private, splits batches by ``wrap_data_loader``, and goes on from an accountant."""

    def test_its_training_loop(self):
        engine = dpfast.PrivacyEngine(accountant="rdp")
        model, optimizer, batches = private(net(), engine, poisson_sampling=False)
        assert isinstance(model, opacus.GradSampleModule)
        before = [p.detach().clone() for p in model.parameters()]
        split = wrap_data_loader(data_loader=batches, max_batch_size=3, optimizer=optimizer)
        sizes, stepped = [], []
        for x, y in split:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            sizes.append(len(x))
            stepped.append(not optimizer._is_last_step_skipped)
        assert sum(sizes) == 24 and max(sizes) <= 3 and sum(stepped) == 3
        assert len(engine.accountant.history) == 1 and engine.accountant.history[0][2] == 3
        assert any(not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
        again = dpfast.PrivacyEngine(accountant="rdp")
        again.accountant.load_state_dict(engine.accountant.state_dict())
        assert again.get_epsilon(DELTA) == engine.get_epsilon(DELTA)

    @pytest.fixture(params=["patched", "imported"])
    def products(self, request):
        """The engine and the function that the product has, without a line changed or with two imports."""
        if request.param == "imported":
            yield dpfast.PrivacyEngine, dpfast.wrap_data_loader
            return
        dpfast.patch_opacus()
        try:
            yield opacus.PrivacyEngine, opacus.utils.batch_memory_manager.wrap_data_loader
        finally:
            dpfast.unpatch_opacus()

    def test_rows_with_equal_values(self, products):
        """A table of categories: parts of a batch have rows in common, and are no less parts of it."""
        Engine, wrap = products
        torch.manual_seed(0)
        rows = TensorDataset(F.one_hot(torch.arange(16) % 3).float(), torch.arange(16) % 2)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        twin = oracle.pristine(model, torch.float64)
        collate = torch.utils.data.default_collate
        model, optimizer, batches = private(
            model, Engine(accountant="rdp"), DataLoader(rows, batch_size=2), max_grad_norm=0.1, noise_multiplier=0.0
        )
        optimizer.param_groups[0]["lr"] = 0.0
        batches.collate_fn = lambda batch: collate(batch) if batch else {}
        given, kinds = [], []
        for _ in range(4):
            for batch in wrap(data_loader=batches, max_batch_size=2, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                if batch:
                    given.append(batch)
                    F.cross_entropy(model(batch[0]), batch[1]).backward()
                else:  # so that Opacus' optimizer has something to clip
                    for p in optimizer.params:
                        p.grad_sample = p.new_empty((0, *p.shape))
                optimizer.step()
                if optimizer._is_last_step_skipped:
                    continue
                kinds.append(len(given))
                expected = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
                if given:
                    x, y = (torch.cat(parts) for parts in zip(*given, strict=True))
                    grads = oracle.per_sample_gradients(twin, (x.double(),), y, F.cross_entropy)
                    expected = oracle.clipped_sum(grads, 0.1)
                for p, want in zip(model.parameters(), expected.values(), strict=True):
                    torch.testing.assert_close(p.grad.double(), want / 2, rtol=1e-4, atol=1e-7)
                given.clear()
        assert len(kinds) == 32 and 0 in kinds and max(kinds) > 1

    def test_a_part_does_not_count_twice(self):
        model, optimizer, batches = private(net(), dpfast.PrivacyEngine(), poisson_sampling=False)
        parts = iter(dpfast.wrap_data_loader(data_loader=batches, max_batch_size=3, optimizer=optimizer))
        x, y = next(parts)
        train(model, optimizer, [(x, y)])
        next(parts)
        with pytest.raises(ValueError, match="an earlier batch than the physical batch"):
            F.cross_entropy(model(x), y).backward()


class TestNeMo:
    """It builds Opacus' parts itself, under Accelerate; and says that Opacus cannot do with gradient checkpointing."""

    def test_parts_of_its_own(self):
        """Subclasses of Opacus' classes, on our samplers."""

        class Module(opacus.GradSampleModule):
            @contextlib.contextmanager
            def no_sync(self):
                yield

        class Optimizer(opacus.optimizers.DPOptimizer):
            @property
            def param_groups(self):
                return self.original_optimizer.param_groups

            @param_groups.setter
            def param_groups(self, groups):
                self.original_optimizer.param_groups = groups

        sigma = get_noise_multiplier(target_epsilon=3.0, target_delta=DELTA, sample_rate=1 / 3, epochs=1)
        dpfast.register()
        try:
            model = Module(net())
            optimizer = Optimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0 * sigma, max_grad_norm=0.1,
                expected_batch_size=5,
            )  # fmt: skip
            optimizer.param_groups = optimizer.param_groups
            x, y = torch.randn(5, 4), torch.randn(5, 2)
            grads = oracle.per_sample_gradients(
                oracle.pristine(model._module, torch.float64), (x.double(),), y.double(), mse
            )
            with model.no_sync():
                F.mse_loss(model(x), y).backward()
            optimizer.pre_step()
        finally:
            dpfast.unregister()
        expected = oracle.clipped_sum(grads, 0.1)
        for p, want in zip(model._module.parameters(), expected.values(), strict=True):
            torch.testing.assert_close(p.grad.double(), want / 5, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, reentrant):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.rest = nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 2))

            def forward(self, x):
                return checkpoint(self.rest, self.first(x), use_reentrant=reentrant)

        torch.manual_seed(0)
        model = Block()
        x, y = torch.randn(5, 4), torch.randn(5, 2)
        grads = oracle.per_sample_gradients(oracle.pristine(model, torch.float64), (x.double(),), y.double(), mse)
        made, optimizer, _ = make_private(model, size=5, max_grad_norm=0.1)
        made.no_sync = contextlib.nullcontext
        optimizer.param_groups = optimizer.param_groups
        with made.no_sync():
            F.mse_loss(made(x), y).backward()
        total = 0.0
        for p, want in zip(model.parameters(), oracle.clipped_sum(grads, 0.1).values(), strict=True):
            torch.testing.assert_close(p.summed_grad.double(), want, rtol=1e-4, atol=1e-6)
            total += p.summed_grad.double().square().sum()
        assert total.sqrt() <= 5 * 0.1 * SLACK
