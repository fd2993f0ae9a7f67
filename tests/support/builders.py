"""Observations made by hand: a still, quiet clip with one person, to which each test adds what it is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from curation.observe.observations import Observations

Box = tuple[str, float, tuple[float, float, float, float]]
DANCER: Box = ("person", 0.9, (0.3, 0.1, 0.6, 0.9))


def observations(boxes: list[list[Box]] | None = None, *, fps: float = 30.0, seconds: float = 3.0, **changes: Any):
    """A clip whose frames change by a steady little; `boxes` per sample, the same dancer in all by default."""
    count = round(fps * seconds)
    times = np.arange(count) / fps
    if boxes is None:
        boxes = [[DANCER]] * round(6 * seconds)
    flat = [(sample, *box) for sample, group in enumerate(boxes) for box in group]
    quiet = np.full(count, 0.05, np.float32)
    quiet[:1] = 0
    made = Observations(
        clip_id="0123456789abcdef",
        kind="full",
        width=1920,
        height=1080,
        transfer="sdr",
        start_s=0.0,
        end_s=seconds,
        surround="none",
        active=(0.0, 0.0, 1.0, 1.0),
        times_s=times,
        content=np.full(count, 4.0, np.float32),
        luma=np.full(count, 100.0, np.float32),
        contrast=np.full(count, 50.0, np.float32),
        gap=quiet,
        person_gap=quiet.copy(),
        dissolve=np.zeros(count, np.float32),
        sample_times_s=np.arange(len(boxes)) * seconds / max(len(boxes), 1),
        box_sample=np.array([row[0] for row in flat], np.int32),
        box_xyxy=np.array([row[3] for row in flat], np.float32).reshape(-1, 4),
        box_class=tuple(row[1] for row in flat),
        box_confidence=np.array([row[2] for row in flat], np.float32),
        box_track=np.zeros(len(flat), np.int32),
        provenance={},
    )
    return replace(made, **changes)
