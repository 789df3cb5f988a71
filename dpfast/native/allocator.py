"""Memory that a step frees stays with the process, as the next step needs it again.

glibc gives freed memory back to the system once so much of it lies at the end of the heap, and large blocks at once. A
private step keeps backprops and activations until the end of its backward. So it frees more together than ordinary
training does, and the next step would fetch as many pages again, which takes up to a fifth of its time. What is kept is
free memory that the process has had in use before.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

ASKED_BY = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")  # glibc's own, and GLIBC_TUNABLES
_TRIM, _PAD, _MAP = -1, -2, -3  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
SETTINGS = (
    (_TRIM, (1 << 31) - 1),  # bytes that may lie free at the end of the heap: the most that it takes
    (_PAD, 1 << 30),  # bytes of addresses, not of memory, by which the heap grows: large blocks then find room in it
    (_MAP, 1 << 25),  # bytes from which a block that finds none is given back when it is freed: the most that it takes
)


@cache
def keep_freed_memory() -> str | None:
    """Have this process keep what it frees, on Linux with glibc: None, or why it does not.

    Whoever has set one of glibc's variables for this is obeyed.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if asked := [*filter(os.environ.get, ASKED_BY), *(["GLIBC_TUNABLES"] if tuned else [])]:
        return f"{asked[0]}={os.environ[asked[0]]} says otherwise"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "this system's allocator has no mallopt"
    return None if all([mallopt(*setting) for setting in SETTINGS]) else "mallopt refused"


def give_back() -> None:
    """Give back what is free now: resident memory is then what is in use, as far as glibc can tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another allocator's affair
