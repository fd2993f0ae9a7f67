"""Which clip lies in which file: the only place of the package that opens, locks, renames or deletes files.

The shard files are the truth. index.parquet is a summary of them that saves reading every footer and holds the hashes;
it is written last, and whatever a crash left between a shard and the index is found and put right by the next `commit`.
A clip exists once in a folder: where two files hold it, the one written last keeps it.

Writers in several processes take turns by a lock on the folder. One lock beside one index is less to go wrong than an
index part per shard: removal, replacement and clean-up need the whole picture at once anyway.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from curation.files import atomic_path, sha256_file
from curation.shards.schema import SCHEMA_VERSION, VERSION_KEY, ShardError, check_schema

INDEX_NAME = "index.parquet"
REBUILD = "rebuild the index with curation.shards.writer.rebuild_index"
_COLUMNS = pa.schema(  # those of ClipEntry in its order, then those of its shard
    [
        ("clip_id", pa.string()),
        ("split", pa.string()),
        ("file", pa.string()),
        ("row_group", pa.int32()),
        ("row_groups", pa.int32()),
        ("frames", pa.int32()),
        ("sha256", pa.string()),
        ("size_bytes", pa.int64()),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


@dataclass(frozen=True, slots=True)
class ClipEntry:
    """Where one clip lies: `row_groups` row groups of `file` from `row_group` on, `frames` rows in all."""

    clip_id: str
    split: str | None
    file: str
    row_group: int
    row_groups: int
    frames: int


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard file, its name within the folder, and its clips in the order they lie in it."""

    file: str
    sha256: str
    size_bytes: int
    clips: tuple[ClipEntry, ...]


def shard_paths(folder: Path) -> list[Path]:
    """The shard files of a folder, indexed or not, by name."""
    return sorted(folder.glob("shard-*.parquet"))


def open_shard(path: Path) -> pq.ParquetFile:
    """A memory-mapped shard of the version this program reads. Raises ShardError if it is missing or something else."""
    try:
        shard = pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing; restore it, or {REBUILD}.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardError(f"{path} is not a readable Parquet file; restore it, or move it out of the folder.") from error
    check_schema(shard.schema_arrow, shard.metadata.metadata or {}, str(path))
    return shard


def check_file(folder: Path, shard: ShardEntry) -> None:
    """Raise ShardError unless the file is there and as large as the index says."""
    path = folder / shard.file
    if not path.exists():
        raise ShardError(f"{path} is missing; restore it, or {REBUILD}.")
    if path.stat().st_size != shard.size_bytes:
        raise ShardError(f"{path} is not the file its index describes; open the folder anew, or {REBUILD}.")


def read_index(folder: Path) -> tuple[ShardEntry, ...]:
    """All shards of a folder, by file name. Raises ShardError if the index is missing or not one."""
    path = folder / INDEX_NAME
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing; name a folder of shards, or {REBUILD}.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardError(f"{path} is not a readable index; {REBUILD}.") from error
    if table.schema.names != _COLUMNS.names or (table.schema.metadata or {}).get(VERSION_KEY) != b"%d" % SCHEMA_VERSION:
        raise ShardError(f"{path} is not an index of schema version {SCHEMA_VERSION}; {REBUILD}.")
    clips: dict[tuple[str, str, int], list[ClipEntry]] = {}
    for *row, sha256, size_bytes in zip(*(column.to_pylist() for column in table.columns), strict=True):
        clip = ClipEntry(*row)
        clips.setdefault((clip.file, sha256, size_bytes), []).append(clip)
    return tuple(ShardEntry(*shard, tuple(entries)) for shard, entries in sorted(clips.items()))


