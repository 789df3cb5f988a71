"""A pytest plugin for one of several processes that share out tests: ``pytest -p tests.share --share 3/8 --begun F``.

Every test is noted in the file when it begins, and none that is there begins again: a process that died is followed by
another one, which goes on with the next test. ``bench/split.py`` starts them. Where a test leaves the GPU unusable for
its process, as an illegal address does, the process ends, so that the tests after it do not fail with it.
"""

import sys
from pathlib import Path

import pytest

from bench.split import LOST


def pytest_addoption(parser):
    parser.addoption("--share", required=True, help="k/n: every n-th test, from the k-th on (0 ≤ k < n)")
    parser.addoption("--begun", required=True, type=Path, help="the file of the tests that have begun")


def pytest_collection_modifyitems(config, items):
    share, count = map(int, config.getoption("--share").split("/"))
    file = config.getoption("--begun")
    begun = set(file.read_text().splitlines()) if file.exists() else set()
    items[:] = [item for k, item in enumerate(items) if k % count == share and item.nodeid not in begun]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    with item.config.getoption("--begun").open("a") as file:
        file.write(f"{item.nodeid}\n")
    done = yield
    torch = sys.modules.get("torch")  # who has not loaded it has used no GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError as error:
            pytest.exit(f"{item.nodeid} has left the GPU unusable: {error}", returncode=LOST)
    return done
