"""What the tests of the ops on samples share."""

import torch


def draw(dtype, *shape):
    """Numbers of very different sizes."""
    return (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
