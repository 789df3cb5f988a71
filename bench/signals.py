"""Ctrl-C and SIGTERM that cannot get lost.

An exception that is raised inside a destructor or the callback of a weak reference is printed and dropped, and signals
come there as anywhere. So our handler also leaves a note, which whoever has just saved something reads.

``timeout`` sends its signal twice, to the process and to its group: the second one must not stop what the first has
begun, which is to save and to print.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME = 0.05  # seconds after a signal in which another one is the same
_heard = False
_last = -SAME


@contextmanager
def interruptible() -> Iterator[None]:
    """In here both signals raise KeyboardInterrupt, each time that they come. Afterwards all is as before.

    A signal that is ignored stays so: Ctrl-C is not meant for what a shell runs in the background.
    """
    global _heard, _last
    _heard, _last = False, -SAME
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in former.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
        _heard = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _heard, _last
    _heard, before, _last = True, _last, time.monotonic()
    if _last - before >= SAME:
        raise KeyboardInterrupt


def obey() -> None:
    """To be called wherever it is safe to stop.

    Raises:
        KeyboardInterrupt: there was a signal, and what it raised may have been dropped.
    """
    if _heard:
        raise KeyboardInterrupt
