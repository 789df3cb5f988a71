"""Checkpoints that a run goes on from bit for bit, and that an interrupted write cannot spoil.

They hold the noise's key, the seed of the batches and a hash of the data: they are never to be published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.checkpoints import NOISE_STATE, PLAN, read
from dpfast.engine import PrivacyEngine
from dpfast.integrations.finetune.config import FinetuneError, option
from dpfast.noise.stream import check_state

FOLDER = "checkpoints"
KEEP = 2
RUN = "finetune"  # our entry in a checkpoint
NAME = re.compile(r"step-(\d{8})(\.rank\d+)?\.pt")


def newest(folder: Path, suffix: str = "") -> Path | None:
    """The checkpoint of the last step that there is one of."""
    found = sorted(p for p in folder.glob(f"step-*{suffix}.pt") if NAME.fullmatch(p.name)) if folder.is_dir() else []
    return found[-1] if found else None


def name_of(step: int, suffix: str = "") -> str:
    """A checkpoint's file name; with ``suffix`` for each rank under FSDP."""
    return f"step-{step:08d}{suffix}.pt"


def step_of(path: Path) -> int:
    """The step in a checkpoint's file name."""
    return int(path.name[5:13])


def save(folder: Path, step: int, suffix: str, engine: PrivacyEngine, module: Any, optimizer: Any, run: Any) -> Path:
    """Save in Opacus' layout, with ``run`` beside; the newest :data:`KEEP` stay.

    Where only a part of the model trains, only that part is saved.
    """
    path = folder / name_of(step, suffix)
    held = {
        RUN: {**run, "step": step},
        PLAN: module.clipped_sum.planner.state_dict(),
        NOISE_STATE: optimizer.noise.state_dict(),  # batches and dropout are functions of the seed and the step
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        engine.save_checkpoint(path=path, module=saved_part(module), optimizer=optimizer, checkpoint_dict=held)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        last = newest(folder, suffix)
        kept = f"; {last.name} is whole" if last is not None else ""
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise FinetuneError(f"the checkpoint of step {step} cannot be written ({reason}): make room{kept}") from error
    for old in sorted(folder.glob(f"step-*{suffix}.pt"))[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def peek(path: Path) -> dict[str, Any]:
    """Our entry of a checkpoint, without reading weights."""
    try:
        run = read(path, map_location="meta")[RUN]
        return {"step": run["step"], "seed": run["seed"], **run}
    except Exception as error:
        raise FinetuneError(
            f"{path} is no checkpoint that can be read ({type(error).__name__}): take it away, and --resume goes on "
            f"from the one before it"
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


def load(path: Path, engine: PrivacyEngine, module: Any, optimizer: Any, device: torch.device, key: Any) -> None:
    """Take everything over from a checkpoint that :func:`check` has let through.

    Args:
        key: the noise's key that this run's seed gives; None in secure mode.
    """
    noise = read(path, map_location="meta").get(NOISE_STATE, {})
    if key is not None and tuple(noise.get("key") or ()) != tuple(key):
        raise FinetuneError(f"{path} has another noise key than its seed gives: start anew, with another --output")
    try:
        check_state(noise)
        rest = engine.load_checkpoint(
            path=path, module=saved_part(module), optimizer=optimizer, torch_load_kwargs={"map_location": device}
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise FinetuneError(f"{path} does not fit this run ({str(error).partition(chr(10))[0]}): start anew") from error
    optimizer.noise.load_state_dict(noise)
    if PLAN in rest:
        module.clipped_sum.planner.load_state_dict(rest[PLAN])


class TrainedPart:
    """Of a model, what trains: its ``state_dict`` has nothing else."""

    def __init__(self, module: nn.Module):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters that train, detached."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """RuntimeError if names or shapes differ."""
        if set(state) != set(self.parameters):
            raise RuntimeError("its parameters have other names")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state[name])


def saved_part(module: nn.Module) -> Any:
    """What a checkpoint holds of the model: all of it, or only what trains."""
    return module if all(p.requires_grad for p in module.parameters()) else TrainedPart(module)
