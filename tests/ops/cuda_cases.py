"""Every op of csrc/cuda against the CPU library: for a GPU (tests/gpu) and for the emulator (test_cuda_host.py).

``Side`` is where the CUDA library's ops run. What the headers in csrc/include compute must agree to the bit; sums,
whose order differs, to a few roundings of what is added up.
"""

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfast import native, ops
from dpfast.ops.update import ROUNDINGS
from tests.ops.samples import draw

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16, F64)
MODES = {"none": (0.0, 0.0), "fast": (1.3, 0.0), "secure": (1.3, 2.0**-20)}
KEY = [0x2B7E1516, 0x28AED2A6, 0xABF71588, 0x09CF4F3C, 0x762E7160, 0xF38B4DA5, 0x6A784D90, 0xFFFFFFFF]
GUARD = 64
# Within a quad and a tile, at the edges of pieces of all sizes; (elements, offset in the stream, shift in memory)
PLACES = [
    *((n, 0, 0) for n in (0, 1, 3, 4, 127, 128, 129, 2048, 2049, 16384, 50_001)),
    *((1000, offset, shift) for offset in (0, 1, 2, 3, 77, 128) for shift in (0, 1, 3)),
    (4099, 2**34 - 50, 2),  # quads beyond 32 bits
    (70_003, 5, 3),
    (70_003, 4, 0),
]


@dataclass
class Side:
    """``ops`` has the CUDA library's ops, which take tensors on ``device``; ``capturing`` is a context that records
    them instead, and gives what replays them."""

    ops: Any
    device: str
    capturing: Callable[[], AbstractContextManager[Callable[[], None]]]

    def to(self, x: Any, shift: int = 0) -> Any:
        """Copies on the device, each amid poison and ``shift`` elements behind an aligned address."""
        if not isinstance(x, Tensor):
            return [self.to(one, shift) for one in x]
        whole = torch.full((x.numel() + 2 * GUARD + shift,), math.nan, device=self.device).to(x.dtype)
        return whole[GUARD + shift : GUARD + shift + x.numel()].view(x.shape).copy_(x)


def cpu() -> Any:
    """The CPU library's ops."""
    if not native.available("cpu"):
        pytest.skip(f"nothing to compare with: {native.why_not('cpu')}")
    return torch.ops.dpfast


def assert_same(got: Any, want: Any) -> None:
    """The same bits, but for what a NaN carries."""
    if not isinstance(got, Tensor):
        assert len(got) == len(want)
        for pair in zip(got, want, strict=True):
            assert_same(*pair)
        return
    got = got.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    bits = [x.masked_fill(x.isnan(), 0).contiguous().view(integers) for x in (got, want)]
    different = (bits[0] != bits[1]).nonzero()
    assert len(different) == 0, f"{len(different)} of {got.numel()} differ, first at {different[0].tolist()}"


def assert_guards(tensors: list[Tensor]) -> None:
    """Nothing was written beside tensors made by :meth:`Side.to`."""
    for x in tensors:
        start, whole = x.storage_offset(), torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        assert whole[:start].isnan().all() and whole[start + x.numel() :].isnan().all(), "written beside the tensor"


def assert_close(got: Tensor, want: Tensor, size: Tensor, units: float) -> None:
    """``|got - want| ≤ units · u · size``, u half a unit in the last place of the type that sums are made in."""
    assert got.dtype == want.dtype and got.shape == want.shape
    error = (got.cpu().double() - want.double()).abs()
    assert (error <= units * torch.finfo(want.dtype).eps / 2 * size + 1e-300).all()


# ---------------------------------------------------------------- noise