def scan_shard(path: Path, name: str | None = None) -> ShardEntry:
    """What the index says of a file (to be called `name`), read from the file: hash, size, clips by row group.

    Raises ShardError unless every clip has row groups of its own, one after the other.
    """
    shard, name = open_shard(path), name or path.name
    clips: dict[str, ClipEntry] = {}
    for group in range(shard.num_row_groups):
        rows = shard.read_row_group(group, columns=["clip_id", "split"], use_threads=False)
        clip_id, split = rows["clip_id"][0].as_py(), rows["split"][0].as_py()
        clip = clips.get(clip_id, ClipEntry(clip_id, split, name, group, 0, 0))
        if len(rows["clip_id"].unique()) > 1 or clip.row_group + clip.row_groups != group:
            raise ShardError(
                f"{path} mixes clips in its row groups; write it anew with curation.shards.writer.write_shards."
            )
        clips[clip_id] = replace(clip, row_groups=clip.row_groups + 1, frames=clip.frames + rows.num_rows)
    return ShardEntry(name, sha256_file(path), path.stat().st_size, tuple(clips.values()))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; waits for whoever holds it. A process that dies gives it up."""
    import fcntl  # POSIX only; reading shards works without it

    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder of shards; check the path.")
    with (folder / ".lock").open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)  # closing alone would leave it to a process forked meanwhile


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary file for a shard whose name is not yet known, locked while its writer lives, removed at the end."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".staged.", suffix=".parquet", dir=folder)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(handle)


def publish(staging: Path, name: str) -> None:
    """Give a staged file its final name, flushed to the disk, in place of any file of that name."""
    with atomic_path(staging.parent / name) as beside:
        staging.replace(beside)


class Place:
    """A folder of shards on this disk, for `commit`: its files, and the lock that lets writers take turns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for oneself, and clean up what killed writers left."""
        with locked(self.folder):
            _sweep(self.folder)
            yield

    def files(self) -> dict[str, int]:
        """Bytes of every shard, the one written last at the end."""
        paths = sorted(shard_paths(self.folder), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return {path.name: path.stat().st_size for path in paths}

    def fetch(self, name: str) -> Path:
        """A file, to be read here."""
        return self.folder / name

    def send(self, name: str) -> None:
        """Make public a file that was written here."""

    def delete(self, name: str) -> None:
        """Take a file away."""
        (self.folder / name).unlink()


def commit(
    place: Place,
    rewrite: Callable[[Path, frozenset[str]], ShardEntry],
    *,
    fresh: Iterable[ShardEntry] = (),
    remove: frozenset[str] = frozenset(),
    trust_index: bool = True,
) -> frozenset[str]:
    """Bring files and index into agreement, the index last, and return which clips of `remove` were there.

    fresh: shards just written; their clips replace those of the same id in other files.
    rewrite: replaces a file by one with only the given clips; called for files that lose some of theirs.
    trust_index: False reads every file anew instead of believing the index where sizes agree.
    """
    with place.alone():
        written = {entry.file: entry for entry in fresh}
        known: dict[str, ShardEntry] = {}
        if trust_index:
            with suppress(ShardError):  # a missing or damaged index is only a slower start
                known = {entry.file: entry for entry in read_index(place.fetch(INDEX_NAME).parent)}
        entries = [
            entry if (entry := written.get(name) or known.get(name)) and entry.size_bytes == size
            # unknown, or replaced since
            else scan_shard(place.fetch(name))
            for name, size in place.files().items()
        ]  # fmt: skip
        entries.sort(key=lambda entry: entry.file in written)  # fresh ones beat all, then those written last
        owner = {clip.clip_id: entry.file for entry in entries for clip in entry.clips}
        kept = []
        for entry in entries:
            held = {clip.clip_id for clip in entry.clips}
            keep = frozenset(clip_id for clip_id in held - remove if owner[clip_id] == entry.file)
            if keep == held:
                kept.append(entry)
            elif keep:
                kept.append(rewrite(place.fetch(entry.file), keep))
                place.send(entry.file)
            else:
                place.delete(entry.file)
        _write_index(place.folder, kept)
        place.send(INDEX_NAME)
        return remove & owner.keys()


def _write_index(folder: Path, entries: Iterable[ShardEntry]) -> None:
    rows = [
        (*(getattr(clip, name) for name in ClipEntry.__slots__), entry.sha256, entry.size_bytes)
        for entry in sorted(entries, key=lambda entry: entry.file)
        for clip in entry.clips
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _COLUMNS, strict=True)], schema=_COLUMNS)
    with atomic_path(folder / INDEX_NAME) as beside:
        pq.write_table(table, beside, compression="zstd")


def _sweep(folder: Path) -> None:
    """Delete what killed writers left behind: it can be large, and it holds frames that may have to go.

    A living writer's file is locked from before its first byte until it has its final name.
    """
    import fcntl

    for path in folder.glob(".*.parquet"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as stream:  # NFS locks what may be written
            if os.fstat(stream.fileno()).st_size:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
