"""Peak memory in fresh processes: what is held counts, and a process that dies is a row."""

import sys

import pytest

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")

from bench import memory
from tests.bench.jobs import MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read on Linux")


def test_what_a_step_holds_is_its_growth():
    little, much = (memory.growth("tests.bench.jobs:job", mib=mib)["growth_bytes"] for mib in (20, 120))
    assert 19 * MIB < little < 40 * MIB
    assert 99 * MIB < much - little < 110 * MIB
    assert memory.ratio({"growth_bytes": much}, {"growth_bytes": little}) == much / little
    assert memory.ratio({"error": "out of memory"}, {"growth_bytes": little}) is None


@pytest.mark.parametrize(
    "ends, said",
    [
        ("killed", "out of memory: killed by the system"),
        ("exits", "exit status 3"),
        ("raises", "out of memory: no more"),
    ],
)
def test_a_process_that_dies_is_a_row(ends, said):
    assert memory.growth("tests.bench.jobs:job", ends=ends) == {"error": said}
