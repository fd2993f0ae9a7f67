"""Windows of decoded frames from shards, read without touching any other clip.

A reader opens files on first use, maps them into memory and keeps the most recent ones open. It may be pickled and
forked into data-loading processes; give every thread its own. Nothing here writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation.shards.codec import DepthRange, decode_depth, decode_jpeg, unpack_mask
from curation.shards.index import (
    ClipEntry,
    ShardEntry,
    check_file,
    open_shard,
    read_index,
    reading,
)
from curation.shards.schema import PROVENANCE_KEY, ShardError

if TYPE_CHECKING:
    import torch

_MAX_OPEN = 64


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Consecutive frames of one clip, decoded; N frames of H x W pixels, the training grid.

    frame_index: (N,) int32 within the clip.  times_s: (N,) float64, relative to the video's first frame.
    stretch: horizontal over vertical scale of the grid against the displayed picture, whose pixels are square.
    rgb: (N, H, W, 3) uint8.
    depth_m: (N, H, W) float32 metres along the optical axis, 0 where invalid.  depth_valid: (N, H, W) bool.
    human_mask: (N, H, W) bool.
    boxes: (N, 4) float32 xyxy pixels, NaN where not detected.  box_confidence: (N,) float32, NaN likewise.
    intrinsics: (N, 3, 3) float32, pixels, OpenCV camera (x right, y down, z forward), NaN where the teacher had none.
    A field is None if the shard does not hold it or it was not requested.
    """

    clip_id: str
    split: str | None
    frame_index: NDArray[np.int32]
    times_s: NDArray[np.float64]
    stretch: float
    rgb: NDArray[np.uint8] | None
    depth_m: NDArray[np.float32] | None
    depth_valid: NDArray[np.bool_] | None
    human_mask: NDArray[np.bool_] | None
    boxes: NDArray[np.float32]
    box_confidence: NDArray[np.float32]
    intrinsics: NDArray[np.float32] | None
    provenance: Mapping[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The arrays that are not None, by name, as torch tensors that share their memory."""
        import torch

        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if isinstance(array, np.ndarray)}


class ShardReader:
    """Random access to the clips of a folder. Raises ShardError on opening if the index and the files disagree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = _sound_index(folder)
        self.clips: Mapping[str, ClipEntry] = MappingProxyType(
            {clip.clip_id: clip for shard in self.shards for clip in shard.clips}
        )
        self._files = {shard.file: shard for shard in self.shards}
        self._open = lru_cache(maxsize=_MAX_OPEN)(open_clips)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.folder,)

    def frames(
        self, clip_id: str, start: int = 0, stop: int | None = None, *, rgb: bool = True, depth: bool = True
    ) -> Window:
        """Decoded frames [start, stop) of a clip, stop None for its end; rgb and depth only if requested.

        Raises ShardError for an unknown clip, frames it does not have, and damaged data.
        """
        without = ([] if rgb else ["jpeg"]) + ([] if depth else ["depth"])
        rows = self.table(clip_id, start, stop, without=["depth_valid", *without])
        with reading(self.folder / self.clips[clip_id].file):
            return self._window(clip_id, rows, rgb=rgb, depth=depth)

    def _window(self, clip_id: str, rows: pa.Table, *, rgb: bool, depth: bool) -> Window:
        height, width = rows["height"][0].as_py(), rows["width"][0].as_py()
        taught, depth_m = rows["depth_log_min"].null_count == 0, None
        if depth and taught:
            bounds = depth_bounds(rows)
            depth_m = np.empty((rows.num_rows, height, width), np.float32)
            for blob, out in zip(rows["depth"].to_pylist(), depth_m, strict=True):
                decode_depth(blob, height, width, bounds, out)
        masks = rows["human_mask"].drop_null().to_pylist()
        return Window(
            clip_id=clip_id,
            split=rows["split"][0].as_py(),
            frame_index=rows["frame_index"].to_numpy().copy(),
            times_s=rows["time_s"].to_numpy().copy(),
            stretch=rows["stretch"][0].as_py(),
            rgb=np.stack([decode_jpeg(image) for image in rows["jpeg"].to_pylist()]) if rgb else None,
            depth_m=depth_m,
            depth_valid=None if depth_m is None else depth_m > 0,
            human_mask=np.stack([unpack_mask(mask, height, width) for mask in masks]) if masks else None,
            boxes=_vectors(rows["box"], 4),
            box_confidence=rows["box_confidence"].fill_null(np.nan).to_numpy().copy(),
            intrinsics=_vectors(rows["intrinsics"], 9).reshape(-1, 3, 3) if taught else None,
            provenance=self._shard(self.clips[clip_id]).provenance[rows["provenance"][0].as_py()],
        )

    def table(self, clip_id: str, start: int = 0, stop: int | None = None, *, without: Sequence[str] = ()) -> pa.Table:
        """Frames [start, stop) of a clip as stored, with all columns of the file except `without`."""
        clip = self.clips.get(clip_id)
        if clip is None:
            raise ShardError(f"Clip {clip_id} is not in {self.folder}; choose one from its index.")
        stop = clip.frames if stop is None else stop
        if not 0 <= start < stop <= clip.frames:
            raise ShardError(f"Clip {clip_id} has frames 0 to {clip.frames}; frames {start} to {stop} were requested.")
        shard = self._shard(clip).parquet
        groups, skipped, offset = [], 0, 0
        with reading(self.folder / clip.file):
            for group in range(clip.row_group, clip.row_group + clip.row_groups):
                rows = shard.metadata.row_group(group).num_rows
                if offset + rows <= start:
                    skipped += rows
                elif offset < stop:
                    groups.append(group)
                offset += rows
            columns = [name for name in shard.schema_arrow.names if name not in without]
            return shard.read_row_groups(groups, columns, use_threads=False).slice(start - skipped, stop - start)

    def _shard(self, clip: ClipEntry) -> _Open:
        return self._open(self.folder, self._files[clip.file])


def _sound_index(folder: Path) -> tuple[ShardEntry, ...]:
    """The shards of the newest index. Raises ShardError if one of their files is missing or has another size."""
    shards = read_index(folder)
    while True:
        try:
            for shard in shards:
                check_file(folder, shard)
            return shards
        except ShardError:
            newer = read_index(folder)  # a writer may have replaced a file since
            if newer == shards:
                raise
            shards = newer


class _Open(NamedTuple):
    parquet: pq.ParquetFile
    provenance: Mapping[str, Any]


def open_clips(folder: Path, shard: ShardEntry) -> _Open:
    """A shard file for reading, with the provenance of its clips. Raises ShardError if it is not the indexed file."""
    check_file(folder, shard)  # a shard rewritten since the index was read would return another clip's frames
    parquet = open_shard(folder / shard.file)
    with reading(folder / shard.file):
        return _Open(parquet, json.loads(parquet.metadata.metadata.get(PROVENANCE_KEY, b"{}")))


def depth_bounds(rows: pa.Table) -> DepthRange:
    """The depth range of a clip's codes."""
    return DepthRange(rows["depth_log_min"][0].as_py(), rows["depth_log_max"][0].as_py())


def _vectors(column: pa.ChunkedArray, length: int) -> NDArray[np.float32]:
    return np.array([row or [np.nan] * length for row in column.to_pylist()], np.float32)
