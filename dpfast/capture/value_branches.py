"""Branches of somebody else's code on the values of tensors, which compute the same either way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def all_branches(traced: Any) -> Iterator[None]:
    """Transformers takes a tensor for which ``traced`` holds for one that is traced: it does not branch on its values.

    Its masks leave out what is not needed for the very values given (no padding in this batch, say), but for traced
    tensors; what is computed is the same.
    """
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    known = getattr(utils, "is_fake_tensor", None)
    if known is None:
        yield
        return
    utils.is_fake_tensor = lambda x: traced(x) or known(x)
    try:
        yield
    finally:
        utils.is_fake_tensor = known
