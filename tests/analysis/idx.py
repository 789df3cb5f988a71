"""Tiny folders of images in the IDX format: each class is a bright stripe at a place of its own, under noise."""

import gzip
from pathlib import Path

import torch
from torch import Tensor

CLASSES, SIDE = 4, 16


def packed(values: Tensor) -> bytes:
    """``values`` of bytes as an IDX file."""
    head = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return head + bytes(values.to(torch.uint8).flatten().tolist())


def stripes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[n, SIDE, SIDE]`` of 0 to 255, and their classes ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = 120 * torch.rand(n, SIDE, SIDE, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label * SIDE // CLASSES : (label + 1) * SIDE // CLASSES] += 100
    return images, labels


def idx_folder(folder: Path, train: int = 64, test: int = 32) -> Path:
    """Four files, two of them packed."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, n) in enumerate((("train", train), ("t10k", test))):
        images, labels = stripes(n, seed)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(packed(images), 1))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(packed(labels))
    return folder
