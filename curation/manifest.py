"""Manifests: lists of clips by platform, video id and time span. Nothing else about a video is ever kept.

This module never touches the network or a video.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


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
        """16 hex digits that name the video whatever the span; the name of its folder on disk."""
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
