"""The wrapped module beside the user's own: names, copies, pickles; removed without trace; refused without trace."""

import copy
import io
import pickle

import opacus
import pytest
import torch
from torch import nn

from tests import snapshot
from tests.helpers import F64, engine_of, follow, loader_of, make_private, mse, sums_of
from tests.oracle import Verdict
from tests.zoo import every_layer, loss_of, specimen


def private(name: str, **kw):
    """``(model, inputs, target, loss, verdict)`` and what ``make_private`` returned."""
    model, inputs, target = specimen(name)
    verdict = Verdict(model, inputs, target, loss_of(name))
    return model, inputs, target, verdict, make_private(model, max_grad_norm=verdict.max_grad_norm, **kw)


@every_layer
def test_names_are_as_in_opacus(name):
    """The wrapper's keys are those of Opacus' wrapper, the model's own are what they were."""
    model, _, _ = specimen(name)
    keys, names = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    wrapped, _, _ = make_private(model)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == names
    assert [n for n, _ in wrapped.named_parameters()] == [f"_module.{n}" for n in names]
    theirs = opacus.GradSampleModule(specimen(name)[0], strict=False)
    assert list(wrapped.state_dict()) == list(theirs.state_dict())
    wrapped.load_state_dict(wrapped.state_dict())


@every_layer
def test_types_and_signatures_are_left(name):
    """Transformers, PEFT and FSDP look at them."""
    import inspect

    model, _inputs, _ = specimen(name)
    before = {n: (type(m), inspect.signature(m.forward)) for n, m in model.named_modules()}
    make_private(model)
    assert {n: (type(m), inspect.signature(m.forward)) for n, m in model.named_modules()} == before


@every_layer
def test_training_and_evaluation(name):
    model, inputs, _ = specimen(name)
    plain = copy.deepcopy(model)
    wrapped, _, _ = make_private(model)
    for mode in (False, True):
        wrapped.train(mode)
        plain.train(mode)
        assert wrapped.training == model.training == mode
        with torch.no_grad():
            torch.testing.assert_close(wrapped(*inputs), plain(*inputs))


@every_layer
def test_deepcopy(name):
    """The copy is private too, and has nothing in common with the original."""
    model, inputs, target, verdict, (wrapped, optimizer, _) = private(name)
    twin = copy.deepcopy(wrapped)
    verdict.loss_fn(twin(*inputs), target).backward()
    verdict.check_norms(twin.per_sample_gradient_norms)
    verdict.check_sums({n.removeprefix("_module."): s for n, s in sums_of(twin).items()})
    assert not any(s.any() for s in sums_of(model).values())
    verdict.loss_fn(wrapped(*inputs), target).backward()
    verdict.check_sums(sums_of(model))
    optimizer.step()


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@every_layer
def test_pickle(name, how):
    _model, inputs, target, verdict, (wrapped, _, _) = private(name)
    if how == "pickle":
        back = pickle.loads(pickle.dumps(wrapped))
    else:
        file = io.BytesIO()
        torch.save(wrapped, file)
        file.seek(0)
        back = torch.load(file, weights_only=False)
    assert type(back) is type(wrapped)
    with torch.no_grad():
        torch.testing.assert_close(back(*inputs), wrapped(*inputs))
    verdict.loss_fn(back(*inputs), target).backward()
    verdict.check_norms(back.per_sample_gradient_norms)


def test_pickle_after_training():
    _, inputs, target, _verdict, (wrapped, optimizer, _) = private("Linear")
    mse(wrapped(*inputs), target).backward()
    copy.deepcopy(wrapped)
    pickle.dumps(wrapped)
    optimizer.step()