def inputs(dtype: torch.dtype, places: list[tuple[int, int, int]]) -> list[Tensor]:
    """Sums, some elements of which are infinite, NaN, or beyond what secure noise has 32 bits for."""
    wide = F64 if dtype == F64 else F32
    made = [3 * torch.randn(n, dtype=wide) for n, _, _ in places]
    for x in made:
        if len(x) > 100:
            x[[0, 1, 2, len(x) // 2]] = torch.tensor([math.nan, 1e30, -0.0, math.inf], dtype=wide)
    return made


def noisy_grad(side: Side, dtype: torch.dtype, mode: str, places: list[tuple[int, int, int]] = PLACES) -> None:
    std, grid = MODES[mode]
    places = [(n, o if mode == "fast" or o < 2**33 else 999, s) for n, o, s in places]
    sums, offsets = inputs(dtype, places), [offset for _, offset, _ in places]
    arguments = (torch.randperm(len(sums)).tolist(), offsets, KEY, 7, std, grid, 0.1)
    want = [torch.empty_like(x, dtype=dtype) for x in sums]
    cpu().noisy_grad_(sums, want, *arguments)
    theirs = [side.to(x, shift) for x, (_, _, shift) in zip(sums, places, strict=True)]
    grads = [side.to(torch.empty_like(x), 3 * shift % 4) for x, (_, _, shift) in zip(want, places, strict=True)]
    side.ops.noisy_grad_(theirs, grads, *arguments)
    assert_guards(grads)
    assert_same(grads, want)
    assert_same(theirs, sums)
    if dtype in (F32, F64):
        side.ops.noisy_grad_(theirs, theirs, *arguments)
        assert_guards(theirs)
        assert_same(theirs, want)


def many_tensors(side: Side, count: int = 1900) -> None:
    """More than a launch's table holds, of several dtypes."""
    dtypes = [DTYPES[k % 4] for k in range(count)]
    sums = [torch.randn(k % 7, dtype=F64 if dtype == F64 else F32) for k, dtype in enumerate(dtypes)]
    want = [torch.empty_like(x, dtype=dtype) for x, dtype in zip(sums, dtypes, strict=True)]
    arguments = (list(range(count)), [k % 5 for k in range(count)], KEY, 3, 1.3, 0.0, 0.5)
    cpu().noisy_grad_(sums, want, *arguments)
    theirs, grads = side.to(sums), side.to(want)
    side.ops.noisy_grad_(theirs, grads, *arguments)
    assert_same(grads, want)


def standard_normal(side: Side, mode: str, n: int, offset: int) -> None:
    grid = MODES[mode][1]
    want, got = torch.empty(n), side.to(torch.empty(n), 1)
    cpu().standard_normal(want, KEY, 5, 6, offset, grid)
    side.ops.standard_normal(got, KEY, 5, 6, offset, grid)
    assert_guards([got])
    assert_same(got, want)


UPDATES = list(itertools.product(("sgd", "momentum", "adam", "amsgrad", "corrected"), (0, 1), (False, True)))


def update(side: Side, dtype: torch.dtype, mode: str, rule: str, rounding: int, extras: bool) -> None:
    """``extras``: gradients are written and, for 16-bit parameters, master copies kept."""
    std, grid = MODES[mode]
    places = [(n, o if o < 2**33 else 999, s) for n, o, s in PLACES[4:]]
    sums = [x.nan_to_num(0.5, 2.0, -2.0) for x in inputs(F32, places)]
    parameters, offsets = list(range(len(sums))), [offset for _, offset, _ in places]

    def new(positive: bool = False) -> list[Tensor]:
        made = [torch.randn_like(x) for x in sums]
        return [(x.abs() if positive else x).to(dtype) for x in made]

    params, states = new(), [new(k > 0) for k in range({"sgd": 0, "momentum": 1, "amsgrad": 3}.get(rule, 2))]
    masters = [p.float() + 1e-4 * torch.randn_like(x) for p, x in zip(params, sums, strict=True)] if extras else []
    for p, master in zip(params, masters, strict=False):
        p[::2] = master.to(dtype)[::2]  # the others were set from outside
    grads = new() if extras else []
    noise = (parameters, offsets, KEY, 7, std, grid, 0.1)
    shifts = [shift for _, _, shift in places]

    def run(ops: Any, sums: list[Tensor], lists: list[list[Tensor]]) -> None:
        grads, params, masters, *states = lists
        if rule in ("sgd", "momentum"):
            options = (0.05, 0.9 if states else 0.0, 0.1, 0.01, bool(states), False, False, rounding, [3, 4])
            ops.noisy_sgd_(sums, grads, params, states[0] if states else [], masters, *noise, *options)
        else:
            largest = states[2] if len(states) == 3 else []
            correction = (0.02, 1e-3) if rule == "corrected" else (0.0, 0.0)
            options = (0.05, 0.9, 0.99, 1e-8, 0.01, 3.0, *correction, rule == "adam", False, rounding, [3, 4])
            ops.noisy_adam_(sums, grads, params, states[0], states[1], largest, masters, *noise, *options)

    lists = [grads, params, masters, *states]
    shifted = [[side.to(x, shifts[k]) for k, x in enumerate(tensors)] for tensors in lists]
    run(side.ops, [side.to(x, shifts[k]) for k, x in enumerate(sums)], shifted)
    run(cpu(), sums, lists)
    for got, want in zip(shifted, lists, strict=True):
        assert_guards(got)
        assert_same(got, want)


# ---------------------------------------------------------------- updates in a graph

RULES = {
    "sgd": (ops.SGD(0.05, maximize=True), 0),
    "momentum": (ops.SGD(0.05, 0.9, 0.1, 0.01, nesterov=True), 1),
    "first momentum": (ops.SGD(0.05, 0.9, 0.1, 0.01, first=True), 1),
    "adam": (ops.Adam(0.05, 0.9, 0.99, 1e-8, 0.01, t=3.0), 2),
    "corrected": (ops.Adam(0.05, 0.9, 0.99, 1e-8, 0.01, t=3.0, noise=0.02, floor=1e-3), 2),
    "amsgrad": (ops.Adam(0.05, 0.9, 0.999, 1e-8, 0.01, t=1.0, decoupled=True, maximize=True), 3),
}
LATER_RULES = {
    "t": 70_001.0,
    "lr": 0.003,
    "noise": 0.3,
    "beta2": 0.9999,
    "momentum": 0.7,
}  # what changes from one step to the next


def updates_in_a_graph(side: Side, dtype: torch.dtype, mode: str, name: str, rounding: str) -> None:
    """One graph of an update, replayed under other keys, steps and hyperparameters: each time what the call of this one
    step writes, on the CPU, to the bit; and nothing where it is told so."""
    rule, count = RULES[name]
    slots = 1 if isinstance(rule, ops.SGD) else 3
    unused: list[list[Tensor]] = [[]] * (slots - count)
    std, grid = MODES[mode]
    places = [(130, 3, 1), (1000, 128, 0), (0, 0, 0), (7, 2**34 - 3 if mode == "fast" else 0, 0)]
    sums = [torch.randn(n) for n, *_ in places]
    kept = [[torch.randn(n).abs().to(dtype) for n, *_ in places] for _ in range(1 + count)]
    masters = [x.float() for x in kept[0]] if dtype != F32 and rounding == "nearest" else []
    indices, offsets = [4, 0, 9, 2], [offset for _, offset, _ in places]
    empty = [x.to(dtype) for x in sums]

    def copied(to: Callable[[Any], Any]) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor]]:
        return to(sums), to(empty), [to(each) for each in kept], to(masters)

    def flat(given: tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        _, grads, (params, *states), copies = given
        return [*grads, *params, *itertools.chain(*states), *copies]

    theirs, here = copied(side.to), copied(lambda x: [y.clone() for y in x])
    numbers = torch.zeros(ops.NUMBERS, dtype=F64, device=side.device)
    words = torch.zeros(ops.WORDS, dtype=torch.int64, device=side.device)
    lost = torch.zeros(300, dtype=torch.bool, device=side.device)

    def call() -> None:
        gave, grads, (params, *states), copies = theirs
        op = side.ops.noisy_sgd_in_graph_ if slots == 1 else side.ops.noisy_adam_in_graph_
        common = (copies, indices, offsets, numbers, words, lost, grid > 0, ROUNDINGS.index(rounding))
        op(gave, grads, params, *states, *unused, *common)

    with side.capturing() as replay:
        call()
    before = [x.clone() for x in flat(theirs)]
    seen: list[Tensor] = []
    for step in range(4):
        noise = ops.Noise((*KEY[step:], *KEY[:step]), 7 + step, std * (1 + step), grid, 0.1)
        changed = {key: value for key, value in LATER_RULES.items() if step > 1 and hasattr(rule, key)}
        now = replace(rule, **changed) if not (name == "sgd" and "momentum" in changed) else replace(rule, lr=0.003)
        rounding_key = (3 + step, 2**32 - 1 - step)
        for x, y in zip(theirs[0], sums, strict=True):
            x.copy_(y)
        given = torch.tensor(ops.numbers_of(now, noise), dtype=F64), torch.tensor(ops.words_of(noise, rounding_key))
        for writes, which in ((0.0, ()), (1.0, (step,)), (1.0, (299, 0)), (1.0, ())):
            numbers.copy_(given[0])[0] = writes
            words.copy_(given[1])
            lost.zero_()[list(which)] = True
            replay()
            if not writes or which:
                assert_same(flat(theirs), [x.cpu() for x in before])
        params, *states = here[2]
        states += unused
        ops.noisy_step_(now, params, sums, here[1], states, here[3], indices, noise, rounding, rounding_key, offsets)
        assert_same(flat(theirs), flat(here))
        before = [x.clone() for x in flat(theirs)]
        seen.append(theirs[1][1].float().cpu().clone())
    assert_guards([x for x in flat(theirs) if x.numel()])
    distinct = {tuple(x.tolist()) for x in seen}
    assert len(distinct) == (len(seen) if std else 1)  # another noise every time


def captured_keys(side: Side) -> None:
    """An op whose key and step are among its arguments is not let into a graph; nothing is written, then or later."""
    x, noise = side.to(torch.ones(8)), ([0], [0], KEY, 1, 1.0, 0.0, 1.0)
    sgd = (0.1, 0.0, 0.0, 0.0, False, False, False, 0, [1, 2])
    adam = (0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, 0.0, 0.0, False, False, 0, [1, 2])
    p, m, v = side.to(torch.ones(3, 8))
    calls = {
        "standard_normal": lambda: side.ops.standard_normal(x, KEY, 1, 0, 0, 0.0),
        "noisy_grad_": lambda: side.ops.noisy_grad_([x], [x], *noise),
        "noisy_sgd_": lambda: side.ops.noisy_sgd_([x], [], [p], [], [], *noise, *sgd),
        "noisy_adam_": lambda: side.ops.noisy_adam_([x], [], [p], [m], [v], [], [], *noise, *adam),
    }
    with side.capturing() as replay:
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"{name} is being captured by a CUDA graph.*dpfast\.graphed"):
                call()
    replay()
    assert_same([x, p, m, v], [torch.ones(8)] * 4)


