"""The run itself: set up, the training loop, evaluation, and the result."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpfast.accounting.epsilon import quietly
from dpfast.analysis.collation import check_collation
from dpfast.capture.refusals import LayoutError
from dpfast.data.physical_batches import padded
from dpfast.data.sampling import PoissonBatches
from dpfast.engine import PrivacyEngine
from dpfast.integrations.finetune import checkpoint, fit, privacy
from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError
from dpfast.integrations.finetune.data import IGNORED, Collate, Samples
from dpfast.integrations.finetune.processes import Place, over_ranks
from dpfast.integrations.pieces import backward_in_pieces, counts, pieces
from dpfast.losses import causal_lm_loss, sequence_classification_loss

# In a checkpoint: what the run's sums depend on that no option decides, and whether the key is no longer the seed's.
REPLAY, RENEWED = "replay", "renewed"


@dataclass
class Job:
    """A run that is set up: model, data, plan and place, and where it stands."""

    config: FinetuneConfig
    place: Place
    model: nn.Module
    collate: Collate
    data: Samples
    held_out: Samples | None
    plan: privacy.Plan
    seed: int
    state: dict[str, Any]  # what a checkpoint says about the run
    resume_from: Path | None = None
    step: int = 0
    size: int = 1
    compared: bool = False  # rows collated alone and together
    figures: dict[str, float] = field(default_factory=dict)  # of the last evaluation

    def __post_init__(self) -> None:
        config, place = self.config, self.place
        self.classes = config.task == "classification"
        self.batches = PoissonBatches(
            len(self.data),
            self.plan.steps_per_epoch,
            seed=privacy.number(self.seed, privacy.BATCHES),
            rank=place.rank,
            world_size=place.world_size,
        )
        self.loader: DataLoader = DataLoader(self.data, batch_sampler=self.batches, collate_fn=self.collate)
        self.suffix = f".rank{place.rank}" if config.fsdp else ""
        self.folder = Path(config.output) / checkpoint.FOLDER
        self.save_every = config.save_every or self.plan.steps_per_epoch
        self.log_every = config.log_every or max(1, self.plan.steps // 20)
        self.measure: Any = sequence_classification_loss if self.classes else causal_lm_loss
        self._make_private()

    def _make_private(self) -> None:
        config, place = self.config, self.place
        model = self.model.to(place.device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore
        shared = over_ranks(model, config, place)
        trained = [p for p in model.parameters() if p.requires_grad]
        inner = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.engine = PrivacyEngine(accountant=config.accountant, secure_mode=config.secure)
        try:
            self.private, self.optimizer, _ = self.engine.make_private(
                module=shared,
                optimizer=inner,
                data_loader=self.loader,
                noise_multiplier=self.plan.noise_multiplier,
                max_grad_norm=config.max_grad_norm,
                poisson_sampling=False,  # the loader's batches are Poisson's already
                loss_reduction="sum",
                clipping_fn=config.clipping_fn,
                noise_generator=None if config.secure else privacy.noise_generator(self.seed),
                low_precision=config.low_precision if config.pure_bf16 else "nearest",
                expected_batch_size=self.plan.expected_batch_size,
            )
        except UnsupportedModuleError as error:
            reasons = "; ".join(line for line in str(error).splitlines() if line.strip())
            raise FinetuneError(f"--model cannot be trained privately: {reasons}") from error
        # The loss is a sum over samples, which keeps them apart in 16 bits; the step divides by the expected size.
        self.optimizer.loss_reduction = "mean"
        if config.compile:
            self.private.compile()

    # ---------------------------------------------------------------- one step

    def loss_of(self, piece: dict[str, Tensor], given: int | None = None) -> Tensor:
        """The summed loss of a physical batch, or of the ``given`` samples that it begins with.

        There is no forward for one without rows, which most models cannot run.
        """
        if not len(piece["input_ids"]):
            if not self.config.fsdp:
                return torch.zeros((), requires_grad=True)
            piece, given = self.made_up(1), 0  # every rank has to gather the shards; a gradient of exact zeros
        logits, labels = self.logits_of(piece)
        return self.measure(logits[:given], labels[:given])

    def logits_of(self, piece: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits, and labels on the same device."""
        device = self.place.device
        held = {name: x.to(device) for name, x in piece.items()}
        labels = held.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16):
            return self.private(**held).logits, labels

    def made_up(self, rows: int) -> dict[str, Tensor]:
        """Samples of the longest length that say nothing, no two neighbours alike."""
        ids = np.arange(self.data.longest + rows, dtype=self.data.tokens.dtype) % 8
        return self.collate([(ids[k : k + self.data.longest], 0) for k in range(rows)])

    def attempt(self, rows: int) -> None:
        """Forward and backward of made-up samples, and nothing left of them."""
        try:
            self.loss_of(self.made_up(rows)).backward()
        finally:
            self.optimizer.zero_grad()

    def choose_size(self) -> None:
        """Set the physical batch size."""
        asked = self.config.physical_batch_size
        if isinstance(asked, int):
            self.size = asked
            return
        trained = sum(p.numel() for p in self.private.parameters() if p.requires_grad)
        most = math.ceil(self.plan.expected_batch_size / self.place.world_size)
        size = fit.fitting_size(self.attempt, most, self.place.device, 8 * trained)
        self.size = min(self.place.from_each(size))

    def learning_rate(self, step: int) -> float:
        """Of the step of that number, counted from 0."""
        config, warmup = self.config, self.config.warmup_steps
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.plan.steps - warmup)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return config.learning_rate * factor[config.lr_schedule]

    def _check_collation(self) -> None:
        """A sample's gradient must not depend on what it is padded with; shards would have to be gathered for that."""
        if self.compared or self.config.fsdp:
            return
        try:
            check_collation(self.private, self.loss_of, self.data, self.collate)
        except ValueError as error:
            raise FinetuneError(f"--model cannot be trained privately: {str(error).splitlines()[0]}") from error
        self.compared = True

    def take_step(self, batch: dict[str, Tensor]) -> float:
        """One private step on a logical batch, an empty one too; the summed loss."""
        # Dropout too is a function of seed, step and rank: a resumed run needs no generator's state.
        torch.manual_seed(privacy.number(self.seed, privacy.DROPOUT, self.step, self.place.rank, bits=63))
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            self._check_collation()
            loss = self._backward({name: x.to(self.place.device) for name, x in batch.items()})
            self.optimizer.step()
        except LayoutError as error:
            raise FinetuneError(f"--model cannot be trained privately: {str(error).splitlines()[0]}") from error
        except Exception as error:
            if not fit.is_out_of_memory(error):
                raise
            smaller = f"--physical-batch-size {self.size // 2}" if self.size > 1 else "a shorter --context"
            raise FinetuneError(
                f"{self.size} samples at once do not fit in memory: use {smaller}, --gradient-checkpointing or "
                f"--physical-batch-size auto"
            ) from error
        self.optimizer.zero_grad()
        self.step += 1
        return float(loss)

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        samples, size = len(batch["input_ids"]), self.size
        of = counts(samples, size, self.optimizer.ranks.most(-(-samples // size)))
        parts = pieces(batch, size, len(of))
        if not self.config.pad:
            return backward_in_pieces(self.optimizer, parts, of, self.loss_of)
        parts = (padded(part, given, size) for part, given in zip(parts, of, strict=True))
        return backward_in_pieces(self.optimizer, parts, of, self.loss_of, size)

    # ---------------------------------------------------------------- the loop

    def resume(self) -> None:
        """Go on from the checkpoint: with its noise too, if dropout will be what it would have been."""
        if self.resume_from is None:
            return
        held = checkpoint.peek(self.resume_from)
        known = not (self.config.secure or held.get(RENEWED))
        key = privacy.noise_key(self.seed) if known else None
        checkpoint.load(self.resume_from, self.engine, self.private, self.optimizer, self.place.device, key)
        other = held.get(REPLAY) != self.replay()
        if other:
            self.optimizer.noise.renew()  # the same noise on other sums would lay their difference bare
        self.state[RENEWED] = other or bool(held.get(RENEWED))
        self.batches.step = self.step

    def replay(self) -> dict[str, Any]:
        """What else dropout depends on, beside seed, step and rank."""
        return {
            "physical_batch_size": self.size,
            "ranks": self.place.world_size,
            "device": self.place.device.type,
            "compile": self.config.compile,
            "pad": self.config.pad,
            "gradient_checkpointing": self.config.gradient_checkpointing,
            "torch": str(torch.__version__),
        }

    def epsilon(self) -> float:
        """Spent so far."""
        if self.plan.noise_multiplier == 0:
            return math.inf
        return quietly(self.engine.get_epsilon, self.plan.delta)

    def train(self) -> None:
        """All steps that are left, with a progress bar, logs, checkpoints and evaluations on rank 0."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        first, config = self.place.rank == 0, self.config
        logs = SummaryWriter(str(Path(config.output) / "logs"), purge_step=self.step + 1) if first else None
        shown: dict[str, str] = {}
        bar = tqdm(total=self.plan.steps, initial=self.step, unit="step", disable=not first, dynamic_ncols=True)
        with bar, logs or contextlib.nullcontext(), interruptions() as interrupted:
            tokens, since = 0, time.perf_counter()
            while self.step < self.plan.steps:
                for batch in self.loader:
                    loss = self.take_step(batch)
                    tokens += int(batch["attention_mask"].sum()) * self.place.world_size  # shares differ by a sample
                    if config.show_training_loss:
                        rows = len(batch["input_ids"])
                        shown["training loss (not private)"] = f"{loss / rows:.3f}" if rows else "-"
                    last = self.step == self.plan.steps
                    if first and (last or self.step % self.log_every == 0):
                        rate = tokens / (time.perf_counter() - since)
                        epsilon = self.epsilon()
                        shown |= {"epsilon": f"{epsilon:.3f}", "tokens/s": f"{rate:,.0f}"}
                        assert logs is not None
                        for name, value in (
                            ("epsilon", epsilon),
                            ("tokens_per_second", rate),
                            ("learning_rate", self.learning_rate(self.step - 1)),
                        ):
                            logs.add_scalar(name, value, self.step)
                        tokens, since = 0, time.perf_counter()
                    if last or self.step % self.save_every == 0:
                        self.save()
                        self.evaluate()
                        for name, value in self.figures.items():
                            shown[name] = f"{value:.4g}"
                            if logs is not None:
                                logs.add_scalar(f"eval/{name}", value, self.step)
                    bar.set_postfix(shown, refresh=False)
                    bar.update()
                    if interrupted and not last:
                        if self.step % self.save_every:
                            self.save()
                        raise KeyboardInterrupt
                    if last:
                        break

    def save(self) -> None:
        """A checkpoint, before anything of this step is shown: what is shown is never taken back and done anew."""
        if self.place.rank == 0 or self.config.fsdp:
            run = {**self.state, "physical_batch_size": self.size, REPLAY: self.replay()}
            checkpoint.save(self.folder, self.step, self.suffix, self.engine, self.private, self.optimizer, run)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss and perplexity per token, or loss and accuracy, on the held-out samples; on every rank alike."""
        if self.held_out is None:
            return
        self.private.eval()
        total, counted, right = 0.0, 0, 0
        loader: DataLoader = DataLoader(self.held_out, batch_size=self.size, collate_fn=self.collate)
        for batch in loader:
            for piece in pieces(batch, self.size):
                logits, labels = self.logits_of(piece)
                if self.classes:
                    total += float(sequence_classification_loss(logits, labels))
                    counted += len(labels)
                    right += int((logits.argmax(-1) == labels).sum())
                else:  # per token, not per sample: what perplexity means
                    each = (labels[:, 1:] != IGNORED).sum(1)
                    total += float((causal_lm_loss(logits, labels, reduction="none") * each).sum())
                    counted += int(each.sum())
        self.private.train()
        loss = total / max(1, counted)
        self.figures = {"loss": loss}
        self.figures |= {"accuracy": right / counted} if self.classes else {"perplexity": math.exp(min(loss, 700))}


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """Ctrl-C within is noted, for the loop to end after the step that runs; the second one ends it at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
