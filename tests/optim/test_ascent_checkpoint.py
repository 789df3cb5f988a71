"""A run that goes on from a checkpoint, and checkpoints of other runs."""

import io

import pytest
import torch
from torch.optim import AdamW

import dpfast
from tests.helpers import engine_of
from tests.ops.noisy import same
from tests.optim.ascending import Net, Private, data, sgd, started
from tests.optim.test_ascent import each_ascent


@each_ascent
@pytest.mark.parametrize("make", [sgd, lambda params: AdamW(params, lr=0.05)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "used"])
def test_a_resumed_run_is_bit_equal(fresh, make, ascent):
    """A fresh model's first forward, with all its checks, is at a shifted point. The noise is brought back by hand."""
    steps, file = [data() for _ in range(5)], io.BytesIO()
    whole = Private(Net().double(), make, ascent=ascent)
    for k, batch in enumerate(steps):
        if k == 2:
            engine_of().save_checkpoint(path=file, module=whole.wrapped, optimizer=whole.optimizer)
            noise = whole.optimizer.noise.state_dict()
        whole.step(batch)
    file.seek(0)
    again = Private(Net().double(), make, seed=99, ascent=ascent)
    if not fresh:
        again.step(data())
    engine_of().load_checkpoint(path=file, module=again.wrapped, optimizer=again.optimizer)
    again.optimizer.noise.load_state_dict(noise)
    for batch in steps[2:]:
        again.step(batch)
    assert same(again.values(), whole.values())


def checkpoint_of(run: Private) -> io.BytesIO:
    file = io.BytesIO()
    engine_of().save_checkpoint(path=file, module=run.wrapped, optimizer=run.optimizer)
    file.seek(0)
    return file


def load(run: Private, file: io.BytesIO) -> None:
    engine_of().load_checkpoint(path=file, module=run.wrapped, optimizer=run.optimizer)


def test_checkpoints_of_other_runs():
    """Without an ascent's state the next step is DP-SGD; another rho scales the shift; another ascent is refused."""
    run, plain = started(), started(None)
    load(run, checkpoint_of(plain))
    assert not run.optimizer.ascending.shift
    with pytest.warns(UserWarning, match="run with DPSAT"):
        load(plain, checkpoint_of(started()))
    double, zero, first = started(dpfast.DPSAT(0.6)), started(dpfast.DPSAT(0.0)), started()
    load(double, checkpoint_of(first))
    theirs = first.optimizer.ascending.shift.shifts.values()
    shifts = zip(double.optimizer.ascending.shift.shifts.values(), theirs, strict=True)
    assert all(torch.equal(a, 2 * b) for a, b in shifts)
    load(zero, checkpoint_of(first))
    assert not zero.optimizer.ascending.shift
    other = started(dpfast.DPSATMomentum(0.3))
    before = other.values()
    with pytest.raises(ValueError, match="ascent state: of 'DPSAT'"):
        load(other, checkpoint_of(first))
    assert same(other.values(), before)


def cut(state):
    name = next(iter(state["shifts"]))
    state["shifts"][name] = state["shifts"][name][:1]


DAMAGES = {
    "shifts": cut,
    "of 'DiSK'": lambda state: state.update(ascent="DiSK"),
    "filtered": lambda state: state.pop("filtered"),
    "no parameter": lambda state: state["shifts"].update({"no parameter": torch.zeros(1)}),
    "settings": lambda state: state.update(settings=dict(rho="0.3")),
}


@pytest.mark.parametrize("word", DAMAGES)
def test_a_damaged_checkpoint_is_refused_whole(word):
    run = started()
    held = torch.load(checkpoint_of(run), weights_only=False)
    DAMAGES[word](held["ascent_state_dict"])
    file, before, shift = io.BytesIO(), run.values(), run.optimizer.ascending.shift.shifts
    torch.save(held, file)
    file.seek(0)
    with pytest.raises(ValueError, match=f"ascent state: .*{word}"):
        load(run, file)
    assert same(run.values(), before) and run.optimizer.ascending.shift.shifts is shift