@pytest.mark.parametrize("used", [True, False], ids=["after training", "at once"])
@every_layer
def test_removed_without_trace(name, used):
    model, inputs, target = specimen(name)
    before = snapshot.of_model(model)
    wrapped, optimizer, _ = make_private(model, noise_multiplier=0.0)
    if used:
        loss_of(name)(wrapped(*inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    plain = wrapped.to_standard_module()
    assert plain is model
    after = snapshot.of_model(model)
    for key in before:
        assert after[key] == before[key], key
    loss_of(name)(model(*inputs), target).backward()  # ordinary gradients again
    twin = specimen(name)[0]
    loss_of(name)(follow(twin, model)(*inputs), target).backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=n: f"{n}: {m}")


def test_private_again_after_removal():
    model, inputs, target = specimen("Linear")
    twin = copy.deepcopy(model)
    for bound in (0.1, 0.3):
        wrapped, _, _ = make_private(model, max_grad_norm=bound)
        mse(wrapped(*inputs), target).backward()
        Verdict(twin, inputs, target, mse, bound).check_sums(sums_of(model))
        wrapped.to_standard_module()


@every_layer
def test_without_a_wrapper(name):
    """``wrap_model=False``: the hooks come back, the model itself is trained, ``cleanup()`` leaves no trace."""
    model, inputs, target = specimen(name)
    before = snapshot.of_model(model)
    verdict = Verdict(model, inputs, target, loss_of(name))
    hooks, optimizer, _ = make_private(model, max_grad_norm=verdict.max_grad_norm, wrap_model=False)
    assert not isinstance(hooks, nn.Module)
    verdict.loss_fn(model(*inputs), target).backward()
    verdict.check_norms(hooks.per_sample_gradient_norms)
    verdict.check_sums(sums_of(model))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    hooks.cleanup()
    assert snapshot.of_model(model) == before


def test_norms_before_the_first_backward():
    wrapped, _, _ = make_private(specimen("Linear")[0])
    with pytest.raises(AttributeError, match="per_sample_gradient_norms"):
        _ = wrapped.per_sample_gradient_norms


def test_submodules_are_reached_through_the_wrapper():
    model, _, _ = specimen("tied GPT")
    wrapped, _, _ = make_private(model)
    assert wrapped.tok is model.tok


class Nested(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), nn.ModuleDict({"bad": layer})
        self.scale = nn.Parameter(torch.ones(4))


def good() -> nn.Module:
    return Nested(nn.LayerNorm(4))


REFUSALS = {
    "BatchNorm": (lambda: Nested(nn.BatchNorm1d(4)), {}, ["inner.bad", "BatchNorm"]),
    "LSTM": (lambda: Nested(nn.LSTM(4, 4)), {}, ["inner.bad", "DPLSTM"]),
    "max_norm": (lambda: Nested(nn.Embedding(3, 4, max_norm=2.5)), {}, ["inner.bad", "max_norm", "2.5"]),
    "sparse": (lambda: Nested(nn.Embedding(3, 4, sparse=True)), {}, ["inner.bad", "sparse"]),
    "loss_reduction": (good, {"loss_reduction": "median"}, ["loss_reduction", "median"]),
    "clipping": (good, {"clipping": "sideways"}, ["clipping", "sideways"]),
    "noise_multiplier": (good, {"noise_multiplier": -1.0}, ["noise_multiplier", "-1"]),
    "max_grad_norm": (good, {"max_grad_norm": -2.0}, ["max_grad_norm", "-2"]),
    "max_grad_norm, NaN": (good, {"max_grad_norm": float("nan")}, ["max_grad_norm", "nan"]),
    "list": (good, {"max_grad_norm": [1.0, 2.0], "clipping": "per_layer"}, ["max_grad_norm", "2"]),
    "groups": (good, {"max_grad_norm": {"first": 1.0}, "clipping": "per_layer"}, ["scale"]),
    "one C per layer": (good, {"max_grad_norm": [1.0] * 5, "clipping": "flat"}, ["max_grad_norm"]),
    "mode": (good, {"grad_sample_mode": "fussed"}, ["fussed"]),
    "other parameters": (good, {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)}, []),
    "criterion": (
        good,
        {"criterion": nn.CrossEntropyLoss(reduction="sum"), "grad_sample_mode": "ghost"},
        ["reduction", "sum"],
    ),
}


@pytest.mark.parametrize("cause", REFUSALS)
def test_a_refusal_leaves_everything_as_it_was(cause):
    make, options, words = REFUSALS[cause]
    model = make()
    options = dict(options)
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader, engine = loader_of(8, 4), engine_of()
    criterion = options.get("criterion")
    before = (snapshot.of_model(model), snapshot.of_optimizer(optimizer), snapshot.of_loader(loader))
    said = None if criterion is None else dict(vars(criterion))
    options = dict(poisson_sampling=True) | options
    with pytest.raises((ValueError, NotImplementedError)) as refusal:
        make_private(model, optimizer=optimizer, engine=engine, data_loader=loader, **options)
    for word in words:
        assert word in str(refusal.value)
    after = (snapshot.of_model(model), snapshot.of_optimizer(optimizer), snapshot.of_loader(loader))
    assert after == before
    assert said is None or vars(criterion) == said
    assert engine.dataset is None
    assert len(engine.accountant) == 0


def test_a_model_in_evaluation_is_refused_as_in_opacus():
    with pytest.raises(ValueError, match="training mode"):
        make_private(good().eval())


def test_float64_model_keeps_float64_sums():
    model, inputs, target = specimen("Linear")
    wrapped, _, _ = make_private(model)
    mse(wrapped(*inputs), target).backward()
    assert {p.summed_grad.dtype for p in model.parameters()} == {F64}
