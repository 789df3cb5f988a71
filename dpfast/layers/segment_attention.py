"""Attention over packed rows: each segment by itself, so that nothing of another one comes near it.

A mask that keeps segments apart is not enough: ``0 · NaN`` is NaN, in the forward and in the backward, and a product of
two samples that overflows is one as well. So ``scaled_dot_product_attention`` is called for one segment at a time,
which is also less work. A mask that does not keep segments apart is refused all the same: it says that the model would
compute something else without us. Attention that is written out (a product, softmax, a product) is looked at when
softmax has run; where a number is not finite there, the backward pass is refused as a whole: see
:attr:`SegmentAttention.carries`.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpfast.capture.running_pass import unseen
from dpfast.capture.segments import PACKED, Segments
from dpfast.refusals import SamplesMeetError

SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)
WITHOUT_MASK = "attention without a mask, in which positions of a row see each other"
BY_MASK = "a mask that lets segments of a row see each other"
_running = threading.local()
REMEDY = (
    "Transformers makes a mask by segments from position_ids where there is no attention_mask and no cache: give no "
    "attention_mask, set model.config.use_cache = False, and choose attn_implementation='sdpa'"
)


class SegmentAttention(TorchFunctionMode):
    """Attention within is over one segment at a time.

    Attributes:
        carries: a NaN of one segment reaches others: some attention was written out in operators, or a trial has shown
            it.
    """

    def __init__(self, segments: Segments):
        super().__init__()
        self.segments = segments
        self.carries = False
        self._checked: list[tuple[Any, bool, list[Any]]] = []  # masks of the pass, with their parts

    def __enter__(self) -> SegmentAttention:
        self.before = getattr(_running, "mode", None)
        _running.mode = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _running.mode = self.before
        super().__exit__(*error)

    @staticmethod
    def running() -> SegmentAttention | None:
        """The innermost one that this thread is in."""
        return getattr(_running, "mode", None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            self._look_at_mask(inspect.signature(func).bind(*args, **kwargs).arguments.get("attn_mask"))
        elif "attention" in (name := getattr(func, "__name__", "")) or "attn" in name:
            self.carries = True  # a kernel of which nothing is known here
        out = func(*args, **kwargs)
        if func in SOFTMAX:
            self._look(out)
        return out

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        rows, length = self.segments.rows, self.segments.length
        lengths = query.shape[-2], key.shape[-2]
        if lengths != (length, length) or query.shape[0] % max(1, rows):
            raise SamplesMeetError(
                f"units={PACKED!r}: attention of {lengths[0]} positions on {lengths[1]} in {len(query)} rows, where "
                f"packed rows are {[rows, length]}: it cannot be told which of them are of one sample. {REMEDY}"
            )
        masks = self._parts(attn_mask, is_causal)
        each = len(query) // rows  # of [rows · heads, length, d]
        out = []
        of_rows = zip(*(x.split(each) for x in (query, key, value)), masks, self.segments.runs, strict=True)
        for *of_row, its_masks, cuts in of_rows:
            sides = zip(*(x.split(cuts, -2) for x in of_row), its_masks, strict=True)
            parts = [
                F.scaled_dot_product_attention(
                    q, k, v, None if isinstance(mask, bool) else mask, dropout_p, mask is True, **kwargs
                )
                for q, k, v, mask in sides
            ]
            out.append(parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _parts(self, mask: Tensor | None, is_causal: bool) -> list[Any]:
        """For each row the mask of each run of it: True for a causal one, False for none.

        Raises:
            SamplesMeetError: it lets segments see each other.
        """
        for known, causal, parts in self._checked:
            if causal == is_causal and _is_same(known, mask):
                return parts
        if mask is None:
            if self.segments.shares_rows:
                raise meet(WITHOUT_MASK)
            parts = [[is_causal] * len(cuts) for cuts in self.segments.runs]
        else:
            places = self._places(mask)
            with unseen("masks of packed rows"):
                open_ = _open(mask)
                self._check_apart(open_, BY_MASK)
                plain = mask.dtype == torch.bool or bool(((mask == 0) | ~open_).all())
                simple = [_simple(open_[place]) if plain and not mask.requires_grad else None for place in places]
            each = iter([mask[p] if way is None else way for p, way in zip(places, simple, strict=True)])
            parts = [[next(each) for _ in cuts] for cuts in self.segments.runs]
        self._checked.append((mask, is_causal, parts))
        return parts

    def _places(self, mask: Tensor) -> list[tuple[Any, ...]]:
        """Where in ``mask`` each run of each row is."""
        rows, places = self.segments.rows, []
        each = len(mask) // rows if mask.dim() > 2 and len(mask) % rows == 0 and len(mask) >= rows else 0
        for row, cuts in enumerate(self.segments.runs):
            of_row = slice(row * each, (row + 1) * each) if each else slice(None)
            start = 0
            for n in cuts:
                place = of_row, ..., slice(start, start + n), slice(start, start + n)
                places.append(place if mask.dim() > 2 else place[1:])
                start += n
        return places

    def _check_apart(self, open_: Tensor, what: str) -> None:
        """``open_ [..., length, length]`` is False between positions of different segments."""
        apart = self._apart.to(open_.device)
        rows = self.segments.rows
        if open_.dim() > 2:
            each = open_.shape[0] // rows if open_.shape[0] % rows == 0 and open_.shape[0] else 0
            lead = apart.repeat_interleave(each, 0) if each else apart
            if not each and open_.shape[0] != 1:
                raise meet(what)
            apart = lead.reshape(len(lead), *[1] * (open_.dim() - 3), *apart.shape[1:])
        if open_.shape[-2:] != apart.shape[-2:] or bool((open_ & apart).any()):
            raise meet(what)

    @property
    def _apart(self) -> Tensor:
        """``[rows, length, length]``: positions of different segments, or of one and of padding."""
        numbers = self.segments.numbers
        return (numbers[:, :, None] != numbers[:, None, :]) & ((numbers >= 0)[:, :, None] | (numbers >= 0)[:, None, :])

    def _look_at_mask(self, mask: Tensor | None) -> None:
        """Of attention that PyTorch makes as a whole, where nothing can be run by segments."""
        self.carries = True
        if mask is not None:
            with unseen("masks of packed rows"):
                self._check_apart(~mask if mask.dtype == torch.bool else _open(mask), BY_MASK)
        elif self.segments.shares_rows:
            raise meet(WITHOUT_MASK)

    def _look(self, out: Any) -> None:
        """What a softmax gave, if it may be attention that is written out: exact zeros between segments."""
        length = self.segments.length
        if not isinstance(out, Tensor) or out.dim() < 3 or out.shape[-2:] != (length, length) or length < 2:
            return
        if out.dim() == 3 and len(out) == self.segments.rows:  # logits of as many classes as there are positions
            return
        self.carries = True
        with unseen("what softmax gives for packed rows"):
            if self.segments.shares_rows:
                self._check_apart(
                    (out.detach() != 0) & ~out.detach().isnan(), "attention weights that are not 0 between segments"
                )


def _open(mask: Tensor) -> Tensor:
    """Where a mask lets a position see another one."""
    return mask.detach() if mask.dtype == torch.bool else mask.detach() > torch.finfo(mask.dtype).min / 2


def _simple(open_: Tensor) -> bool | None:
    """False if a mask of one segment is open throughout, True if it is a causal one, None if it is another."""
    n = open_.shape[-1]
    if bool(open_.all()):
        return False
    return True if bool((open_ == torch.ones(n, n, dtype=torch.bool, device=open_.device).tril()).all()) else None


def _is_same(mask: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are one mask, or views of one that lie in the same place; ``mask`` is held, with its memory."""
    if mask is None or other is None:
        return mask is other
    places = [(x.data_ptr(), x._version, x.dtype, x.shape, x.stride()) for x in (mask, other)]
    return places[0] == places[1]


def meet(what: str) -> SamplesMeetError:
    """The refusal of attention over rows of several segments."""
    return SamplesMeetError(f"units={PACKED!r}: the samples of a packed row meet in {what}. {REMEDY}")
