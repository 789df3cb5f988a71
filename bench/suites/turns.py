"""Calls that take turns, some of which may fail."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bench.measure import Step, free_memory, in_turns, said


def turns_of(
    calls: Mapping[str, Step], device: torch.device, seconds: float
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """What :func:`bench.measure.in_turns` gives for the calls that live, and why each of the others does not.

    A call that died once, say for memory that it has beside fewer others only, is left out, and the rest starts anew.
    Where nobody can tell whose failure it is, it is everybody's.
    """
    left, reasons = dict(calls), dict[str, str]()
    while left:
        blamed: list[str] = []
        try:
            return in_turns({name: _named(name, call, blamed) for name, call in left.items()}, device, seconds), reasons
        except Exception as failure:  # whatever it is, it is a row of the table
            reason = said(failure)
        for name in blamed or list(left):
            reasons[name] = reason
            del left[name]
        free_memory()
    return {}, reasons


def _named(name: str, call: Step, blamed: list[str]) -> Step:
    def named() -> object:
        try:
            return call()
        except Exception:
            blamed.append(name)
            raise

    return named
