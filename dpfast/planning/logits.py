"""Whether a language model's logits are stored, or made again where they are needed: free memory decides."""

from __future__ import annotations

import re
from pathlib import Path

import torch

SMALL = 1 << 26  # bytes of logits, up to which nobody asks
SHARE = 0.5  # of the memory that is free, which logits may take


def fit(nbytes: int, device: torch.device) -> bool:
    """Whether so many bytes of logits take no more than their share of what is free; where it cannot be told, yes."""
    if nbytes <= SMALL:
        return True
    free = free_memory(device)
    return free is None or nbytes <= SHARE * free


def free_memory(device: torch.device) -> int | None:
    """Bytes: of a GPU with what its allocator holds unused, or of this machine; None where it cannot be told."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return None
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])
