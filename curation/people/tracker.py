"""Track ids: the same person keeps one number from sample to sample."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from curation.people.detector import Detections

# track_buffer counts updates of the tracker; at 6 samples a second, 12 updates take 2 s.
_TRACKER = SimpleNamespace(
    track_high_thresh=0.25, track_low_thresh=0.1, new_track_thresh=0.25, track_buffer=12, match_thresh=0.8,
    fuse_score=True,
)  # fmt: skip


class PeopleTracker:
    """ByteTrack over the person boxes of consecutive samples of one clip."""

    def __init__(self, person: int) -> None:
        from ultralytics.trackers.byte_tracker import BYTETracker

        self._tracker = BYTETracker(_TRACKER)
        self._person = person

    def __call__(self, found: Detections, width: int, height: int) -> NDArray[np.int32]:
        """Track id (k,) of every detection of the next sample; 0 if it is not a person or not tracked."""
        from ultralytics.engine.results import Boxes

        tracks = np.zeros(len(found.confidence), np.int32)
        people = np.flatnonzero(found.klass == self._person)
        size = np.array([width, height, width, height], np.float32)
        table = np.column_stack([found.xyxy[people] * size, found.confidence[people], found.klass[people]])
        for row in self._tracker.update(Boxes(table.astype(np.float32).reshape(-1, 6), (height, width))):
            tracks[people[int(row[7])]] = int(row[4])
        return tracks
