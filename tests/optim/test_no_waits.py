"""A private step never makes the host wait for a device, but for what is in the tables here.

Each wait stalls a GPU until the host has caught up, so the tables are to shrink until nothing is left in them. A count
that has fallen fails too: take it down here. The tests run on a CPU, where tensors that would stay there anyway are
taken for a device's.
"""

import pytest
import torch

from bench.dispatched import count
from dpfast.amp import GradScaler
from tests.helpers import loader_of, make_private
from tests.ops.noisy import require
from tests.zoo import ZOO, every_layer, loss_of, specimen

CPU = torch.device("cpu")
B = 4
ITEM, MADE = "aten._local_scalar_dense", "aten.lift_fresh"  # item(), torch.tensor()

# layer family: waits of a step of SGD
ALLOWED = {
    "Linear": {},
    "Linear on sequences": {},
    "Embedding": {ITEM: 1},
    "EmbeddingBag": {ITEM: 1},
    "EmbeddingBag with offsets": {ITEM: 1},
    "Conv1d": {},
    "Conv2d": {},
    "Conv2d circular": {},
    "Conv3d": {},
    "ConvTranspose2d": {},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {},
    "InstanceNorm2d": {},
    "MultiheadAttention": {},
    "TransformerEncoderLayer": {},
    "DPMultiheadAttention": {},
    "DPRNN": {},
    "DPGRU": {},
    "DPLSTM": {},
    "bare parameters": {},
    "PReLU": {},
    "tied GPT": {ITEM: 1},
}

ADAPTIVE = dict(
    clipping="adaptive",
    target_unclipped_quantile=0.5,
    clipbound_learning_rate=0.2,
    max_clipbound=10.0,
    min_clipbound=0.01,
    unclipped_num_std=2.0,
)
# what else a step may do, on two linear layers: its optimizer, options of make_private, and the waits
OTHERWISE = {
    "AdamW": (torch.optim.AdamW, {}, {"tolist": 1}),  # torch keeps counts of steps on the CPU
    "unfused": (torch.optim.RMSprop, {}, {}),
    "per layer": (torch.optim.SGD, dict(clipping="per_layer"), {}),
    "adaptive": (torch.optim.SGD, ADAPTIVE, {"tolist": 1, MADE: 2}),  # and tolist in the backward, which no mode sees
    "0/1": (torch.optim.SGD, dict(clipping_fn="global", max_grad_norm=1e-3), {}),
}


@pytest.fixture(autouse=True)
def _compiled_ops():
    """Where there is no library, plain PyTorch asks for more."""
    require("noisy_sgd_")


def watched(name, optimizer=torch.optim.SGD, lost=False, scaler=False, **options):
    """A step of a model of the zoo, counted; with ``lost`` a sample's gradient is not finite."""
    model, inputs, target = specimen(name, B, torch.float32)
    if lost:
        inputs[0][0] = torch.inf
    given = dict(noise_multiplier=1.0, data_loader=loader_of(B), optimizer=optimizer(model.parameters(), lr=0.01))
    given["noise_generator"] = torch.Generator().manual_seed(0)  # it moves the threshold of adaptive clipping
    wrapped, private, _ = make_private(model, **given | options)
    scales = GradScaler(private, device="cpu", init_scale=2.0**8) if scaler else None

    def step():
        loss = loss_of(name)(wrapped(*inputs), target)
        (loss if scales is None else scales.scale(loss)).backward()
        (private if scales is None else scales).step(*[private] * (scales is not None))
        private.zero_grad()

    return count(step, CPU)


def assert_waits(seen, allowed):
    assert seen.operators.total() > 20  # it was a whole step
    assert seen.waits_by_operator == allowed, f"it waits at {dict(seen.waits)}"


def test_every_family_is_in_the_table():
    assert list(ALLOWED) == list(ZOO)


@every_layer
def test_a_step_of_each_layer_family(name):
    assert_waits(watched(name), ALLOWED[name])


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_step_with_other_options(name):
    optimizer, options, allowed = OTHERWISE[name]
    assert_waits(watched("Linear", optimizer, **options), allowed)


@pytest.mark.filterwarnings("ignore:1 of 4 samples have a gradient norm")
def test_a_step_with_a_lost_sample():
    assert_waits(watched("Linear", lost=True), {})


def test_a_step_of_a_scaled_loss():
    assert_waits(watched("Linear", scaler=True), {})
