from collections.abc import Iterator

import pytest

from tests.integrations.processes import Processes


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Iterator[Processes]:
    """Three processes on gloo."""
    processes = Processes(tmp_path_factory.mktemp("ranks"), 3)
    yield processes
    processes.end()
