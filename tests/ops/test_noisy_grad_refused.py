"""``noisy_grad_`` and ``Noise``: every bad input is an error with its name, before anything is written."""

import math

import pytest
import torch

from dpfast import ops
from tests.ops.noisy import BF16, F16, F32, F64, new_key, new_noise, same

KEY = (1, 2, 3, 4, 5, 6, 7, 8)
META = torch.device("meta")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(key=KEY[:7]), ValueError, "key"),
        (dict(key=(*KEY, 9)), ValueError, "key"),
        (dict(key=()), ValueError, "key"),
        (dict(key=(*KEY[:7], 1 << 32)), ValueError, "key"),
        (dict(key=(*KEY[:7], -1)), ValueError, "key"),
        (dict(key=(*KEY[:7], 1.5)), ValueError, "key"),
        (dict(step=1 << 32), OverflowError, "step=4294967296"),
        (dict(step=-1), OverflowError, "step=-1"),
        (dict(std=-1.0), ValueError, "std=-1.0"),
        (dict(std=-1e-300), ValueError, "std=-1e-300"),
        (dict(std=math.nan), ValueError, "std=nan"),
        (dict(std=math.inf), ValueError, "std=inf"),
        (dict(scale=math.nan), ValueError, "scale=nan"),
        (dict(scale=-math.inf), ValueError, "scale=-inf"),
        (dict(grid=3 * 2.0**-24), ValueError, "grid="),
        (dict(grid=-(2.0**-24)), ValueError, "grid=-"),
        (dict(grid=math.nan), ValueError, "grid=nan"),
        (dict(grid=2.0**-27), ValueError, "grid="),  # noise of more than 32 bits
        (dict(grid=2.0**-15), ValueError, "grid="),  # a grid that shows
        (dict(grid=2.0**-24, std=0.0), ValueError, "grid="),
    ],
    ids=str,
)
def test_noise_is_checked_when_it_is_made(given, error, words):
    with pytest.raises(error) as refusal:
        ops.Noise(**(dict(key=KEY, step=0, std=1.0) | given))
    assert words in str(refusal.value)


@pytest.mark.parametrize("given", [{}, dict(step=(1 << 32) - 1), dict(std=0.0), dict(grid=2.0**-26), dict(grid=2**-16)])
def test_the_last_that_is_good(given):
    noise = ops.Noise(**(dict(key=KEY, step=0, std=1.0) | given))
    x = torch.zeros(9)
    ops.noisy_grad_([x], [x], [(1 << 32) - 1], noise, [(1 << 35) - 9])
    assert x.isfinite().all()
    assert bool(x.any()) == (noise.std > 0)


def test_a_key_is_a_secret():
    """Neither a message nor what is printed of the noise shows it."""
    key = new_key()
    with pytest.raises(ValueError) as refusal:
        ops.Noise(tuple(key[:7]), 0, 1.0)
    shown = str(refusal.value) + repr(ops.Noise(tuple(key), 0, 1.0))
    assert not any(str(word) in shown for word in key)


def one(**given):
    """Arguments of a good call for two tensors, but for what is given."""
    summed = [torch.randn(130), torch.randn(41)]
    good = dict(summed=summed, grads=[torch.full_like(x, math.pi) for x in summed], parameters=[0, 1], offsets=[0, 0])
    return good | given


def at(name, k, tensor, dtype=None):
    """The second (k = 1) or first tensor of a list is another one."""
    arguments = one()
    arguments[name][k] = tensor
    return arguments


def overlapping(how):
    buffer = torch.full((400,), math.pi)
    arguments = one()
    if how == "grads twice":
        arguments["summed"][1] = torch.randn(130)
        arguments["grads"] = [buffer[:130]] * 2
    elif how == "grads in part":
        arguments["grads"] = [buffer[:130], buffer[129:170]]
    elif how == "grads within":
        arguments["grads"] = [buffer[:130], buffer[40:81]]
    elif how == "a sum in part":
        arguments["summed"][0], arguments["grads"][0] = buffer[:130], buffer[1:131]
    elif how == "another's sum":
        arguments["summed"][0], arguments["grads"][1] = buffer[:130], buffer[60:101]
    elif how == "16 bits in place":
        arguments["summed"][0] = buffer[:130]
        arguments["grads"][0] = buffer.view(BF16)[:130]
    else:
        arguments["summed"][0] = arguments["grads"][0] = buffer[:1].expand(130)
    return arguments


