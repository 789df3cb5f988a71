"""nn.ConvTranspose1d, 2d and 3d: stride, dilation, groups, depthwise, output_padding and output_size."""

import pytest
import torch
from torch import nn

from tests.helpers import F32, F64, check_layer

CONV = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (9,), 2: (5, 4), 3: (3, 4, 2)}
OPTIONS = {
    "plain": dict(),
    "no bias": dict(bias=False),
    "1x1": dict(kernel_size=1),
    "stride": dict(stride=2),
    "stride above kernel": dict(kernel_size=2, stride=3),
    "padding": dict(padding=1),
    "dilation": dict(dilation=2),
    "groups": dict(groups=2, stride=2),
    "depthwise": dict(groups=4, out_channels=8),
    "output_padding": dict(stride=2, output_padding=1),
    "output_padding above stride": dict(dilation=3, output_padding=2),
    "everything": dict(stride=3, dilation=2, groups=2, padding=1, output_padding=2),
}


def net(dims: int, **kw) -> nn.Module:
    kw = dict(in_channels=4, out_channels=6, kernel_size=3) | kw
    return nn.Sequential(nn.GroupNorm(2, 4), CONV[dims](**kw))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_exact(options, dims):
    check_layer(net(dims, **options), (torch.randn(3, 4, *SIZES[dims]),), F64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float32(options):
    check_layer(net(2, **options), (torch.randn(3, 4, *SIZES[2]),), F32)


def test_other_sizes_in_each_direction():
    options = dict(kernel_size=(3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2))
    check_layer(net(2, **options), (torch.randn(3, 4, 5, 4),), F64)


def test_one_position_in():
    check_layer(net(2), (torch.randn(3, 4, 1, 1),), F64)


class Upsample(nn.Module):
    """``output_size`` at call time decides the output padding."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)), output_size=x.shape[2:])


@pytest.mark.parametrize("size", [(7, 7), (8, 7)], ids=str)
def test_output_size(size):
    check_layer(Upsample(), (torch.randn(3, 2, *size),), F64)
