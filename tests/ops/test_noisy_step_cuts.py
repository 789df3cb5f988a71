"""The update in the noise's pass: the same bits however a parameter is cut, on any threads and instruction set."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.ops.noisy import (
    BF16,
    BUILDS,
    F16,
    F32,
    MODES,
    Call,
    arguments,
    assert_guards,
    guarded,
    new_noise,
    require,
    run,
    run_with,
    same,
    tensors,
)

KINDS = [(F32, "nearest"), *((dtype, way) for dtype in (BF16, F16) for way in ("nearest", "stochastic", "master"))]
each_kind = pytest.mark.parametrize(("dtype", "low_precision"), KINDS, ids=lambda k: str(k).removeprefix("torch."))
each_mode = pytest.mark.parametrize("mode", MODES)
NUMBERS = {
    "noisy_sgd_": lambda t: (0.1, 0.9, 0.2, 0.01, True, False, t == 0),
    "noisy_adam_": lambda t: (0.1, 0.9, 0.99, 1e-8, 0.01, t + 1.0, 0.02 * (t % 2), 1e-3, t % 2 == 0, False),
}


@pytest.fixture(autouse=True)
def compiled():
    require("noisy_sgd_")
    require("noisy_adam_")


@dataclass
class Training:
    """Three steps of an op on elements of parameter 7, from ``offset`` on."""

    op: str
    lists: list[list[Tensor]]  # gradients, parameters, states, masters: each [one tensor] or []
    sums: list[Tensor]  # of each step
    noise: tuple
    rounding: tuple
    offset: int

    @classmethod
    def new(cls, op, dtype, low_precision, n, offset, mode):
        """Random values of ``n`` elements."""
        parameter = torch.randn(n).to(dtype)
        states = [[torch.rand(n).to(dtype)] for _ in range(1 if op == "noisy_sgd_" else 3)]
        masters = [parameter.float()] if low_precision == "master" else []
        lists = [[torch.full((n,), math.nan, dtype=dtype)], [parameter], *states, masters]
        rounding = int(low_precision == "stochastic"), torch.randint(1 << 32, (2,)).tolist()
        return cls(op, lists, list(3 * torch.randn(3, n)), arguments(new_noise(mode)), rounding, offset)

    def part(self, low: int, high: int) -> "Training":
        """The same for some of the elements, in guarded memory."""
        lists = [[move(t[low:high]) for t in tensors] for tensors in self.lists]
        sums = [move(x[low:high]) for x in self.sums]
        return Training(self.op, lists, sums, self.noise, self.rounding, self.offset + low)

    def calls(self) -> list[Call]:
        key, _, *rest = self.noise
        return [
            (self.op, ([x], *self.lists, [7], [self.offset], key, t, *rest, *NUMBERS[self.op](t), *self.rounding))
            for t, x in enumerate(self.sums)
        ]

    def results(self) -> list[Tensor]:
        return [t for tensors in self.lists for t in tensors]


def move(piece: Tensor) -> Tensor:
    return guarded(len(piece), piece.dtype, shift=len(piece) % 3).copy_(piece)


@each_kind
@each_mode
@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize(("n", "offset"), [(70_001, 0), (1000, 77), (1000, 2**34 - 333)])
def test_parts_and_threads(dtype, low_precision, mode, op, n, offset):
    """The whole with two threads; its parts, each alone with one."""
    whole = Training.new(op, dtype, low_precision, n, offset, mode)
    cuts = sorted({0, n, *torch.randint(n, (5,)).tolist()})
    parts = [whole.part(low, high) for low, high in itertools.pairwise(cuts)]
    before = [t.clone() for t in whole.results()]
    torch.set_num_threads(2)
    try:
        run(whole.calls())
    finally:
        torch.set_num_threads(1)
    for part in parts:
        run(part.calls())
    for start, want, *got in zip(before, whole.results(), *(part.results() for part in parts), strict=True):
        assert want.isfinite().all() and not same(start, want)
        assert same(torch.cat(got), want)
    for part in parts:
        for tensor in (*part.results(), *part.sums):
            assert_guards(tensor)


@pytest.mark.parametrize("isa", BUILDS)
def test_instruction_sets(isa, tmp_path):
    """Every build makes the bits that this process makes."""
    kinds = [(op, *kind, mode) for op in NUMBERS for kind in KINDS for mode in MODES]
    calls = [
        call
        for k, (op, dtype, low_precision, mode) in enumerate(kinds)
        for call in Training.new(op, dtype, low_precision, 997 + k, 2**34 - 500 + 13 * k, mode).calls()
    ]
    done = run_with(isa, calls, tmp_path)
    run(calls)
    assert same(tensors(done), tensors(calls))


@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_stochastic_rounding_has_a_key_of_its_own(op, dtype):
    """Another key, step or parameter rounds otherwise, from the same gradient."""
    work = Training.new(op, dtype, "stochastic", 500, 0, "fast")
    key, _, _, grid, scale = work.noise
    work.noise = (key, 0, 0.0, grid, scale)  # without noise: only the rounding can differ
    change = {
        "nothing": lambda args, place: args,
        "key": lambda args, place: (*args[:-1], [args[-1][0] ^ 1, args[-1][1]]),
        "key's second word": lambda args, place: (*args[:-1], [args[-1][0], args[-1][1] ^ (1 << 31)]),
        "parameter": lambda args, place: (*args[:place], [8], *args[place + 1 :]),
        "offset": lambda args, place: (*args[: place + 1], [2**34], *args[place + 2 :]),
        "step": lambda args, place: (*args[: place + 3], 5, *args[place + 4 :]),
    }
    got = {}
    for name, changed in change.items():
        mine = work.part(0, 500)
        (op, args), *_ = mine.calls()
        run([(op, changed(args, 1 + len(mine.lists)))])
        got[name] = mine.lists[1][0]
    want = work.part(0, 500)
    run(want.calls()[:1])
    assert same(got.pop("nothing"), want.lists[1][0])
    for name, tensor in got.items():
        different = (tensor != want.lists[1][0]).double().mean().item()
        assert 0.1 < different < 0.6, f"another {name}: {different} of the elements rounded otherwise"
        torch.testing.assert_close(tensor, want.lists[1][0], rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
