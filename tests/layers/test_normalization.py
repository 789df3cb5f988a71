"""LayerNorm, RMSNorm, GroupNorm and InstanceNorm; BatchNorm is refused with Opacus' advice."""

import pytest
import torch
from torch import nn

from tests.helpers import BF16, F32, F64, assert_refused, check_layer

INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (7,), 2: (5, 3), 3: (3, 2, 4)}


def after_linear(norm: nn.Module, d: int = 6) -> nn.Module:
    """A layer before, so that the gradient of the norm's input counts; a weight that is not all ones."""
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return nn.Sequential(nn.Linear(d, d), norm)


def after_conv(norm: nn.Module, dims: int, channels: int = 4) -> nn.Module:
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return nn.Sequential(CONV[dims](channels, channels, 1, bias=False), norm)  # a bias there has no gradient


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 6), (3, 5, 6), (3, 2, 5, 6)], ids=str)
@pytest.mark.parametrize(
    "options",
    [dict(), dict(bias=False), dict(elementwise_affine=False)],
    ids=["affine", "no bias", "not affine"],
)
def test_layer_norm(options, shape, dtype):
    check_layer(after_linear(nn.LayerNorm(6, **options)), (torch.randn(shape),), dtype)


@pytest.mark.parametrize("normalized", [(6,), (5, 6), (3, 5, 6)], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_several_normalised_dimensions(norm, normalized):
    check_layer(after_linear(norm(normalized)), (torch.randn(4, 3, 5, 6),), F64)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 6), (3, 5, 6), (3, 2, 5, 6)], ids=str)
@pytest.mark.parametrize(
    "options", [dict(), dict(eps=1e-3), dict(elementwise_affine=False)], ids=["affine", "eps", "not affine"]
)
def test_rms_norm(options, shape, dtype):
    check_layer(after_linear(nn.RMSNorm(6, **options)), (torch.randn(shape),), dtype)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_sequence_first(norm):
    check_layer(after_linear(norm(6)), (torch.randn(5, 4, 6),), F64, batch_first=False)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm(groups, dims, dtype):
    check_layer(after_conv(nn.GroupNorm(groups, 4), dims), (torch.randn(4, 4, *SIZES[dims]),), dtype)


def test_group_norm_without_positions():
    check_layer(after_linear(nn.GroupNorm(2, 6)), (torch.randn(4, 6),), F64)


def test_group_norm_not_affine():
    check_layer(after_conv(nn.GroupNorm(2, 4, affine=False), 2), (torch.randn(4, 4, 5, 3),), F64)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(affine, dims, dtype):
    model = after_conv(INSTANCE[dims](4, affine=affine), dims)
    check_layer(model, (torch.randn(4, 4, *SIZES[dims]),), dtype)


@pytest.mark.parametrize("half", ["weight", "bias"])
@pytest.mark.parametrize(
    ("norm", "args"),
    [(nn.LayerNorm, (4,)), (nn.GroupNorm, (2, 4)), (nn.InstanceNorm1d, (4, 1e-5, 0.1, True))],
    ids=["layer", "group", "instance"],
)
def test_half_frozen(norm, args, half):
    model = after_linear(norm(*args), 4)
    getattr(model[1], half).requires_grad_(False)
    check_layer(model, (torch.randn(5, 4, 4),), F64)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm], ids=lambda n: n.__name__
)
def test_batch_norm_is_refused(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleDict({"bad": norm(4)}), nn.Flatten())
    assert_refused(model, "BatchNorm", "1.bad", "ModuleValidator.fix")


def test_running_statistics_are_refused():
    """They are buffers filled from the data without noise."""
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4, affine=True, track_running_stats=True))
    assert_refused(model, "track_running_stats", "1")
