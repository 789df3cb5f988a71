"""Which checkpoint a run goes on from, and that it is of this very run.

They hold the noise's key, the seed of the batches and a hash of the data: they are never to be published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpfast.checkpoints import read
from dpfast.integrations.distributed import PRIVACY_NAME
from dpfast.integrations.finetune.config import FinetuneError, option
from dpfast.integrations.trainer_checkpoints import newest_whole

FOLDER = "checkpoints"
KEEP = 2


def newest(output: Path) -> Path | None:
    """The checkpoint of the last step that a run in ``output`` has saved whole."""
    found = newest_whole(str(output / FOLDER))
    return None if found is None else Path(found)


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def peek(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about its run, without reading weights."""
    path = checkpoint / PRIVACY_NAME
    try:
        held = read(path, map_location="cpu")
        run = held["extra"]
        return {"step": held["step"], "seed": run["seed"], "noise_multiplier": held["noise_multiplier"], **run}
    except Exception as error:
        raise FinetuneError(
            f"{path} is no checkpoint that can be read ({type(error).__name__}): take {checkpoint.name} away, and "
            f"--resume goes on from the one before it"
        ) from error


def check(path: Path, held: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse to go on with anything but the run that was saved: the same noise over other sums would bare them."""
    start = "start anew, with another --output"
    if held["seed"] != run["seed"]:  # another key, batches and random weights
        raise FinetuneError(f"{path} has another noise key than --seed gives: leave --seed out, or {start}")
    if held["model"] != run["model"]:
        raise FinetuneError(
            f"{path} is of another model: give the --model and LoRA options it was made with, or {start}"
        )
    if held["data"] != run["data"]:
        raise FinetuneError(f"{path} is of other training data (or another --context): {start}")
    for name, value in run["settings"].items():
        if held["settings"].get(name) != value:
            was = held["settings"].get(name)
            raise FinetuneError(
                f"{path} was made with {option(name)} {was}, and here it is {value}: keep it, or {start}"
            )
