"""Checkpoints of private training on several ranks, through ``torch.distributed.checkpoint``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.tensor import DTensor

from dpfast.accounting.runs import joined, state_of
from dpfast.checkpoints import read, written
from dpfast.engine import PrivacyEngine
from dpfast.optim.fused_update import MASTER, make_masters
from dpfast.optim.optimizer import FusedDPOptimizer
from dpfast.refusals import CheckpointError

PRIVACY_NAME = "privacy.pt"
SHARDS = "shards"  # beside it, in a checkpoint of a Trainer whose model is sharded
EVERYTHING = states.StateDictOptions()
TRAINED = states.StateDictOptions(ignore_frozen_params=True, strict=False)  # the frozen base is nothing to be saved


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has shared the model's parameters out over ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def full(x: Tensor) -> Tensor:
    """All of a tensor. Where it is sharded, all ranks have to ask together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The ``state_dict`` of a sharded model, on the CPU of rank 0; called by all ranks."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return states.get_model_state_dict(model, options=options)


def save_shards(folder: str, model: nn.Module, optimizer: FusedDPOptimizer) -> None:
    """What trains of a sharded model, and the optimizer's state, into a part of ``folder``; called by all ranks."""
    dcp.save(
        _state(model, optimizer, TRAINED), checkpoint_id=os.path.join(folder, SHARDS), process_group=_group(optimizer)
    )


def load_shards(folder: str, model: nn.Module, optimizer: FusedDPOptimizer) -> None:
    """What :func:`save_shards` has saved, at any number of ranks; called by all ranks."""
    held = _state(model, optimizer, TRAINED)
    dcp.load(held, checkpoint_id=os.path.join(folder, SHARDS), process_group=_group(optimizer))
    _take_over(held, model, optimizer, TRAINED)


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    engine: PrivacyEngine,
    module: Any,
    optimizer: FusedDPOptimizer,
    extra: Any = None,
) -> None:
    """A folder with model, optimizer state and accountant; called by all ranks.

    It is written beside ``path`` and renamed when it is whole: an interrupted write leaves what was there before (for
    a moment as ``path`` with ``.before`` at its end). It can be loaded at another number of ranks, sharded or not. It
    holds no key of the noise. What ``extra`` holds may be secret: the seed of the batches tells who was in which.

    Args:
        path: of the folder; one that is there is replaced.
        module, optimizer: as ``make_private`` has returned them.
        extra: what else rank 0 is to keep (the sampler's step, a scheduler's state): plain Python and tensors.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    first = optimizer.ranks.rank == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    optimizer.ranks.from_rank(0, None)  # the folder is there
    dcp.save(_state(module, optimizer), checkpoint_id=partial, process_group=_group(optimizer))
    if first:
        privacy = {
            "accountant": state_of(engine.accountant),
            "max_grad_norms": optimizer.max_grad_norms,
            "extra": extra,
        }
        with written(partial / PRIVACY_NAME) as file:
            torch.save(privacy, file)
        if path.exists():
            before = path.with_name(path.name + ".before")
            shutil.rmtree(before, ignore_errors=True)
            os.replace(path, before)
            os.replace(partial, path)
            shutil.rmtree(before)
        else:
            os.replace(partial, path)
    optimizer.ranks.from_rank(0, None)  # it is whole


def load_checkpoint(
    path: str | os.PathLike[str], *, engine: PrivacyEngine, module: Any, optimizer: FusedDPOptimizer
) -> Any:
    """Go on from :func:`save_checkpoint`, at any number of ranks; called by all ranks. Returns its ``extra``.

    The next step draws a new key for the noise, as after :meth:`dpfast.PrivacyEngine.load_checkpoint`.

    Raises:
        ValueError: there is no whole checkpoint, or it is of another kind; nothing is changed.
    """
    path = Path(path)
    if not (path / PRIVACY_NAME).is_file():
        raise CheckpointError(
            f"path={str(path)!r}: no whole checkpoint of private training is there (no {PRIVACY_NAME})"
        )
    privacy = read(path / PRIVACY_NAME, map_location="cpu")
    counted = joined(engine.accountant, privacy["accountant"])
    if len(privacy["max_grad_norms"]) != len(optimizer.max_grad_norms):
        raise CheckpointError(
            f"path={str(path)!r}: saved with {len(privacy['max_grad_norms'])} clipping norms, and this optimizer has "
            f"{len(optimizer.max_grad_norms)}: give make_private the same clipping"
        )
    held = _state(module, optimizer)
    dcp.load(held, checkpoint_id=path, process_group=_group(optimizer))
    _take_over(held, module, optimizer)
    counted.take_over()
    optimizer.noise.renew()
    optimizer.clipping.thresholds = list(privacy["max_grad_norms"])
    return privacy["extra"]


def _state(module: Any, optimizer: FusedDPOptimizer, options: Any = EVERYTHING) -> dict[str, Any]:
    """Tensors by name, sharded ones as each rank has them."""
    model = _model(module)
    # The wrapped optimizer's: to have a state to fill, torch takes a step with it, which must not be a private one.
    if optimizer.low_precision == "master":
        states.get_optimizer_state_dict(model, optimizer.original_optimizer)  # takes that step, where there is no state
        make_masters(optimizer.original_optimizer)
    return {
        "model": states.get_model_state_dict(model, options=options),
        "optimizer": states.get_optimizer_state_dict(model, optimizer.original_optimizer),
    }


def _take_over(held: dict[str, Any], module: Any, optimizer: FusedDPOptimizer, options: Any = EVERYTHING) -> None:
    model = _model(module)
    masters = {name: state[MASTER].clone() for name, state in held["optimizer"]["state"].items() if MASTER in state}
    states.set_model_state_dict(model, held["model"], options=options)
    states.set_optimizer_state_dict(model, optimizer.original_optimizer, optim_state_dict=held["optimizer"])
    for name, p in model.named_parameters():
        if name in masters:  # which torch has rounded to the parameter's dtype
            optimizer.original_optimizer.state[p][MASTER] = masters[name]


def _model(module: Any) -> nn.Module:
    return getattr(module, "_module", module)


def _group(optimizer: FusedDPOptimizer) -> Any:
    return getattr(optimizer.ranks, "group", None) if dist.is_initialized() else None
