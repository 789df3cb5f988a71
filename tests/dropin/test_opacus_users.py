"""What users of Opacus rely on besides arguments: attributes, methods that are replaced, hooks, other numbers."""

import numpy as np
import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.schedulers import ExponentialGradClip
from torch import nn

import dpfast
from dpfast.data.physical_batches import BatchMemoryManager
from dpfast.optim.optimizer import FusedDPOptimizer
from tests import oracle
from tests.helpers import SLACK, make_private, mse


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def batch(size=5):
    torch.manual_seed(4)
    return torch.randn(size, 4), torch.randn(size, 2)


def backward(model, x, y):
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


class TestSummedGradient:
    def sums(self, model, C):
        x, y = batch()
        grads = oracle.per_sample_gradients(net().double(), (x.double(),), y.double(), mse)
        return oracle.clipped_sum(grads, C)

    @pytest.mark.parametrize("look", ["hook", "pre_step", "kept"])
    def test_it_is_there_until_zero_grad(self, look):
        model, optimizer, _ = make_private(net(), size=5, max_grad_norm=0.1, noise_multiplier=1.0)
        seen = []
        if look == "hook":
            optimizer.attach_step_hook(lambda o: seen.append([p.summed_grad.clone() for p in o.params]))
        optimizer.keep_summed_grad = look == "kept"
        backward(model, *batch())
        optimizer.pre_step() if look == "pre_step" else optimizer.step()
        expected = self.sums(model, 0.1)
        for held in [[p.summed_grad for p in optimizer.params], *seen]:
            for got, p, want in zip(held, optimizer.params, expected.values(), strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
                assert got.data_ptr() != p.grad.data_ptr() and not torch.equal(got, p.grad * 5)
        assert (look != "hook") or len(seen) == 1
        optimizer.zero_grad()
        assert all(p.summed_grad is None for p in optimizer.params)
        backward(model, *batch())  # not added to what was kept
        every = torch.cat([p.summed_grad.flatten() for p in optimizer.params])
        assert torch.linalg.vector_norm(every) <= 5 * 0.1 * SLACK

    def test_nothing_is_kept_where_nobody_looks(self):
        model, optimizer, _ = make_private(net(), size=5)
        backward(model, *batch())
        optimizer.step()
        assert all(p.summed_grad is None for p in optimizer.params)


class TestGradSamples:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_they_are_opacus(self, reduction, dtype):
        x, y = (t.to(dtype) for t in batch())
        held = []
        for engine in (opacus.PrivacyEngine(), dpfast.PrivacyEngine()):
            given = (
                {"grad_sample_mode": "hooks"} if type(engine) is opacus.PrivacyEngine else {"keep_grad_samples": True}
            )
            model, optimizer, _ = make_private(
                net().to(dtype), engine=engine, loss_reduction=reduction, size=5, **given
            )
            F.mse_loss(model(x), y, reduction=reduction).backward()
            held.append([p.grad_sample for p in model.parameters()])
            assert [s.shape for s in optimizer.grad_samples] == [(5, *p.shape) for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad_sample is None for p in model.parameters())
        for ours, theirs in zip(held[1], held[0], strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_several_passes_are_a_list(self):
        model, optimizer, _ = make_private(net(), keep_grad_samples=True)
        for size in (5, 2):
            backward(model, *batch(size))
        weight = model._module[0].weight
        assert [len(s) for s in weight.grad_sample] == [5, 2]
        assert optimizer.grad_samples[0].shape == (7, 3, 4) and optimizer.accumulated_iterations == 2

    def test_without_asking_there_are_none(self):
        model, optimizer, _ = make_private(net())
        backward(model, *batch())
        assert model._module[0].weight.grad_sample is None
        with pytest.raises(ValueError, match="keep_grad_samples=True"):
            _ = optimizer.grad_samples

    def test_refused_where_there_are_none(self):
        model = net()
        with pytest.raises(ValueError, match="keep_grad_samples"):
            make_private(model, keep_grad_samples=True, max_physical_batch_size=1)
        with pytest.raises(ValueError, match="keep_grad_samples"):
            make_private(model, keep_grad_samples=True, grad_sample_mode="hooks")
        assert not any("forward" in vars(m) for m in model.modules())


class TestThePrivateModel:
    def test_it_is_a_grad_sample_module(self):
        model, *_ = make_private(net())
        assert isinstance(model, opacus.GradSampleModule) and hasattr(model, "_module")
        assert not isinstance(net(), opacus.GradSampleModule)
        assert opacus.GradSampleModule(net()).GRAD_SAMPLERS is model.GRAD_SAMPLERS

    def test_hooks_on_and_off(self):
        model, optimizer, _ = make_private(net(), size=5)
        x, y = batch()
        assert model.hooks_enabled
        model.disable_hooks()
        model.disable_hooks()
        assert not model.hooks_enabled
        backward(model, x, y)  # an ordinary one
        (ordinary,) = torch.autograd.grad(F.mse_loss((twin := net())(x), y), twin[0].weight)
        assert torch.equal(model._module[0].weight.grad, ordinary)
        with pytest.raises(ValueError, match="no backward pass"):
            optimizer.step()
        optimizer.zero_grad()
        model.enable_hooks()
        backward(model, x, y)
        assert model._module[0].weight.grad is None and model._module[0].weight.summed_grad is not None
        optimizer.step()
        optimizer.zero_grad()
        model.remove_hooks()
        assert not model.hooks_enabled
        model.add_hooks(loss_reduction="mean", batch_first=True)
        backward(model, x, y)
        assert model.hooks_enabled and model.per_sample_gradient_norms.shape == (5,)
        with pytest.raises(ValueError, match="remove_hooks"):
            model.add_hooks()

    def test_what_it_says_of_itself(self):
        model, *_ = make_private(net())
        assert model.grad_accumulation_allowed
        model.forbid_grad_accumulation()
        assert not model.grad_accumulation_allowed
        assert model.is_supported(net()) and not model.is_supported(nn.Sequential(nn.BatchNorm1d(3)))
        assert model.validate(net()) == []
        (error,) = model.validate(nn.BatchNorm1d(3))
        assert isinstance(error, NotImplementedError) and "BatchNorm" in str(error)
        with pytest.raises(NotImplementedError, match="BatchNorm"):
            type(model).validate(nn.BatchNorm1d(3), strict=True)


class TestReplacedParts:
    def test_a_noise_of_ones_own(self):
        """As in Opacus' tutorial: what is replaced is called, and the rest of the step goes round it."""
        model, optimizer, _ = make_private(net(), size=5, lr=1.0, max_grad_norm=0.1)
        called = []

        def add_noise():
            for p in optimizer.params:
                _check_processed_flag(p.summed_grad)
                p.grad = p.summed_grad + 1
                _mark_as_processed(p.summed_grad)
            called.append(len(optimizer.params))

        optimizer.add_noise = add_noise
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, *batch())
        expected = [(p.summed_grad + 1) / 5 for p in model.parameters()]
        optimizer.step()
        assert called == [4]
        for p, was, grad in zip(model.parameters(), before, expected, strict=True):
            torch.testing.assert_close(p.detach(), was - grad)

    def test_around_our_own(self):
        """Our noise and then something: it is divided once."""
        model, optimizer, _ = make_private(net(), size=5, max_grad_norm=0.1)
        own, called = optimizer.add_noise, []
        optimizer.add_noise = lambda: (own(), called.append(1))
        backward(model, *batch())
        expected = [p.summed_grad / 5 for p in model.parameters()]
        optimizer.step()
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad)
        assert called == [1]

    @pytest.mark.parametrize("name", ["clip_and_accumulate", "scale_grad"])
    def test_the_other_parts(self, name):
        model, optimizer, _ = make_private(net(), size=5)
        called = []
        setattr(optimizer, name, lambda: called.append(name))
        backward(model, *batch())
        optimizer.step()
        assert called == [name]

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("how", ["Opacus' code", "around our own"])
    def test_scale_grad_finds_what_is_not_divided(self, how, reduction):
        model, optimizer, _ = make_private(net(), size=5, max_grad_norm=0.1, loss_reduction=reduction)
        plain, found = DPOptimizer.scale_grad if how == "Opacus' code" else FusedDPOptimizer.scale_grad, []

        def scale_grad():
            found.extend([p.grad.clone() for p in optimizer.params])
            plain(optimizer)

        optimizer.scale_grad = scale_grad
        backward(model, *batch())
        sums = [p.summed_grad.clone() for p in model.parameters()]
        optimizer.step()
        for p, grad, total in zip(model.parameters(), found, sums, strict=True):
            torch.testing.assert_close(grad, total)
            torch.testing.assert_close(p.grad, total / 5 if reduction == "mean" else total)

    @pytest.mark.parametrize("noise_first", [False, True])
    def test_clipping_of_opacus_counts_a_sample_once(self, noise_first):
        """Opacus' code adds to the sum that it finds; ours is not there then."""
        model, optimizer, _ = make_private(net(), size=5, max_grad_norm=0.1, keep_grad_samples=True)
        optimizer.clip_and_accumulate = lambda: DPOptimizer.clip_and_accumulate(optimizer)
        if noise_first:
            optimizer.add_noise = lambda: DPOptimizer.add_noise(optimizer)
        backward(model, *batch())
        expected = [p.summed_grad / 5 for p in model.parameters()]
        optimizer.step()
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-6)  # Opacus adds 1e-6 to norms

    def test_a_larger_norm_comes_before_clipping_of_ones_own(self):
        """What it clips to, which has changed since the backward, is what the noise is scaled by."""
        noise = torch.Generator().manual_seed(0)
        model, optimizer, _ = make_private(
            net(), size=5, max_grad_norm=1e-6, noise_multiplier=1.0, keep_grad_samples=True, noise_generator=noise
        )
        optimizer.clip_and_accumulate = lambda: DPOptimizer.clip_and_accumulate(optimizer)
        backward(model, *batch())
        optimizer.max_grad_norm = 100.0
        optimizer.step()
        assert max(p.grad.abs().max() for p in model.parameters()) > 10

    def test_pre_step(self):
        model, optimizer, _ = make_private(net(), size=5, lr=1.0, max_grad_norm=0.1)
        own, called = optimizer.pre_step, []
        optimizer.pre_step = lambda: (called.append(1), own())[1]
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, *batch())
        expected = [p.summed_grad / 5 for p in model.parameters()]
        optimizer.step()
        assert called == [1]
        for p, was, grad in zip(model.parameters(), before, expected, strict=True):
            torch.testing.assert_close(p.detach(), was - grad)

    def test_clipping_of_opacus_on_no_samples(self):
        model, optimizer, _ = make_private(net(), size=5, noise_multiplier=1.0, keep_grad_samples=True)
        optimizer.clip_and_accumulate = lambda: DPOptimizer.clip_and_accumulate(optimizer)
        backward(model, *(x[:0] for x in batch()))
        optimizer.expect_no_samples()
        optimizer.step()
        assert all(p.grad.any() for p in model.parameters())

    def test_clipping_that_fails_or_makes_nothing(self):
        model, optimizer, _ = make_private(net(), size=5, max_grad_norm=0.1)
        backward(model, *batch())
        expected = [p.summed_grad / 5 for p in model.parameters()]

        def fails():
            raise ArithmeticError

        optimizer.clip_and_accumulate = fails
        with pytest.raises(ArithmeticError):
            optimizer.step()
        optimizer.clip_and_accumulate = lambda: None
        optimizer.step()
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad)

    def test_clipping_of_ones_own_in_physical_batches(self):
        """Their per-sample gradients are gone by the last of them. Around our own nothing is lost."""
        data = torch.utils.data.TensorDataset(*batch(8))
        loader = torch.utils.data.DataLoader(data, batch_size=4)
        model, optimizer, loader = make_private(net(), data_loader=loader, keep_grad_samples=True)
        optimizer.clip_and_accumulate = lambda: FusedDPOptimizer.clip_and_accumulate(optimizer)

        def epoch():
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
                for x, y in parts:
                    optimizer.zero_grad()
                    backward(model, x, y)
                    optimizer.step()

        epoch()
        optimizer.clip_and_accumulate = lambda: DPOptimizer.clip_and_accumulate(optimizer)
        with pytest.raises(ValueError, match="last physical batch alone"):
            epoch()

    def test_a_subclass(self):
        model, optimizer, _ = make_private(net(), size=5, noise_multiplier=1.0)

        class Silent(FusedDPOptimizer):
            def add_noise(self):
                for p in self.params:
                    p.grad = torch.zeros_like(p)

        optimizer.__class__ = Silent
        assert isinstance(optimizer, DPOptimizer)
        backward(model, *batch())
        optimizer.step()
        assert all(not p.grad.any() for p in model.parameters())

    def test_what_needs_our_noise(self):
        adaptive = dict(target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, max_clipbound=9.0)
        adaptive |= dict(min_clipbound=0.1, unclipped_num_std=2.0)
        model, optimizer, _ = make_private(net(), size=5, noise_multiplier=1.0, clipping="adaptive", **adaptive)
        assert optimizer.target_unclipped_quantile == 0.5 and optimizer.min_clipbound == 0.1
        backward(model, *batch())
        assert optimizer.sample_size == 5 and 0 <= optimizer.unclipped_num <= 5
        optimizer.add_noise = lambda: None
        with pytest.raises(ValueError, match="add_noise"):
            optimizer.step()
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = optimizer.nothing


