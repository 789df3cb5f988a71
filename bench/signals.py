"""Ctrl-C and SIGTERM that cannot get lost.

An exception that is raised inside a destructor or the callback of a weak reference is printed and dropped, and signals
come there as anywhere. So our handler also leaves a note, which whoever has just saved something reads.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_heard = False


@contextmanager
def interruptible() -> Iterator[None]:
    """In here both signals raise KeyboardInterrupt, each time that they come. Afterwards all is as before.

    A signal that is ignored stays so: Ctrl-C is not meant for what a shell runs in the background.
    """
    global _heard
    _heard = False
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
    global _heard
    _heard = True
    raise KeyboardInterrupt


def obey() -> None:
    """To be called wherever it is safe to stop.

    Raises:
        KeyboardInterrupt: there was a signal, and what it raised may have been dropped.
    """
    if _heard:
        raise KeyboardInterrupt
