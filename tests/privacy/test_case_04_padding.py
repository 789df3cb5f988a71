"""Case 4: padded, grouped and dilated convolutions; repeated indices in a bag; padding rows. Within C."""

import pytest
import torch
from torch import nn

from tests.helpers import F64, assert_exact, assert_sensitivity, mse


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_border_pixels_are_used_more_than_once(dilation, groups, mode):
    """All of the image is border: a norm taken from the unpadded image would be far off."""
    model = nn.Conv2d(4, 4, 3, padding=2, dilation=dilation, groups=groups, padding_mode=mode).double()
    x = torch.zeros(4, 4, 3, 3, dtype=F64)
    x[..., 0, :] = 10 * torch.randn(4, 4, 3)
    with torch.no_grad():
        target = torch.randn_like(model(x))
    run = assert_exact(model, (x,), target, mse)
    assert_sensitivity(model, ((x,), target), mse, run.norms.median().item() / 2)


def test_convolution_after_explicit_padding_agrees_with_padding_mode():
    conv = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular").double()
    twin = nn.Sequential(nn.CircularPad1d(1), nn.Conv1d(2, 3, 3).double())
    twin[1].load_state_dict(conv.state_dict())
    x, target = torch.randn(4, 2, 5, dtype=F64), torch.randn(4, 3, 5, dtype=F64)
    a, b = (assert_exact(model, (x,), target, mse, 0.01) for model in (conv, twin))
    torch.testing.assert_close(a.norms, b.norms)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("repeats", [2, 5, 40])
def test_an_index_repeated_in_a_bag(repeats, mode):
    """The row's gradient is the sum of its uses: ``repeats`` times as large, not once."""
    model = nn.EmbeddingBag(6, 3, mode=mode).double()
    ids = torch.full((3, repeats), 4)
    ids[1, 0] = 2
    target = torch.randn(3, 3, dtype=F64)
    run = assert_exact(model, (ids,), target, mse)
    assert_sensitivity(model, ((ids,), target), mse, run.norms.min().item() / 2)


@pytest.mark.parametrize("padding_idx", [0, 3])
def test_a_sample_of_padding_alone_contributes_nothing(padding_idx):
    model = nn.Embedding(6, 3, padding_idx=padding_idx).double()
    ids = torch.randint(6, (4, 5))
    ids[2] = padding_idx
    run = assert_exact(model, (ids,), torch.randn(4, 5, 3, dtype=F64), mse, 0.1)
    assert run.norms[2] == 0
    assert not run.sums["weight"][padding_idx].any()
