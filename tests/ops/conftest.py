"""The compiled ops, for the tests that are of nothing else."""

import pytest
import torch

from dpfast import native


@pytest.fixture
def ops():
    if not native.available("cpu"):
        pytest.skip(f"no CPU library: {native.why_not('cpu')}")
    return torch.ops.dpfast
