"""For every test of the optimizers: a count of the updates made in the noise's pass."""

import pytest

from dpfast import ops
from tests.ops.noisy import require


@pytest.fixture
def passes(monkeypatch):
    """For each update that is made in the noise's pass, how many parameters it has; skips where there is none."""
    for op in ("noisy_grad_", "noisy_sgd_", "noisy_adam_"):
        require(op)
    counted, real = [], ops.noisy_step_

    def spy(rule, params, *args, **kw):
        counted.append(len(params))
        return real(rule, params, *args, **kw)

    monkeypatch.setattr(ops, "noisy_step_", spy)
    return counted
