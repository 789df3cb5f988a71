"""``make_private(low_precision=...)``: bfloat16 and float16 models with every option, and what is refused."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, RMSprop

from dpfast import native, ops
from dpfast.optim.fused_update import MASTER
from tests.helpers import engine_of, make_private
from tests.ops.noisy import BF16, F16, F32, F64, require, same
from tests.optim.private import OPTIMIZERS, Plain, Run, batch, each_optimizer, net

WAYS = ("nearest", "stochastic", "master")
each_way = pytest.mark.parametrize("way", WAYS)
each_dtype = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])


def run_of(name, dtype=BF16, way="nearest", model=None, **kw):
    if way != "nearest":
        require("noisy_sgd_")
        require("noisy_adam_")
    torch.manual_seed(5)  # the rounding's key too is drawn from the noise's generator
    return Run(model or net().to(dtype), OPTIMIZERS[name], loss_reduction="sum", low_precision=way, **kw)


@each_optimizer
@each_dtype
@each_way
def test_a_run(name, dtype, way, passes):
    """It repeats, trains, keeps the parameters' dtype, and its gradients are those of the noise alone."""
    datas = batch(dtype=dtype), None, batch(dtype=dtype)
    runs = [run_of(name, dtype, way) for _ in range(2)]
    for data in datas:
        grads = [run.step(data) for run in runs]
        assert same(*grads)
    assert same(runs[0].values(), runs[1].values())
    assert len(passes) == 6
    noise = run_of(name, dtype).step(None)
    assert same(noise, run_of("sgd", dtype).step(None)), "not of the optimizer"
    assert all(g.dtype == dtype and g.any() for g in noise)
    for p in runs[0].model.parameters():
        assert p.dtype == dtype and p.isfinite().all()
        state = runs[0].optimizer.state[p]
        assert (MASTER in state) == (way == "master")
        if way == "master":
            assert state[MASTER].dtype == F32 and same(state[MASTER].to(dtype), p.detach())
            assert not torch.equal(state[MASTER], p.float())


@each_dtype
def test_noise_is_added_before_anything_is_rounded(dtype):
    """With a master copy and SGD the update is the float32 gradient, though ``p.grad`` is 16 bits."""
    model = net().to(dtype)
    twin = Run(copy.deepcopy(model).float(), OPTIMIZERS["sgd"], loss_reduction="sum")
    run = run_of("sgd", dtype, "master", model)
    start = twin.values()
    for p, q in zip(run.step(None), twin.step(None), strict=True):
        assert same(p, q.to(dtype))
    for p, q, first in zip(model.parameters(), twin.values(), start, strict=True):
        assert same(run.optimizer.state[p][MASTER], q)
        assert not torch.equal(q - first, (q - first).to(dtype).float())


@each_way
def test_float32_models_are_as_without(way):
    """The option is for 16-bit parameters; of a mixed model only those."""
    runs = [run_of("adamw", F32, w) for w in ("nearest", way)]
    for data in (batch(), batch()):
        for run in runs:
            run.step(data)
    assert same(runs[0].values(), runs[1].values())
    assert runs[1].optimizer.state_dict().keys() == runs[0].optimizer.state_dict().keys()
    assert not any(MASTER in state for state in runs[1].optimizer.state.values())
    assert runs[1].optimizer.noise.state_dict()["rounding_key"] is None or way == "stochastic"


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5).to(BF16), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.a(x.to(BF16)).float())


@each_way
@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_mixed_models(name, way, passes):
    run = run_of(name, way=way, model=Mixed())
    start = run.values()
    for _ in range(3):
        run.step(batch())
    assert sorted(passes) == [2] * 6
    has = [MASTER in run.optimizer.state[p] for p in run.model.parameters()]
    assert has == [way == "master"] * 2 + [False] * 2
    assert not any(same(p, q) for p, q in zip(run.values(), start, strict=True))


