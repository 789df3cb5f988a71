"""Noise, and the optimizer's update in the noise's pass, beside torch's own ops: for the kernels' suite.

What an op made is compared at both ends of its tensors with the reference in float64, rounded as the op's own dtype:
noise is a pure function of key, step, parameter and element, so that no more needs to be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, cycle
from typing import Any

import torch
from torch import Tensor

from bench.suites.kernel_cases import Case, CaseSet, Sizes, relative_error, sets_of
from dpfast import ops
from dpfast.reference.noisy_grad import noisy_grad_ as reference_noisy_grad_

KEY = (1, 2, 3, 4, 5, 6, 7, 8)
MODES = {"fast": (1.0, 0.0), "secure": (1.0, 2.0**-24), "none": (0.0, 0.0)}  # std, grid
COMPARED = 1 << 14  # elements at each end
FEW = 6  # tensors at each end of a list
NOISE_ERROR = 1e-5  # float32 arithmetic, rounded once
UPDATE_ERROR = 5e-3  # of a 16-bit update: float32 arithmetic now and then falls on the other side of a rounding
# Floating-point operations of an element, about; what generators do with integers is not counted.
NORMAL, ADAM, MOMENTUM = 26, 14, 6
LR, BETAS, EPS, DECAY, T, MOMENT = 1e-3, (0.9, 0.999), 1e-8, 0.01, 3, 0.9
LARGE_LR = 0.1  # for bfloat16, whose parameters a small step would leave as they are


def case_sets(sizes: Sizes, device: torch.device) -> list[CaseSet]:
    """Updates only where the compiled library has them: without it they are not one pass."""
    n = sizes.elements
    sets = [CaseSet(f"noise, {n:,} elements", "bytes", torch.float32, partial(noise_cases, n, device))]
    if ops.is_native("noisy_adam_", device):
        make = partial(update_cases, n // 4, device)
        sets.append(CaseSet(f"update, {n // 4:,} elements", "bytes", torch.float32, make))
    return sets


def shapes(n: int) -> list[int]:
    """Sizes of a transformer's parameters, about n elements in all."""
    width = 768 if n >= 1 << 22 else 16
    block = [width * width, width, width * 4 * width, 4 * width, width, width]
    return block * max(1, n // sum(block))


def noise_at(step: int, mode: str, scale: float) -> ops.Noise:
    std, grid = MODES[mode]
    return ops.Noise(KEY, step, std, grid, scale)


def noisy(summed: Sequence[Tensor], grads: Sequence[Tensor], noise: ops.Noise) -> None:
    """The compiled op itself where there is one: what Python checks before it is no part of a kernel."""
    parameters = list(range(len(summed)))
    if not ops.is_native("noisy_grad_", summed[0].device):
        return ops.noisy_grad_(summed, grads, parameters, noise)
    arguments = (list(noise.key), noise.step, noise.std, noise.grid, noise.scale)
    torch.ops.dpfast.noisy_grad_(list(summed), list(grads), parameters, [0] * len(summed), *arguments)


def ends(n: int) -> list[slice]:
    size = min(n, COMPARED)
    return [slice(0, size), slice(n - size, n)]


def wanted(summed: Tensor, at: slice, parameter: int, noise: ops.Noise) -> Tensor:
    """The noisy gradient of a piece, float64, by the reference."""
    source = summed.double()
    want = torch.empty_like(source)
    reference_noisy_grad_(source, want, parameter, at.start, noise.key, noise.step, noise.std, noise.grid, noise.scale)
    return want


def noise_cases(n: int, device: torch.device) -> list[Case]:
    """All of them together go from one set of buffers to the next: none finds in the cache what its neighbour left."""
    steps = count()
    sizes, sets = shapes(n), sets_of(4 * n)

    x = [torch.randn(n, device=device) for _ in range(sets)]
    y = [torch.empty_like(one) for one in x]
    half = [torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(sets)]
    many = [[list(torch.randn(sum(sizes), device=device).split(sizes)) for _ in range(2)] for _ in range(sets)]

    def copy() -> None:
        turn = next(steps) % sets
        y[turn].copy_(x[turn])

    def theirs() -> None:
        """On a GPU into a buffer that is there; elsewhere the two lines that a script has."""
        turn = next(steps) % sets
        source, target = x[turn], y[turn]
        if device.type == "cuda":
            torch.randn(n, out=target, device=device).add_(source).mul_(0.5)
        else:
            source.add_(torch.randn_like(source)).mul_(0.5)

    def case(name: str, moved: float, mode: str, buffers: list[tuple[list[Tensor], list[Tensor]]]) -> Case:
        total = sum(one.numel() for one in buffers[0][0])

        def call() -> None:
            step = next(steps)
            noisy(*buffers[step % sets], noise_at(step, mode, 0.5))

        flops = (3 + (NORMAL if mode != "none" else -2)) * total
        check = partial(noisy_error, *buffers[-1], noise_at(1 << 20, mode, 0.5))
        return Case(name, flops, moved * total, call, check, tolerance=NOISE_ERROR)

    apart = [([a], [b]) for a, b in zip(x, y, strict=True)]
    to_half = [([a], [b]) for a, b in zip(x, half, strict=True)]
    lists = [(a, b) for a, b in many]
    return [
        Case("torch: randn, add, mul", (NORMAL + 2) * n, 8 * n, theirs),
        Case("copy", 0, 8 * n, copy),
        case("noisy_grad_ without noise", 8, "none", apart),
        case("noisy_grad_ fast", 8, "fast", apart),
        case("noisy_grad_ fast, in place", 8, "fast", [(a, a) for a, _ in apart]),
        case("noisy_grad_ fast, to bfloat16", 6, "fast", to_half),
        case(f"noisy_grad_ fast, {len(sizes)} tensors", 8, "fast", lists),
        case("noisy_grad_ secure", 8, "secure", apart),
    ]


def noisy_error(summed: Sequence[Tensor], grads: Sequence[Tensor], noise: ops.Noise) -> float:
    places = [(k, at) for k in few(len(summed)) for at in ends(summed[k].numel())]
    want = [wanted(summed[k][at], at, k, noise).to(grads[k].dtype) for k, at in places]  # before it is written over
    noisy(summed, grads, noise)
    return relative_error([grads[k][at] for k, at in places], want)


def few(n: int) -> list[int]:
    """The first and the last of a list's places."""
    return sorted({*range(min(FEW, n)), *range(max(0, n - FEW), n)})


# ---------------------------------------------------------------- updates

State = list[list[Tensor]]  # summed, grads, params, then the optimizer's states: a list of tensors each


def update_cases(n: int, device: torch.device) -> list[Case]:
    """Ours also make the noise, scale, and leave the noisy gradient in ``grads``."""
    steps = count()
    sizes, sets = shapes(n), sets_of(16 * n)

    def theirs() -> Callable[[], Any]:
        param = torch.nn.Parameter(torch.randn(n, device=device))
        param.grad = torch.randn(n, device=device)
        return torch.optim.AdamW([param], lr=LR, fused=True).step

    fused = cycle([theirs() for _ in range(sets)])

    def case(
        name: str, moved: float, flops: float, rule: Callable[..., None], mode: str, state: Callable[[], State]
    ) -> Case:
        buffers = [state() for _ in range(sets)]
        turns = cycle(buffers)
        total = sum(one.numel() for one in buffers[0][0])
        narrow = buffers[0][2][0].dtype != torch.float32
        lr = LARGE_LR if narrow else LR

        def call() -> None:
            rule(next(turns), noise_at(next(steps), mode, LR), lr)

        def check() -> float:
            return update_error(rule, buffers[0], noise_at(1 << 20, mode, LR), lr)

        flops = (3 + NORMAL + flops) * total
        tolerance = UPDATE_ERROR if narrow else Case.tolerance
        return Case(name, flops, moved * total, call, check, tolerance=tolerance)

    one, many = partial(new_state, [n], device, torch.float32), partial(new_state, sizes, device, torch.float32)
    half = partial(new_state, [n], device, torch.bfloat16)
    return [
        Case("torch: fused AdamW, without noise", ADAM * n, 28 * n, lambda: next(fused)()),
        case("noisy_adam_ (AdamW) fast", 32, ADAM, adamw, "fast", one),
        case("noisy_adam_ (AdamW) secure", 32, ADAM, adamw, "secure", one),
        case(f"noisy_adam_ (AdamW) fast, {len(sizes)} tensors", 32, ADAM, adamw, "fast", many),
        case("noisy_adam_ (AdamW) fast, bfloat16", 18, ADAM, adamw, "fast", half),
        case("noisy_sgd_ with momentum, fast", 24, MOMENTUM, sgd, "fast", one),
    ]


def new_state(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> State:
    """``grads`` are the sums themselves where their dtype allows it."""
    made = [torch.rand(sum(sizes), device=device) for _ in range(4)]
    summed, *rest = [list(one.split(list(sizes))) for one in (made[0], *(one.to(dtype) for one in made[1:]))]
    grads = summed if dtype == torch.float32 else [torch.empty_like(one) for one in rest[0]]
    return [summed, grads, *rest]


def places_of(state: State, noise: ops.Noise) -> tuple[Any, ...]:
    count_ = len(state[0])
    return list(range(count_)), [0] * count_, list(noise.key), noise.step, noise.std, noise.grid, noise.scale


def adamw(state: State, noise: ops.Noise, lr: float) -> None:
    rule = (lr, *BETAS, EPS, DECAY, float(T), 0.0, 0.0, True, False, 0, [1, 2])
    torch.ops.dpfast.noisy_adam_(*state, [], [], *places_of(state, noise), *rule)


def sgd(state: State, noise: ops.Noise, lr: float) -> None:
    rule = (lr, MOMENT, 0.0, DECAY, False, False, False, 0, [1, 2])
    torch.ops.dpfast.noisy_sgd_(*state[:4], [], *places_of(state, noise), *rule)


def update_error(rule: Callable[..., None], state: State, noise: ops.Noise, lr: float) -> float:
    """Of the gradient, of how far parameters moved, and of the moments, beside torch's own optimizer in float64."""
    places = [(k, at) for k in few(len(state[0])) for at in ends(state[0][k].numel())]
    before = [[items[k][at].double() for items in state] for k, at in places]
    rule(state, noise, lr)
    got: list[Tensor] = []
    want: list[Tensor] = []
    for (k, at), (summed, _, param, *moments) in zip(places, before, strict=True):
        used = moments if rule is adamw else moments[:1]
        grad = wanted(summed, at, k, noise)
        moved, states = step_in_float64(rule, param, grad, used, lr)
        dtype = state[2][k].dtype  # what is kept is rounded to it
        want += [grad.to(dtype), moved.to(dtype).double() - param, *(one.to(dtype) for one in states)]
        got += [state[1][k][at], state[2][k][at].double() - param]
        got += [items[k][at] for items in state[3 : 3 + len(used)]]
    return relative_error(got, want)


def step_in_float64(
    rule: Callable[..., None], param: Tensor, grad: Tensor, moments: list[Tensor], lr: float
) -> tuple[Tensor, list[Tensor]]:
    """The parameter and the optimizer's states after torch's own step."""
    leaf = torch.nn.Parameter(param.clone())
    leaf.grad = grad
    optimizer: torch.optim.Optimizer
    if rule is adamw:
        optimizer = torch.optim.AdamW([leaf], lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False)
        names = ["exp_avg", "exp_avg_sq"]
        optimizer.state[leaf]["step"] = torch.tensor(T - 1.0)
    else:
        optimizer = torch.optim.SGD([leaf], lr=lr, momentum=MOMENT, weight_decay=DECAY, foreach=False)
        names = ["momentum_buffer"]
    optimizer.state[leaf].update({name: one.clone() for name, one in zip(names, moments, strict=True)})
    optimizer.step()
    return leaf.detach(), [optimizer.state[leaf][name] for name in names]
