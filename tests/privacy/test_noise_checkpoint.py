"""``save_checkpoint`` and ``load_checkpoint``: a run goes on, all but its noise, whose key is new and never kept."""

import copy
import io

import opacus
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, RMSprop

from dpfast.checkpoints import NOISE_STATE
from tests.helpers import engine_of, loader_of, make_private
from tests.ops.noisy import BF16, F16, F32, F64, require, same

B, D = 6, 5
OPTIMIZERS = {
    "sgd": lambda params: SGD(params, lr=0.1),
    "sgd momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda params: AdamW(params, lr=0.01, amsgrad=True),
    "rmsprop": lambda params: RMSprop(params, lr=0.01),
}


class Run:
    """A private run on batches that are its own."""

    def __init__(self, name="sgd", dtype=F32, secure=False, engine=None, **kw):
        self.engine = engine or engine_of(secure_mode=secure)
        self.model = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
        kw = dict(optimizer=OPTIMIZERS[name](self.model.parameters()), noise_multiplier=1.0, loss_reduction="sum") | kw
        loader = loader_of(B, shuffle=True)
        self.wrapped, self.optimizer, _ = make_private(self.model, engine=self.engine, data_loader=loader, **kw)

    def train(self, batches) -> "Run":
        for x, y in batches:
            self.optimizer.zero_grad()
            F.cross_entropy(self.wrapped(x.to(self.model[0].weight)).float(), y, reduction="sum").backward()
            self.optimizer.step()
        return self

    def save(self, target=None, **kw):
        target = io.BytesIO() if target is None else target
        self.engine.save_checkpoint(path=target, module=self.wrapped, optimizer=self.optimizer, **kw)
        if isinstance(target, io.BytesIO):
            target.seek(0)
        return target

    def load(self, source) -> dict:
        return self.engine.load_checkpoint(path=source, module=self.wrapped, optimizer=self.optimizer)

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def noise(self):
        """Gradients of an empty batch."""
        self.optimizer.zero_grad()
        self.optimizer.expect_no_samples()
        self.optimizer.step()
        return [p.grad.clone() for p in self.model.parameters()]


def batches(n: int):
    return [(torch.randn(B, D), torch.randint(3, (B,))) for _ in range(n)]


def assert_same_runs(one: Run, other: Run, more_steps: int = 0) -> None:
    """``more_steps``: those of ``one`` that were another run's."""
    assert same(one.values(), other.values())
    ours, theirs = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for k, state in ours["state"].items():
        assert state.keys() == theirs["state"][k].keys()
        assert same([*state.values()], [*theirs["state"][k].values()])
    ((sigma, rate, steps),) = other.engine.accountant.history
    assert one.engine.accountant.history == [(sigma, rate, steps + more_steps)]
    assert one.optimizer.noise.state_dict() == other.optimizer.noise.state_dict()


KINDS = [
    *((name, F32, "nearest") for name in OPTIMIZERS),
    ("adamw", F64, "nearest"),
    *((name, dtype, way) for name in ("sgd momentum", "adamw") for dtype, way in ((BF16, "master"), (F16, "master"))),
    *((name, BF16, "stochastic") for name in ("sgd momentum", "adamw")),
]


@pytest.mark.parametrize("form", ["path", "buffer"])
@pytest.mark.parametrize(("name", "dtype", "low_precision"), KINDS, ids=lambda k: str(k).removeprefix("torch."))
def test_a_resumed_run_is_the_uninterrupted_one_but_for_its_noise(name, dtype, low_precision, form, tmp_path):
    """To the bit, over two interruptions, where the test brings the noise back as it brings the batches back."""
    if low_precision != "nearest":
        require("noisy_sgd_")
    kw, data = dict(name=name, dtype=dtype, low_precision=low_precision), batches(6)
    whole = Run(**kw, noise_generator=torch.Generator().manual_seed(8))
    start = copy.deepcopy(whole.model.state_dict())
    whole.train(data)
    part = Run(**kw, noise_generator=torch.Generator().manual_seed(8))
    part.model.load_state_dict(start)
    for k in (0, 2):
        part.train(data[k : k + 2])
        kept, noise = part.save(tmp_path / f"{k}.pt" if form == "path" else None), part.optimizer.noise.state_dict()
        part.train(batches(1))  # after the checkpoint was made
        part = Run(**kw, noise_generator=torch.Generator().manual_seed(99) if k else None)
        if k:
            part.noise()  # has a key and a step of its own
        rest = part.load(kept)
        assert NOISE_STATE not in rest and part.optimizer.noise.key is None
        part.optimizer.noise.load_state_dict(noise)
    part.train(data[4:])
    assert_same_runs(part, whole, more_steps=1)
    assert part.optimizer.noise.step == 6


def test_saving_changes_nothing():
    """Neither the run nor the user's own dictionary; what is in it comes back."""
    data, mine = batches(3), {"epoch": 3}
    run = Run(noise_generator=torch.Generator().manual_seed(1))
    twin = Run(noise_generator=torch.Generator().manual_seed(1))
    twin.model.load_state_dict(run.model.state_dict())
    kept = run.train(data[:1]).save(checkpoint_dict=mine)
    assert mine == {"epoch": 3}
    assert_same_runs(run.train(data[1:]), twin.train(data))
    assert Run().load(kept)["epoch"] == 3


def test_the_state_is_its_own():
    """A state that was taken does not move with the stream, and can be saved without pickling code."""
    run = Run().train(batches(2))
    state = run.optimizer.noise.state_dict()
    before = copy.deepcopy(state)
    run.train(batches(2))
    assert state == before and state["step"] == 2
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state


@pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])
def test_checkpoints_hold_no_key(secure):
    """Words of the key are nowhere in the file; a resumed run has noise that is fresh each time."""
    run = Run(secure=secure)
    keys = []
    real = run.optimizer.noise.next
    run.optimizer.noise.next = lambda *args: keys.append(real(*args)) or keys[-1]
    run.train(batches(3))
    kept = run.save()
    assert len(keys) == 3
    found = list(numbers_in(torch.load(kept, weights_only=True)))
    words = {word for noise in keys for word in noise.key if word}
    assert len(words) == (24 if secure else 2) and not words & set(found)
    draws = []
    for _ in range(2):
        kept.seek(0)
        other = Run(secure=secure)
        other.load(kept)
        assert same(other.values(), run.values())
        assert other.engine.accountant.history == run.engine.accountant.history
        assert other.optimizer.noise.key is None
        draws.append(other.noise())
    draws.append(run.noise())
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not any(same(g, h) for g, h in zip(draws[a], draws[b], strict=True))


def numbers_in(item):
    if isinstance(item, dict):
        item = item.values()
    if isinstance(item, torch.Tensor):
        return
    if isinstance(item, int):
        yield item
    elif isinstance(item, (list, tuple)) or type(item).__name__ in ("dict_values", "odict_values"):
        for part in item:
            yield from numbers_in(part)


@pytest.mark.parametrize("to_secure", [True, False])
def test_a_checkpoint_of_the_other_mode(to_secure):
    """Everything is taken over."""
    old = Run(secure=not to_secure).train(batches(2))
    kept, new = old.save(), Run(secure=to_secure)
    new.load(kept)
    assert new.optimizer.noise.secure == to_secure
    assert same(new.values(), old.values())
    assert not any(same(g, h) for g, h in zip(new.noise(), old.noise(), strict=True))
    assert (new.optimizer.noise.state_dict().get("key") is None) == to_secure


def test_a_checkpoint_of_an_earlier_version():
    """It has the noise's key, which is neither used nor given to the caller."""
    old = Run().train(batches(2))
    held = torch.load(old.save(), weights_only=True) | {NOISE_STATE: old.optimizer.noise.state_dict()}
    kept, new = io.BytesIO(), Run()
    torch.save(held, kept)
    kept.seek(0)
    assert NOISE_STATE not in new.load(kept)
    new.noise()
    assert new.optimizer.noise.key not in (None, old.optimizer.noise.key)


def test_checkpoints_of_opacus():
    """Of Opacus: all that it has comes back, beside the steps that were taken here."""
    run = Run().train(batches(2))
    theirs = io.BytesIO()
    opacus.PrivacyEngine.save_checkpoint(run.engine, path=theirs, module=run.wrapped, optimizer=run.optimizer)
    theirs.seek(0)
    other = Run().train(batches(1))
    before = other.optimizer.noise.key
    other.load(theirs)
    assert same(other.values(), run.values())
    assert other.engine.accountant.history == [(1.0, 1.0, 3)]
    other.train(batches(1))
    assert other.optimizer.noise.key != before


def test_checkpoints_without_an_optimizer():
    """As in Opacus: model and accountant come back, and what is missing is said."""
    run, other, buffer = Run().train(batches(1)), Run(), io.BytesIO()
    run.engine.save_checkpoint(path=buffer, module=run.wrapped)
    buffer.seek(0)
    with pytest.warns(UserWarning, match="optimizer_state_dict has 0 items but optimizer is provided"):
        other.load(buffer)
    assert same(other.values(), run.values())


def test_a_checkpoint_loaded_without_the_optimizer():
    """Its noise takes a new key all the same: what the batches will be is not known."""
    run = Run(noise_generator=torch.Generator().manual_seed(3)).train(batches(2))
    kept, seen = run.save(), [run.noise()]
    for _ in range(2):
        kept.seek(0)
        other = Run(noise_generator=torch.Generator().manual_seed(3)).train(batches(2))
        with pytest.warns(UserWarning, match="optimizer is not provided"):
            other.engine.load_checkpoint(path=kept, module=other.wrapped)
        seen.append(other.noise())
    for k, one in enumerate(seen):
        assert not any(same(one, other) for other in seen[:k])


def test_going_back_twice_never_repeats_noise():
    """Neither does an engine beside it that goes on from the same file, whatever generator it was given."""
    run = Run(noise_generator=torch.Generator().manual_seed(3)).train(batches(2))
    kept = run.save()
    seen = [run.noise()]
    for _ in range(2):
        kept.seek(0)
        with pytest.warns(UserWarning, match="steps more than the checkpoint"):
            run.load(kept)
        seen.append(run.noise())
        kept.seek(0)
        other = Run(noise_generator=torch.Generator().manual_seed(3))
        other.load(kept)
        seen.append(other.noise())
    for k, one in enumerate(seen):
        assert not any(same(one, other) for other in seen[:k])


def test_a_stream_that_is_brought_back_twice():
    """Who restores a state answers for the batches, but not in a stream that has gone on from there."""
    run = Run().train(batches(1))
    state = run.optimizer.noise.state_dict()
    seen = [run.noise()]
    for _ in range(2):
        with pytest.warns(UserWarning, match="a new key is drawn"):
            run.optimizer.noise.load_state_dict(state)
        seen.append(run.noise())
    for k, one in enumerate(seen):
        assert not any(same(one, other) for other in seen[:k])
