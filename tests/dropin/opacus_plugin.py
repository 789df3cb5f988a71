"""A pytest plugin for Opacus' own tests: dpfast comes before they are imported, and their outcomes are noted."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import opacus
import opacus.privacy_engine
import torch
from hypothesis import HealthCheck, settings

import dpfast
from dpfast.dropin import script_needs
from tests.dropin.torchvision_stand_in import stand_in


class HooksByDefault(dpfast.PrivacyEngine):
    """dpfast's engine with Opacus' default mode, where a test gives none."""

    def make_private(self, *, grad_sample_mode: str = "hooks", **kwargs: Any) -> tuple[Any, ...]:
        return super().make_private(grad_sample_mode=grad_sample_mode, **kwargs)

    def make_private_with_epsilon(self, *, grad_sample_mode: str = "hooks", **kwargs: Any) -> tuple[Any, ...]:
        return super().make_private_with_epsilon(grad_sample_mode=grad_sample_mode, **kwargs)


def through_the_engine() -> None:
    opacus.PrivacyEngine = opacus.privacy_engine.PrivacyEngine = HooksByDefault


def patched() -> None:
    """Each file of tests is a script of its own, whatever others in the process need of Opacus."""
    folder = Path(opacus.__file__).parent / "tests"

    def sources(frame: FrameType | None) -> Iterator[tuple[str, str]]:
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(folder):
                yield path.name, path.read_text()
            frame = frame.f_back

    script_needs._sources = sources  # type: ignore[assignment]
    dpfast.patch_opacus()


WAYS = {"stock": lambda: None, "samplers": dpfast.register, "engine": through_the_engine, "patched": patched}


class Plugin:
    """Changes Opacus for the rest of the process.

    ``outcomes`` has, of each test, whether it has passed, failed or was skipped, and what was raised.
    """

    def __init__(self, way: str, examples: int):
        self.outcomes: dict[str, list[str]] = {}
        stand_in()
        settings.register_profile(
            "opacus",
            max_examples=examples,
            derandomize=True,  # the same ones in every way, and with every run
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        settings.load_profile("opacus")
        torch.set_num_threads(1)
        WAYS[way]()

    def pytest_runtest_setup(self, item: Any) -> None:
        seed = zlib.crc32(item.nodeid.encode())
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.removeprefix("opacus/tests/")
        before = self.outcomes.get(name, ["", ""])[0]
        if report.failed and before != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            raised = report.longreprtext if crash is None else crash.message
            self.outcomes[name] = ["failed", raised.strip()[:300]]
        elif report.skipped and not before:  # a test of which one part is skipped has run
            self.outcomes[name] = ["skipped", ""]
        elif report.passed and before != "failed" and report.when == "call":
            self.outcomes[name] = ["passed", ""]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.pytest_runtest_logreport(report)
