"""Per-sample and clipped gradients of 2-D convolutions against PyTorch's own in float64, one sample at a time."""

import pytest
import torch
import torch.nn.functional as F
from dpfast_kernels.convolution import (
    Config,
    box_of,
    clipped_gradient_with,
    convolution_clipped_gradient,
    convolution_sample_gradients,
    sample_gradients_with,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, rows a sample, C, p, size, then kernel, stride, padding, dilation, groups
CASES = {
    "plain": (2, 1, 3, 5, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "all different": (2, 1, 4, 6, (11, 9), (3, 2), (2, 1), (2, 0), (1, 3), 2),
    "several rows": (2, 3, 2, 3, (5, 6), (2, 3), (1, 2), (0, 1), (2, 1), 1),
    "depthwise": (3, 1, 4, 8, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "one position": (3, 1, 3, 2, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "pointwise": (2, 1, 20, 18, (5, 5), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "vectors": (2, 1, 16, 16, (5, 4), (2, 2), (1, 1), (1, 0), (1, 1), 1),
    "vectors in groups": (1, 2, 32, 32, (6, 5), (2, 1), (2, 1), (1, 2), (1, 2), 2),
    "many rows of one position": (1, 19, 3, 2, (2, 2), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "one line": (2, 1, 3, 4, (1, 37), (1, 5), (1, 2), (0, 2), (1, 1), 1),
    "unread edge": (2, 1, 2, 3, (8, 8), (3, 3), (3, 3), (0, 0), (1, 1), 1),
    "cut in slices": (1, 1, 2, 3, (13, 14), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no sample": (0, 1, 3, 5, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
}

# Kernels tell 32 bits from 16; float16 and bfloat16 differ in what Triton loads alone.
each = pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in DTYPES if dtype != torch.float16 or case in ("plain", "vectors")],
)


def inputs(case, dtype, device):
    batch, rows, C, p, size, *geometry = CASES[case]
    kernel, *_, groups = geometry
    x = torch.randn(batch * rows, C, *size, device=device).to(dtype)
    weight = torch.zeros(p, C // groups, *kernel, device=device, dtype=torch.float64)
    shape = F.conv2d(torch.zeros(1, C, *size, dtype=torch.float64, device=device), weight, None, *geometry[1:]).shape
    return x, torch.randn(batch * rows, *shape[1:], device=device).to(dtype), geometry, batch


def gradients(x, G, geometry, batch):
    """Float64 ``[B, p, C/groups, kh, kw]``."""
    kernel, stride, padding, dilation, groups = geometry
    weight = torch.zeros(G.shape[1], x.shape[1] // groups, *kernel, dtype=torch.float64, device=x.device)
    samples = []
    for x_i, G_i in zip(x.double().chunk(batch), G.double().chunk(batch), strict=True):
        w = weight.clone().requires_grad_()
        F.conv2d(x_i, w, None, stride, padding, dilation, groups).backward(G_i)
        samples.append(w.grad)
    return torch.stack(samples)


def expected(x, G, geometry, batch):
    """What is right, and the magnitudes of what is added up."""
    if not batch:
        weight = torch.zeros(
            0, G.shape[1], x.shape[1] // geometry[-1], *geometry[0], dtype=torch.float64, device=x.device
        )
        return weight, weight
    return gradients(x, G, geometry, batch), gradients(x.abs(), G.abs(), geometry, batch)


def units(x, G, batch):
    return (len(G) / max(batch, 1) * G.shape[2] * G.shape[3] / 8 + 8) * 2**-24


@each
def test_sample_gradients(case, dtype, device):
    x, G, geometry, batch = inputs(case, dtype, device)
    samples, squared = convolution_sample_gradients(x, G, *geometry, batch, True)
    right, magnitude = expected(x, G, geometry, batch)
    assert samples.dtype == squared.dtype == torch.float32
    assert samples.shape == right.shape and squared.shape == (batch,)
    assert ((samples - right).abs() <= units(x, G, batch) * magnitude).all()
    written = samples.double().square().sum((1, 2, 3, 4))
    assert ((squared - written).abs() <= 8 * 2**-24 * written).all()
    none, same = convolution_sample_gradients(x, G, *geometry, batch, False)
    assert none.shape == (0, *samples.shape[1:]) and torch.equal(same, squared)


@each
def test_clipped_gradient(case, dtype, device):
    x, G, geometry, batch = inputs(case, dtype, device)
    factors = torch.rand(batch, device=device)
    total = convolution_clipped_gradient(x, G, factors, *geometry)
    right, magnitude = (side.flatten(1).T @ factors.double() for side in expected(x, G, geometry, batch))
    assert total.dtype == torch.float32 and total.shape == (G.shape[1], x.shape[1] // geometry[-1], *geometry[0])
    assert ((total.flatten() - right).abs() <= (units(x, G, batch) + batch * 2**-24) * magnitude).all()


def test_views_and_mixed_dtypes(device):
    """Channels last, a slice, and a float32 input with bfloat16 backprops."""
    x, G, geometry, batch = inputs("all different", torch.float32, device)
    x, G = x.to(memory_format=torch.channels_last), G.to(torch.bfloat16).transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.randn(batch, 2 * x.shape[1], *x.shape[2:], device=device)[:, ::2]
    wide.copy_(x)
    samples, _ = convolution_sample_gradients(wide, G, *geometry, batch, True)
    other, _ = convolution_sample_gradients(x.contiguous(), G.contiguous(), *geometry, batch, True)
    assert torch.equal(samples, other)
    right, magnitude = expected(x, G, geometry, batch)
    assert ((samples - right).abs() <= units(x, G, batch) * magnitude).all()


def test_no_sample_reaches_another(device):
    x, G, geometry, batch = inputs("depthwise", torch.bfloat16, device)
    clean, squared = convolution_sample_gradients(x, G, *geometry, batch, True)
    factors = torch.tensor([1, 0, 0.5], device=device)
    total = convolution_clipped_gradient(x, G, factors, *geometry)
    x[1, 0, 0, 0], G[1, 1, 2, 2] = torch.inf, torch.nan
    after, squared_after = convolution_sample_gradients(x, G, *geometry, batch, True)
    assert torch.equal(clean[[0, 2]], after[[0, 2]]) and torch.equal(squared[[0, 2]], squared_after[[0, 2]])
    assert not squared_after[1].isfinite()
    assert torch.equal(convolution_clipped_gradient(x, G, factors, *geometry), total)


@pytest.mark.parametrize("positions", [16, 64])
def test_boxes_cover_every_position_once(positions):
    for rows, height, width in [(1, 1, 1), (1, 7, 7), (1, 1, 100), (3, 14, 14), (40, 1, 1), (1, 33, 31), (2, 200, 3)]:
        images, lines, columns = box_of(rows, height, width, positions)
        assert images * lines * columns == positions
        steps = -(-rows // images) * -(-height // lines) * -(-width // columns)
        assert rows * height * width <= steps * positions
        assert steps <= rows * height * -(-width // positions)  # a line at a time


def test_what_no_position_reads_does_not_count(device):
    """Infinities in pixels that the stride leaves out, and in the sides of a box that are beyond the image."""
    x, G, geometry, batch = inputs("unread edge", torch.float32, device)
    clean, _ = convolution_sample_gradients(x, G, *geometry, batch, True)
    x[:, :, 6:], x[..., 6:] = torch.inf, torch.nan
    dirty, squared = convolution_sample_gradients(x, G, *geometry, batch, True)
    assert torch.equal(clean, dirty) and squared.isfinite().all()


def test_other_tiles(device):
    x, G, geometry, batch = inputs("several rows", torch.float32, device)
    right, magnitude = expected(x, G, geometry, batch)
    samples, _ = sample_gradients_with(x, G, *geometry, batch, True, config=Config(32, 16, 16, 4, 1))
    assert ((samples - right).abs() <= units(x, G, batch) * magnitude).all()
    factors = torch.ones(batch, device=device)
    total = clipped_gradient_with(x, G, factors, *geometry, config=Config(16, 32, 32, 4, 1))
    assert ((total - right.sum(0)).abs() <= units(x, G, batch) * magnitude.sum(0)).all()


def test_ops(device):
    x, G, geometry, batch = inputs("plain", torch.float32, device)
    for store in (True, False):
        torch.library.opcheck(convolution_sample_gradients, (x, G, *geometry, batch, store))
    torch.library.opcheck(convolution_clipped_gradient, (x, G, torch.rand(batch, device=device), *geometry))