# ---------------------------------------------------------------- norms and sums


def clip_factors(side: Side, function: int) -> None:
    squared = 9 * torch.rand(3, 1000, dtype=F64) ** 4
    bounds = 1e-6 * squared
    squared[[0, 1, 2, 1], [5, 7, 8, 9]] = torch.tensor([math.nan, math.inf, 0.0, 1.7e308], dtype=F64)
    bounds[[2, 1], [8, 9]] = torch.tensor([0.0, 1e308], dtype=F64)
    arguments = (squared, bounds, torch.tensor([0.5, 1.0, 2.0], dtype=F64))
    factors, count = side.ops.clip_factors(*side.to(arguments), function, 0.7, 3.0)
    want, expected = cpu().clip_factors(*arguments, function, 0.7, 3.0)
    assert_same(factors, want)
    assert count.item() == expected.item() == 3


def samples(batch: int) -> list[Tensor]:
    """Of every dtype and of sizes around those of quads, tiles and pieces."""
    sizes = (0, 1, 3, 4, 127, 128, 129, 513, *((8191, 8192, 8193, 20_000) if batch < 50 else ()))
    return [draw(dtype, batch, n) for dtype in DTYPES for n in sizes]


def squared_norms(side: Side, batch: int) -> None:
    tensors = samples(batch)
    want = cpu().squared_norms(tensors)
    got = side.ops.squared_norms([side.to(x) for x in tensors])
    torch.testing.assert_close(got.cpu(), want, rtol=1e-14, atol=0)
    # the same bits at any address
    assert_same(side.ops.squared_norms([side.to(x, k % 4) for k, x in enumerate(tensors)]), got.cpu())


