"""Writes clips into shards and removes them again. The same clips in the same order give the same bytes.

This holds for one version of pyarrow and blosc2: pyarrow's version is in every file, as Parquet's `created_by`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation.files import sha256_json
from curation.records import ClipSample
from curation.shards.codec import decode_jpeg, depth_range, encode_depth, pack_mask, usable
from curation.shards.index import (
    INDEX_NAME,
    Gone,
    ShardEntry,
    ShardFolder,
    commit,
    newest_index,
    nobody,
    open_shard,
    publish,
    reading,
    scan_shard,
    shard_paths,
    staged,
    unused_name,
)
from curation.shards.schema import (
    PROVENANCE_KEY,
    ROWS_PER_GROUP,
    SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    ShardError,
    check_schema,
)

# Generous: the footer's bytes for one column of one row group, and for the schema with its documentation.
_COLUMN_BYTES = 256
_SCHEMA_BYTES = 2**14


def write_shards(
    samples: Iterable[ClipSample], folder: Path, *, max_bytes: int, gone: Gone = nobody
) -> list[ShardEntry]:
    """Write clips, in the order given, into as many shards as needed, then the index. Holds one clip in memory.

    A shard is closed before it would exceed `max_bytes`; only a single clip larger than that gets a larger file.
    Clips that the folder already holds are replaced. gone: which of these clips were forgotten; called after all are
    written, and its clips are removed. Raises ShardError for an inconsistent sample; shards that were complete by then
    stay, and the next call adds them to the index.
    """
    return write_tables(map(encode_clip, samples), folder, max_bytes=max_bytes, gone=gone)


def write_tables(clips: Iterable[pa.Table], folder: Path, *, max_bytes: int, gone: Gone = nobody) -> list[ShardEntry]:
    """Like write_shards, for clips encoded by encode_clip, possibly with columns added or filled in."""
    entries: list[ShardEntry] = []
    tables = _checked(clips)
    table = next(tables, None)
    while table is not None:
        with _open(folder, table.schema) as shard:
            shard.add(table)
            while (table := next(tables, None)) is not None and shard.size_with(table) <= max_bytes:
                shard.add(table)
            entries.append(shard.publish())
    if entries:
        update_index(folder, entries, gone)
    return entries


def update_index(folder: Path, entries: Iterable[ShardEntry], gone: Gone = nobody) -> None:
    """Add shards to the folder's index, and any complete shard that a crash kept out of it. Safe to repeat."""
    commit(ShardFolder(folder), rewrite, fresh=entries, gone=gone)


def rebuild_index(folder: Path) -> None:
    """Rebuild the index from the shard files alone.

    Raises ShardError for a folder with neither shards nor an index.
    """
    _exists(folder)
    commit(ShardFolder(folder), rewrite, trust_index=False)


def remove_clips(folder: Path, clip_ids: Iterable[str]) -> frozenset[str]:
    """Remove clips from the folder permanently; return those that existed.

    The other clips of their files are written to new files, and the old files are deleted. Open readers keep the old
    bytes until they close. After a crash, call it again. Raises ShardError for a folder with neither shards nor index.
    """
    _exists(folder)
    return drop_clips(ShardFolder(folder), clip_ids)


def _exists(folder: Path) -> None:
    """Raise ShardError for a mistyped path, which would otherwise become an empty data set."""
    if not (shard_paths(folder) or (folder / INDEX_NAME).exists() or ShardFolder(folder).versions()):
        raise ShardError(f"{folder} is not a folder of shards: it has no shard and no index; check the path.")


def drop_clips(place: ShardFolder, clip_ids: Iterable[str]) -> frozenset[str]:
    """`remove_clips` for a folder on this disk or behind a URL."""
    return commit(place, rewrite, remove=frozenset(clip_ids))


