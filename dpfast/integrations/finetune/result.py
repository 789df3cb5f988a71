"""What a run leaves: a model that ``from_pretrained`` loads, its tokenizer, and a page that says what was promised."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError
from dpfast.integrations.finetune.privacy import Plan, unit_of
from dpfast.version import __version__

BASE = "base"  # the frozen model of a LoRA result, if it is to be had nowhere else
PARTS = ".result"


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        model: in eval mode, its own class again (with LoRA a ``PeftModel``).
        tokenizer: saved beside it.
        epsilon, delta: what the run has spent, over all its steps.
        noise_multiplier, steps: with which noise, and how many.
        figures: of the last evaluation; empty without ``eval``.
        output: the folder.
    """

    model: nn.Module
    tokenizer: Any
    epsilon: float
    delta: float
    noise_multiplier: float
    steps: int
    figures: dict[str, float]
    output: Path


def prepare(output: Path, resume: bool) -> None:
    """Make the folder, and see that nothing of another run is in it.

    Raises:
        FinetuneError: it holds a run already, or cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in ("checkpoints", "config.json", "adapter_config.json"):
                there = output / name
                if there.is_file() or (there.is_dir() and any(there.iterdir())):
                    raise FinetuneError(
                        f"--output {output} holds a run already: --resume goes on with it, or give another"
                    )
        probe = output / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise FinetuneError(f"--output {output} cannot be written to: {error.strerror or error}") from error


def save(
    output: Path, model: Any, tokenizer: Any, card: str, facts: dict[str, Any], state: dict[str, Any] | None = None
) -> None:
    """Save model, tokenizer, README.md and privacy.json, each file whole or not at all."""
    parts = output / PARTS
    try:
        shutil.rmtree(parts, ignore_errors=True)
        model.save_pretrained(parts, **({} if state is None else {"state_dict": state}))
        tokenizer.save_pretrained(parts)
        (parts / "README.md").write_text(card, encoding="utf-8")
        (parts / "privacy.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in sorted(parts.iterdir()):
            os.replace(path, output / path.name)
        parts.rmdir()
    except OSError as error:
        raise FinetuneError(
            f"the result cannot be written to {output} ({error.strerror or error}): make room, then --resume"
        ) from error


def facts(config: FinetuneConfig, plan: Plan, epsilon: float, checked: str) -> dict[str, Any]:
    """privacy.json of a result: what was promised, by which means, and what was proved of the model.

    Args:
        checked: what the last look at the samples has shown.
    """
    names = ("torch", "opacus", "transformers")
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": plan.delta,
        "unit": f"{unit_of(config)}, added or removed",
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": 1 / plan.steps_per_epoch,
        "steps": plan.steps,
        "expected_batch_size": plan.expected_batch_size,
        "sampling": "Poisson",
        "accountant": config.accountant,
        "clipping": {"style": "flat", "function": config.clipping_fn, "max_grad_norm": config.max_grad_norm},
        "noise": "secure" if config.secure else "fast",
        "separation_of_samples": checked,
        "versions": {"dpfast": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in names},
    }


def card(config: FinetuneConfig, text: str, made: bool) -> str:
    """README.md of a result, a model card with ``text``; ``made``: the model began from random weights."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=None if made or config.model is None or Path(config.model).exists() else config.model,
        library_name="peft" if config.lora_rank else "transformers",
        pipeline_tag="text-classification" if config.task == "classification" else "text-generation",
        tags=["differential-privacy", "dp-sgd", "dpfast"],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _loading(config: FinetuneConfig, classes: list[Any] | None, made: bool) -> list[str]:
    """Code that loads a result from wherever its folder has gone."""
    auto = f"AutoModelFor{'SequenceClassification' if config.task == 'classification' else 'CausalLM'}"
    if not config.lora_rank:
        return [
            f"from transformers import AutoTokenizer, {auto}",
            "",
            'folder = "."  # where this file is',
            f"model = {auto}.from_pretrained(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    base = f'f"{{folder}}/{BASE}"' if made else repr(config.model)
    count = f", num_labels={len(classes)}" if classes else ""
    return [
        "from peft import PeftModel",
        f"from transformers import AutoTokenizer, {auto}",
        "",
        'folder = "."  # where this file is',
        f"base = {auto}.from_pretrained({base}{count})",
        "model = PeftModel.from_pretrained(base, folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]


def page(
    config: FinetuneConfig,
    plan: Plan,
    epsilon: float,
    figures: dict[str, float],
    classes: list[Any] | None,
    made: bool,
) -> str:
    """What a result is, for people, and how to load it."""
    of_users = config.unit_column is not None
    clipped = "users'" if of_users else "per-sample"
    several = "" if of_users else "someone with several rows is protected less; "
    lines = [
        "# A model fine-tuned with differential privacy",
        "",
        f"(ε, δ) = ({epsilon:.3f}, {plan.delta:g}) towards adding or removing {unit_of(config)}, by the "
        f"{config.accountant} accountant: {plan.steps} steps of DP-SGD (AdamW) on Poisson batches with sample rate "
        f"1/{plan.steps_per_epoch}, noise multiplier {plan.noise_multiplier:.4f}, {clipped} gradients clipped to "
        f"{config.max_grad_norm:g} ({config.clipping_fn}), {'secure' if config.secure else 'fast'} noise.",
        "",
        f"Not covered: {several}which classes there are, the number of {'users' if of_users else 'rows'}, the "
        "sizes of batches, and figures on rows that were held out for evaluation.",
        "",
        "```python",
        *_loading(config, classes, made),
        "```",
    ]
    if config.lora_rank:
        lines += [
            "",
            f"This is a LoRA adapter of rank {config.lora_rank}; `model.merge_and_unload()` gives a whole model.",
        ]
    if classes:
        lines += ["", "Classes: " + ", ".join(f"{k}: {name}" for k, name in enumerate(classes))]
    if figures:
        lines += ["", "On the evaluation data: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items())]
    lines += ["", "`privacy.json` has the guarantee and what it rests on, for programs."]
    lines += ["", "Publish the files in this folder; never `checkpoints/`, which holds the key of the noise."]
    return "\n".join(lines) + "\n"
