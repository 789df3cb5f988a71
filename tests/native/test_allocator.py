"""Whether a process keeps the memory that a step frees: asked in processes of their own, as it is for good."""

import os
import platform
import subprocess
import sys

import pytest

from dpfast.native import allocator

# Page faults of a step that frees half of what it takes before the other half, at the end of the heap.
STEPS = """
import resource, sys, torch
from dpfast.native import allocator
if "keep" in sys.argv:
    assert allocator.keep_freed_memory() is None, allocator.keep_freed_memory()
def step(blocks=60):
    held = [torch.ones(500_000) for _ in range(blocks)]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(int(sys.argv[1]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):
    step()
step(int(sys.argv[1]))
resident = lambda: int(open("/proc/self/statm").read().split()[1])
before = resident()
allocator.give_back()
given = before - resident()
print(sorted(faults() for _ in range(5))[2], given)
"""


def faults(blocks, *arguments):
    """Of so many blocks, in a process of its own, without what the environment says of the allocator."""
    given = {name: value for name, value in os.environ.items() if name not in (*allocator.ASKED_BY, "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", STEPS, str(blocks), *arguments]
    out = subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout
    return [int(number) for number in out.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator that is told is glibc's")
def test_a_step_fetches_no_memory_again():
    kept, pages = faults(60, "keep")
    for blocks in (60, 120, 60, 90, 150, 240):
        given_back, _ = faults(blocks)
        if given_back > 20:  # not in a process that happens to hold something at the very end of its heap
            break
    assert kept < given_back / 4 and given_back > 20, f"page faults a step: {kept} and {given_back}"
    assert pages * 4096 > 60 * 500_000 * 4 / 2, "what it keeps is given back when somebody asks for it"


@pytest.mark.parametrize("name", [*allocator.ASKED_BY, "GLIBC_TUNABLES"])
def test_who_has_asked_for_something_else_is_obeyed(monkeypatch, name):
    value = "glibc.malloc.trim_threshold=65536" if name == "GLIBC_TUNABLES" else "65536"
    monkeypatch.setenv(name, value)
    assert allocator.keep_freed_memory.__wrapped__() == f"{name}={value} says otherwise"


def test_a_private_run_on_the_cpu_asks_for_it(monkeypatch):
    import torch
    from torch import nn

    from dpfast import PrivacyEngine

    asked = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: asked.append(1))
    model = nn.Linear(3, 2)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 2))
    PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert asked