@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "amsgrad"])
@each_dtype
def test_a_state_dict_keeps_the_masters_bits(name, dtype):
    """Saved and loaded, here and in torch's own optimizer, which keeps them aside and goes on without."""
    run = run_of(name, dtype, "master")
    for _ in range(2):
        run.step(batch(dtype=dtype))
    buffer = io.BytesIO()
    torch.save(run.optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    other = run_of(name, dtype, "master")
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(state)
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert other.optimizer.state[q][MASTER].dtype == F32
        assert same(run.optimizer.state[p][MASTER], other.optimizer.state[q][MASTER])
        assert run.optimizer.state[p][MASTER].data_ptr() != other.optimizer.state[q][MASTER].data_ptr()
    data = batch(dtype=dtype)
    other.optimizer.noise.load_state_dict(run.optimizer.noise.state_dict())
    assert same(run.step(data), other.step(data))
    assert same(run.values(), other.values())
    plain = Plain(net().to(dtype), OPTIMIZERS[name])
    plain.model.load_state_dict(run.model.state_dict())
    plain.optimizer.load_state_dict(state)
    plain.step([torch.ones_like(p) for p in plain.model.parameters()])
    assert not any(same(p, q) for p, q in zip(plain.values(), run.values(), strict=True))


def test_a_parameter_set_from_outside_wins():
    """``load_state_dict`` of the model between steps is not undone by the masters."""
    run = run_of("sgd", way="master")
    values = {name: value + 3 for name, value in net().to(BF16).state_dict().items()}  # no copy rounds to them
    run.step(batch(dtype=BF16))
    run.model.load_state_dict(values)
    grads = run.step(None)
    for p, value, g in zip(run.model.parameters(), values.values(), grads, strict=True):
        want, room = value.float() - 0.1 * g.float(), 0.1 * g.abs().max() * 2**-7  # of p.grad's rounding
        torch.testing.assert_close(run.optimizer.state[p][MASTER], want, rtol=0, atol=room)


def untouched(model) -> bool:
    return not any("forward" in vars(m) for m in model.modules()) and not any(
        hasattr(p, "summed_grad") for p in model.parameters()
    )


def hooked(params):
    optimizer = SGD(params, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    ("way", "dtype", "make", "words"),
    [
        ("round", BF16, OPTIMIZERS["sgd"], ["low_precision='round'", "'nearest', 'stochastic', 'master'"]),
        (None, BF16, OPTIMIZERS["sgd"], ["low_precision=None"]),
        (True, F32, OPTIMIZERS["sgd"], ["low_precision=True"]),
        (["master"], BF16, OPTIMIZERS["sgd"], ["low_precision=['master']"]),
        ("stochastic", BF16, lambda params: RMSprop(params), ["low_precision='stochastic'", "RMSprop", "'nearest'"]),
        ("master", BF16, lambda params: RMSprop(params), ["low_precision='master'", "RMSprop"]),
        ("master", BF16, hooked, ["low_precision='master'", "hooks"]),
        ("stochastic", F64, OPTIMIZERS["sgd"], ["low_precision='stochastic'", "float64"]),
        ("master", BF16, lambda p: SGD(p, lr=torch.tensor(0.1)), ["low_precision='master'", "tensor"]),
    ],
    ids=str,
)
def test_refused_before_anything_is_changed(way, dtype, make, words):
    model = net().to(dtype)
    optimizer, engine = make(list(model.parameters())), engine_of()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError) as refusal:
        make_private(model, optimizer=optimizer, engine=engine, low_precision=way, loss_reduction="sum")
    for word in words:
        assert word in str(refusal.value), f"{word!r} is not in: {refusal.value}"
    assert untouched(model) and optimizer.state_dict() == before and len(engine.accountant) == 0
    # and the same objects can still be made private
    make_private(model, optimizer=optimizer, engine=engine, loss_reduction="sum")


@pytest.mark.parametrize("way", ["stochastic", "master"])
def test_a_hook_that_comes_later(way, passes):
    """Refused at the step, with nothing used up: without the hook the same step is taken."""
    run, twin = (run_of("sgd", way=way) for _ in range(2))
    data = batch(dtype=BF16)
    handle = run.optimizer.original_optimizer.register_step_post_hook(lambda *_: None)
    run.backward(data)
    start, sums = run.values(), [p.summed_grad.clone() for p in run.model.parameters()]
    with pytest.raises(ValueError, match=f"low_precision='{way}'.*hooks"):
        run.optimizer.step()
    assert same(run.values(), start) and passes == []
    assert same([p.summed_grad for p in run.model.parameters()], sums)
    assert run.optimizer.noise.step == 0
    handle.remove()
    run.optimizer.step()
    assert same(run.grads(), twin.step(data)) and same(run.values(), twin.values())


def test_without_the_compiled_library(monkeypatch):
    """Refused where plain PyTorch must serve; the nearest is served."""
    monkeypatch.setattr(native, "available", lambda device: False)
    for way in ("stochastic", "master"):
        with pytest.raises(ValueError, match=f"low_precision='{way}'.*no compiled library for cpu"):
            Run(net().bfloat16(), OPTIMIZERS["sgd"], loss_reduction="sum", low_precision=way)
    run = Run(net().bfloat16(), OPTIMIZERS["sgd"], loss_reduction="sum")
    run.step()
    assert all(p.isfinite().all() for p in run.values())


def test_pre_step_rounds_to_the_gradients_dtype():
    """``pre_step`` leaves 16-bit gradients: the bits that the whole step leaves."""
    run, twin = (run_of("adamw", way="master") for _ in range(2))
    data = batch(dtype=BF16)
    run.backward(data)
    run.optimizer.pre_step()
    assert same(run.grads(), twin.step(data))
    assert all(g.dtype == BF16 for g in run.grads())


def test_compute_dtype_of_sums():
    """What the noise is added to is float32."""
    run = run_of("sgd")
    run.backward(batch(dtype=BF16))
    assert {p.summed_grad.dtype for p in run.model.parameters()} == {F32} == {ops.compute_dtype(BF16)}


@pytest.mark.parametrize("way", ["stochastic", "master"])
@pytest.mark.parametrize("part", ["add_noise", "scale_grad", "clip_and_accumulate"])
def test_a_replaced_part_of_the_step_is_followed_by_torchs_own_update(part, way):
    """Which rounds to the nearest, and knows of no copies: refused with nothing released."""
    run = run_of("sgd", way=way)
    own = getattr(run.optimizer, part)
    setattr(run.optimizer, part, lambda: own())
    before = run.values()
    with pytest.raises(ValueError, match=f"low_precision='{way}' needs .* a method of the optimizer was replaced"):
        run.step(batch(dtype=BF16))
    assert same(run.values(), before) and run.optimizer.noise.step == 0
