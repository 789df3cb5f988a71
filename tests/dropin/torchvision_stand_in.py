"""What Opacus' tests want of torchvision, for where it is not installed: random images, and models with BatchNorm.

The wheels that package registries have are of one build of torch each. On another they do not load, and Transformers,
which finds them, fails as well: so torchvision is none of the tests' requirements.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class FakeData(Dataset):
    """As many random images in [0, 1] as ``size`` says, the same at each look, with random classes."""

    def __init__(self, size: int, image_size: Sequence[int], num_classes: int, transform: Callable[[Tensor], Tensor]):
        self.size, self.image_size, self.num_classes, self.transform = size, image_size, num_classes, transform

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of a data set of {self.size} images")
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(tuple(self.image_size), generator=generator)
        return self.transform(image), int(torch.randint(self.num_classes, (), generator=generator))


class Compose:
    def __init__(self, transforms: Sequence[Callable[[Tensor], Tensor]]):
        self.transforms = transforms

    def __call__(self, image: Tensor) -> Tensor:
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    """Images are tensors already."""

    def __call__(self, image: Tensor) -> Tensor:
        return image


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class SmallConvNet(nn.Module):
    """Convolutions with BatchNorm, which Opacus refuses until ``ModuleValidator.fix`` has been over it."""

    def __init__(self, weights: None = None):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


PARTS: dict[str, dict[str, Any]] = {
    "datasets": {"FakeData": FakeData},
    "transforms": {"Compose": Compose, "ToTensor": ToTensor, "Normalize": Normalize},
    "models": dict.fromkeys(("resnet18", "densenet121", "mobilenet_v3_small"), SmallConvNet),
}


def stand_in() -> None:
    """Have ``import torchvision`` give this where there is none."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    sys.modules["torchvision"] = whole = ModuleType("torchvision", __doc__)
    for name, contents in PARTS.items():
        part = ModuleType(f"torchvision.{name}")
        vars(part).update(contents)
        setattr(whole, name, part)
        sys.modules[part.__name__] = part
