"""Packing: the samples of a batch behind one another in one row, after they were drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpfast.data.units import is_count
from dpfast.refusals import CollateError


@dataclass(frozen=True)
class Packed:
    """A ``collate_fn`` for ``make_private(units="packed")``: no token is padding.

    It packs the samples that a batch has drawn, so that Poisson sampling draws samples, whatever they are packed with.
    Which samples share a row changes nothing of what a sample contributes, as they do not meet.

    Example:
        >>> loader = DataLoader(samples, batch_size=16, collate_fn=Packed(max_length=512))

    Args:
        max_length: tokens of a sample that are kept, the first ones: a public number.

    A sample is a mapping with ``input_ids`` (a list or a tensor of at least one token) and perhaps ``labels`` of the
    same length, or ``input_ids`` alone. A batch is a dict of int64 tensors ``[1, total]``: ``input_ids``, ``labels``
    (the ids, where there are none) and ``position_ids``, which begin at 0 in each sample.

    Raises:
        ValueError: ``max_length`` is no whole number of at least 1; or a sample without tokens, or with another number
            of labels.
    """

    max_length: int
    takes_none: ClassVar[bool] = True  # a batch without samples is a row without positions

    def __post_init__(self) -> None:
        if not is_count(self.max_length):
            raise ValueError(f"max_length={self.max_length!r}: give a whole number of at least 1")

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        ids, labels, positions = [], [], []
        for k, sample in enumerate(samples):
            given = sample if isinstance(sample, Mapping) else {"input_ids": sample}
            its = torch.as_tensor(given["input_ids"], dtype=torch.int64)
            targets = torch.as_tensor(given.get("labels", its), dtype=torch.int64)
            if its.dim() != 1 or not len(its) or targets.shape != its.shape:
                raise CollateError(
                    f"sample {k} of the batch: input_ids of shape {list(its.shape)} and labels of shape "
                    f"{list(targets.shape)}; both have to be vectors of one length, of a token at least"
                )
            ids.append(its[: self.max_length])
            labels.append(targets[: self.max_length])
            positions.append(torch.arange(len(ids[-1])))
        none = torch.zeros(0, dtype=torch.int64)
        return {
            "input_ids": torch.cat([none, *ids]).unsqueeze(0),
            "labels": torch.cat([none, *labels]).unsqueeze(0),
            "position_ids": torch.cat([none, *positions]).unsqueeze(0),
        }


@dataclass(frozen=True)
class PackedAfter:
    """A ``collate_fn`` that packs what another one makes of each sample alone, without its padding.

    Args:
        collate_fn: from a list of one sample to a mapping of tensors ``[1, T]``: ``input_ids``, ``labels``, and
            perhaps ``attention_mask``, which is 0 at padding.

    A batch is a dict of tensors ``[1, total]``, as :class:`Packed` makes them, with what else ``collate_fn`` gives of
    each token. There is no attention mask in it: ``position_ids`` say where samples begin.

    Raises:
        ValueError: a sample without tokens, or a tensor of ``collate_fn`` that has no number for each token.
    """

    collate_fn: Callable[[list[Any]], Any]
    takes_none: ClassVar[bool] = True

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        rows = [self._row(self.collate_fn([sample])) for sample in samples]
        if any(row.keys() != rows[0].keys() for row in rows):
            raise CollateError(
                f"collate_fn gives {sorted(rows[0])} of one sample and other columns of another: packed samples have "
                f"the same columns"
            )
        if not rows:
            none = torch.zeros(1, 0, dtype=torch.int64)
            return {"input_ids": none, "labels": none, "position_ids": none}
        return {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}

    def _row(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        given = {name: x for name, x in batch.items() if name not in ("attention_mask", "position_ids")}
        ids, mask = torch.as_tensor(batch["input_ids"]), batch.get("attention_mask")
        inside = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else torch.as_tensor(mask)[0] != 0
        for name, x in given.items():
            if not isinstance(x, Tensor) or x.shape[:2] != ids.shape or len(ids) != 1 or not bool(inside.any()):
                raise CollateError(
                    f"collate_fn gives {name!r} of shape {list(getattr(x, 'shape', ()))} for one sample of "
                    f"{int(inside.sum())} tokens: packing needs a number for each token, [1, T], and a token at least"
                )
        return {name: x[:, inside] for name, x in given.items()} | {
            "position_ids": torch.arange(int(inside.sum()), device=ids.device)[None]
        }
