"""Drawn scenes with an edit in them, or what only looks like one, and a watcher that finds the dancer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.people.detector import Detections

WIDTH, HEIGHT, COUNT, MIDDLE = 192, 108, 60, 30
_RED = (220, 30, 40)


class Watcher:
    """Stands in for a detector: finds the red dancer, if there is one."""

    person, names, long_side = 0, {0: "person"}, 96
    provenance = {"weights": "none", "sha256": "0"}  # noqa: RUF012

    def __init__(self, batch: int = 1) -> None:
        self.batch = batch

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        assert 1 <= len(images) <= self.batch
        return [self._find(image.astype(int)) for image in images]

    def _find(self, rgb: NDArray[np.int64]) -> Detections:
        rows, columns = np.nonzero((rgb[..., 0] - rgb[..., 1:].max(2)) > 90)
        if not len(rows):
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
        height, width = rgb.shape[:2]
        box = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        return Detections(np.array([box], np.float32), np.array([0.9], np.float32), np.array([0], np.int32))


def backdrop(seed: int) -> NDArray[np.uint8]:
    """A room's worth of soft blue and green shapes."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((HEIGHT, WIDTH + COUNT, 3)), (0, 0), 8)
    room = 110 + 60 * noise / noise.std((0, 1))
    room[..., 0] = room[..., 1:].min(2)
    return np.clip(room, 0, 255).astype(np.uint8)


def dancer(number: int, shift: int = 0) -> tuple[slice, slice]:
    """Rows and columns that the dancer covers: swaying, and two thirds as high as the picture."""
    left = int(60 + 12 * np.sin(number / 12)) + shift
    return slice(18, 90), slice(left, left + 20)


def scene(number: int, *, seed: int = 0, shift: int = 0, pan: int = 0) -> NDArray[np.uint8]:
    """(HEIGHT, WIDTH, 3) RGB of a dancer before a backdrop, the camera moved by `pan` pixels."""
    image = backdrop(seed)[:, pan : pan + WIDTH].copy()
    image[dancer(number, shift)] = _RED
    return image


def _black(image: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    return (image * (1 - share)).astype(np.uint8)


def _mixed(first: NDArray[np.uint8], second: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    return np.clip((1 - share) * first + share * second.astype(float), 0, 255).astype(np.uint8)


def _flashed(number: int) -> NDArray[np.uint8]:
    image = scene(number)
    return np.clip(image * 0.15 + 200, 0, 255).astype(np.uint8) if number % 12 in (5, 6) else image


# Name -> the picture of each frame, and whether it is one shot.
SCENES: dict[str, tuple[Callable[[int], NDArray[np.uint8]], bool]] = {
    "steady": (scene, True),
    "pan": (lambda n: scene(n, pan=n), True),
    "strobe": (_flashed, True),
    "hard cut": (lambda n: scene(n, seed=int(n >= MIDDLE)), False),
    "early cut": (lambda n: scene(n, seed=int(n >= 6)), False),
    "late cut": (lambda n: scene(n, seed=int(n >= COUNT - 6)), False),
    "jump cut": (lambda n: scene(n, shift=70 if n >= MIDDLE else 0), False),
    "fade": (lambda n: _black(scene(n), float(np.clip((12 - abs(n - MIDDLE)) / 8, 0, 1))), False),
    "dissolve": (lambda n: _mixed(scene(n), scene(n, seed=1), float(np.clip((n - 24) / 12, 0, 1))), False),
}
