"""Does a loss of each sample depend on that sample alone? Forwards only, of model and loss together.

As :class:`dpfast.separation.check.Check`, for training that has no backward. Where the proof has gaps, samples are
replaced in as many groups as tell every pair of them apart. Half of the samples are also left out, for what depends on
how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.recorder import Recorder
from dpfast.capture.trees import map_tensors
from dpfast.separation.check import Check, Verdict
from dpfast.separation.draws import Draws
from dpfast.separation.followed import Followed
from dpfast.separation.inputs import kept_only, replaced
from dpfast.separation.labels import Met, Rows
from dpfast.separation.passes import own_random_numbers, same
from dpfast.separation.state import kept


class LossCheck(Check):
    """One check of ``losses(batch, count) → [count]``, which calls ``module`` without gradients."""

    def __init__(
        self,
        losses: Callable[[Sequence[Any], int], Tensor],
        module: nn.Module,
        batch: Sequence[Any],
        count: int,
        seed: int = 0,
        public: Callable[[str], bool] = lambda name: False,
    ):
        recorder = Recorder({p: name for name, p in module.named_parameters()})
        recorder.batch_sizes = [count]
        super().__init__(
            lambda args, kwargs: losses(args, self.size), tuple(batch), {}, recorder, 0, module, seed, public
        )
        self.count = self.size = count

    def verdict(self) -> Verdict:
        """What is shown on this batch."""
        verdict = self.again()
        if not verdict.mixed and self.count > 1:
            verdict.mixed, untried = self._left_out()
            verdict.untried += [f"whether losses depend on the batch's size ({untried})"] if untried else []
        return verdict

    def _forward(self, *args: Any, **kw: Any) -> tuple[Followed, list[Tensor]]:
        return super()._forward(*args, **kw, base="the loss")

    def _outputs(self, returned: Any) -> list[Tensor]:
        return [returned]

    def _settle(self, follow: Followed, verdict: Verdict, outputs: list[Tensor] | None = None) -> None:
        super()._settle(follow, verdict, outputs)
        label = follow.labels[outputs[0]] if outputs else None
        if verdict.mixed:
            return
        if isinstance(label, Met):
            verdict.mixed = f"samples meet in {label}, and each loss is of several"
        elif isinstance(label, Rows) and sorted(label.owners.each.tolist()) != [*range(self.count)]:
            verdict.mixed = "a sample has several of the losses, or none"

    def _replaced_forward(self, follow: Followed, outputs: list[Tensor]) -> str:
        """For each bit of the samples' numbers: those that have it are replaced, and then those that do not."""
        numbers = torch.arange(self.count)
        for bit in range((self.count - 1).bit_length()):
            having = numbers[(numbers >> bit) % 2 == 1]
            for others in (having, numbers[(numbers >> bit) % 2 == 0]):
                inputs = replaced(self.inputs, others, self.count, 0, follow.axes)
                try:
                    _, after = self._forward(inputs=inputs)
                except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                    continue  # what stands in for a sample need not be one that the model takes
                stays = torch.ones(self.count, dtype=torch.bool).index_fill_(0, others, False)
                mine = [x[0][stays.to(x[0].device)] for x in (outputs, after)]
                if not same(mine[:1], mine[1:]):
                    return "losses of some samples depend on others"
        return ""

    def _left_out(self) -> tuple[str, str]:
        """Why losses depend on how many samples there are, and what cannot be tried."""
        halves = torch.arange(self.count).split((self.count + 1) // 2)
        whole = self._losses_of(self.inputs[0], self.seed)
        draws = Draws(self.count)
        if drew := not same([whole], [self._losses_of(self.inputs[0], self.seed + 1)]):
            with draws:
                whole = self._losses_of(self.inputs[0], self.seed)
        for half in halves:
            self.size = len(half)
            rest = kept_only(self.inputs[0], half, self.count, 0, self.recorder.input_axes)
            try:
                with draws.playing(half) if drew else nullcontext():
                    part = self._losses_of(rest, self.seed)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
                return "", str(error)
            finally:
                self.size = self.count
            if not same([whole[half.to(whole.device)]], [part]):
                return "a sample's loss depends on how many samples there are, or on others of the batch", ""
        return "", ""

    def _losses_of(self, batch: Any, seed: int) -> Tensor:
        with own_random_numbers(seed), kept(self.module):
            return torch.as_tensor(self.run(map_tensors(Tensor.detach, batch), {}))
