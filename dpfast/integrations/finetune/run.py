"""``finetune``: from a config to a result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dpfast.integrations.distributed import whole_state
from dpfast.integrations.finetune import checkpoint, model, privacy, result
from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError
from dpfast.integrations.finetune.data import Collate, Rows, Samples, class_names, read_rows, tokenised
from dpfast.integrations.finetune.pair_trainer import FinetunePairTrainer
from dpfast.integrations.finetune.preferences import CollatePairs, PairRows, Pairs, read_pairs, tokenised_pairs
from dpfast.integrations.finetune.processes import Place, sharded, take_place
from dpfast.integrations.finetune.trainer import FinetuneTrainer, Run
from dpfast.integrations.replayed import fingerprint
from dpfast.refusals import RankLostError

# Of these the model that comes out depends: a resumed run must have the same.
DECISIVE = (
    *("epochs", "max_steps", "batch_size", "learning_rate", "weight_decay", "lr_schedule", "warmup_steps"),
    *("target_epsilon", "target_delta", "noise_multiplier", "accountant", "max_grad_norm", "clipping_fn", "secure"),
    *("bf16", "pure_bf16", "low_precision", "truncate", "fsdp", "lora_alpha"),
    *("unit_column", "rows_per_unit", "dpo", "dpo_beta", "packing", "probe_first"),
)


def finetune(config: FinetuneConfig) -> result.FinetuneResult:
    """Fine-tune a causal language model or a classifier with differential privacy.

    Guarantee: (ε, δ) under adding or removing one row of the training data, or all rows of one user where there is a
    ``unit_column``, as :mod:`dpfast` gives it: a row is a sample (never several rows in one, nor one in several; with
    ``dpo`` a pair), clipped by itself with ``packing`` too, its loss is its own, batches are Poisson samples, and every
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
    labels = rows.labels if isinstance(rows, Rows) else None
    names = None if labels is None else class_names(labels)
    if names is not None and len(names) < 2:
        raise FinetuneError(f"--label-column {config.label_column}: there is only one class: at least 2 are needed")
    torch.manual_seed(privacy.number(seed, privacy.WEIGHTS))  # all ranks start from the same weights
    net: Any
    net, tokenizer, made = model.load(config, names)
    context = model.context_of(config, net.config, tokenizer)
    data, held_out_data, pad = _tokenised(config, rows, held_out, net, tokenizer, context)
    if config.noise_multiplier is None and held is None:
        say("looking for the noise multiplier ...", flush=True)
    units = len(data) if data.users is None else len({*data.users})
    plan = privacy.plan_of(config, units, held["noise_multiplier"] if held else None)
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
        "data": data.digest,
    }
    if held is not None:
        assert found is not None
        checkpoint.check(found, held, state)
        if config.physical_batch_size == "auto":
            config.physical_batch_size = held["physical_batch_size"]
    reference = copy.deepcopy(net) if config.dpo and config.lora_rank is None else None
    net = net.to(place.device)
    if config.fsdp:
        net = sharded(net)
    least = data.longest if config.pad else 1
    if isinstance(data, Pairs):
        pairs = CollatePairs(pad, context, least)
        run = Run(config, place.device, pairs, data, held_out_data, plan, seed)
        trainer: FinetuneTrainer = FinetunePairTrainer(net, run, say, reference)
    else:
        collate = Collate(pad, context, names is not None, least)
        trainer = FinetuneTrainer(net, Run(config, place.device, collate, data, held_out_data, plan, seed), say)
    trainer.extra_state = state
    _announce(trainer, place, made, held)
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if not trainer.figures:
        trainer.evaluate()
    return _finish(trainer, place, tokenizer, names, made)


def _checkpoint(config: FinetuneConfig, place: Place) -> tuple[Path | None, dict[str, Any] | None]:
    if not config.resume:
        return None, None
    output = Path(config.output)
    found = place.from_first(checkpoint.newest(output))
    if found is None or not found.exists():
        raise FinetuneError(
            f"--resume: there is no checkpoint in {output / checkpoint.FOLDER}: leave --resume out to start anew"
        )
    return found, checkpoint.peek(found)