class TestCriterion:
    def test_ghost_gives_four_and_is_fused(self):
        for criterion in ({"criterion": nn.CrossEntropyLoss()}, {}):
            out = make_private(net(), grad_sample_mode="ghost", **criterion)
            model, optimizer, criterion, _ = out
            assert type(optimizer) is FusedDPOptimizer
            criterion(model(batch()[0]), torch.tensor([0, 1, 0, 1, 1])).backward()
            assert model.per_sample_gradient_norms.shape == (5,)

    def test_without_a_mode_it_changes_nothing(self):
        """As in Opacus, whose default mode gives three values back."""
        assert len(make_private(net(), criterion=nn.CrossEntropyLoss())) == 3

    def test_with_a_budget(self):
        model = net()
        out = dpfast.PrivacyEngine(accountant="rdp").make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1.0, target_epsilon=3.0,
            data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(8)), batch_size=2),
            target_delta=1e-3, epochs=1, criterion=nn.MSELoss(), grad_sample_mode="ghost",
        )  # fmt: skip
        assert len(out) == 4 and type(out[1]) is FusedDPOptimizer


class TestHooks:
    @pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
    @pytest.mark.parametrize("early", [True, False])
    def test_on_gradients_are_refused(self, kind, early):
        model = net()
        if early:
            getattr(model[0].weight, kind)(lambda g: None)
            with pytest.raises(ValueError, match=r"'0.weight' has a hook.*attach_step_hook"):
                make_private(model)
            assert not any("forward" in vars(m) for m in model.modules())
            return
        private, *_ = make_private(model)
        handle = getattr(model[0].weight, kind)(lambda g: None)
        with pytest.raises(ValueError, match=r"'0.weight' has a hook"):
            private(batch()[0])
        handle.remove()
        backward(private, *batch())

    def test_counters_count_steps(self):
        """The looks at the samples run the model more often than a step; what it counts is the steps."""

        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.calls, self.said = nn.Linear(4, 2), 0, None

            def forward(self, x):
                self.calls += 1
                self.said = f"call {self.calls}"
                return self.layer(x)

        inner = Counts()
        model, optimizer, _ = make_private(inner)
        for step in range(1, 10):
            backward(model, *batch())
            optimizer.step()
            optimizer.zero_grad()
            assert (inner.calls, inner.said) == (step, f"call {step}")


