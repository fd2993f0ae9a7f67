"""Per-frame measures of continuity, which show edits, flashes and fades.

PySceneDetect's content score shows hard cuts. It cannot tell a strobe from a cut, and it misses a jump cut before a
still background. So the change *through* a moment is measured too: the smallest difference between any frame just
before it and any frame just after it. The frames around a flash bridge it; nothing bridges an edit. Policies decide
what a cut is, not this module.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scenedetect import FrameTimecode
from scenedetect.detectors import ContentDetector

THUMB_LONG_SIDE = 256  # the size that PySceneDetect itself scales down to
_SMALL_LONG_SIDE = 64
_BRIDGE_S = 0.2  # frames this close on either side may bridge a moment; strobes go dark for up to 0.1 s
_DISSOLVE_S = 0.5  # half the longest dissolve that is recognised
_CONTRAST_FLOOR = 4.0  # grey levels; noise in a black frame must not count as structure


class ShotMeasures(NamedTuple):
    """Arrays of one value per frame, float32; the first frame has no change and holds 0.

    content: PySceneDetect's ContentDetector score against the frame before.
    luma, contrast: mean and standard deviation of grey levels, 0-255.
    gap: change through this moment over the whole picture, brightness and contrast removed; 0 none, 1 unrelated.
    person_gap: the same inside the person's box (0 if no box is known).
    dissolve: how well a mixture of two different frames around it explains this frame; 0 not at all, 1 entirely.
    """

    content: NDArray[np.float32]
    luma: NDArray[np.float32]
    contrast: NDArray[np.float32]
    gap: NDArray[np.float32]
    person_gap: NDArray[np.float32]
    dissolve: NDArray[np.float32]


class ShotMeter:
    """Measures a clip's frames as they are decoded and keeps only the results, 24 bytes a frame."""

    def __init__(self, frame_s: float) -> None:
        """frame_s: the clip's median time between frames, seconds."""
        self._detector = ContentDetector()
        self._rate = 1.0 / frame_s
        self._bridge = int(np.clip(round(_BRIDGE_S / frame_s), 3, 12))
        self._reach = int(np.clip(round(_DISSOLVE_S / frame_s), 4, 30))
        self._small: deque[NDArray[np.float32]] = deque(maxlen=2 * self._reach + 1)
        self._person: deque[tuple[slice, slice] | None] = deque(maxlen=2 * self._reach + 1)
        # For each recent frame, its difference from each of the 2 * bridge - 1 frames before it, nearest first.
        self._apart: deque[NDArray[np.float32]] = deque(maxlen=2 * self._bridge)
        self._rows = {name: array("f") for name in ShotMeasures._fields}
        self._count = 0

    def add(self, bgr: NDArray[np.uint8], person: Sequence[float] | None) -> None:
        """Add the next frame, upright (h, w, 3) uint8 BGR, and the last known person box (fractions)."""
        self._detector.process_frame(FrameTimecode(self._count, self._rate), bgr)
        score = self._detector._frame_score  # the only access to the score that does not also compute an edge map
        height, width = bgr.shape[:2]
        scale = _SMALL_LONG_SIDE / max(height, width)
        size = (max(8, round(width * scale)), max(8, round(height * scale)))
        grey = cv2.resize(cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), size, interpolation=cv2.INTER_AREA).astype(np.float32)
        luma, contrast = float(grey.mean()), float(grey.std())
        self._rows["content"].append(score or 0.0)
        self._rows["luma"].append(luma)
        self._rows["contrast"].append(contrast)
        plain = (grey - luma) / (contrast + _CONTRAST_FLOOR)
        recent = self._held(self._count + 1 - 2 * self._bridge, self._count)
        earlier = np.stack([self._small[n] for n in reversed(recent)]) if recent else np.zeros((0, *plain.shape))
        self._apart.append(np.abs(earlier - plain).mean((1, 2)))
        self._small.append(plain)
        self._person.append(None if person is None else _slices(person, *size))
        self._count += 1
        if self._count > self._bridge - 1:
            self._measure_gap(self._count - self._bridge)
        if self._count > self._reach:
            self._measure_dissolve(self._count - 1 - self._reach)

    def finish(self) -> ShotMeasures:
        """Measure the last frames, after which no further frames come."""
        for frame in range(max(0, self._count - self._bridge + 1), self._count):
            self._measure_gap(frame)
        for frame in range(max(0, self._count - self._reach), self._count):
            self._measure_dissolve(frame)
        return ShotMeasures(**{name: np.asarray(row, np.float32) for name, row in self._rows.items()})

    def _held(self, first: int, last: int) -> list[int]:
        """Positions in the ring buffer of those frames of [first, last) that it still holds."""
        oldest = self._count - len(self._small)
        return [n - oldest for n in range(max(first, oldest), min(last, self._count))]

    def _measure_gap(self, frame: int) -> None:
        before = self._held(frame - self._bridge, frame)
        after = self._held(frame, frame + self._bridge)
        if frame == 0 or not before:
            self._rows["gap"].append(0.0)
            self._rows["person_gap"].append(0.0)
            return
        late = len(self._apart) - (self._count - frame)  # this frame's position in the ring of differences
        gap = min(float(self._apart[late + k][k : k + self._bridge].min()) for k in range(len(after)))
        self._rows["gap"].append(gap)
        box = self._person[after[0]]
        if box is None:
            self._rows["person_gap"].append(0.0)
            return
        left = np.stack([self._small[n][box] for n in before])
        right = np.stack([self._small[n][box] for n in after])
        difference = np.abs(left[:, None] - right[None, :])
        self._rows["person_gap"].append(float(difference.mean((2, 3)).min()))

    def _measure_dissolve(self, frame: int) -> None:
        """Explain the frame as a mixture of the frames `reach` away: this fits a dissolve, but not a movement."""
        ends = self._held(frame - self._reach, frame - self._reach + 1) + self._held(
            frame + self._reach, frame + self._reach + 1
        )
        if len(ends) < 2:
            self._rows["dissolve"].append(0.0)
            return
        a, b = (self._small[n].ravel() for n in ends)
        middle = self._small[self._held(frame, frame + 1)[0]].ravel()
        if np.abs(a - b).mean() < 0.2:  # nothing to dissolve between
            self._rows["dissolve"].append(0.0)
            return
        # Least-squares fit of the frame by these two, through the normal equations in two unknowns.
        aa, bb, ab, am, bm = a @ a, b @ b, a @ b, a @ middle, b @ middle
        determinant = max(float(aa * bb - ab * ab), 1e-6)
        share_a, share_b = float(bb * am - ab * bm) / determinant, float(aa * bm - ab * am) / determinant
        mixed = min(share_a, share_b) > 0.15
        error = np.abs(share_a * a + share_b * b - middle).mean()
        alone = min(np.abs(a - middle).mean(), np.abs(b - middle).mean())
        self._rows["dissolve"].append(float(np.clip(1 - error / max(alone, 1e-6), 0, 1)) if mixed else 0.0)


def _slices(box: Sequence[float], width: int, height: int) -> tuple[slice, slice]:
    """Rows and columns of a fractional xyxy box, enlarged by a fifth on each side, at least 4 pixels."""
    x1, y1, x2, y2 = box
    grow_x, grow_y = 0.2 * (x2 - x1), 0.2 * (y2 - y1)
    left, right = int(np.clip((x1 - grow_x) * width, 0, width - 4)), int(np.ceil((x2 + grow_x) * width))
    top, bottom = int(np.clip((y1 - grow_y) * height, 0, height - 4)), int(np.ceil((y2 + grow_y) * height))
    return slice(top, max(bottom, top + 4)), slice(left, max(right, left + 4))
