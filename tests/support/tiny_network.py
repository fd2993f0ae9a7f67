"""What the network's tests share: a clip, named random inputs, one way to compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unish_model.selfcheck.weights import input_array


@dataclass(frozen=True)
class Clip:
    images: Tensor
    patches: Tensor
    bbox: Tensor

    def __getitem__(self, part: slice) -> Clip:
        return Clip(self.images[part], self.patches[part], self.bbox[part])

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.patches, self.bbox


def random_input(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(input_array("tests", name, shape))


def gap(ours: Tensor, other: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((ours.detach().double() - other.detach().double()).abs().max() / other.detach().abs().max())
