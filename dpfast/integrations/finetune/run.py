"""``finetune``: from a config to a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dpfast.distributed.ranks import RankLostError
from dpfast.integrations.finetune import checkpoint, model, privacy, result
from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError
from dpfast.integrations.finetune.data import Collate, Rows, Samples, class_names, read_rows, tokenised
from dpfast.integrations.finetune.loop import RENEWED, Job
from dpfast.integrations.finetune.processes import Place, take_place
from dpfast.integrations.replayed import fingerprint

# Of these the model that comes out depends: a resumed run must have the same.
DECISIVE = (
    *("epochs", "max_steps", "batch_size", "learning_rate", "weight_decay", "lr_schedule", "warmup_steps"),
    *("target_epsilon", "target_delta", "noise_multiplier", "accountant", "max_grad_norm", "clipping_fn", "secure"),
    *("bf16", "pure_bf16", "low_precision", "truncate", "fsdp", "lora_alpha"),
)


def finetune(config: FinetuneConfig) -> result.FinetuneResult:
    """Fine-tune a causal language model or a classifier with differential privacy.

    Guarantee: (ε, δ) under adding or removing one row of the training data, as :mod:`dpfast` gives it: a row is a
    sample (never several rows in one, nor one in several), its loss is its own, batches are Poisson samples, and every
    step is accounted before its noisy gradient is used. A resumed run is bit-equal to one that was not interrupted
    (but for the noise of ``secure``); with another physical batch size, number of ranks, device or torch, under which
    dropout is another one, its noise takes a new key.

    Example:
        >>> from dpfast.integrations.finetune import FinetuneConfig, finetune
        >>> result = finetune(FinetuneConfig(
        ...     model="path/to/gpt2", train="notes.jsonl", lora_rank=16, target_epsilon=8, batch_size=1024,
        ...     physical_batch_size=16, bf16=True, output="out"))
        >>> print(result.epsilon, result.figures)

    Raises:
        FinetuneError: the request, the data or the machine needs something to be put right; the text says what.
    """
    config.validate()
    place = take_place(config)
    try:
        return _finetune(config, place)
    except RankLostError as error:
        raise FinetuneError(f"{error} (with --resume)") from error
    finally:
        if place.started:
            dist.destroy_process_group()


def _finetune(config: FinetuneConfig, place: Place) -> result.FinetuneResult:
    output, say = Path(config.output), print if place.rank == 0 else _silent
    if place.rank == 0:
        result.prepare(output, config.resume)
    place.wait()
    found, held = _checkpoint(config, place)
    seed = config.seed if config.seed is not None else held["seed"] if held else privacy.draw_seed()
    seed = place.from_first(seed)
    if config.seed is not None:
        say(
            "--seed: whoever knows it can take the noise off; without it the seed is drawn, and kept in the checkpoints"
        )

    rows, held_out = _rows(config, seed)
    names = class_names([*(rows.labels or [])]) if rows.labels is not None else None
    if names is not None and len(names) < 2:
        raise FinetuneError(f"--label-column {config.label_column}: there is only one class: at least 2 are needed")
    torch.manual_seed(privacy.number(seed, privacy.WEIGHTS, bits=63))  # all ranks start from the same weights
    net: Any
    net, tokenizer, made = model.load(config, names)
    context = model.context_of(config, net.config, tokenizer)
    data, held_out_data, pad = _tokenised(config, rows, held_out, net, tokenizer, context)
    if config.noise_multiplier is None and held is None:
        say("looking for the noise multiplier ...", flush=True)
    plan = privacy.plan_of(config, len(data), held["noise_multiplier"] if held else None)
    if made and config.lora_rank is not None and place.rank == 0 and held is None:  # a run that goes on has it
        net.save_pretrained(output / result.BASE)
    if config.lora_rank is not None:
        if made:
            net.name_or_path = str((output / result.BASE).resolve())
        net = model.with_adapters(net, config)

    settings = {name: value for name, value in vars(config).items() if name in DECISIVE}
    state = {
        "version": 1,
        "seed": seed,
        "settings": settings,
        "model": fingerprint(net),
        "data": data.digest(),
        "noise_multiplier": plan.noise_multiplier,
    }
    if held is not None:
        assert found is not None
        checkpoint.check(found, held, state)
    collate = Collate(pad, context, names is not None, data.longest if config.pad else 1)
    job = Job(config, place, net, collate, data, held_out_data, plan, seed, state, found)
    if held is not None:
        job.step = held["step"]
        if config.physical_batch_size == "auto":
            config.physical_batch_size = held["physical_batch_size"]
    job.choose_size()
    job.resume()
    _announce(say, job, made)
    job.train()
    if not job.figures:
        job.evaluate()
    return _finish(job, tokenizer, names, made, say)


def _checkpoint(config: FinetuneConfig, place: Place) -> tuple[Path | None, dict[str, Any] | None]:
    if not config.resume:
        return None, None
    folder = Path(config.output) / checkpoint.FOLDER
    suffix = f".rank{place.rank}" if config.fsdp else ""
    found = checkpoint.newest(folder, suffix)
    if config.fsdp:  # the last step that every rank has saved
        steps = place.from_each(-1 if found is None else checkpoint.step_of(found))
        found = folder / checkpoint.name_of(min(steps), suffix) if min(steps) >= 0 else None
    if found is None or not found.exists():
        raise FinetuneError(f"--resume: there is no checkpoint in {folder}: leave --resume out to start anew")
    return found, checkpoint.peek(found)


def _rows(config: FinetuneConfig, seed: int) -> tuple[Rows, Rows | None]:
    """Rows to train on and rows to evaluate on."""
    label = config.label_column if config.task == "classification" else None
    rows = read_rows(config.train, config.text_column, label)
    if config.eval is None:
        return rows, None
    try:
        fraction = float(config.eval)
    except (TypeError, ValueError):
        return rows, read_rows(config.eval, config.text_column, label)
    if not 0 < fraction < 1:
        raise FinetuneError(f"--eval {config.eval}: give a file, or a fraction between 0 and 1")
    # A coin for each row: whether one is there does not change where the others go.
    words = np.random.SeedSequence(seed, spawn_key=(privacy.HELD_OUT,))
    out = np.random.default_rng(words).random(len(rows.texts)) < fraction
    if out.all() or not out.any():
        raise FinetuneError(f"--eval {config.eval}: too few rows to hold some out: give a file")
    return rows.select(np.flatnonzero(~out).tolist()), rows.select(np.flatnonzero(out).tolist())


def _tokenised(
    config: FinetuneConfig, rows: Rows, held_out: Rows | None, net: Any, tokenizer: Any, context: int
) -> tuple[Samples, Samples | None, int]:
    label_ids = None
    if rows.labels is not None:
        label_ids = {name: net.config.label2id[str(name)] for name in set(rows.labels)}
    if label_ids is not None and held_out is not None and held_out.labels is not None:
        new = sum(x not in label_ids for x in held_out.labels)
        if new:
            raise FinetuneError(f"--eval: {new} rows have a class that no training row has: take them out")
    data = tokenised(rows, tokenizer, context, config.truncate, label_ids)
    if held_out is None:
        return data, None, tokenizer.pad_token_id
    return data, tokenised(held_out, tokenizer, context, True, label_ids), tokenizer.pad_token_id


def _announce(say: Any, job: Job, made: bool) -> None:
    config, plan = job.config, job.plan
    trained = sum(p.numel() for p in job.private.parameters() if p.requires_grad)
    every = sum(p.numel() for p in job.private.parameters())
    kind = "random weights" if made else "loaded"
    source = " of the bundled text" if config.train is None else ""
    held = f"; {len(job.held_out):,} to evaluate on" if job.held_out is not None else ""
    chosen = " (found to fit)" if config.physical_batch_size == "auto" else ""
    ranks = f", over {job.place.world_size} ranks" if job.place.world_size > 1 else ""
    say(f"model     {type(job.model).__name__} ({kind}), {trained:,} of {every:,} parameters train, {job.place.device}")
    say(f"data      {plan.samples:,} samples{source}, the longest of {job.data.longest} tokens{held}")
    say(f"batches   {plan.expected_batch_size} samples expected, {job.size} at a time{chosen}{ranks}")
    say(f"privacy   noise multiplier {plan.noise_multiplier:.4f}, {plan.steps} steps, delta {plan.delta:g}")
    if job.step:
        say(f"resumed   after step {job.step}")
        if job.state[RENEWED]:
            say("          with a new noise key, as the batches are run otherwise than before")
    if plan.noise_multiplier == 0:
        say("NOT PRIVATE: the noise multiplier is 0")


def _finish(job: Job, tokenizer: Any, names: list[Any] | None, made: bool, say: Any) -> result.FinetuneResult:
    config, plan, epsilon = job.config, job.plan, job.epsilon()
    checked = str(job.private.separation or "not looked at")
    net: Any = job.private.to_standard_module()
    state = None
    if config.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if job.place.rank == 0:
        card = result.card(config, result.page(config, plan, epsilon, job.figures, names, made), made)
        result.save(Path(config.output), net, tokenizer, card, result.facts(config, plan, epsilon, checked), state)
    job.place.wait()
    spent = f"epsilon {epsilon:.3f} at delta {plan.delta:g} after {job.step} steps"
    figures = "".join(f", {name} {value:.4g}" for name, value in job.figures.items())
    say(f"done      {spent}{figures}")
    if job.private.nonfinite_samples:
        say(f"          {job.private.nonfinite_samples} gradients were not finite and counted as zero")
    say(f"          result in {config.output}; {config.output}/checkpoints holds the noise's key: never publish it")
    return result.FinetuneResult(
        net.eval(), tokenizer, epsilon, plan.delta, plan.noise_multiplier, job.step, job.figures, Path(config.output)
    )


def _silent(*args: Any, **kwargs: Any) -> None:
    """Ranks other than the first print nothing."""
