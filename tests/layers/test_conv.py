"""nn.Conv1d, Conv2d and Conv3d: stride, dilation, groups, depthwise, every padding mode, "same", "valid"."""

import pytest
import torch
from torch import nn

from tests.helpers import BF16, F32, F64, assert_exact, check_layer, mse

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (7, 6), 3: (5, 4, 6)}
OPTIONS = {
    "plain": dict(),
    "no bias": dict(bias=False),
    "1x1": dict(kernel_size=1),
    "stride": dict(stride=2, padding=1),
    "stride leaving a rest": dict(stride=3),
    "dilation": dict(dilation=2, padding=2),
    "groups": dict(groups=2, padding=1),
    "depthwise": dict(groups=4, out_channels=8),
    "same": dict(padding="same"),
    "same, even kernel": dict(padding="same", kernel_size=2),
    "same, dilated groups": dict(padding="same", dilation=2, groups=2),
    "valid": dict(padding="valid", stride=2),
    "everything": dict(stride=2, dilation=2, groups=2, padding=2),
}


def net(dims: int, channels: int = 4, **kw) -> nn.Module:
    """A 1x1 convolution before, so that the gradient of the layer's input counts too."""
    kw = dict(in_channels=channels, out_channels=6, kernel_size=3) | kw
    return nn.Sequential(CONV[dims](channels, channels, 1), nn.Tanh(), CONV[dims](**kw))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_exact(options, dims):
    check_layer(net(dims, **options), (torch.randn(4, 4, *SIZES[dims]),), F64)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [dict(padding=1), dict(padding=2, groups=2, dilation=2, stride=2), dict(padding="same"), dict(padding=0)],
    ids=["1", "grouped, dilated, strided", "same", "0"],
)
def test_padding_modes(options, mode, dims):
    check_layer(net(dims, padding_mode=mode, **options), (torch.randn(3, 4, *SIZES[dims]),), F64)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_other_sizes_in_each_direction(mode):
    options = dict(kernel_size=(3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), padding_mode=mode)
    check_layer(net(2, **options), (torch.randn(3, 4, 7, 9),), F64)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_low_precision_conv2d(options, dtype):
    check_layer(net(2, **options), (torch.randn(3, 4, *SIZES[2]),), dtype)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("options", [dict(padding="same"), dict(groups=2, stride=2)], ids=["same", "grouped"])
def test_float32(options, dims):
    check_layer(net(dims, **options), (torch.randn(3, 4, *SIZES[dims]),), F32)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_output_of_one_position(dims):
    """T = 1: the kernel covers the whole image."""
    check_layer(net(dims, kernel_size=SIZES[dims]), (torch.randn(4, 4, *SIZES[dims]),), F64)


@pytest.mark.parametrize("channels", [(1, 1), (1, 7), (5, 1), (3, 17)], ids=str)
def test_odd_channels(channels):
    model = nn.Conv2d(*channels, 3, padding=1)
    check_layer(model, (torch.randn(3, channels[0], 5, 7),), F32)


def test_large_images_with_few_channels():
    """Many positions, a small kernel: the other end of the plan."""
    check_layer(net(2, channels=2, padding=1), (torch.randn(2, 2, 33, 31),), F32)


def test_inputs_that_are_not_contiguous():
    model = net(2, padding=1)
    for x in (
        torch.randn(3, 4, 7, 7, dtype=F64).to(memory_format=torch.channels_last),
        torch.randn(3, 7, 7, 4, dtype=F64).permute(0, 3, 1, 2),
        torch.randn(3, 4, 14, 7, dtype=F64)[:, :, ::2],
        torch.randn(3, 1, 7, 7, dtype=F64).expand(3, 4, 7, 7),
    ):
        check_layer(model, (x,), F64)


@pytest.mark.parametrize("frozen", ["2.weight", "2.bias"])
def test_half_frozen(frozen):
    model = net(2, padding=1).double()
    model.get_parameter(frozen).requires_grad_(False)
    assert_exact(model, (torch.randn(3, 4, 5, 5).double(),), torch.randn(3, 6, 5, 5).double(), mse)
