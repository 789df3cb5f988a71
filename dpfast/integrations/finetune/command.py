"""``python -m dpfast finetune``: the options of the command are the fields of the config."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from dataclasses import fields

from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError, option

NEEDS = ("transformers", "peft", "datasets", "pandas", "tensorboard", "tqdm", "psutil")
TYPES = {"int | None": int, "int": int, "float | None": float, "float": float}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options, with the config's defaults."""
    for each in fields(FinetuneConfig):
        text = each.metadata["help"]
        if each.type == "bool":
            parser.add_argument(option(each.name), action="store_true", help=text)
            continue
        if each.default is not None:
            text += " (%(default)s)"
        choices = each.metadata.get("choices")
        kind = TYPES.get(str(each.type), str)
        metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "TEXT")
        parser.add_argument(option(each.name), type=kind, default=each.default, metavar=metavar, help=text)


def main(asked: argparse.Namespace) -> int:
    """Run it.

    Returns:
        The exit status: 0; 2 after one line on what has to be put right; 130 after an interruption.
    """
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
            print(f"\ndpfast finetune: interrupted; --resume goes on from the last checkpoint in {config.output}")
        return 130
    return 0


def _quiet() -> None:
    """One progress bar is enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
