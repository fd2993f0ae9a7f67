"""The records passed between the stages: one frozen dataclass each, no behaviour.

ClipRef -> VideoFile -> Observations -> Verdict -> ClipSample -> shard.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["pass", "fail", "unknown"]
Decision = Literal["accept", "reject", "unknown"]
Transfer = Literal["sdr", "pq", "hlg"]  # the transfer function: how code values become light
Part = tuple[float, float, float, float]  # x1, y1, x2, y2 of a part of the displayed picture, as fractions
WHOLE: Part = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A verified video on this machine. Width and height are as displayed: rotation and pixel aspect applied."""

    path: Path
    sha256: str
    size_bytes: int
    codec: str
    width: int
    height: int
    frames: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class CriterionResult:
    """One criterion's outcome with every reason, each a short sentence with the measured value."""

    criterion: str
    outcome: Outcome
    reasons: tuple[str, ...] = ()
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A policy's answer for one clip's observations: accept if every criterion passes, reject if any fails."""

    clip_id: str
    policy_name: str
    policy_hash: str
    decision: Decision
    criteria: tuple[CriterionResult, ...]

    @property
    def first_reason(self) -> str | None:
        """The first failing criterion, or the first unknown one, in the policy's order; None for an accepted clip."""
        for outcome in ("fail", "unknown"):
            for result in self.criteria:
                if result.outcome == outcome:
                    return result.criterion
        return None


@dataclass(frozen=True, slots=True)
class Frames:
    """Sampled frames of one clip on the training grid (6 fps, longer side 518, sides multiples of 14 by default).

    times_s: (N,) float64 presentation times relative to the video's first frame.
    jpeg: N encoded RGB frames of height x width. Training and the teacher both decode these same bytes.
    stretch: horizontal over vertical scale of the grid against the displayed picture, whose pixels are square: fx / fy,
        in pixels of the grid, of a camera with square pixels.
    """

    width: int
    height: int
    times_s: NDArray[np.float64]
    jpeg: tuple[bytes, ...]
    stretch: float = 1.0


@dataclass(frozen=True, slots=True)
class TeacherDepth:
    """A teacher's output on the training grid.

    depth_m: (N, H, W) float32 metres along the optical axis, 0 where invalid.
    valid: (N, H, W) bool.
    intrinsics: (N, 3, 3) float32, pixels of the training grid, OpenCV camera frame (x right, y down, z forward).
    """

    depth_m: NDArray[np.float32]
    valid: NDArray[np.bool_]
    intrinsics: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ClipSample:
    """One accepted clip, ready for a shard.

    boxes: (N, 4) float32 xyxy pixels of the training grid, the person's box; NaN where not detected in that frame.
    box_confidence: (N,) float32, NaN where not detected.
    depth: None if no teacher ran; provenance says which teacher, detector, policy and parameters made the sample.
    """

    clip_id: str
    split: str | None
    frames: Frames
    boxes: NDArray[np.float32]
    box_confidence: NDArray[np.float32]
    depth: TeacherDepth | None
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class ClipRef:
    """One clip of one video.

    Times are integer microseconds, half-open [start, end), relative to the first video frame's presentation time;
    None means the video's own start or end.
    """

    platform: str
    video_id: str
    start_us: int | None = None
    end_us: int | None = None
    split: str | None = None

    @property
    def clip_id(self) -> str:
        """First 16 hex digits of SHA-256 over platform, video id, start and end in microseconds ("" for None)."""
        start = "" if self.start_us is None else str(self.start_us)
        end = "" if self.end_us is None else str(self.end_us)
        return _short_hash(self.platform, self.video_id, start, end)

    @property
    def video_key(self) -> str:
        """16 hex digits that name the video, independent of the span; also the name of its folder on disk."""
        return _short_hash(self.platform, self.video_id)

    @property
    def start_s(self) -> float:
        """Start in seconds, 0 for the video's own start."""
        return (self.start_us or 0) / 1e6

    @property
    def end_s(self) -> float | None:
        """End in seconds, or None for the video's own end."""
        return None if self.end_us is None else self.end_us / 1e6


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
