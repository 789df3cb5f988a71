"""What fresh processes are made to run by the tests of memory."""

import os
import signal
from collections.abc import Callable

import torch

MIB = 1 << 20


def job(mib: int = 0, ends: str = "") -> Callable:
    """A step that holds and drops ``mib`` MiB, or ends its process."""

    def step() -> None:
        torch.ones(mib * MIB, dtype=torch.uint8)
        if ends == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if ends == "exits":
            os._exit(3)
        if ends == "raises":
            raise MemoryError("no more")

    return lambda small: lambda: (lambda: None) if small else step
