"""Training frames of one clip: their grid, sampling them again from the video, and the file that keeps them.

The file keeps them from observing until a shard is written, so that nothing is decoded twice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.deadlines import check_time
from curation.failures import ClipFailure, FailureCode
from curation.files import atomic_path
from curation.observe.sampling import sample_indices
from curation.records import WHOLE, ClipRef, Frames, Part
from curation.settings import ObserveSettings
from curation.shards.codec import encode_jpeg
from curation.video.decode import pictures
from curation.video.index import VideoIndex, with_index


def write_frames(frames: Frames, path: Path) -> None:
    """Write to a temporary file next to `path`, then rename."""
    table = pa.table({"time_s": frames.times_s, "jpeg": pa.array(frames.jpeg, pa.binary())})
    grid = {"width": str(frames.width), "height": str(frames.height), "stretch": str(frames.stretch)}
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(grid), temporary, compression="none")


def read_frames(path: Path) -> Frames | None:
    """The frames kept at `path`, or None if the file is missing or damaged."""
    try:
        table = pq.read_table(path)
        grid = {key.decode(): value for key, value in table.schema.metadata.items()}
        return Frames(
            width=int(grid["width"]),
            height=int(grid["height"]),
            times_s=np.asarray(table["time_s"], np.float64),
            jpeg=tuple(table["jpeg"].to_pylist()),
            stretch=float(grid["stretch"]),
        )
    except (OSError, pa.ArrowInvalid, KeyError):
        return None


def sample_frames(ref: ClipRef, path: Path, settings: ObserveSettings, part: Part = WHOLE) -> Frames:
    """Only the clip's training frames, by random access. For the whole picture, the same bytes as from `observe`."""

    def read(index: VideoIndex) -> Frames:
        first, last = index.span(ref.start_s, ref.end_s)
        numbers = first + sample_indices(index.times_s[first:last], settings.sample_fps)
        refuse_long(len(numbers), settings)
        width, height = training_grid(index, settings.frame_long_side, part)
        jpeg: list[bytes] = []
        for picture in pictures(index, numbers.tolist(), width, height, part):
            check_time()
            jpeg.append(encode_jpeg(picture))
        stretch = grid_stretch(index, width, height, part)
        return Frames(width=width, height=height, times_s=index.times_s[numbers], jpeg=tuple(jpeg), stretch=stretch)

    return with_index(path, read, settings.limits)


def refuse_long(samples: int, settings: ObserveSettings) -> None:
    if samples > (most := settings.limits.max_samples):
        text = f"the clip has {samples} samples, the limit is {most}; split it into shorter clips in the manifest"
        raise ClipFailure(FailureCode.TOO_LARGE, text)


def training_grid(index: VideoIndex, long_side: int, part: Part = WHOLE) -> tuple[int, int]:
    """Width and height with the longer side `long_side`, both multiples of 14 (one patch of the networks)."""
    sides = _sides(index, part)
    scale = long_side / max(sides)
    return tuple(max(14, round(side * scale / 14) * 14) for side in sides)  # type: ignore[return-value]


def grid_stretch(index: VideoIndex, width: int, height: int, part: Part = WHOLE) -> float:
    """Horizontal over vertical scale of a width x height grid against this part as displayed; 1 is no stretch."""
    sides = _sides(index, part)
    return (width / sides[0]) / (height / sides[1])


def _sides(index: VideoIndex, part: Part) -> tuple[float, float]:
    """Width and height of a part of the displayed picture, in pixels."""
    return index.width * (part[2] - part[0]), index.height * (part[3] - part[1])
