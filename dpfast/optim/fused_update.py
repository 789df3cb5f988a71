"""Whether and how the wrapped optimizer's own update is made in the pass that adds the noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from dpfast import ops
from dpfast.distributed.ranks import first_element, like, local
from dpfast.noise.parts import StepNoise, only
from dpfast.optim.noise_correction import NOISE_VARIANCE, corrected, note

LOW_PRECISION = ("nearest", "stochastic", "master")
MASTER = "master_param"  # in the optimizer's state, beside torch's own


def why_not_fused(optimizer: Optimizer) -> str | None:
    """Why torch's own step must run after the noise; None if noise and update can be one pass."""
    if type(optimizer) not in (SGD, Adam, AdamW):
        return f"{type(optimizer).__name__} has no fused update"
    if is_step_replaced(optimizer, type(optimizer)):
        return "its step method was replaced"
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any(hooks) or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return "it has step hooks"
    op = "noisy_sgd_" if type(optimizer) is SGD else "noisy_adam_"
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("differentiable"):
            return "capturable and differentiable keep torch's own step"
        numbers = [group["lr"], group["weight_decay"], *group.get("betas", ())]
        if any(isinstance(number, Tensor) for number in numbers):
            return "a hyperparameter is a tensor"
    key = _key(optimizer)
    look = _looks.get(optimizer)
    if look is None or look.key != key:
        look = _looks[optimizer] = _Look(key, _why_not_these(optimizer, op))
    return look.why_not


class _Look:
    """What was found in an optimizer's parameters and state, as they were then."""

    def __init__(self, key: Any, why_not: str | None):
        self.key, self.why_not = key, why_not
        self.parts: set[tuple[int, ...]] = set()  # the parameters of each update (a bucket of ranks') that was checked
        self.places: dict[int, tuple[Tensor, int, int]] = {}  # of a parameter, by its id

    def place(self, p: Any, index: Mapping[Any, int]) -> tuple[Tensor, int, int]:
        """This rank's part of ``p``, and where it is in the noise stream: index and first element."""
        place = self.places.get(id(p))
        if place is None:
            place = self.places[id(p)] = (local(p.detach()), index[p], first_element(p))
        return place


_looks: WeakKeyDictionary[Optimizer, _Look] = WeakKeyDictionary()


def _key(optimizer: Optimizer) -> Any:
    """Another one when a parameter, its memory or the state is another one."""
    params = [
        (id(p), p.requires_grad, p.dtype, p.data_ptr()) for group in optimizer.param_groups for p in group["params"]
    ]
    fused = [bool(group.get("fused")) for group in optimizer.param_groups]
    return params, fused, id(optimizer.state), len(optimizer.state)


def _why_not_these(optimizer: Optimizer, op: str) -> str | None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not p.requires_grad:
                continue
            if p.dtype not in ops.PARAMETER_DTYPES or not local(p).is_contiguous():
                return f"a parameter is {p.dtype if local(p).is_contiguous() else 'not contiguous'}"
            if not ops.is_native(op, p.device):
                return f"no compiled library for {p.device.type}"
            if p.device.type != "cpu" and group.get("fused"):
                return "fused=True keeps its step counter on the device"
            moments = (value for name, value in optimizer.state.get(p, {}).items() if name not in ("step", MASTER))
            if any(isinstance(m, Tensor) and (m.dtype != p.dtype or not local(m).is_contiguous()) for m in moments):
                return "optimizer state of another dtype or layout"
    if _share_memory([local(p) for group in optimizer.param_groups for p in group["params"]]):
        return "parameters share memory"
    return None


def is_step_replaced(optimizer: Optimizer, kind: type[Optimizer]) -> bool:
    """Whether the optimizer's step is another than ``kind``'s, be it beneath what a scheduler has wrapped around it."""
    step: Any = optimizer.step
    # By where the wrapper is defined: its attributes go over to whatever is wrapped around it.
    while getattr(step, "__globals__", None) is vars(lr_scheduler):
        step = step.__wrapped__
    return getattr(step, "__func__", step) is not kind.step


def _share_memory(params: Sequence[Tensor]) -> bool:
    spans: dict[torch.device, list[tuple[int, int]]] = defaultdict(list)
    for p in params:
        start, length = p.data_ptr(), p.nbytes
        if length:
            spans[p.device].append((start, start + length))
    return any(b[0] < a[1] for its in spans.values() for a, b in pairwise(sorted(its)))


