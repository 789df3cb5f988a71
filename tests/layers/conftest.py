"""Which modules vmap has served."""

from typing import Any

import pytest

from dpfast.layers.generic import Generic


@pytest.fixture
def vmaps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were run one sample at a time, each time that they were."""
    seen: list[str] = []
    call = Generic.__call__

    def counted(self: Generic, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self.module).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Generic, "__call__", counted)
    return seen
