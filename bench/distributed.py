"""Two ranks on this machine, private beside non-private: `python -m bench.distributed`.

DistributedDataParallel on gloo, one thread a rank, both ways of training in the same processes and taking turns; and
`fully_shard`, whose peak memory is each way's own pair of processes. A figure is a ratio to the non-private way in the
same round, of the slower rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench import measure, memory
from bench.methods import quiet_peers
from bench.record import Record, title_of
from bench.workloads import sequence_loss, workloads
from dpfast import tables

RANKS = 2
TARGET_TIME, TARGET_MEMORY = 1.2, 1.2


def step_of(work_name: str, private: bool, sharded: bool, rank: int) -> measure.Step:
    """One step on this rank's half of the workload's batch."""
    from dpfast import PrivacyEngine
    from dpfast.data.sampling import PoissonBatches
    from dpfast.integrations.finetune.processes import sharded as shard

    work = workloads("cpu")[work_name]
    x, y = (side[rank::RANKS] for side in work.batch())
    model: Any = work.model()
    if sharded:
        model = shard(model)
    elif not private:
        model = DistributedDataParallel(model)
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if private:
        batches = PoissonBatches(work.batch_size, 1, seed=0, rank=rank, world_size=RANKS)
        data = torch.utils.data.TensorDataset(*work.batch())
        model, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
            module=model if sharded else DistributedDataParallel(model),
            optimizer=optimizer,
            data_loader=torch.utils.data.DataLoader(data, batch_sampler=batches),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        sequence_loss(criterion, model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def on_ranks(job: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``job(rank, *args)`` returns on each of two ranks that have met."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, job, args), nprocs=RANKS)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]


def _rank(rank: int, folder: str, job: Callable[..., Any], args: Any) -> None:
    quiet_peers()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    Path(folder, f"{rank}.json").write_text(json.dumps(job(rank, *args)))
    dist.destroy_process_group()


def times(rank: int, work: str, sharded: bool, seconds: float, rounds: int) -> list[list[float]]:
    """Rounds of ``[non-private, private]`` seconds; the ranks run equally many."""
    steps = [step_of(work, private, sharded, rank) for private in (False, True)]
    for step in steps * 2:
        step()
    found: list[list[float]] = []
    begin = time.perf_counter()
    while len(found) < rounds:
        taken = [0.0, 0.0]
        for which in (0, 1) if len(found) % 2 else (1, 0):
            dist.barrier()
            taken[which] = measure.timed(steps[which])
        found.append(taken)
        enough = torch.tensor(float(time.perf_counter() - begin > seconds and len(found) >= 5))
        dist.all_reduce(enough, dist.ReduceOp.MAX)
        if enough:
            break
    return found


def grown_on(rank: int, work: str, private: bool, sharded: bool) -> dict[str, Any]:
    """This rank's growth of resident memory over its first steps (see memory.growth_here), without the warm-up run."""
    return memory.growth_here(lambda small: lambda: (lambda: None) if small else step_of(work, private, sharded, rank))


def compared(work: str, sharded: bool, seconds: float, rounds: int) -> dict[str, Any]:
    """Ratios of one workload, one way of being distributed."""
    per_rank = on_ranks(times, work, sharded, seconds, rounds)
    slower = [[max(of_rank[k][which] for of_rank in per_rank) for which in (0, 1)] for k in range(len(per_rank[0]))]
    with memory.allocator():
        plain, private = (on_ranks(grown_on, work, way, sharded) for way in (False, True))
    grown = [max(of_rank["growth_bytes"] for of_rank in way) for way in (plain, private)]
    return {
        "work": work,
        "sharded": sharded,
        "non_private_seconds": measure.percentiles([row[0] for row in slower]),
        "private_seconds": measure.percentiles([row[1] for row in slower]),
        "time_ratio": measure.percentiles([row[1] / row[0] for row in slower]),
        "growth_bytes": grown,
        "memory_ratio": grown[1] / grown[0],
        "target_time": None if sharded else TARGET_TIME,
        "target_memory": TARGET_MEMORY if sharded else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", choices=workloads("cpu"), default=["gpt128", "llama"])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "bench" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as on the ranks
    configuration = {
        "command": f"python -m bench.distributed --work {' '.join(arguments.work)} --seconds {arguments.seconds:g} "
        f"--rounds {arguments.rounds}",
        "suite": "distributed",
        "ranks": RANKS,
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
    }
    record = Record.new(arguments.out, "distributed", torch.device("cpu"), configuration)
    rows = record.suite.setdefault("rows", [])
    for work in arguments.work:
        for sharded in (False, True):
            rows.append(compared(work, sharded, arguments.seconds, arguments.rounds))
            record.save()
    record.finish(torch.device("cpu"))
    print(report(record.data))
    print(f"record: {record.path}")


def report(data: dict[str, Any]) -> str:
    """As a suite's (see bench.suites)."""
    cells = [
        [
            row["work"],
            "fully_shard" if row["sharded"] else "DDP",
            f"{row['non_private_seconds']['median']:.2f}",
            "{median:.2f} ({p20:.2f}–{p80:.2f}), n={n}".format(**row["time_ratio"]),
            f"{row['growth_bytes'][0] / measure.MIB:.0f}",
            f"{row['memory_ratio']:.2f}",
        ]
        for row in data["suite"].get("rows", [])
    ]
    header = ("workload", "two ranks", "non-private, s", "private", "growth of the larger rank, MiB", "private")
    return f"## Two ranks\n\n{title_of(data)}\n\n{tables.markdown(header, cells)}"


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    return []  # a table says it all


if __name__ == "__main__":
    main()
