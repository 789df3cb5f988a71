"""Runs that are kept as they end, so that an experiment that was interrupted goes on, and a part of it is made anew."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpfast.analysis.reproduce.finetune_runs import Outcome

NAME = "runs.json"


class Record:
    """Outcomes by name, in a file of the folder; those of other settings are not taken over.

    Args:
        folder: where the file is, or is to be.
        settings: what outcomes depend on, beside their names.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.path = folder / NAME
        self.settings = json.loads(json.dumps(settings))
        self.outcomes: dict[str, Outcome] = {}
        if self.path.is_file():
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["settings"] == self.settings:
                self.outcomes = {name: Outcome(**outcome) for name, outcome in held["outcomes"].items()}
        self.found = len(self.outcomes)

    def outcome(self, name: str, make: Callable[[], Outcome]) -> Outcome:
        """The outcome of that name; made, and written down, if there is none."""
        if name not in self.outcomes:
            self.outcomes[name] = make()
            held = {"settings": self.settings, "outcomes": {k: asdict(one) for k, one in self.outcomes.items()}}
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
            os.replace(part, self.path)
        return self.outcomes[name]
