"""``python -m dpfast bench``: dpfast beside ordinary training and its peers, measured in a clone of the sources."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """The bench is no part of the package: it is run from a clone, with what the extra ``demo`` installs."""
    root = Path(__file__).parents[2]
    if not (root / "bench" / "command.py").is_file():
        print("error: bench is in dpfast's sources, not in its package: run this in a clone of them", file=sys.stderr)
        return 2
    missing = [name for name in ("matplotlib", "psutil", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: bench needs {', '.join(missing)}: pip install 'dpfast[demo]'", file=sys.stderr)
        return 2
    sys.path.insert(0, str(root))
    return importlib.import_module("bench.command").main(arguments)
