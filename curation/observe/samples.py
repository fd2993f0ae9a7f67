"""Training frames of one clip, kept between observing and writing the shard so that nothing is decoded twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.files import atomic_path
from curation.records import Frames


def write_frames(frames: Frames, path: Path) -> None:
    """Write beside `path` and rename."""
    table = pa.table({"time_s": frames.times_s, "jpeg": pa.array(frames.jpeg, pa.binary())})
    grid = {"width": str(frames.width), "height": str(frames.height), "stretch": str(frames.stretch)}
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(grid), temporary, compression="none")


def read_frames(path: Path) -> Frames | None:
    """The frames kept at `path`, or None where there are none, or not whole ones."""
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
