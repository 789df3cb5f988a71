"""Does a model keep the samples of a batch apart? Proved from its operators; tried where a proof does not reach.

The first check runs the model forward and backward while a proof follows, which says what is mixed, and what it cannot
settle. That is tried: half of the samples are replaced, and the other half under another seed. Two things are tried
always: half of the samples replaced, once, for what no operator shows (a kernel that PyTorch does not know of), and
half of them left out, for what depends on how many there are. Later checks run forward only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.recorder import Recorder
from dpfast.capture.refusals import listed
from dpfast.capture.shift import Shift
from dpfast.capture.trees import map_tensors, tensors
from dpfast.capture.value_branches import all_branches
from dpfast.refusals import LayoutError
from dpfast.separation import answers
from dpfast.separation.draws import Draws
from dpfast.separation.experiment import Experiment
from dpfast.separation.followed import Followed
from dpfast.separation.inputs import replaced
from dpfast.separation.labels import Drawn, Rows
from dpfast.separation.passes import own_random_numbers, own_saved_tensors, same
from dpfast.separation.proof import Read
from dpfast.separation.state import Numbers, kept
from dpfast.separation.texts import Left, left_for_next

MOST_ANSWERS = 8  # questions of Python about samples that are answered otherwise, each by itself


@dataclass
class Verdict:
    """What a check has shown.

    Attributes:
        mixed: why samples are not kept apart; empty if nothing shows that they are not.
        gaps: what the proof does not settle, each with the operator and the module; empty if it is complete.
        tried: operators without a rule, tried alone on random numbers.
        untried: what could not be tried, and why.
    """

    mixed: str = ""
    gaps: list[str] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    picks: bool = False  # layers get rows that the samples' values pick
    by_sample: bool = False  # each sample runs by itself, under vmap

    @property
    def proved(self) -> bool:
        """Whether every operator that ran keeps samples apart, whatever the values are."""
        return not self.mixed and not self.gaps

    def __str__(self) -> str:
        if self.mixed:
            return f"samples are not kept apart: {self.mixed}"
        lines = ["samples are kept apart: proved from the operators that ran"]
        if self.by_sample:
            lines = ["samples are kept apart: each runs by itself, under torch.func.vmap"]
        elif self.gaps:
            lines = [
                f"samples are kept apart as far as replacing them shows; no proof beyond {listed(sorted(self.gaps))}"
            ]
        if self.tried:
            lines.append(f"operators without a rule, tried alone on random numbers: {', '.join(self.tried)}")
        return "\n".join([*lines, *(f"not tried: {what}" for what in self.untried)])


def _gap(read: Read) -> str:
    what = "how many rows samples' values pick" if read.shape else "a value that Python reads of the samples"
    return f"{what} in {read.module}"


class Check:
    """Checks of a model on one batch; ``public`` tells of a parameter's or buffer's name that it may hold data."""

    def __init__(
        self,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        recorder: Recorder,
        batch_dim: int,
        module: nn.Module,
        seed: int = 0,
        public: Callable[[str], bool] = lambda name: False,
    ):
        self.run, self.inputs, self.recorder = run, (args, kwargs), recorder
        self.batch_dim, self.module, self.seed, self.public = batch_dim, module, 2 * seed, public
        self.experiment = Experiment(run, self.inputs, recorder, batch_dim, module, public)

    def whole(self) -> Verdict:
        """The check before a layout is trusted; layouts that are clean become verified."""
        recorder = self.recorder
        verified = set(recorder.verified)
        with torch.random.fork_rng(), recorder.setting(shift=_off_zero(recorder)):
            if recorder.batch_size is None:  # the layers' rows may tell which of several sizes it is
                self.experiment.sketches(self.inputs, self.seed)
            if recorder.batch_size is None:
                return Verdict(mixed=f"the batch size may be any of {recorder.batch_sizes}")
            if recorder.batch_size < 2:
                return Verdict()
            verdict = self._whole(recorder.batch_size)
        if verdict.mixed:
            recorder.verified = verified
        return verdict

    def _whole(self, batch: int) -> Verdict:
        recorder, experiment = self.recorder, self.experiment
        sharded = recorder.ranks.sharded
        verdict = Verdict(gaps=["parameters that are sharded over processes"]) if sharded else Verdict()
        follow = None if sharded else Followed(recorder, self.module, self.batch_dim, public=self.public)
        draws, left = Draws(batch), dict[str, Tensor]()
        with draws:
            before = experiment.sketches(self.inputs, self.seed, left=left, follow=follow)
        reached = set(before)
        if follow is not None:
            self._settle(follow, verdict)
        if verdict.mixed:
            return verdict
        one, other = torch.arange(batch).split((batch + 1) // 2)
        left_torch = follow is not None and any(not read.answered and not read.shape for read in follow.reads)
        followed = follow is not None and not follow.lost and not left_torch  # each row, wherever it went
        verdict.mixed = experiment.replaced(other, before, left, self.seed, may_order=followed)
        if not verdict.mixed and not sharded:
            verdict.mixed, untried = experiment.halves(before, draws, self.seed)
            verdict.untried += [f"whether gradients depend on the batch's size ({untried})"] if untried else []
        if verdict.gaps and not verdict.mixed:
            left = {}
            before = experiment.sketches(self.inputs, self.seed + 1, left=left)
            verdict.mixed = experiment.replaced(one, before, left, self.seed + 1, may_order=followed)
        if followed and not verdict.mixed:
            recorder.verified |= {layout for layout in recorder.new_layouts if layout[0] in reached}
        return verdict

    def again(self) -> Verdict:
        """A later check, of forwards only: of layouts that are trusted, on another batch and other random numbers."""
        with torch.random.fork_rng():
            follow, outputs = self._forward()
            verdict = Verdict()
            self._settle(follow, verdict, outputs)
            if verdict.gaps and not verdict.mixed:
                verdict.mixed = self._replaced_forward(follow, outputs)
        return verdict

    def by_sample(self) -> Verdict:
        """Of a model that runs one sample at a time: a forward and backward, which raises what a real one would."""
        follow = Followed(self.recorder, self.module, self.batch_dim, public=self.public)
        self.experiment.sketches(self.inputs, self.seed, follow=follow)
        return Verdict(gaps=sorted({*follow.lost, *follow.met}), tried=sorted(follow.tried), by_sample=True)

    def state(self) -> str:
        """Why a forward may not leave what it leaves in the model, at any size of the batch."""
        with torch.random.fork_rng():
            try:
                follow, _ = self._forward()
                why = follow.why() or self._left_by_answers(follow)
            except LayoutError:  # it comes again where the model runs, which knows what to do
                return ""
        return why if isinstance(why, Left) else ""

    def _settle(self, follow: Followed, verdict: Verdict, outputs: list[Tensor] | None = None) -> None:
        """What the proof says; with what a forward finds that an earlier one has left, and with what Python decides."""
        verdict.mixed = follow.why()
        verdict.gaps, verdict.tried, verdict.picks = sorted(follow.lost), sorted(follow.tried), bool(follow.picked)
        if not verdict.mixed and (earlier := follow.left()):
            verdict.mixed = self._forward(earlier=earlier)[0].why()
        if not verdict.mixed and (follow.drew or any(isinstance(read.label, Drawn) for read in follow.reads)):
            self._try_chance(verdict)
        after = follow.reads[follow.forward_reads :] if follow.forward_reads >= 0 else []
        after = [read for read in after if not read.shape]
        verdict.gaps += sorted({f"{_gap(read)}, in the backward" for read in after})
        if not verdict.mixed and follow.reads_of_samples():
            if outputs is None:
                follow, outputs = self._forward()
            self._try_samples(follow.reads_of_samples(), outputs, verdict)
            verdict.mixed = self._left_by_answers(follow) or self._left_by_others(follow) or verdict.mixed

    def _forward(
        self, high: bool | None = None, inputs: Any = None, numbers: Numbers | None = None, **kw: Any
    ) -> tuple[Followed, list[Tensor]]:
        """A forward that a proof follows, and its outputs that train; ``high``: of random numbers not torch's.

        It finds ``numbers`` that another forward has left in the model's attributes.
        """
        args, kwargs = map_tensors(Tensor.detach, self.inputs if inputs is None else inputs)
        if kw.get("earlier"):  # which may be the inputs themselves
            args, kwargs = map_tensors(Tensor.clone, (args, kwargs))
        follow = Followed(self.recorder, self.module, self.batch_dim, public=self.public, **kw)
        with ExitStack() as stack:
            stack.enter_context(all_branches(lambda x: isinstance(x, Tensor)))
            stack.enter_context(own_random_numbers(self.seed))
            stack.enter_context(own_saved_tensors())
            keeping = stack.enter_context(kept(self.module))
            if numbers is not None:
                keeping.put(numbers)
            stack.enter_context(nullcontext() if high is None else answers.extreme_draws(high))
            follow.starts(args, kwargs)
            stack.enter_context(follow.following())
            outputs = self._outputs(self.run(args, kwargs))
            follow.returns(outputs, outputs)
            follow.numbers = keeping.numbers()
        return follow, [x.detach() for x in outputs]

    def _outputs(self, returned: Any) -> list[Tensor]:
        """What of a forward's result samples must be apart in."""
        return [x for x in tensors(returned) if x.requires_grad]

    def _try_chance(self, verdict: Verdict) -> None:
        """Whatever Python decides by random numbers, samples must be kept apart."""
        for high in (False, True):
            try:
                follow, _ = self._forward(high, answer=answers.of_chance(high))
            except Exception as error:  # whatever the model says to it
                verdict.untried.append(f"another outcome of what is decided at random ({error})")
                continue
            if why := follow.why():
                verdict.mixed = why if isinstance(why, Left) else f"{why}, where random numbers decide so"
                return

    def _try_samples(self, reads: list[Read], outputs: list[Tensor], verdict: Verdict) -> None:
        """Python must not decide for one sample by the values of others: each of them is answered otherwise."""
        verdict.gaps += sorted({_gap(read) for read in reads if not read.answered})
        answered = [read for read in reads if read.answered]
        for k, read in enumerate(answered[:MOST_ANSWERS]):
            effect = self._effect(k, outputs, read)
            mine = isinstance(read.label, Rows) and read.label.dim is None
            if effect and (effect == "raised" or mine or read.kind is int):
                verdict.gaps.append(_gap(read))  # its own sample's, or sizes: told by replacing others
            elif effect:
                verdict.mixed = (
                    f"gradients of several samples meet in what the model returns: Python decides by {read.label} what "
                    f"is done with all samples"
                )
                return
        verdict.gaps += sorted({_gap(read) for read in answered[MOST_ANSWERS:]} - set(verdict.gaps))

    def _effect(self, nth: int, outputs: list[Tensor], read: Read) -> str:
        """What another answer to the ``nth`` question about samples does to the outputs; nothing if they stay."""
        for other in answers.of_samples(nth):
            try:
                found = self._forward(answer=other)[1]
            except Exception:  # whatever the model says to it
                if read.kind is not bool:
                    return "raised"
                continue  # it asks whether to raise
            if not same(outputs, found):
                return "changed"
        return ""

    def _left_by_answers(self, follow: Followed) -> str:
        """Why numbers that Python has read of samples may not stay in the model: each is answered otherwise."""
        answered = [read for read in follow.reads_of_samples() if read.answered]
        for k, read in enumerate(answered[:MOST_ANSWERS]):
            for other in answers.of_samples(k):
                try:
                    found, _ = self._forward(answer=other)
                except Exception:  # whatever the model says to it
                    continue
                if why := self._left(follow.numbers, found.numbers, read.label):
                    return why
        return ""

    def _left_by_others(self, follow: Followed) -> str:
        """The same of numbers that are read past PyTorch's operators: half of the samples are replaced."""
        try:
            found, _ = self._forward(inputs=self._half_replaced(follow))
        except Exception:  # whatever the model says to it
            return ""
        return self._left(follow.numbers, found.numbers)

    def _left(self, numbers: Numbers, others: Numbers, where: object = None) -> str:
        """Why a forward may not leave either of these behind: the next one computes something else by them."""
        places = zip(self.module.named_modules(), numbers, others, strict=True)
        names = [
            f"{name}.{key}" if name else key
            for (name, _), mine, its in places
            for key in its
            if key not in mine or mine[key] != its[key]
        ]
        if all(self.public(name) for name in names):
            return ""
        try:
            alike = same(self._forward(numbers=numbers)[1], self._forward(numbers=others)[1])
        except Exception:  # whatever the model says to it
            return ""
        return "" if alike else left_for_next(names, where)

    def _half(self, follow: Followed) -> Tensor:
        batch = follow.labels.batch
        return torch.arange(batch).split((batch + 1) // 2)[self.seed // 2 % 2]

    def _half_replaced(self, follow: Followed) -> Any:
        return replaced(self.inputs, self._half(follow), follow.labels.batch, self.batch_dim, follow.axes)

    def _replaced_forward(self, follow: Followed, outputs: list[Tensor]) -> str:
        """Half of the samples replaced, the outputs of the others must stay."""
        batch, half = follow.labels.batch, self._half(follow)
        try:
            _, after = self._forward(inputs=self._half_replaced(follow))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return ""
        stays = torch.tensor([k for k in range(batch) if k not in set(half.tolist())])
        for x, y in zip(outputs, after, strict=False):
            if x.dim() > self.batch_dim and x.shape == y.shape and x.shape[self.batch_dim] == batch:
                mine = [side.index_select(self.batch_dim, stays.to(side.device)) for side in (x, y)]
                if not same(mine[:1], mine[1:]):
                    return "what the model returns for some samples depends on others"
        return ""


def _off_zero(recorder: Recorder) -> Shift:
    """Parameters that are all zero (gates, LoRA's B) take small values: they may be what samples will meet through."""
    if recorder.shift.in_use or recorder.ranks.sharded:
        return recorder.shift
    draw = torch.Generator().manual_seed(0)
    shift = Shift()
    zero = [p for p in recorder.names if p.requires_grad and p.numel() and not bool(p.detach().any())]
    shift.set({p: 0.05 * torch.randn(p.shape, generator=draw).to(p) for p in zero})
    shift.start_forward()
    return shift
