"""``noisy_step_``: every bad input is an error with its name, before anything is written."""

import math

import pytest
import torch

from dpfast import ops
from tests.ops.noisy import BF16, F16, F64, new_noise, require, same

RULES = {
    "sgd": ops.SGD(0.1, momentum=0.9),
    "adam": ops.Adam(0.1, 0.9, 0.99, 1e-8, 0.0, 1.0),
}
each_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True)
def compiled():
    require("noisy_sgd_")
    require("noisy_adam_")


def good(rule: str, dtype=BF16) -> dict:
    """Two parameters with all that they can have."""
    params = [torch.randn(n).to(dtype) for n in (130, 41)]
    return dict(
        params=params,
        summed=[torch.randn(len(p)) for p in params],
        grads=[torch.full_like(p, math.pi) for p in params],
        states=[[torch.rand(len(p)).to(dtype) for p in params] for _ in range(1 if rule == "sgd" else 3)],
        masters=[p.float() for p in params],
        parameters=[0, 1],
    )


def all_tensors(arguments: dict) -> list[torch.Tensor]:
    lists = (arguments[name] for name in ("params", "summed", "grads", "masters"))
    return [t for tensors in (*lists, *arguments["states"]) for t in tensors]


def second(name: str, change):
    """The second tensor of a list is changed."""

    def make(rule):
        arguments = good(rule)
        tensors = arguments["states"][-1] if name == "states" else arguments[name]
        tensors[1] = change(tensors[1])
        return arguments

    return make


def given(**changed):
    return lambda rule: good(rule) | changed


def shared(one: str, other: str, dtype=BF16, shift: int = 0):
    """A tensor of ``other`` lies where one of ``one`` lies, or ``shift`` elements further."""

    def make(rule):
        arguments = good(rule, dtype)
        pick = {name: arguments["states"][0] if name == "states" else arguments[name] for name in (one, other)}
        n, type_ = pick[other][0].numel(), pick[other][0].dtype
        buffer = torch.randn(n + 7).to(type_)
        pick[one][0] = buffer[:n] if pick[one][0].dtype == type_ else buffer.view(pick[one][0].dtype)[:n]
        pick[other][0] = buffer[shift : shift + n]
        return arguments

    return make


BAD = {
    "float64 parameter": (second("params", torch.Tensor.double), ["params[1]", "float64"]),
    "integer parameter": (second("params", torch.Tensor.int), ["params[1]", "int32"]),
    "16-bit sum": (second("summed", lambda t: t.to(F16)), ["summed[1]", "float16"]),
    "float64 sum": (second("summed", lambda t: t.to(F64)), ["summed[1]", "float64"]),
    "gradient of another dtype": (second("grads", lambda t: t.to(F16)), ["grads[1]", "float16"]),
    "state of another dtype": (second("states", torch.Tensor.float), ["states[", "[1]", "float32"]),
    "16-bit master": (second("masters", lambda t: t.to(BF16)), ["masters[1]", "bfloat16"]),
    **{
        f"{what} {name}": (second(name, change), [f"{name}[", "[1]", *words])
        for name in ("params", "grads", "states", "masters")
        for what, change, words in (
            ("other size of", lambda t: t[:40].clone(), ["40", "41"]),
            ("other device of", lambda t: t.to("meta"), ["meta"]),
            ("strided", lambda t: t.repeat_interleave(2)[::2], ["contiguous"]),
        )
    },
    "too few gradients": (given(grads=[torch.zeros(130, dtype=BF16)]), ["grads has 1"]),
    "too few masters": (given(masters=[torch.zeros(130)]), ["masters has 1"]),
    "too few sums": (given(summed=[torch.zeros(130)]), ["summed has 1"]),
    "too few indices": (given(parameters=[0]), ["1 parameters"]),
    "index overflow": (given(parameters=[0, 1 << 32]), ["parameters[1]=4294967296"]),
    "unknown rounding": (given(rounding="down"), ["rounding='down'"]),
    "parameter and state": (shared("params", "states"), ["memory"]),
    "parameter and state in part": (shared("params", "states", shift=3), ["overlap"]),
    "parameter and its own gradient": (shared("params", "grads"), ["memory"]),
    "parameter and gradient in part": (shared("params", "grads", shift=1), ["overlap"]),
    "sum and master": (shared("summed", "masters"), ["memory"]),
    "sum and gradient in part": (shared("grads", "summed"), ["overlap"]),
    "parameter and sum": (shared("params", "summed", torch.float32), ["memory"]),
}


@each_rule
@pytest.mark.parametrize("bad", BAD)
def test_bad_tensors(bad, rule):
    make, words = BAD[bad]
    arguments = make(rule)
    before = [t.clone() for t in all_tensors(arguments)]
    with pytest.raises(ValueError) as refusal:
        ops.noisy_step_(RULES[rule], noise=new_noise(), **arguments)
    for word in words:
        assert word in str(refusal.value), f"{word!r} is not in: {refusal.value}"
    for old, new in zip(before, all_tensors(arguments), strict=True):
        assert old.is_meta or same(old, new), "something was written"


@each_rule
@pytest.mark.parametrize(
    "bad",
    [
        dict(states=[[]]),
        dict(states=[[], [], []]),
        dict(rounding="stochastic", rounding_key=(1,)),
        dict(rounding="stochastic", rounding_key=(1, 2, 3)),
    ],
    ids=str,
)
def test_what_no_optimizer_passes(bad, rule):
    """An error too, be it the library's own."""
    arguments = good(rule) | bad
    before = [t.clone() for t in all_tensors(arguments)]
    with pytest.raises((ValueError, RuntimeError)):
        ops.noisy_step_(RULES[rule], noise=new_noise(), **arguments)
    assert same(all_tensors(arguments), before)


@each_rule
def test_good_tensors(rule):
    """The same call is taken as it is, with and without masters, and with float32's gradient in place of its sum."""
    for arguments in (good(rule), good(rule) | dict(masters=[]), good(rule, torch.float32) | dict(masters=[])):
        if arguments["params"][0].dtype == torch.float32:
            arguments["grads"] = arguments["summed"]
        before = [p.clone() for p in arguments["params"]]
        ops.noisy_step_(RULES[rule], noise=new_noise(), **arguments)
        for old, new in zip(before, arguments["params"], strict=True):
            assert new.isfinite().all() and not torch.equal(old, new)
