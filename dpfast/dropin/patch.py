"""``opacus.PrivacyEngine`` served by the fused mode, in scripts that know nothing of dpfast."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, NamedTuple, TypeGuard

import opacus.utils.batch_memory_manager
from opacus import PrivacyEngine as OpacusEngine
from torch import nn
from torch.utils.data import DataLoader

from dpfast.data.physical_batches import OPACUS_WRAPS, BatchMemoryManager, wrap_data_loader
from dpfast.dropin.replaced import PARTS, replaced_in_opacus
from dpfast.dropin.script_needs import first_need
from dpfast.engine import FUSED, PrivacyEngine

logger = logging.getLogger("dpfast")
SERVED = ("hooks", "functorch", "ew", "ghost")  # modes of Opacus whose step the fused mode takes


class Call(NamedTuple):
    """One ``make_private`` of a patched process."""

    where: str
    asked: str  # the mode of Opacus
    ran: str  # "fused", "Opacus" or "refused"
    why: str


_calls: list[Call] = []


class PatchedEngine(PrivacyEngine):
    """Stands for ``opacus.PrivacyEngine`` between :func:`patch_opacus` and :func:`unpatch_opacus`.

    Arguments, defaults and results are Opacus'. Its modes "hooks", "functorch", "ew" and "ghost" are served by the
    fused mode. An engine stays Opacus' where its script needs what only Opacus' mode has, and a line in the log says
    so: see :func:`why_opacus`.
    """

    _decided = False

    def make_private(  # type: ignore[override]
        self, *, grad_sample_mode: str = "hooks", criterion: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """As ``opacus.PrivacyEngine.make_private``; the guarantee is that of :class:`dpfast.PrivacyEngine`."""
        return self._served(super().make_private, grad_sample_mode, criterion, kwargs)

    def make_private_with_epsilon(  # type: ignore[override]
        self, *, grad_sample_mode: str = "hooks", criterion: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """As ``opacus.PrivacyEngine.make_private_with_epsilon``."""
        return self._served(super().make_private_with_epsilon, grad_sample_mode, criterion, kwargs)

    def _is_opacus(self, mode: str | None) -> TypeGuard[str]:
        return mode != FUSED  # "ghost" comes this far where it is to stay Opacus' own

    def _served(self, make: Callable[..., tuple[Any, ...]], asked: str, criterion: Any, kwargs: Any) -> tuple[Any, ...]:
        if self._decided:
            return make(grad_sample_mode=asked, criterion=criterion, **kwargs)
        frame = sys._getframe(2)
        where = _place(frame)
        why = why_opacus(self, asked, frame)
        if why is None:
            asked_for = {"criterion": nn.CrossEntropyLoss() if criterion is None else criterion}
            given = dict(grad_sample_mode=FUSED, **(asked_for if asked == "ghost" else {}))
        else:
            logger.warning("dpfast: %s: grad_sample_mode=%r stays Opacus' own, as %s", where, asked, why)
            given = dict(grad_sample_mode=asked, criterion=criterion)
        self._decided = True
        try:
            made = make(**given, **kwargs)
        except Exception as error:
            _calls.append(Call(where, asked, "refused", str(error).partition("\n")[0]))
            raise
        finally:
            self._decided = False
        _calls.append(Call(where, asked, FUSED if why is None else "Opacus", why or ""))
        return made


class PatchedBatchMemoryManager(BatchMemoryManager):
    """Stands for Opacus' in the meantime, and is not dpfast's own, whose names stay when the patch is taken off."""


def patched_wrap_data_loader(*, data_loader: DataLoader, max_batch_size: int, optimizer: Any) -> DataLoader:
    """Stands for Opacus' in the meantime, likewise."""
    return wrap_data_loader(data_loader=data_loader, max_batch_size=max_batch_size, optimizer=optimizer)


def why_opacus(engine: OpacusEngine, mode: str, frame: FrameType | None) -> str | None:
    """Why ``engine`` has to run ``mode`` as Opacus does, for code that calls from ``frame``; None if it need not."""
    if mode == FUSED:
        return None
    if mode not in SERVED:
        return f"the fused mode has nothing for {mode!r}"
    if own := [name for name in PARTS if getattr(type(engine), name) is not getattr(OpacusEngine, name)]:
        return f"{type(engine).__name__} has its own {', '.join(own)}"
    if (replaced := replaced_in_opacus()) is not None:
        return f"{replaced} was replaced"
    need = first_need(frame)
    return None if need is None else f"{need.where} {need.what}"


def patch_opacus() -> None:
    """Have ``opacus.PrivacyEngine`` served by the fused mode in this process, until :func:`unpatch_opacus`.

    At the top of a script or a notebook it is the only line to add; ``python -m dpfast run script.py`` needs none::

        import dpfast

        dpfast.patch_opacus()

        from opacus import PrivacyEngine

    ``BatchMemoryManager`` and ``wrap_data_loader`` of ``opacus.utils.batch_memory_manager`` become dpfast's too. Names
    that modules have imported before are replaced as well. Engines that exist already stay what they are. Calling it
    twice changes nothing.
    """
    _replace(_STAND_INS)


def unpatch_opacus() -> None:
    """Give Opacus its own names back. Engines that were made in between go on as they are."""
    _replace({ours: opacus_own for opacus_own, ours in _STAND_INS.items()})


def calls() -> list[Call]:
    """Every ``make_private`` of a patched engine in this process so far."""
    return [*_calls]


_STAND_INS: dict[Any, Any] = {
    OpacusEngine: PatchedEngine,
    opacus.utils.batch_memory_manager.BatchMemoryManager: PatchedBatchMemoryManager,
    OPACUS_WRAPS: patched_wrap_data_loader,
}


def _replace(stand_ins: dict[Any, Any]) -> None:
    """Put other classes and functions in the place of those that ``stand_ins`` has, wherever a module names them."""
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == "dpfast" or not hasattr(module, "__dict__"):
            continue
        for attribute, value in [*vars(module).items()]:
            # isinstance() asks the value itself, and lazy attributes then load
            if issubclass(type(value), (type, FunctionType)) and value in stand_ins:
                setattr(module, attribute, stand_ins[value])


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
