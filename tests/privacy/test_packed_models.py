"""Families of Transformers' models over packed rows: exact against one sample at a time, or refused by name."""

import pytest
import torch

from tests.helpers import F32
from tests.integrations import transformer_models as tm
from tests.privacy.packed import Segmented, examine, packed, tokens

EXACT = ["mistral", "qwen2", "gemma", "phi3", "neox"]  # mistral's window is shorter than a sample
REFUSED = {
    "opt": "attention without a mask",
    "bert, masked": "attention without a mask",
    "bloom": "weights that are not 0 between segments",
    "mamba": "A_log|not kept apart",
    "mixtral": "MixtralTopKRouter|orders or picks",
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    examine(tm.model(name, scale=2, num_hidden_layers=1, use_cache=False).to(F32), tokens([6, 1, 5]), leave_out=False)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    private = Segmented(tm.model(name, scale=2, use_cache=False), 1.0)
    with pytest.raises((ValueError, RuntimeError), match=REFUSED[name]):
        private.backward(packed(tokens()))
    assert private.nothing_summed()
