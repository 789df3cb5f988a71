"""Numbers as users give them: Python's, NumPy's, or tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """A NumPy number or a tensor of no dimension as a Python number, of one dimension as a list; else ``value``."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim < 2:
        return value.tolist()
    return value
