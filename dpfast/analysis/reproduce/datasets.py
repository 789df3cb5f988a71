"""Data that people know, each from where a machine may have it; nothing is downloaded.

Images come in the IDX format of MNIST (http://yann.lecun.com/exdb/mnist): two bytes of zeros, the type, the number of
dimensions, their sizes as big-endian 32-bit numbers, and the values.
"""

from __future__ import annotations

import gzip
import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dpfast.analysis.reproduce.common import Data

FASHION = Path("/usr/share/datasets/fashion-mnist")
GET_FASHION = "apt-get install dataset-fashion-mnist, or give the folder that has its four IDX files"
PARTS = {"train": "train", "test": "t10k"}
HELD_OUT = 5000  # of the training images, at most a tenth: for temperatures and learning rates


class MissingData(ValueError):
    """The data is not on this machine, or is not in the format; the message says how to get it."""


def read_idx(path: Path) -> Tensor:
    """The bytes of an IDX file, packed by gzip or not.

    Raises:
        MissingData: it is none, or not of bytes.
    """
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise MissingData(f"--data: {path} is no IDX file of bytes")
    sizes = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(raw[3])]
    start = 4 + 4 * len(sizes)
    if len(raw) != start + math.prod(sizes):
        raise MissingData(f"--data: {path} has {len(raw)} bytes, where its head says {start + math.prod(sizes)}")
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).reshape(sizes)


def find_idx(folder: Path, part: str, what: str) -> Path:
    """The file of ``part`` (train or t10k) that has the images or the labels.

    Raises:
        MissingData: there is none.
    """
    for path in sorted(folder.glob(f"{part}-{what}*")) if folder.is_dir() else []:
        if path.suffix in (".gz", "") or path.name.endswith("ubyte"):
            return path
    raise MissingData(f"--data {folder}: there is no {part}-{what}-idx*-ubyte(.gz) in it: {GET_FASHION}")


@lru_cache(maxsize=1)
def images(folder: Path, pooled: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images ``[n, side²]`` in [0, 1], each pixel the mean of ``pooled²``, and their labels ``[n]``; of both parts."""
    found = {}
    for name, part in PARTS.items():
        x, y = (read_idx(find_idx(folder, part, what)) for what in ("images", "labels"))
        if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
            raise MissingData(
                f"--data {folder}: images {list(x.shape)} and labels {list(y.shape)} do not belong together"
            )
        x = torch.nn.functional.avg_pool2d(x.unsqueeze(1).float() / 255, pooled).flatten(1)
        found[name] = x, y.long()
    return found


def idx_data(folder: Path, seed: int, pooled: int = 2) -> Data:
    """Training images without those held out by ``seed``, those, and the test images that the data comes with."""
    parts = images(folder, pooled)
    (x, y), test = parts["train"], parts["test"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, rest = order.split([n := min(HELD_OUT, len(x) // 10), len(x) - n])
    return Data(
        TensorDataset(x[rest], y[rest]),
        TensorDataset(x[held], y[held]),
        TensorDataset(*test),
        features=x.shape[1],
        classes=int(y.max()) + 1,
    )