def encode_clip(sample: ClipSample) -> pa.Table:
    """One clip as rows of the schema, its provenance in the table's metadata. Raises ShardError if shapes disagree."""
    frames, depth = sample.frames, sample.depth
    count, height, width = len(frames.jpeg), frames.height, frames.width
    _check(sample)
    provenance = sha256_json(sample.provenance)
    columns: dict[str, Any] = {
        "clip_id": [sample.clip_id] * count,
        "split": [sample.split] * count,
        "frame_index": range(count),
        "time_s": frames.times_s,
        "width": [width] * count,
        "height": [height] * count,
        "stretch": [frames.stretch] * count,
        "jpeg": frames.jpeg,
        "box": _rows_or_null(sample.boxes),
        "box_confidence": [None if np.isnan(value) else value for value in sample.box_confidence],
        "provenance": [provenance] * count,
    }
    if depth is not None:
        bounds = depth_range(depth.depth_m, depth.valid)
        columns["depth"] = [
            encode_depth(metres, valid, bounds) for metres, valid in zip(depth.depth_m, depth.valid, strict=True)
        ]
        columns["depth_log_min"] = [bounds.log_min] * count
        columns["depth_log_max"] = [bounds.log_max] * count
        columns["depth_valid"] = [pack_mask(pixels) for pixels in usable(depth.depth_m, depth.valid)]
        columns["intrinsics"] = _rows_or_null(depth.intrinsics.reshape(count, 9))
    arrays = [pa.array(columns.get(field.name, [None] * count), field.type) for field in SCHEMA]
    metadata = {
        VERSION_KEY: SCHEMA.metadata[VERSION_KEY],
        PROVENANCE_KEY: _provenance_json({provenance: sample.provenance}),
    }
    return pa.table(arrays, schema=SCHEMA.with_metadata(metadata))


def _check(sample: ClipSample) -> None:
    frames, depth = sample.frames, sample.depth
    count, size = len(frames.jpeg), (frames.height, frames.width)
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "times_s": (frames.times_s.shape, (count,)),
        "boxes": (sample.boxes.shape, (count, 4)),
        "box_confidence": (sample.box_confidence.shape, (count,)),
    }
    if depth is not None:
        found["depth_m"] = (depth.depth_m.shape, (count, *size))
        found["valid"] = (depth.valid.shape, (count, *size))
        found["intrinsics"] = (depth.intrinsics.shape, (count, 3, 3))
    wrong = [f"{name} has shape {shape}, not {wanted}" for name, (shape, wanted) in found.items() if shape != wanted]
    if not wrong and not (count and np.all(np.isfinite(frames.times_s)) and np.all(np.diff(frames.times_s) > 0)):
        wrong = ["there are no frames, or their times do not increase"]
    if not wrong and not (np.isfinite(frames.stretch) and frames.stretch > 0):
        wrong = [f"its stretch is {frames.stretch}, not a positive number"]
    if not wrong and (shape := decode_jpeg(frames.jpeg[0]).shape) != (*size, 3):
        wrong = [f"its first JPEG has shape {shape}, not {(*size, 3)}"]
    if wrong:
        raise ShardError(f"Clip {sample.clip_id} cannot go into a shard: {'; '.join(wrong)}. Make the sample again.")


def _rows_or_null(values: NDArray[np.float32]) -> list[list[float] | None]:
    return [None if np.isnan(row).any() else row.tolist() for row in values]


def _provenance_json(records: dict[str, Any]) -> str:
    return json.dumps(records, sort_keys=True, separators=(",", ":"))


def _provenance_of(table: pa.Table) -> tuple[str, Any]:
    key = table["provenance"][0].as_py()
    return key, json.loads(table.schema.metadata[PROVENANCE_KEY])[key]


def _checked(clips: Iterable[pa.Table]) -> Iterator[pa.Table]:
    seen: set[str] = set()
    for table in clips:
        check_schema(table.schema, table.schema.metadata or {}, "A clip to be written")
        clip_id = table["clip_id"][0].as_py()
        if clip_id in seen:
            raise ShardError(f"Clip {clip_id} is given twice; give every clip once.")
        seen.add(clip_id)
        yield table


