"""Bars of one colour around a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curation.records import WHOLE, Part

_BAR_NOISE = 12  # grey levels that compression adds to a uniform bar


class BarFinder:
    """Finds letterbox and pillarbox bars: lines of one colour that never change, next to a line that a picture fills.

    The second condition tells a bar from a plain backdrop, where the first different line shows only a head or a hand.
    """

    def __init__(self) -> None:
        self._low: NDArray[np.uint8] | None = None
        self._high: NDArray[np.uint8] | None = None

    def add(self, bgr: NDArray[np.uint8]) -> None:
        if self._low is None or self._high is None:
            self._low, self._high = bgr.copy(), bgr.copy()
        else:
            np.minimum(self._low, bgr, out=self._low)
            np.maximum(self._high, bgr, out=self._high)

    def active(self) -> Part:
        """x1, y1, x2, y2 of the picture inside the bars, as fractions of the whole."""
        if self._low is None or self._high is None:
            return WHOLE
        low, high = self._low.astype(np.int16), self._high.astype(np.int16)
        top, bottom = _bars(low, high)
        left, right = _bars(low.swapaxes(0, 1), high.swapaxes(0, 1))
        height, width = low.shape[:2]
        return left / width, top / height, 1 - right / width, 1 - bottom / height


def _bars(low: NDArray[np.int16], high: NDArray[np.int16]) -> tuple[int, int]:
    """Number of bar rows at the top and at the bottom; as in a letterbox, both or neither.

    One hard edge is enough: next to a black backdrop a bar has no edge, but it is as thick as the other one.
    """
    (top, top_edge), (bottom, bottom_edge) = _plain_rows(low, high), _plain_rows(low[::-1], high[::-1])
    thick = max(top if top_edge else 0, bottom if bottom_edge else 0)
    if not thick or min(top, bottom) < 0.8 * thick or thick < 0.02 * len(low) or thick > 0.4 * len(low):
        return 0, 0
    return min(top, thick), min(bottom, thick)


def _plain_rows(low: NDArray[np.int16], high: NDArray[np.int16]) -> tuple[int, bool]:
    """Number of first rows of one colour that never change, and whether a picture fills the row after them."""
    colour = np.median(low[0], axis=0)
    different = ((high - colour) > _BAR_NOISE).any(2) | ((colour - low) > _BAR_NOISE).any(2)
    share = different.mean(1)
    inner = np.flatnonzero(share > 0.02)
    if not len(inner):
        return len(low), False
    first = int(inner[0])
    # A bar's edge may fall inside one line of the thumbnail, so the next line counts too.
    return first, bool(share[first : first + 2].max() > 0.5)