BAD = {
    "another device": (lambda: at("grads", 1, torch.empty(41, device=META)), ["grads[1]", "meta"]),
    "a sum elsewhere": (lambda: at("summed", 1, torch.empty(41, device=META)), ["[1]", "meta"]),
    "an integer sum": (lambda: at("summed", 1, torch.ones(41, dtype=torch.int32)), ["summed[1]", "int32"]),
    "an integer grad": (lambda: at("grads", 1, torch.ones(41, dtype=torch.int64)), ["grads[1]", "int64"]),
    "a 16-bit sum": (lambda: at("summed", 1, torch.ones(41, dtype=BF16)), ["summed[1]", "bfloat16"]),
    "a complex sum": (lambda: at("summed", 1, torch.ones(41, dtype=torch.complex64)), ["summed[1]", "complex64"]),
    "too wide a grad": (lambda: at("grads", 1, torch.ones(41, dtype=F64)), ["grads[1]", "float64"]),
    "too narrow a grad": (lambda: at("summed", 1, torch.ones(41, dtype=F64)), ["grads[1]", "float32"]),
    "strides of a grad": (lambda: at("grads", 1, torch.ones(82)[::2]), ["grads[1]", "contiguous"]),
    "strides of a sum": (lambda: at("summed", 0, torch.ones(13, 10).T), ["summed[0]", "contiguous"]),
    "another size": (lambda: at("grads", 1, torch.ones(42)), ["grads[1]", "42", "41"]),
    "no elements": (lambda: at("grads", 1, torch.ones(0)), ["grads[1]", "0"]),
    "too few grads": (lambda: one(grads=[torch.zeros(130)]), ["grads"]),
    "too many grads": (lambda: one(grads=[torch.zeros(130), torch.zeros(41), torch.zeros(1)]), ["grads"]),
    "too few parameters": (lambda: one(parameters=[0]), ["1 parameters"]),
    "too few offsets": (lambda: one(offsets=[0]), ["1 offsets"]),
    "a negative parameter": (lambda: one(parameters=[0, -1]), ["parameters[1]=-1"]),
    "parameter overflow": (lambda: one(parameters=[0, 1 << 32]), ["parameters[1]=4294967296"]),
    "a negative offset": (lambda: one(offsets=[0, -1]), ["offsets[1]=-1"]),
    "element overflow": (lambda: one(offsets=[0, (1 << 35) - 40]), ["offsets[1]=34359738328"]),
    "too many elements": (lambda: at("summed", 1, torch.ones(1).expand((1 << 35) + 1)), ["34359738369"]),
    **{
        f"overlap: {how}": (lambda how=how: overlapping(how), words)
        for how, words in {
            "grads twice": ["grads[1]", "memory"],
            "grads in part": ["overlap"],
            "grads within": ["overlap"],
            "a sum in part": ["overlap"],
            "another's sum": ["overlap"],
            "16 bits in place": ["overlap"],
            "itself": ["contiguous"],
        }.items()
    },
}


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_tensors(bad, mode):
    make, words = BAD[bad]
    arguments = make()
    before = [t.clone() for name in ("summed", "grads") for t in arguments[name] if t.numel() < 1000]
    with pytest.raises(ValueError) as refusal:
        ops.noisy_grad_(**arguments, noise=new_noise(mode))
    for word in words:
        assert word in str(refusal.value), f"{word!r} is not in: {refusal.value}"
    after = [t for name in ("summed", "grads") for t in arguments[name] if t.numel() < 1000]
    for old, new in zip(before, after, strict=True):
        assert old.is_meta or torch.equal(old, new), "something was written"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_what_looks_bad_and_is_not(dtype):
    """Neighbours in one buffer, empty tensors at one address, and nothing at all."""
    buffer = torch.full((500,), math.nan, dtype=dtype)
    sums, noise = [torch.randn(n) for n in (100, 0, 300, 0, 50)], new_noise()
    grads = [buffer[:100], buffer[100:100], buffer[100:400], buffer[400:400], buffer[400:450]]
    ops.noisy_grad_(sums, grads, [0, 1, 2, 3, 4], noise)
    assert buffer[:450].isfinite().all() and buffer[450:].isnan().all()
    for k, x in enumerate(sums):
        alone = torch.empty_like(x, dtype=dtype)
        ops.noisy_grad_([x], [alone], [k], noise)
        assert same(alone, grads[k])
    ops.noisy_grad_([], [], [], noise)
