"""Limits the size of a video, how slow its download may be, and the disk space it takes.

Checked before the first byte against the size the server announces, and again while bytes arrive, because an announced
size may be missing or wrong.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.download.min_rate import Pace
from curation.failures import ClipFailure, FailureCode
from curation.settings import DownloadSettings

TOO_LARGE = "The video is larger than the setting max_video_mb allows."
NO_ROOM = "The disk has less free space than the setting min_free_mb requires."
SEGMENT_BYTES = 256 << 20  # yt-dlp holds each segment of a stream in memory, even after writing it to disk
LARGE_SEGMENT = f"A segment of the stream is larger than {SEGMENT_BYTES >> 20} MB."
_LOOK_EVERY = 16 << 20  # bytes between two checks of the free space


class Limits:
    """The limits of one video. Sizes are bytes; a method raises ClipFailure where a limit is exceeded.

    REFUSED for the video, TOO_LARGE for one of its segments, DISK_FULL for the disk.

    pace: the minimum rate over all attempts; below it, the code is TIMEOUT.
    """

    def __init__(self, settings: DownloadSettings, folder: Path, progress: Callable[[int, int], None] | None) -> None:
        self._largest = settings.max_video_mb << 20
        self._spare = settings.min_free_mb << 20
        self._folder, self._progress = folder, progress
        self._looked_at = 0
        self._segment: int | None = None
        self._before = 0  # bytes of all segments before this one
        tries = settings.retries + 1
        self.pace = Pace(settings.timeout_s, tries * (self._largest + SEGMENT_BYTES))

    def room(self, size: int = 0) -> None:
        """Check that `size` more bytes fit on the disk and still leave min_free_mb free."""
        if shutil.disk_usage(self._folder).free < self._spare + size:
            raise ClipFailure(FailureCode.DISK_FULL, NO_ROOM)

    def announced(self, size: int, already: int = 0) -> None:
        """Check the size that a server announces, of which `already` bytes are here. The clean copy needs room too."""
        if size > self._largest:
            raise ClipFailure(FailureCode.REFUSED, TOO_LARGE)
        self.room(2 * size - already)

    def hook(self, state: dict[str, Any]) -> None:
        """yt-dlp's progress hook: checks what has arrived, then calls the caller's progress."""
        done = int(state.get("downloaded_bytes") or 0)
        if done > self._largest:
            raise ClipFailure(FailureCode.REFUSED, TOO_LARGE)
        if state.get("fragment_index") != self._segment:
            self._segment, self._before = state.get("fragment_index"), done
        if self._segment is not None and done - self._before > SEGMENT_BYTES:
            raise ClipFailure(FailureCode.TOO_LARGE, LARGE_SEGMENT)
        if not self._looked_at <= done < self._looked_at + _LOOK_EVERY:  # smaller after a new start
            self._looked_at = done
            self.room()
        if self._progress is not None:
            self._progress(done, int(state.get("total_bytes") or state.get("total_bytes_estimate") or 0))