class TestNumbers:
    @pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, lambda v: torch.tensor(v).double()])
    def test_of_other_kinds(self, kind):
        model, optimizer, _ = make_private(net(), noise_multiplier=kind(0.5), max_grad_norm=kind(0.25))
        assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (0.5, 0.25)
        assert type(optimizer.noise_multiplier) is float
        optimizer.noise_multiplier = kind(2.0)
        backward(model, *batch())
        optimizer.step()
        assert optimizer.noise_multiplier == 2.0

    @pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
    def test_a_norm_for_each_layer(self, kind):
        _, optimizer, _ = make_private(net(), clipping="per_layer", max_grad_norm=kind([0.5, 1.0, 0.25, 2.0]))
        assert optimizer.max_grad_norms == [0.5, 1.0, 0.25, 2.0]

    def test_no_norm_at_all_is_refused(self):
        _, optimizer, _ = make_private(net())
        with pytest.raises(ValueError, match="max_grad_norm=0"):
            ExponentialGradClip(optimizer, gamma=0.0).step()
        assert optimizer.max_grad_norm == 1.0

    def test_passes_before_the_step(self):
        model, optimizer, _ = make_private(net())
        assert optimizer.accumulated_iterations == 1
        for passes in (1, 2, 3):
            backward(model, *(passes * x for x in batch()))
            assert optimizer.accumulated_iterations == passes
        optimizer.step()
        optimizer.zero_grad()
        backward(model, *batch())
        assert optimizer.accumulated_iterations == 1
