"""What makes the reproductions quick to run in a test."""

import pytest
from opacus.accountants import RDPAccountant

from dpfast.analysis.reproduce import common


@pytest.fixture
def few_orders(monkeypatch):
    """Rényi divergences of whole orders alone, whose ε is a bound too: those between take most of the time."""
    found = common.noise_for, common._spent
    for cached in found:
        cached.cache_clear()
    monkeypatch.setattr(RDPAccountant, "DEFAULT_ALPHAS", list(range(2, 64)))
    yield
    for cached in found:
        cached.cache_clear()