def noisy_step(
    optimizer: Optimizer,
    summed: Mapping[Any, Tensor],
    index: Mapping[Any, int],
    noise: StepNoise,
    low_precision: str = "nearest",
    rounding_key: tuple[int, int] = (0, 0),
    floor: float = 0.0,
) -> None:
    """Noise, scale and update in one pass; ``p.grad`` then holds the noisy gradient.

    :func:`why_not_fused` has just said None: what it has looked at is not looked at again.

    Args:
        summed: float32 clipped sums of the parameters to update.
        index: each parameter's index in the noise stream.
        low_precision: how 16-bit parameters take an update: ``"nearest"``, ``"stochastic"`` rounding, or through a
            float32 ``"master"`` copy, which is kept in the optimizer's state.
        floor: of Adam's second moments without the noise's variance; 0 to leave that in them.
    """
    look, part = _looks[optimizer], tuple(map(id, summed))
    checked = part in look.parts
    for known in updates(optimizer, summed, index, low_precision, floor, noise.part_of):
        of_part = noise.parts[known.part]
        update = known.with_noise(of_part)
        sums = [summed[p] for p in update.params]
        grads = update.grads(sums)
        ops.noisy_step_(
            update.rule,
            update.parts,
            sums,
            grads,
            update.states,
            update.masters,
            update.indices,
            of_part,
            update.rounding,
            rounding_key,
            update.firsts,
            checked=checked,
        )
        update.end(grads)
    look.parts.add(part)
    end_step(optimizer)


def end_step(optimizer: Optimizer) -> None:
    """A scheduler asks whether the step that it has wrapped was taken."""
    if "step" in vars(optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined]