def _rows(config: FinetuneConfig, seed: int) -> tuple[Rows, Rows | None] | tuple[PairRows, PairRows | None]:
    """Rows to train on and rows to evaluate on."""
    label = config.label_column if config.task == "classification" else None

    def read(source: Any, users: str | None) -> Any:
        if config.dpo:
            return read_pairs(source, users)
        return read_rows(source, config.text_column, label, users)

    rows = read(config.train, config.unit_column)
    if config.eval is None:
        return rows, None
    try:
        fraction = float(config.eval)
    except (TypeError, ValueError):
        return rows, read(config.eval, None)
    if not 0 < fraction < 1:
        raise FinetuneError(f"--eval {config.eval}: give a file, or a fraction between 0 and 1")
    # A coin for each row or user: whether one is there does not change where the others go.
    words = np.random.SeedSequence(seed, spawn_key=(privacy.HELD_OUT,))
    order = {user: k for k, user in enumerate(dict.fromkeys(rows.users or range(len(rows))))}
    coins = np.random.default_rng(words).random(len(order)) < fraction
    out = coins if rows.users is None else coins[[order[user] for user in rows.users]]
    if out.all() or not out.any():
        raise FinetuneError(f"--eval {config.eval}: too few rows to hold some out: give a file")
    return rows.select(np.flatnonzero(~out).tolist()), rows.select(np.flatnonzero(out).tolist())


def _tokenised(
    config: FinetuneConfig, rows: Any, held_out: Any, net: Any, tokenizer: Any, context: int
) -> tuple[Samples | Pairs, Samples | Pairs | None, int]:
    if config.dpo:
        pairs = tokenised_pairs(rows, tokenizer, context, config.truncate)
        others = None if held_out is None else tokenised_pairs(held_out, tokenizer, context, True)
        return pairs, others, tokenizer.pad_token_id
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


def _announce(trainer: FinetuneTrainer, place: Place, made: bool, held: dict[str, Any] | None) -> None:
    run, say = trainer.run, trainer.say
    config, plan, model = run.config, run.plan, trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    kind = "random weights" if made else "loaded"
    source = " of the bundled text" if config.train is None else ""
    more = f"; {len(run.held_out):,} to evaluate on" if run.held_out is not None else ""
    size = trainer.args.per_device_train_batch_size
    chosen = " (found to fit)" if config.physical_batch_size == "auto" else ""
    ranks = f", over {place.world_size} ranks" if place.world_size > 1 else ""
    say(f"model     {type(model).__name__} ({kind}), {trained:,} of {every:,} parameters train, {place.device}")
    them, of_users = "pairs" if config.dpo else "samples", ""
    if config.unit_column is not None:
        of_users = f" of {plan.samples:,} users ({config.unit_column})"
    say(f"data      {len(run.data):,} {them}{source}{of_users}, the longest of {run.data.longest} tokens{more}")
    expected = "users" if config.unit_column is not None else them
    say(f"batches   {plan.expected_batch_size} {expected} expected, {size} {them} at a time{chosen}{ranks}")
    say(f"privacy   noise multiplier {plan.noise_multiplier:.4f}, {plan.steps} steps, delta {plan.delta:g}")
    say(f"          epsilon is for {privacy.unit_of(config)}")
    if plan.probe_steps:
        say(f"          the first {plan.probe_steps} steps train the head alone, the others everything")
    if held is not None:
        say(f"resumed   after step {held['step']}")
    if plan.noise_multiplier == 0:
        say("NOT PRIVATE: the noise multiplier is 0")


def _finish(
    trainer: FinetuneTrainer, place: Place, tokenizer: Any, names: list[Any] | None, made: bool
) -> result.FinetuneResult:
    run, say = trainer.run, trainer.say
    config, plan, figures, steps = run.config, run.plan, trainer.figures, trainer.state.global_step
    epsilon, delta = trainer.privacy_spent()
    assert trainer.hooks is not None
    checked, lost = str(trainer.hooks.separation or "not looked at"), trainer.hooks.nonfinite_samples
    trainer.hooks.cleanup()
    net: Any = trainer.model
    state = whole_state(net) if config.fsdp else None
    if place.rank == 0:
        card = result.card(config, result.page(config, plan, epsilon, figures, names, made), made)
        result.save(Path(config.output), net, tokenizer, card, result.facts(config, plan, epsilon, checked), state)
    place.wait()
    shown = "".join(f", {name} {value:.4g}" for name, value in figures.items())
    of = f" for {privacy.unit_of(config)}"
    say(f"done      epsilon {epsilon:.3f} at delta {delta:g}{of}, after {steps} steps{shown}")
    if lost:
        say(f"          {lost} gradients were not finite and counted as zero")
    say(f"          result in {config.output}; {config.output}/checkpoints holds the noise's key: never publish it")
    return result.FinetuneResult(
        net.eval(), tokenizer, epsilon, delta, plan.noise_multiplier, steps, figures, Path(config.output)
    )


def _silent(*args: Any, **kwargs: Any) -> None:
    """Ranks other than the first print nothing."""
