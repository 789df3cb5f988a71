"""Data that people know, each from where a machine may have it; nothing is downloaded.

Images come in the IDX format of MNIST (http://yann.lecun.com/exdb/mnist): two bytes of zeros, the type, the number of
dimensions, their sizes as big-endian 32-bit numbers, and the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dpfast.analysis.reproduce.common import Data

FASHION = Path("/usr/share/datasets/fashion-mnist")
GET_FASHION = "apt-get install dataset-fashion-mnist, or give the folder that has its four IDX files"
FASHION_DELTA = 1e-5  # below one over 60,000, and what the papers take
POOLED = 2  # 28 × 28 pixels become 14 × 14
LEAST = 8  # pixels a side that are left to convolve once pooled
PARTS = {"train": "train", "test": "t10k"}
HELD_OUT = 5000  # of the training images, at most a tenth: for temperatures and learning rates


class MissingData(ValueError):
    """The data is not on this machine, or is not in the format; the message says how to get it."""


def read_idx(path: Path) -> Tensor:
    """The bytes of an IDX file, packed by gzip or not.

    Raises:
        MissingData: it cannot be read, is none, is empty, or is not of bytes.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise MissingData(f"--data: {path} cannot be read ({error}): {GET_FASHION}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise MissingData(f"--data: {path} is no IDX file of bytes: {GET_FASHION}")
    start = 4 + 4 * raw[3]
    sizes = [int.from_bytes(raw[k : k + 4], "big") for k in range(4, start, 4)]
    if len(raw) != start + math.prod(sizes) or not all(sizes):
        raise MissingData(f"--data: {path} has {len(raw)} bytes, which do not fit its sizes {sizes}: {GET_FASHION}")
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
    """Images ``[n, side²]`` in [0, 1], each pixel the mean of ``pooled²``, and their labels ``[n]``; of both parts.

    Raises:
        MissingData: a file is missing or broken, or they do not belong together.
    """
    files = {name: [find_idx(folder, part, what) for what in ("images", "labels")] for name, part in PARTS.items()}
    found = {}
    for name, paths in files.items():
        x, y = map(read_idx, paths)
        if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
            raise MissingData(
                f"--data {folder}: images {list(x.shape)} and labels {list(y.shape)} do not belong together"
            )
        if x.shape[1] != x.shape[2] or x.shape[1] < LEAST * pooled:
            raise MissingData(
                f"--data {folder}: images of {x.shape[1]} × {x.shape[2]} pixels: give square ones of at least "
                f"{LEAST * pooled} a side"
            )
        x = torch.nn.functional.avg_pool2d(x.unsqueeze(1).float() / 255, pooled).flatten(1)
        found[name] = x, y.long()
    (x, y), (x_test, y_test) = found["train"], found["test"]
    if x.shape[1] != x_test.shape[1] or int(y_test.max()) > int(y.max()):
        raise MissingData(f"--data {folder}: the test images have another size, or labels that none to train on has")
    return found


def folder_of(data: str) -> Path:
    """Where the images of ``--data`` are."""
    return FASHION if data == "fashion-mnist" else Path(data)


def check_images(data: str) -> None:
    """Refuse what is neither digits nor a folder that holds images.

    Raises:
        MissingData: says what is wrong with it, and how to get one.
    """
    if data != "digits":
        images(folder_of(data), POOLED)


def idx_data(folder: Path, seed: int, pooled: int = POOLED) -> Data:
    """Training images without those held out by ``seed``, those, and the test images that the data comes with.

    δ is 1e-5, or one over the number of images to train on where that is less.
    """
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
        delta=min(FASHION_DELTA, 1 / len(rest)),
    )
