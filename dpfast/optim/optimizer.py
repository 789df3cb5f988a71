"""The optimizer side of the "fused" mode: noise and scale the clipped sum, then step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from dpfast import ops
from dpfast.clipping.adaptive import AdaptiveClipping
from dpfast.clipping.clipped_sum import ClippedSum
from dpfast.clipping.grad_samples import all_grad_samples
from dpfast.clipping.thresholds import Clipping
from dpfast.distributed.ranks import Ranks, first_element, like, local
from dpfast.noise.parts import StepNoise
from dpfast.noise.stream import NoiseStream
from dpfast.ops.numbers import plain
from dpfast.optim.ascent import Ascending, Ascent, check_ascent
from dpfast.optim.copies import accountant_of, copied, pickled
from dpfast.optim.fused_update import MASTER, noisy_step, why_not_fused
from dpfast.optim.noise_correction import check_noise_correction
from dpfast.optim.step_checks import agree, check_low_precision, check_noise_multiplier, look_for_bypass, refuse_step
from dpfast.refusals import ParametersChangedError, ReplacedMethodError

# A step is never compiled: torch.compile was seen to make another update of it (on Python 3.12, where it follows more
# of Python). As torch.optim does it, without loading the compiler before it is there.
as_written = torch._disable_dynamo

PARTS = ("clip_and_accumulate", "add_noise", "scale_grad")  # of a step, as in Opacus
StepHook = Callable[[DPOptimizer], None]


class FusedDPOptimizer(DPOptimizer):
    """Adds noise once to the clipped sums of a logical batch, divides, and steps as the wrapped optimizer does.

    ``p.grad = (summed_grad + noise_multiplier · sensitivity · z) / expected_batch_size`` for every trainable
    parameter, also for those that the batch did not reach, and for an empty batch. Sum, noise and division are
    float32 (float64 for float64 parameters); only the result is rounded to the parameter's dtype. Where the wrapped
    optimizer is torch's SGD, Adam or AdamW and the compiled library is there, its update is made in the same pass,
    from the float32 gradient; its ``state`` and ``state_dict`` are torch's own.

    Privacy: the noise is scaled by the largest sensitivity that was in force when any part of the logical batch was
    clipped, so a clip scheduler that steps between backward and step cannot leave it too small.

    Args:
        optimizer: the wrapped optimizer.
        noise_multiplier: noise standard deviation over sensitivity; schedulers may change it.
        clipping: thresholds; ``max_grad_norm`` is its sensitivity, and setting it scales all thresholds.
        clipped_sum: where backward passes are summed up.
        expected_batch_size: divisor under ``loss_reduction="mean"``.
        loss_reduction: ``"mean"`` or ``"sum"``.
        generator: what the noise's key is made of; the operating system's if None.
        secure_mode: noise from ChaCha20, see :class:`~dpfast.noise.stream.NoiseStream`.
        low_precision: how 16-bit parameters take an update: rounded to the ``"nearest"``, with ``"stochastic"``
            rounding, or through a float32 ``"master"`` copy in the optimizer's state.
        noise_correction: whether Adam's second moments are relieved of the noise's variance, or the least that is left
            of one: see :mod:`dpfast.optim.noise_correction`.
        adaptive: how C follows a quantile of the norms; it is part of the ``noise_multiplier``'s budget.
        ascent: where the next step takes its gradients: see :mod:`dpfast.optim.ascent`.
        ranks: how the processes of a run share the step; clipped sums are added up over them, noise is added once.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        clipping: Clipping,
        clipped_sum: ClippedSum,
        expected_batch_size: int | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        low_precision: str = "nearest",
        noise_correction: bool | float = False,
        adaptive: AdaptiveClipping | None = None,
        ascent: Ascent | None = None,
        ranks: Ranks | None = None,
    ):
        check_noise_multiplier(noise_multiplier)
        if adaptive is not None:
            adaptive.of_sums(noise_multiplier, len(clipping.thresholds))
        check_low_precision(low_precision, optimizer)
        check_ascent(ascent, optimizer, low_precision)
        filters = ascent is not None and ascent.filters
        floor = check_noise_correction(
            noise_correction, optimizer, clipped_sum.names, filters=filters, why_not=why_not_fused(optimizer)
        )
        other = clipped_sum.optimizer() if clipped_sum.optimizer is not None else None
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        if other is not None and set(other.all_parameters()) != mine:
            raise ParametersChangedError(
                "optimizer: another private optimizer of this model has other parameters than this one, and the two "
                "would end each other's logical batches; delete it, or use one optimizer with param groups"
            )
        self.ranks = ranks or Ranks()
        self.noise = NoiseStream(generator, secure_mode, self.ranks)
        self.low_precision = low_precision
        self.noise_correction = floor  # the least that is left of a second moment; 0 for none
        self.adaptive = adaptive
        self.ascending = Ascending(ascent, optimizer, clipped_sum.names)
        self.clipping = clipping
        self.clipped_sum = clipped_sum
        self.stepped = False  # and not cleared since
        self.first_bypassed = 0  # 1 + the index of a sharded parameter that got a gradient past its tap
        self._divided = False  # gradients, in this step
        self._put_aside: dict[Any, torch.Tensor] = {}  # sums, while a replaced clip_and_accumulate makes its own
        self.keep_summed_grad = False  # until zero_grad(), also where nobody is known to look at it
        self.accounting: StepHook | None = None  # called once a step, whatever other hooks there are
        self._called: list[StepHook] = []  # in this step
        clipped_sum.ranks = self.ranks
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping.sensitivity,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
        )
        self._step_supports_amp_scaling = True  # torch's GradScaler then comes to step(), which refuses it
        clipped_sum.clipping = clipping
        clipped_sum.shift = self.ascending.shift
        clipped_sum.counts_unclipped = adaptive is not None
        clipped_sum.optimizer = weakref.ref(self)
        clipped_sum.tracked = set(self.all_parameters())

    @property
    def max_grad_norm(self) -> float:
        """The sensitivity of the clipped sum: C under flat clipping, ``√Σ C_r²`` over groups."""
        return self.clipping.sensitivity

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.clipping.sensitivity = value

    @property
    def max_grad_norms(self) -> list[float]:
        """The thresholds C_r of all groups."""
        return list(self.clipping.thresholds)

    @property
    def noise_scales(self) -> list[float]:
        """γ_r of all groups: noise has the standard deviation ``noise_multiplier · γ_r`` before division."""
        return self.clipping.noise_scales

    @property
    def accumulated_iterations(self) -> int:
        """Backward passes that one step accounts for: those between two calls of ``step`` (at least one)."""
        return max(1, self.clipped_sum.backwards)

    @property
    def noise_multiplier(self) -> Any:
        """Standard deviation of the noise, over the sensitivity; schedulers may set it, in NumPy's numbers too."""
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: Any) -> None:
        self._noise_multiplier = plain(value)

    @property
    def grad_samples(self) -> list[torch.Tensor]:
        """Per-sample gradients ``[B, *p.shape]``, with ``make_private(..., keep_grad_samples=True)``.

        Raises:
            ValueError: there are none.
        """
        return all_grad_samples(self.params)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the same model; they are clipped and noised from the next backward on."""
        given: Any = param_group["params"]
        added: list[Any] = [given] if isinstance(given, torch.Tensor) else list(given)
        if strange := [list(p.shape) for p in added if p not in self.clipped_sum.names]:
            raise ParametersChangedError(
                f"add_param_group: parameters of shapes {strange} are none of the model given to make_private, so "
                f"nothing clips their gradients: give make_private a model that has them"
            )
        self.original_optimizer.add_param_group({**param_group, "params": added})
        assert self.clipped_sum.tracked is not None
        self.clipped_sum.tracked.update(added)
        for p in added:
            p.summed_grad = None

    def __getattr__(self, name: str) -> Any:
        """Of adaptive clipping what Opacus' optimizer has as attributes: its arguments, and the counts of a step.

        The counts ``sample_size`` and ``unclipped_num`` are not private.
        """
        if (adaptive := vars(self).get("adaptive")) is not None:
            if hasattr(adaptive, name):
                return getattr(adaptive, name)
            if name == "sample_size":
                return self.clipped_sum.samples
            if name == "unclipped_num":
                counts = [count + self.clipped_sum.samples / 2 for count in self.clipped_sum.unclipped]
                return counts if len(self.clipping.thresholds) > 1 else sum(counts)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def has_own_parts(self) -> bool:
        """Whether a part of the step was replaced, by a subclass or on this very optimizer."""
        return any([self.has_own(name) for name in PARTS])

    def has_own(self, name: str) -> bool:
        """Whether the method ``name`` was replaced, by a subclass or on this very optimizer."""
        return name in vars(self) or getattr(type(self), name) is not getattr(FusedDPOptimizer, name)

    @as_written
    def clip_and_accumulate(self) -> None:
        """Put the clipped sums into ``p.summed_grad``: every backward has made them at its end."""
        for p, total in self._put_aside.items():
            p.summed_grad = total
        self._put_aside = {}

    @as_written
    def add_noise(self) -> None:
        """Noisy gradients, from every trainable parameter's ``summed_grad`` to its ``grad``; once a step.

        They are divided in the same pass, unless :meth:`scale_grad` was replaced, which then has that to do.
        """
        self._divided = not self.has_own("scale_grad")
        noise = self._next_noise(1 / self._divisor() if self._divided else 1.0)
        sums = _filled(self._take_sums())
        for p in self.all_parameters():
            p.grad = None
        for summed in self.ranks.totals(sums):
            grads = {
                p: total.view(local(p).shape) if p.dtype == total.dtype else torch.empty_like(total, dtype=p.dtype)
                for p, total in summed.items()
            }
            for part, of_part in enumerate(noise.parts):
                its = [p for p in summed if noise.part_of(p) == part]
                places = [self.clipped_sum.index[p] for p in its], of_part, [first_element(p) for p in its]
                ops.noisy_grad_([summed[p] for p in its], [grads[p] for p in its], *places)
            for p, grad in grads.items():
                p.grad = like(grad, p)

    @as_written
    def scale_grad(self) -> None:
        """Divide gradients, unless :meth:`add_noise` has done so in its own pass, as it does if neither is replaced."""
        if self._divided or self.loss_reduction != "mean":
            return
        self._divided = True
        for p in self.params:
            if p.grad is not None:
                p.grad /= self._divisor()

    def _divisor(self) -> float:
        """What a step divides noisy sums by."""
        if self.loss_reduction != "mean":
            return 1.0
        assert self.expected_batch_size is not None
        return self.expected_batch_size * self.accumulated_iterations

    def _next_noise(self, scale: float) -> StepNoise:
        """The noise that the sums of this logical batch get, of all ranks together; adaptive clipping then moves C.

        ``scale`` is what noisy sums are multiplied with.
        """
        check_noise_multiplier(self.noise_multiplier)
        clipping, adaptive = self.clipping, self.adaptive
        sensitivities = self.clipped_sum.in_force or clipping.in_force
        elements = [0] * len(sensitivities)
        for p in self.all_parameters():
            if p.requires_grad:
                elements[clipping.part_of(p)] += p.numel()
        multiplier = self.noise_multiplier
        if adaptive is not None:
            multiplier = adaptive.of_sums(multiplier, len(clipping.thresholds))
        parts = [
            (multiplier / share, sensitivity, count, scale)
            for share, sensitivity, count in zip(clipping.shares or [1.0], sensitivities, elements, strict=True)
        ]
        first = self.noise.next(*parts[0])
        noise = StepNoise([first, *(self.noise.beside(first, *part) for part in parts[1:])], clipping.part_of)
        if adaptive is not None:
            self._adapt(adaptive, first)
        return noise

    def _take_sums(self) -> dict[Any, torch.Tensor | None]:
        """This rank's clipped sums of the logical batch, None for what no sample has reached."""
        summed, keeps = {}, self._keeps_sums
        for p in self.all_parameters():
            if p.requires_grad:
                summed[p] = total = getattr(p, "summed_grad", None)
                p.summed_grad = total.clone() if keeps and total is not None else None
        return summed

    @property
    def _keeps_sums(self) -> bool:
        """Whether somebody may look at ``p.summed_grad`` between this step and ``zero_grad()``."""
        return self.keep_summed_grad or bool(self._hooks) or self.has_own_parts

    def _adapt(self, adaptive: AdaptiveClipping, noise: ops.Noise) -> None:
        """The next step's C of each group, from the noisy counts of samples that were not clipped."""
        assert self.expected_batch_size is not None
        groups = len(self.clipping.thresholds)
        multiplier = adaptive.of_counts(groups) if self.noise_multiplier > 0 else 0.0
        scale = 1 / (self.expected_batch_size * self.accumulated_iterations)
        beside = self.noise.beside(noise, multiplier, math.sqrt(groups) / 2, groups, scale)
        centred = torch.tensor(self.clipped_sum.unclipped or [0.0] * groups)
        ops.noisy_grad_([centred], [centred], [len(self.clipped_sum.index)], beside)
        pairs = zip(self.clipping.thresholds, centred.tolist(), strict=True)
        self.clipping.thresholds = [adaptive.next_threshold(C, fraction + 0.5) for C, fraction in pairs]

    @as_written
    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noise and scale, and account; False if this call only ends a physical batch."""
        if self.ascending.moves:
            raise ReplacedMethodError("pre_step: the ascent has to see the whole of a step; call step()")
        keeps, self.keep_summed_grad = self.keep_summed_grad, True
        try:
            return self._pre_step()
        finally:
            self.keep_summed_grad = keeps

    def _pre_step(self) -> bool:
        piece = self.clipped_sum.batches.piece
        if not self.begin_step():
            return False
        if self.has_own_parts:
            self._check_own_parts()
            reached = self._fill_sums()
            if reached and self.has_own("clip_and_accumulate"):
                self._clip_as_replaced(piece is None or piece.whole)
        self._account()
        self._divided = False
        try:
            self.add_noise()
            self.scale_grad()
            self.ascending.filter()
            self._call_hooks()
        finally:
            self._end_logical_batch()
        return True

    @as_written
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Noise, scale, account and update; only the end of a physical batch where a step is skipped."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        if self.has_own("pre_step"):
            self._check_update("the optimizer's pre_step was replaced")
            return self.original_optimizer.step() if self.pre_step() else None
        # A hook of the user's own is called with noisy gradients, before the update, as in Opacus; with an update that
        # torch's own step does not have, the hook sees none.
        for_hook = self.has_hooks and self.low_precision == "nearest" and not self.noise_correction
        why_not = "a method of the optimizer was replaced" if self.has_own_parts else None
        why_not = why_not or why_not_fused(self.original_optimizer)
        self._check_update(why_not)
        if for_hook or self.ascending.filters or why_not is not None:
            if not self._pre_step():
                return None
            self.ascending.see_gradients()
            self.ascending.before_update()
            loss = self.original_optimizer.step()
            self.ascending.after_update()
            return loss
        if self.begin_step():
            noise, key, found = self.open_update()
            sums = _filled(found)
            settings = self.low_precision, key, self.noise_correction
            with torch.no_grad():
                for summed in self.ranks.totals(sums):
                    noisy_step(self.original_optimizer, summed, self.clipped_sum.index, noise, *settings)
            self.close_update()
        return None

    def _check_update(self, why_not: str | None) -> None:
        """Refuse an update that torch's own step does not have, where that step would make it."""
        if self.low_precision != "nearest":
            check_low_precision(self.low_precision, self.original_optimizer, why_not)
        if self.noise_correction:
            names = self.clipped_sum.names
            check_noise_correction(self.noise_correction, self.original_optimizer, names, why_not=why_not)

    def _check_own_parts(self) -> None:
        if self.ranks.world_size > 1 or self.adaptive is not None or self.clipping.shares is not None:
            raise ReplacedMethodError(
                "step: a method of the optimizer was replaced (one of add_noise, scale_grad, clip_and_accumulate), "
                "which cannot be done on several ranks, with clipping='adaptive', or with another group_noise than "
                "'global': all of these go through dpfast's own noise"
            )

    def _fill_sums(self) -> bool:
        """What a replaced part of the step needs: every parameter's sum, in ``summed_grad``. Whether there was one."""
        missing = [p for p in self.params if getattr(p, "summed_grad", None) is None]
        for p in missing:
            p.summed_grad = torch.zeros(p.shape, dtype=ops.compute_dtype(p.dtype), device=p.device)
        return len(missing) < len(self.params)

    def _clip_as_replaced(self, whole: bool) -> None:
        """``clip_and_accumulate`` as in Opacus: it finds no sums, and adds to what it finds.

        Where it makes none, those that the backward passes have made are what is released.

        Raises:
            ValueError: it has made sums of its own, and the batch is no ``whole`` one; nothing was released.
        """
        self._put_aside = {p: p.summed_grad for p in self.params}
        for p in self.params:
            p.summed_grad = None
        try:
            self.clip_and_accumulate()
            if self._put_aside and any(p.summed_grad is not None for p in self.params):
                if not whole:
                    raise ReplacedMethodError(
                        "step: clip_and_accumulate was replaced, and has made sums of the last physical batch alone: "
                        "have it call the optimizer's own, or train without BatchMemoryManager"
                    )
                zeros = {p: torch.zeros_like(total) for p, total in self._put_aside.items() if p.summed_grad is None}
                self._put_aside = zeros
                own = self.clipping.in_force
                self.clipped_sum.in_force = [*map(max, self.clipped_sum.in_force or own, own)]
        finally:
            FusedDPOptimizer.clip_and_accumulate(self)

    def open_update(self) -> tuple[StepNoise, tuple[int, int], dict[Any, torch.Tensor | None]]:
        """:meth:`begin_step` has said yes: account for the step, and end its logical batch.

        Returns:
            The noise, which no other step gets; the key of stochastic rounding; and the sums that are to be released,
            by parameter, None where no sample was reached.
        """
        self._account()
        self._call_hooks()
        self.ascending.before_update()
        try:
            noise = self._next_noise(1 / self._divisor())
            sums = self._take_sums()
        finally:
            self._end_logical_batch()
        return noise, self.noise.rounding_key() if self.low_precision == "stochastic" else (0, 0), sums

    def close_update(self) -> None:
        """Parameters and ``p.grad`` are as the update has left them."""
        with torch.no_grad():
            self.ascending.see_gradients()
            self.ascending.after_update()

    @as_written
    def begin_step(self) -> bool:
        """Whether this call of step ends a logical batch; refuses what cannot be released."""
        refuse_step(self)
        self.clipped_sum.batches.tried = True  # what refuses from here on may be put right, and the step called again
        check_noise_multiplier(self.noise_multiplier)  # what can refuse does so before anything is used up
        if self.adaptive is not None:
            self.adaptive.of_sums(self.noise_multiplier, len(self.clipping.thresholds))
        self.noise.check()
        look_for_bypass(self)
        self._is_last_step_skipped = self.is_to_skip
        if self._is_last_step_skipped:
            self.clipped_sum.batches.stepped()
            if self.clipped_sum.batches.of is not None and self.clipped_sum.batches.of.dropped:
                self.clipped_sum.drop()
            return False
        agree(self)
        return True

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Whether the next ``step`` only ends a physical batch, which is not the last of its logical batch."""
        self.clipped_sum.batches.signal(last=not do_skip)

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        batches = self.clipped_sum.batches
        piece = batches.stepped() if pop_next else batches.piece
        return piece is not None and (not piece.last or piece.batch.dropped)

    @property
    def is_to_skip(self) -> bool:
        """Whether the next ``step`` only ends a physical batch."""
        return self._check_skip_next_step(pop_next=False)

    @property
    def has_hooks(self) -> bool:
        """Whether a step calls more than what accounts for it."""
        return bool(self._hooks)

    def expect_no_samples(self) -> None:
        """The next step is of a batch without samples: noise alone, and no backward comes before it."""
        self.clipped_sum.batches.empty = True

    def attach_step_hook(self, fn: StepHook | None) -> None:
        """Have ``fn(optimizer)`` called once a step too, with noisy gradients, before the update.

        Steps are accounted for whatever is attached. Only a hook of the engine's own accountant (its
        ``get_optimizer_hook_fn``, with a sample rate of one's own) takes the place of the one that ``make_private``
        attached. ``step_hook = None`` takes off all others.
        """
        if fn is None:
            self.step_hook = None
        elif self.accounting is not None and accountant_of(fn) not in (None, accountant_of(self.accounting)):
            self._hooks.append(fn)  # of an accountant beside the engine's
        elif accountant_of(fn) is not None:
            self.accounting = fn
        elif fn != self.accounting and fn not in self._hooks:
            self._hooks.append(fn)

    @property
    def step_hook(self) -> StepHook | None:
        """All hooks of a step in one, accounting first; each is called once a step, wherever it is called from."""
        hooks = [hook for hook in (self.accounting, *self._hooks) if hook is not None]

        def every(optimizer: Any) -> None:
            for hook in hooks:
                optimizer._call_once(hook)

        return every if hooks else None

    @step_hook.setter
    def step_hook(self, fn: StepHook | None) -> None:
        self._hooks: list[StepHook] = [] if fn is None else [fn]

    def _account(self) -> None:
        """Before anything is released: it may refuse."""
        self._called = []
        if self.accounting is None:
            return
        accountant = accountant_of(self.accounting)
        before = None if accountant is None else [*accountant.history]
        try:
            self._call_once(self.accounting)
        except BaseException:
            if accountant is not None:  # Opacus' GaussianAccountant takes its history apart before it refuses
                accountant.history = before
            raise

    def _call_hooks(self) -> None:
        try:
            for hook in self._hooks:
                self._call_once(hook)
        finally:
            self._called = []

    def _call_once(self, hook: StepHook) -> None:
        if hook not in self._called:
            self._called.append(hook)
            hook(self)

    def _end_logical_batch(self) -> None:
        self.clipped_sum.start_logical_batch()
        self.clipped_sum.batches.stepped()
        self.clipped_sum.batches.start_step()
        self.stepped = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The wrapped optimizer's; float32 master copies stay float32 (torch would round them to the parameter)."""
        super().load_state_dict(state_dict)
        for k, p in enumerate(self.all_parameters()):
            master = state_dict["state"].get(k, {}).get(MASTER)
            if master is not None:
                self.original_optimizer.state[p][MASTER] = master.detach().clone().to(p.device)

    @as_written
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; the sums of earlier physical batches of an unfinished logical batch stay.

        A physical batch whose backward came, and no step since, is dropped, and its logical batch with it.
        """
        self.clipped_sum.drop_physical_batch()
        if not self._is_last_step_skipped:
            self.clipped_sum.drop()
            self.stepped, self.first_bypassed = False, 0
        if self.clipped_sum.keeps_grad_samples:
            for p in self.all_parameters():
                p.grad_sample = None
        self.original_optimizer.zero_grad(set_to_none)

    def abandon(self) -> None:
        """Drop what a logical batch that was left half-way has summed and signalled: a new one begins.

        A sample of both would be counted twice in one step.
        """
        self.clipped_sum.batches.forget()
        self._is_last_step_skipped = False
        self.zero_grad()

    def leave_loop(self) -> None:
        """:meth:`abandon`, but gradients stay that a step has left, and a whole batch that waits for its step."""
        waiting = self.clipped_sum.batches.piece
        if waiting is not None and waiting.last and not waiting.batch.dropped and self.clipped_sum.waits_for_step:
            return
        self.clipped_sum.batches.forget()
        if self.clipped_sum.used:
            self.clipped_sum.drop()
        self._is_last_step_skipped = False

    def __copy__(self) -> NoReturn:
        raise TypeError("a private optimizer has no shallow copy, which would share its sums: use copy.deepcopy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A private optimizer with a noise key of its own: see :func:`dpfast.optim.copies.copied`."""
        return copied(self, memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For ``pickle``: see :func:`dpfast.optim.copies.pickled`."""
        return pickled(self)

    def all_parameters(self) -> list[Any]:
        """Frozen ones too (``params`` leaves them out): they may be unfrozen between steps."""
        return list({id(p): p for group in self.param_groups for p in group["params"]}.values())


def _filled(sums: Mapping[Any, torch.Tensor | None]) -> dict[Any, torch.Tensor]:
    """``sums`` by parameter, with zeros for what no sample has reached."""

    def one(p: Any, total: torch.Tensor | None) -> torch.Tensor:
        if total is None:
            return torch.zeros(local(p).shape, dtype=ops.compute_dtype(p.dtype), device=p.device)
        return total.contiguous()

    return {p: one(p, total) for p, total in sums.items()}
