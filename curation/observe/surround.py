"""Finds a picture over an enlarged, blurred copy of itself, as portrait video is often re-posted.

`bars` finds bars of one colour. Two conditions together tell a copy from a stage with dark sides, a curtain or a
blurred background: a straight edge along the whole of both sides, at the same distance from the border, with a calmer
picture outside; and outside, a copy of the inside. A miss costs less than a false alarm, so bars with a pattern or
another video, or as sharp as the picture, are not found.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

_KEPT = 32  # frames that are compared
# Real clips without a copy reach 0.55 for the edge and, in another clip, 0.61 for the likeness; one with: 0.98, 0.96.
_EDGE = 0.65
_LIKENESS = 0.85
_STEP = 3.0  # least step across the edge, in grey levels, on average over the clip
_CALM = 2.5  # least ratio of a step across the edge to those outside
_CANDIDATES = 3
_UNEVEN = 1.0  # grey levels, rms: least structure of a surround, apart from straight stripes, that can be compared
_LEAST, _MOST = 0.05, 0.45  # thickness of one bar as a share of the picture's side


class SurroundFinder:
    """Keeps thumbnails spread over a clip and looks for the inner picture that all of them have."""

    def __init__(self) -> None:
        self._every, self._seen = 1, 0
        self._kept: list[NDArray[np.float32]] = []

    def add(self, bgr: NDArray[np.uint8]) -> None:
        """Add one thumbnail of the clip, (height, width, 3), all of one size."""
        if self._seen % self._every == 0:
            self._kept.append(cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY).astype(np.float32))
            if len(self._kept) > _KEPT:
                del self._kept[1::2]
                self._every *= 2
        self._seen += 1

    def inner(self) -> tuple[float, float, float, float] | None:
        """x1, y1, x2, y2 of the picture inside a copy of itself, as fractions of the whole; None if there is none."""
        if not self._kept:
            return None
        pictures = np.stack(self._kept)
        if bar := _bar(pictures):
            return bar, 0.0, 1 - bar, 1.0
        if bar := _bar(np.ascontiguousarray(pictures.swapaxes(1, 2))):
            return 0.0, bar, 1.0, 1 - bar
        return None


def _bar(pictures: NDArray[np.float32]) -> float | None:
    """Thickness, as a share of the width, of the left and right bars of (n, height, width) grey thumbnails."""
    width = pictures.shape[2]
    steps = np.abs(np.diff(pictures, axis=2)).mean(0)  # step x is between the columns x and x + 1
    thickness = np.arange(max(8, round(_LEAST * width)), round(_MOST * width))
    edges = np.array([min(_edge(steps, x), _edge(steps[:, ::-1], x)) for x in thickness])
    straight = [int(thickness[n]) for n in np.argsort(-edges, kind="stable")[:_CANDIDATES] if edges[n] >= _EDGE]
    alike = [(_likeness(pictures, x), x) for x in straight]
    likeness, x = max(alike, default=(0.0, 0))
    # The edge is somewhere within a pixel of the thumbnails; a person who touches it must not seem to keep a distance.
    return (x + 0.5) / width if likeness >= _LIKENESS else None


def _edge(steps: NDArray[np.float32], x: int) -> float:
    """Share of the lines with a clear step at column x. Scaling spreads an edge over two columns."""
    across = steps[:, x - 2 : x + 1].max(1)
    outside = steps[:, x - 8 : x - 3].mean(1)
    return float((across > np.maximum(_CALM * outside, _STEP)).mean())


def _likeness(pictures: NDArray[np.float32], x: int) -> float:
    """Correlation of the outside with the best of the usual copies: cropped to fill or stretched, mirrored or not."""
    width = pictures.shape[2]
    blur = max(2.0, width / 64)

    def outside(picture: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.hstack([cv2.GaussianBlur(picture[:, part], (0, 0), blur) for part in (slice(x), slice(-x, None))])

    there = np.stack([outside(picture) for picture in pictures])
    copies: dict[tuple[bool, bool], list[NDArray[np.float32]]] = {}
    for picture in pictures:
        height = len(picture)
        inner = picture[:, x : width - x]
        tall = round(height * width / inner.shape[1])
        top = (tall - height) // 2
        for stretched in (False, True):
            copy = cv2.resize(inner, (width, height if stretched else tall))
            copy = copy if stretched else copy[top : top + height]
            for mirrored in (False, True):
                copies.setdefault((stretched, mirrored), []).append(outside(copy[:, ::-1] if mirrored else copy))
    return max(_correlation(there, np.stack(copy), x) for copy in copies.values())


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32], x: int) -> float:
    """The smaller of two correlations: with and without what is constant along lines or columns, like folds and skies.

    one, other: (n, height, 2 * x), the left and the right sides next to each other.
    """
    plain = one - one.mean(), other - other.mean()
    uneven = tuple(np.concatenate([_uneven(both[..., :x]), _uneven(both[..., x:])], 2) for both in (one, other))
    sizes = [float(np.sqrt((a**2).sum() * (b**2).sum())) for a, b in (plain, uneven)]
    if sizes[1] < _UNEVEN**2 * one.size:
        return 0.0
    return min(float((a * b).sum()) / size for (a, b), size in zip((plain, uneven), sizes, strict=True))


def _uneven(side: NDArray[np.float32]) -> NDArray[np.float32]:
    lines, columns = side.mean(2, keepdims=True), side.mean(1, keepdims=True)
    return side - lines - columns + side.mean((1, 2), keepdims=True)