class Update(NamedTuple):
    """Parameters that one call of the op updates: those of one group, dtype, noise and history."""

    rule: ops.SGD | ops.Adam
    params: Sequence[Any]
    parts: list[Tensor]  # what this rank has of each
    indices: list[int]  # in the noise stream
    firsts: list[int]  # elements
    states: list[list[Tensor]]
    masters: list[Tensor]
    rounding: str
    steps: list[Tensor]  # counters, which do not count this step yet
    kept: list[dict[str, Any]]  # the optimizer's state of each
    noise_before: float | None  # of the second moments' noise, what is known of the steps before
    part: int  # of the step's noise

    def with_noise(self, noise: ops.Noise) -> Update:
        """The update of a step with this noise."""
        if not isinstance(self.rule, ops.Adam) or not self.rule.floor:
            return self
        return self._replace(rule=corrected(self.rule, self.noise_before, noise))

    def grads(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Where the op writes noisy gradients: float32 ones into the sums themselves."""
        if self.parts[0].dtype != torch.float32:
            return [torch.empty_like(part) for part in self.parts]
        return [x if x.shape == part.shape else x.view(part.shape) for x, part in zip(sums, self.parts, strict=True)]

    def end(self, grads: Sequence[Tensor]) -> None:
        """The op has written."""
        if self.steps:
            torch._foreach_add_(self.steps, 1)
            note(self.rule, self.kept)
        changed = [*self.params, *self.masters, *(state for states in self.states for state in states)]
        torch.autograd.graph.increment_version(changed)  # a graph kept from before is stale
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = like(grad, p)


def updates(
    optimizer: Optimizer,
    trained: Collection[Any],
    index: Mapping[Any, int],
    low_precision: str,
    floor: float = 0.0,
    part_of: Callable[[Any], int] = only,
) -> Iterator[Update]:
    """The calls that update ``trained``. States that are missing are made; nothing else is changed."""
    look = _looks[optimizer]
    for group in optimizer.param_groups:
        alike: dict[tuple[torch.dtype, int], list[Any]] = {}
        for p in group["params"]:
            if p in trained:
                alike.setdefault((p.dtype, part_of(p)), []).append(p)
        for (dtype, part), same in alike.items():
            narrow = dtype != torch.float32
            rounding = "stochastic" if narrow and low_precision == "stochastic" else "nearest"
            for rule, noise_before, params in _by_rule(optimizer, group, same, floor):
                parts, indices, firsts = map(list, zip(*(look.place(p, index) for p in params), strict=True))
                masters = [_master(optimizer, p) for p in params] if narrow and low_precision == "master" else []
                states = _states(optimizer, group, params)
                kept = [optimizer.state[p] for p in params] if isinstance(rule, ops.Adam) else []
                steps = [state["step"] for state in kept]
                places = params, parts, indices, firsts
                yield Update(rule, *places, states, masters, rounding, steps, kept, noise_before, part)


def why_not_known(optimizer: Optimizer, trained: Collection[Any], low_precision: str) -> str | None:
    """Why a step of ``trained`` has to check parameters, or to make states; None if all are as a step before left them.

    :func:`why_not_fused` has just said None.
    """
    if tuple(map(id, trained)) not in _looks[optimizer].parts:
        return "its parameters or their memory are new"
    for group in optimizer.param_groups:
        names = [name for name, used in _used(optimizer, group).items() if used]
        names += [] if isinstance(optimizer, SGD) else ["step"]
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if p in trained and any(state.get(name) is None for name in names):
                return "its state is not there yet"
            if p in trained and low_precision == "master" and p.dtype != torch.float32 and not _has_master(state):
                return "its master copies are not there yet"
    return None


def look_of(optimizer: Optimizer) -> object:
    """Another one when a parameter, its memory or the state is another one.

    :func:`why_not_fused` has just said None.
    """
    return _looks[optimizer]


def _by_rule(
    optimizer: Optimizer, group: Mapping[str, Any], params: Sequence[Any], floor: float
) -> Iterator[tuple[ops.SGD | ops.Adam, float | None, Sequence[Any]]]:
    """The group's hyperparameters, with those of ``params`` that have the same history; states are torch's own.

    With a ``floor``, what is known of the noise in their second moments is a part of the history.
    """
    if isinstance(optimizer, SGD):
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        numbers = {name: group[name] for name in names}
        new = []
        if group["momentum"] != 0:  # without it torch's SGD makes no state
            new = [p for p in params if optimizer.state[p].get("momentum_buffer") is None]
            for p in new:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if new:
            yield ops.SGD(**numbers, first=True), None, new
        seen = {id(p) for p in new}
        if rest := [p for p in params if id(p) not in seen]:
            yield ops.SGD(**numbers), None, rest
        return
    for p in params:
        state = optimizer.state[p]
        if len(state) == 0 or set(state) == {MASTER}:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=p.device if group["fused"] else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p)
    steps = torch.stack([optimizer.state[p]["step"] for p in params]) + 1  # as each will be counted
    by_time: dict[tuple[float, float | None], list[Any]] = defaultdict(list)
    for p, t in zip(params, steps.tolist(), strict=True):
        by_time[t, optimizer.state[p].get(NOISE_VARIANCE) if floor else None].append(p)
    beta1, beta2 = group["betas"]
    for (t, noise_before), same in by_time.items():
        yield (
            ops.Adam(
                group["lr"],
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                t=t,
                floor=floor,
                decoupled=group["decoupled_weight_decay"],
                maximize=group["maximize"],
            ),
            noise_before,
            same,
        )


def _used(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, bool]:
    """States that the op takes, and whether the group has them."""
    if isinstance(optimizer, SGD):
        return {"momentum_buffer": group["momentum"] != 0}
    return {"exp_avg": True, "exp_avg_sq": True, "max_exp_avg_sq": group["amsgrad"]}


def _states(optimizer: Optimizer, group: Mapping[str, Any], params: Sequence[Any]) -> list[list[Tensor]]:
    """A list for each state that the op takes, empty where the group does without it."""
    used = _used(optimizer, group)
    return [[local(optimizer.state[p][name]) for p in params] if here else [] for name, here in used.items()]


def _has_master(state: Mapping[str, Any]) -> bool:
    return MASTER in state and state[MASTER].dtype == torch.float32  # torch's load_state_dict rounds it


def make_masters(optimizer: Optimizer) -> None:
    """The float32 copies of ``low_precision="master"``, where they are not there yet."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and p.dtype != torch.float32:
                _master(optimizer, p)


def _master(optimizer: Optimizer, p: Any) -> Tensor:
    state = optimizer.state[p]
    if not _has_master(state):
        state[MASTER] = p.detach().float()
    return local(state[MASTER])
