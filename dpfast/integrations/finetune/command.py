"""``python -m dpfast finetune``: the options of the command are the fields of the config."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpfast.arguments import Parser
from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError, option

NEEDS = ("transformers", "peft", "datasets", "pandas", "tensorboard", "tqdm", "psutil")
GROUPS = {  # by the first of the config's fields
    "model": "model and task",
    "train": "data",
    "output": "result",
    "lora_rank": "adapters",
    "target_epsilon": "privacy",
    "batch_size": "training",
    "bf16": "memory and speed",
    "secure": "randomness, logs and checkpoints",
}
EXAMPLE = """example: adapters for GPT-2, trained on the column "text" of notes.jsonl with epsilon 8

  python -m dpfast finetune --model gpt2 --train notes.jsonl --eval 0.1 \\
      --lora-rank 16 --target-epsilon 8 --batch-size 256 --epochs 3 --output out
"""
TYPES = {"int | None": int, "int": int, "float | None": float, "float": float}


def parser() -> Parser:
    """The command's options, with the config's defaults, in the config's groups."""
    made = Parser(
        "dpfast finetune",
        usage="python -m dpfast finetune [options]",
        description="Fine-tune a Transformers model with differential privacy.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group: Any = made
    for each in fields(FinetuneConfig):
        if each.name in GROUPS:
            group = made.add_argument_group(GROUPS[each.name])
        text = each.metadata["help"]
        if each.type == "bool":
            group.add_argument(option(each.name), action="store_true", help=text)
            continue
        if each.default is not None:
            text += " (%(default)s)"
        choices = each.metadata.get("choices")
        kind = TYPES.get(str(each.type), str)
        metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "TEXT")
        group.add_argument(option(each.name), type=kind, default=each.default, metavar=metavar, help=text)
    return made


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 2 after one line on what has to be put right; 130 after an interruption.
    """
    asked = parser().parse_args(arguments)
    config = FinetuneConfig(**{each.name: getattr(asked, each.name) for each in fields(FinetuneConfig)})
    first = os.environ.get("RANK", "0") == "0"
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise FinetuneError(f"needs {', '.join(missing)}: pip install 'dpfast[finetune]'")
        config.validate()  # before anything slow is imported
        from dpfast.integrations.finetune.run import finetune

        _quiet()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Secure RNG turned off")
            warnings.filterwarnings("ignore", category=FutureWarning)  # what other libraries tell each other
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # about changes in place, which there are none of
            finetune(config)
    except FinetuneError as error:
        if first:
            print(f"dpfast finetune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print(f"\ndpfast finetune: interrupted{_what_is_left(config)}")
        return 130
    return 0


def _what_is_left(config: FinetuneConfig) -> str:
    none = " before there was a checkpoint; start anew"
    if not (Path(config.output) / "checkpoints").is_dir():
        return none  # and nothing slow is imported to say so
    from dpfast.integrations.finetune import checkpoint

    found = checkpoint.newest(Path(config.output))
    if found is None:
        return none
    return f" after step {checkpoint.step_of(found)}, which is saved; --resume goes on from there"


def _quiet() -> None:
    """One progress bar is enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
