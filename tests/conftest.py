"""For every test: a seed of its own, and uninitialised memory that is poisoned."""

import functools
import gc
import os
import zlib

import pytest
import torch
from opacus.accountants.analysis import rdp

if not torch.cuda.is_available():  # before anything imports triton: its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: as in this one, see below

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported: no test asks a hub, and waits for its answer

try:  # the same examples on every machine: a failure here is a failure there
    from hypothesis import HealthCheck, settings

    settings.register_profile("dpfast", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("dpfast")
except ImportError:  # only tests/privacy/test_properties.py needs it, and says so
    pass


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` gives NaN instead of whatever was there: what reads it before writing shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh random inputs, the same at each run of the same test; on one thread, whatever the one before it left."""
    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def pytest_configure(config):
    """One thread: a test is tiny, and two threads that wait for each other can cost 200 times its work.

    No seed is kept for an accelerator that is not there: that takes milliseconds, and tests set thousands of them.
    And a Rényi divergence is found once: 150 orders of a noise multiplier take as long as dozens of steps.
    """
    torch.set_num_threads(1)
    if not torch.accelerator.is_available():
        for backend in (
            torch.cuda,
            torch.xpu,
            torch.mtia,
        ):  # whose seeds wait for a device, each with its caller's stack
            backend._lazy_call = lambda call, **of: None
    rdp._compute_rdp = functools.cache(rdp._compute_rdp)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the collector need not look through it again after every few tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
