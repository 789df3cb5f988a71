"""Runs functions on several ranks of gloo, each a process of its own that stays for the next function."""

from __future__ import annotations

import datetime
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120  # a function that takes longer hangs


class Processes:
    """``world_size`` processes that have met; call it with a function and its arguments."""

    def __init__(self, folder: Path, world_size: int):
        self.folder, self.world_size, self.calls = folder, world_size, 0
        folder.mkdir(parents=True, exist_ok=True)
        context = mp.get_context("forkserver")  # what takes them seconds to import is imported once
        context.set_forkserver_preload(["torch.distributed", "opacus", "dpfast.engine"])
        self.asked = [context.SimpleQueue() for _ in range(world_size)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(
                target=_serve, args=(rank, world_size, str(folder), self.asked[rank], self.answers), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, body: Callable[..., Any], *args: Any, answers: int | None = None) -> list[Any]:
        """``body(rank, *args)`` on each rank, in order of ranks: what it returned, or the error that it raised.

        ``answers``: how many ranks live to tell, if not all.
        """
        self.calls += 1
        for queue in self.asked:
            queue.put((self.calls, body, args))
        count = self.world_size if answers is None else answers
        ranks = sorted(self.answers.get(timeout=SECONDS) for _ in range(count))
        return [torch.load(self.folder / f"{self.calls}-{rank}.pt", weights_only=False) for rank in ranks]

    def end(self) -> None:
        for queue in self.asked:
            queue.put(None)
        for process in self.processes:
            process.join(timeout=10)
            process.kill()


def _serve(rank: int, world_size: int, folder: str, asked: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    while (call := asked.get()) is not None:
        number, body, args = call
        try:
            result = body(rank, *args)
        except Exception as error:
            traceback.print_exc()
            result = error.with_traceback(None)
            result.__cause__ = result.__context__ = None
        torch.save(result, f"{folder}/{number}-{rank}.pt")
        answers.put(rank)