def weighted_sums(side: Side, batch: int, dtype: torch.dtype, shared: bool) -> None:
    tensors = samples(batch)
    factors = torch.rand(batch, dtype=dtype) if shared else torch.rand(len(tensors), batch, dtype=dtype)
    factors[..., 1::5] = 0
    for x in tensors:
        x[1::5] = math.nan  # must not be multiplied by 0
    want = cpu().weighted_sums(tensors, factors)
    got = side.ops.weighted_sums([side.to(x) for x in tensors], side.to(factors))
    for k, (x, one, other) in enumerate(zip(tensors, got, want, strict=True)):
        size = (x.double().nan_to_num() * (factors if shared else factors[k]).double()[:, None]).abs().sum(0)
        assert_close(one, other, size, 40)
    again = side.ops.weighted_sums([side.to(x, k % 4) for k, x in enumerate(tensors)], side.to(factors))
    assert_same(again, [x.cpu() for x in got])


SHAPES = [(0, 3, 4), (2, 0, 5), (3, 1, 1), (2, 5, 7), (3, 40, 130), (1, 300, 64), (2, 257, 516), (4, 16, 128)]


def positions(side: Side, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    G, x = draw(dtype, *shape), draw(dtype, *shape)
    got, want = side.ops.sum_positions(side.to(G)), cpu().sum_positions(G)
    size = G.double().abs().sum(1)
    assert_close(got[0], want[0], size, 40)
    torch.testing.assert_close(got[1].cpu(), got[0].cpu().double().square().sum(1), rtol=1e-14, atol=0)
    for centred, statistics in itertools.product((True, False), {F32, F64 if dtype == F64 else F32, dtype}):
        mean, rstd = torch.randn(shape[:2]).to(statistics), torch.rand(shape[:2]).to(statistics)
        mean = mean if centred else mean.new_empty(0)
        got = side.ops.normalised_sums(*side.to([G, x, mean, rstd]))
        want = cpu().normalised_sums(G, x, mean, rstd)
        spread = (x.double().abs() + (mean.double().abs()[..., None] if mean.numel() else 0)) * rstd.double()[..., None]
        assert_close(got[0], want[0], (G.double().abs() * spread).sum(1), 40)
        assert_close(got[2], want[2], size, 40)
        for k in (0, 2):
            squares = got[k].cpu().double().square().sum(1)
            torch.testing.assert_close(got[k + 1].cpu(), squares, rtol=1e-14, atol=0)


# B, T, d, ids
TABLES = [
    *((0, 3, 4, 5), (2, 0, 5, 5), (3, 1, 1, 2), (2, 5, 7, 3), (3, 40, 130, 4), (3, 40, 130, 1000), (1, 300, 64, 2)),
    *((2, 257, 516, 9), (5, 33, 128, 1), (4, 31, 20, 6), (2, 128, 4, 1), (9, 64, 12, 40)),
]


def embedding(side: Side, dtype: torch.dtype, table: tuple[int, int, int, int]) -> None:
    B, T, d, rows = table
    ids, G = torch.randint(rows, (B, T)), draw(dtype, B, T, d)
    place = ids.unsqueeze(-1).expand(B, T, d)
    exact = torch.zeros(B, rows, d, dtype=F64).scatter_add_(1, place, G.double()).square().sum((1, 2))
    squared, bound = (x.cpu() for x in side.ops.embedding_squared_norm(ids.to(side.device), side.to(G)))
    torch.testing.assert_close(squared, exact, rtol=1e-12, atol=0)
    assert ((squared - exact).abs() <= bound).all()
    u, tiny = torch.finfo(F64 if dtype == F64 else F32).eps / 2, torch.finfo(F64 if dtype == F64 else F32).tiny
    assert (bound >= 8 * u * squared + T * d * tiny).all() and (bound <= 1e-3 * squared + 2 * T * d * tiny).all()
    for factor_dtype in (F32, F64):
        factors, poisoned = torch.rand(B, dtype=factor_dtype), G.clone()
        factors[1:2], poisoned[1:2] = 0, math.nan
        arguments = ids.to(side.device), side.to(poisoned, 1), side.to(factors), rows + 1
        got, want = side.ops.embedding_sum(*arguments), cpu().embedding_sum(ids, poisoned, factors, rows + 1)
        terms = poisoned.double().nan_to_num().abs() * factors.double().view(B, 1, 1)
        size = torch.zeros(rows + 1, d, dtype=F64).index_add_(0, ids.flatten(), terms.flatten(0, 1))
        assert_close(got, want, size, 40)
        assert_same(side.ops.embedding_sum(*arguments), got.cpu())


# ---------------------------------------------------------------- arguments


def refusals(side: Side) -> None:
    """Messages name the argument; nothing is written."""
    x, ops = side.to(torch.ones(8)), side.ops
    noise = [0], [0], KEY, 1, 1.0, 0.0, 1.0
    cases = [
        ("must be contiguous", lambda: ops.noisy_grad_([x], [side.to(torch.ones(16))[::2]], *noise)),
        ("bad dtype", lambda: ops.noisy_grad_([x], [side.to(torch.ones(8, dtype=F64))], *noise)),
        ("key must have 8 words", lambda: ops.noisy_grad_([x], [x], [0], [0], KEY[:7], 1, 1.0, 0.0, 1.0)),
        ("one parameter index", lambda: ops.noisy_grad_([x], [x], [], [0], KEY, 1, 1.0, 0.0, 1.0)),
        ("factors must have the shape", lambda: ops.weighted_sums([x.view(2, 4)], side.to(torch.ones(3)))),
        ("G must be", lambda: ops.sum_positions(x)),
        ("ids must be int64", lambda: ops.embedding_squared_norm(x.view(2, 4).int(), x.view(2, 4, 1))),
        ("numbers must be float64", lambda: ops.noisy_sgd_in_graph_([x], [], [x], [], [], [0], [0], x, x, x, False, 0)),
        ("squared must be float64", lambda: ops.clip_factors(*[x.view(1, 8)] * 2, x[:1], 0, 1.0, 1.0)),
    ]
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    assert_same(x, torch.ones(8))