class _Shard:
    """A shard being written."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._sink = pa.OSFile(str(path), "wb")
        self._schema = _file_schema(schema)
        self._writer = pq.ParquetWriter(self._sink, self._schema, **_options(schema))
        self._clips: list[tuple[str, str]] = []
        self._provenance: dict[str, Any] = {}
        self._groups = 0

    def add(self, table: pa.Table) -> None:
        """Append one clip in its own row groups."""
        self._writer.write_table(table.cast(self._schema), row_group_size=ROWS_PER_GROUP)
        key, record = _provenance_of(table)
        self._clips.append((table["clip_id"][0].as_py(), key))
        self._provenance[key] = record
        self._groups += -(-table.num_rows // ROWS_PER_GROUP)

    def size_with(self, table: pa.Table) -> int:
        """An upper bound for the finished file's bytes with this clip added."""
        groups = self._groups + -(-table.num_rows // ROWS_PER_GROUP)
        footer = _SCHEMA_BYTES + groups * len(table.schema) * _COLUMN_BYTES
        provenance = len(_provenance_json(self._provenance)) + len(table.schema.metadata[PROVENANCE_KEY])
        return self._sink.tell() + table.nbytes + provenance + footer

    def publish(self) -> ShardEntry:
        """Finish the file and give it its final name, derived from its clips and their provenance.

        If that name is retired, the file gets another: a late deletion may delete the retired name again.
        """
        self._writer.add_key_value_metadata({PROVENANCE_KEY.decode(): _provenance_json(self._provenance)})
        self.close()
        name = f"shard-{sha256_json([SCHEMA_VERSION, self._clips])[:16]}.parquet"
        name = unused_name(name, newest_index(ShardFolder(self._path.parent)).retired)
        entry = scan_shard(self._path, name)
        publish(self._path, name)
        return entry

    def close(self) -> None:
        """Close the file. Safe to repeat."""
        self._writer.close()
        self._sink.close()


def _file_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of a file with these columns, the same for new columns and for those read from another shard."""
    columns = [field.with_type(_plain(field.type)) for field in schema]
    return pa.schema(columns, {VERSION_KEY: SCHEMA.metadata[VERSION_KEY]})


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type with list values named "item", as in Arrow; when read from Parquet, they are named "element"."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return kind
    value = kind.value_field.with_name("item").with_type(_plain(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(value, kind.list_size)
    return pa.large_list(value) if pa.types.is_large_list(kind) else pa.list_(value)


@contextmanager
def _open(folder: Path, schema: pa.Schema) -> Iterator[_Shard]:
    with staged(folder) as path:
        shard = _Shard(path, schema)
        try:
            yield shard
        finally:
            shard.close()


def _options(schema: pa.Schema) -> dict[str, Any]:
    """All writer options that affect the bytes, pinned. Packed pixels do not compress again; other columns do."""
    packed = {"jpeg", "depth"}
    leaves = [f"{f.name}.list.element" if pa.types.is_nested(f.type) else f.name for f in schema]
    return {
        "version": "2.6",
        "data_page_version": "1.0",
        "data_page_size": 2**20,
        "compression": {leaf: "NONE" if leaf in packed else "ZSTD" for leaf in leaves},
        "compression_level": {leaf: 3 for leaf in leaves if leaf not in packed},
        "use_dictionary": ["clip_id", "split", "provenance"],
        "write_statistics": ["clip_id", "split", "frame_index", "time_s"],
    }


def rewrite(path: Path, keep: frozenset[str]) -> ShardEntry:
    """Write a shard in the same folder with only the clips in `keep`."""
    source = open_shard(path)
    metadata = source.metadata.metadata
    with _open(path.parent, source.schema_arrow) as shard:
        for clip in scan_shard(path).clips:
            if clip.clip_id in keep:
                groups = range(clip.row_group, clip.row_group + clip.row_groups)
                with reading(path):
                    table = source.read_row_groups(groups, use_threads=False).replace_schema_metadata(metadata)
                    table.validate(full=True)
                    _provenance_of(table)  # raises if it is missing
                shard.add(table)
        return shard.publish()
