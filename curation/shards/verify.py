"""Checking a folder of shards: every file against the index and its hash, and every frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.files import sha256_json
from curation.shards.codec import decode_codes, decode_jpeg, unpack_mask
from curation.shards.index import (
    INDEX_NAME,
    REBUILD,
    ShardEntry,
    ShardFolder,
    read_index,
    reading,
    scan_shard,
    shard_paths,
)
from curation.shards.reader import depth_bounds, open_clips
from curation.shards.schema import ShardError


def verify(folder: Path, *, decode: bool = True) -> tuple[ShardEntry, ...]:
    """Check every file of a folder against its index and hash and, with `decode`, every frame; return the shards.

    Raises one ShardError with a line for every problem found.
    """
    shards = read_index(folder)
    known = {shard.file for shard in shards}
    problems = [] if ShardFolder(folder).published() else [f"{folder / INDEX_NAME} is not the newest index; {REBUILD}."]
    problems += [f"{path} is not in the index; {REBUILD}." for path in shard_paths(folder) if path.name not in known]
    for shard in shards:
        path = folder / shard.file
        try:
            found = scan_shard(path)
        except ShardError as error:
            problems.append(str(error))
            continue
        if found.sha256 != shard.sha256:
            problems.append(
                f"{path} has SHA-256 {found.sha256}, but its index has {shard.sha256}; restore the file or, if it "
                f"was replaced on purpose, {REBUILD}."
            )
        elif found != shard:
            problems.append(f"{path} does not hold its clips at the positions in the index; {REBUILD}.")
        elif decode:
            problems += [f"{path}: {fault}" for fault in _faults(folder, shard)]
    if problems:
        raise ShardError("\n".join(problems))
    return shards


def _faults(folder: Path, shard: ShardEntry) -> Iterator[str]:
    try:
        parquet, provenance = open_clips(folder, shard)
    except ShardError as error:
        yield str(error)
        return
    for clip in shard.clips:
        try:
            with reading(folder / shard.file):
                rows = parquet.read_row_groups(range(clip.row_group, clip.row_group + clip.row_groups))
                fault = _fault(rows, provenance)
        except ShardError as error:
            fault = str(error)
        if fault:
            yield f"clip {clip.clip_id}: {fault}"


def _fault(rows: pa.Table, provenance: Mapping[str, Any]) -> str | None:
    """The first error in a clip's rows; None if they all match the schema."""
    height, width, key = (rows[name][0].as_py() for name in ("height", "width", "provenance"))
    for name in ("clip_id", "split", "width", "height", "stretch", "depth_log_min", "depth_log_max", "provenance"):
        if len(rows[name].unique()) != 1:
            return f"{name} differs between frames."
    if rows["frame_index"].to_pylist() != list(range(rows.num_rows)):
        return "frame_index has gaps."
    if not np.all(np.diff(rows["time_s"].to_numpy()) > 0):
        return "time_s does not increase."
    if key not in provenance or sha256_json(provenance[key]) != key:
        return "its provenance is missing or altered."
    if any(decode_jpeg(image).shape != (height, width, 3) for image in rows["jpeg"].to_pylist()):
        return f"a frame is not {width}x{height}."
    if rows["human_mask"].null_count not in (0, rows.num_rows):
        return "some frames have a human mask and some do not."
    for mask in rows["human_mask"].drop_null().to_pylist():
        unpack_mask(mask, height, width)
    nulls = {rows[name].null_count for name in ("depth", "depth_log_min", "depth_log_max", "depth_valid")}
    if nulls == {rows.num_rows}:
        return None
    if nulls != {0}:
        return "some frames have depth and some do not."
    levels = depth_bounds(rows).levels
    for blob, mask in zip(rows["depth"].to_pylist(), rows["depth_valid"].to_pylist(), strict=True):
        codes = decode_codes(blob, height, width)
        if codes.max() > levels:
            return f"depth code {codes.max()} is beyond the clip's {levels} levels."
        if not np.array_equal(codes > 0, unpack_mask(mask, height, width)):
            return "depth_valid does not match depth."
    return None
