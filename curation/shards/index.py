"""Which clip is in which file: the only module of the package that opens, locks, renames or deletes files.

The shard files are the truth, and a file is never changed: to remove clips, the rest is written to a file with a new
name. The index is a summary that holds the hashes and saves reading every footer. Each change creates the index's next
version under `.index/`, with a name that must not exist yet; the change takes effect at that moment. A writer that is
not the first, or finds a higher version, worked from an old index: it reads again and starts over. So a writer that was
stopped for hours, and lost its lock meanwhile, undoes nothing when it continues. Readers take the highest version;
index.parquet is a copy of it for other tools, replaced last.

A file is deleted only after a valid version has retired its name, and a retired name is never reused: a file with the
same clips gets a new name. So a deletion, however late, never deletes a file that a later version names.

The next `commit` finds and repairs whatever a crash left, before or after the new version. A clip exists once in a
folder: if two files hold it, the one written last keeps it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.files import atomic_path, fsync, sha256_file, sha256_json
from curation.shards.schema import SCHEMA_VERSION, VERSION_KEY, ShardError, check_schema

INDEX_NAME = "index.parquet"
VERSIONS = ".index"  # the folder of the index's versions; other tools ignore names that begin with a dot
REBUILD = "rebuild the index with: curation verify --repair"
_VERSION = re.compile(r"(\d{8})\.parquet")
_SHARD = re.compile(r"shard-[^/\\\0]*\.parquet")  # the names of shard_paths; no path that leaves the folder
_RETIRED_KEY = b"unish:retired"
_LOCK_TIMEOUT_S = 600.0  # many writers may queue
LOCK_LEASE_S = 30.0  # a lock holder that shows no sign of life for this long loses the lock to another writer
_PATIENCE = 5  # attempts to read the index while a listed version does not exist
# Errors from reading damaged Parquet or using its contents: the last two for missing keys and values.
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError)
_COLUMNS = pa.schema(  # the fields of ClipEntry in order, then those of its shard
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
    """The location of one clip: `row_groups` row groups of `file` from `row_group` on, `frames` rows in total."""

    clip_id: str
    split: str | None
    file: str
    row_group: int
    row_groups: int
    frames: int


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard file, by its name within the folder, and its clips in file order."""

    file: str
    sha256: str
    size_bytes: int
    clips: tuple[ClipEntry, ...]


def shard_paths(folder: Path) -> list[Path]:
    """The shard files of a folder, indexed or not, by name."""
    return sorted(folder.glob("shard-*.parquet"))


def _check_names(names: Iterable[object], path: Path) -> None:
    """Raise ShardError unless all are names of shards within a folder: an index may come from an untrusted source."""
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ShardError(f"{path} names a file that cannot be a shard, {str(name)[:100]!r}; {REBUILD}.")


def open_shard(path: Path) -> pq.ParquetFile:
    """A memory-mapped shard of the version this program reads. Raises ShardError if the file is missing or not one."""
    with reading(path):
        shard = pq.ParquetFile(path, memory_map=True)
        check_schema(shard.schema_arrow, shard.metadata.metadata or {}, str(path))
    return shard


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the libraries' errors for a missing or damaged shard into ShardError."""
    try:
        yield
    except FileNotFoundError as error:
        raise _lacking(path) from error
    except _DAMAGE as error:
        raise ShardError(f"{path} is not a readable Parquet file; restore it, or move it out of the folder.") from error


def _lacking(path: Path) -> ShardError:
    return ShardError(f"{path} is missing; if it was replaced, open the folder again; else restore it, or {REBUILD}.")


def check_file(folder: Path, shard: ShardEntry) -> None:
    """Raise ShardError unless the file is there and as large as the index says."""
    path = folder / shard.file
    if not path.exists():
        raise _lacking(path)
    if path.stat().st_size != shard.size_bytes:
        raise ShardError(f"{path} is not the file its index describes; open the folder again, or {REBUILD}.")


def read_index(folder: Path) -> tuple[ShardEntry, ...]:
    """All shards of a folder, by file name. Raises ShardError if the index is missing or not valid."""
    return ShardFolder(folder).index().entries()


@dataclass(frozen=True, slots=True)
class Index:
    """One version of an index: a row for each clip, and the names of all files that were ever deleted.

    sound: False if the highest version is damaged; this is then the newest readable one.
    """

    version: int
    table: pa.Table
    retired: frozenset[str] = frozenset()
    sound: bool = True

    @staticmethod
    def empty(version: int = 0) -> Index:
        """An index without clips."""
        return Index(version, _COLUMNS.empty_table())

    @staticmethod
    def newest(versions: Callable[[], list[int]], fetch: Callable[[str], Path]) -> Index:
        """The highest version that can be read, else index.parquet. Raises ShardError if neither can be read.

        Its number is that of the highest version, readable or not.
        fetch: returns the path of a file by its name in the folder; the path does not exist if the file does not.
        """
        listed: list[int] = []
        unchanged = 0
        while True:
            numbers = sorted(versions(), reverse=True)
            unchanged = unchanged + 1 if numbers == listed else 0
            listed = numbers
            fault: ShardError | None = None
            for number in numbers:
                path = fetch(version_name(number))
                try:
                    index = Index.read(path, number)
                    return replace(index, version=numbers[0], sound=number == numbers[0])
                except FileNotFoundError:
                    if unchanged < _PATIENCE:
                        break  # a writer made another version, and deleted the listed one
                    fault = fault or ShardError(f"{path} is listed but cannot be opened; {REBUILD}.")
                except ShardError as error:
                    fault = fault or error
            else:
                path = fetch(INDEX_NAME)
                try:
                    return replace(Index.read(path, max(numbers, default=0)), sound=not numbers)
                except FileNotFoundError as error:
                    raise fault or ShardError(f"{path} is missing; name a folder of shards, or {REBUILD}.") from error
            if unchanged:
                time.sleep(0.05)

    @staticmethod
    def read(path: Path, version: int) -> Index:
        """The index in this file. Raises FileNotFoundError, or ShardError if it is not an index."""
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read()
            metadata = table.schema.metadata or {}
            if table.schema.names != _COLUMNS.names or metadata.get(VERSION_KEY) != b"%d" % SCHEMA_VERSION:
                raise ShardError(f"{path} is not an index of schema version {SCHEMA_VERSION}; {REBUILD}.")
            table, retired = table.cast(_COLUMNS), json.loads(metadata.get(_RETIRED_KEY, b"[]"))
            table.validate(full=True)
            _check_names([*table["file"].unique().to_pylist(), *retired], path)
        except FileNotFoundError:
            raise
        except _DAMAGE as error:
            raise ShardError(f"{path} is not a readable index; {REBUILD}.") from error
        return Index(version, table, frozenset(retired))

    def entries(self) -> tuple[ShardEntry, ...]:
        """All shards, by file name."""
        clips: dict[tuple[str, str, int], list[ClipEntry]] = {}
        for *row, sha256, size_bytes in zip(*(column.to_pylist() for column in self.table.columns), strict=True):
            clip = ClipEntry(*row)
            clips.setdefault((clip.file, sha256, size_bytes), []).append(clip)
        return tuple(ShardEntry(*shard, tuple(entries)) for shard, entries in sorted(clips.items()))

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file that it names."""
        files = self.table.select(["file", "size_bytes"]).group_by("file").aggregate([("size_bytes", "max")])
        return dict(zip(files["file"].to_pylist(), files["size_bytes_max"].to_pylist(), strict=True))

    def rows(self, column: str, values: Iterable[str], *, others: bool = False) -> Index:
        """The index of only those clips whose `column` is, or with `others` is not, one of these values."""
        found = pc.is_in(self.table[column], pa.array(sorted(values), pa.string()))
        return replace(self, table=self.table.filter(pc.invert(found) if others else found))

    def with_entries(self, entries: Iterable[ShardEntry]) -> Index:
        """The index with these shards added, sorted by file name."""
        rows = [
            (*(getattr(clip, name) for name in ClipEntry.__slots__), entry.sha256, entry.size_bytes)
            for entry in entries
            for clip in entry.clips
        ]
        columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
        new = pa.table([pa.array(c, f.type) for c, f in zip(columns, _COLUMNS, strict=True)], schema=_COLUMNS)
        both = pa.concat_tables([self.table, new])
        return replace(self, table=both.sort_by([("file", "ascending"), ("row_group", "ascending")]))

    def write(self, path: Path) -> None:
        """Write it to a file."""
        retired = json.dumps(sorted(self.retired)).encode()
        metadata = {VERSION_KEY: str(SCHEMA_VERSION).encode(), _RETIRED_KEY: retired}
        pq.write_table(self.table.replace_schema_metadata(metadata), path, compression="zstd", write_page_checksum=True)


def index_versions(names: Iterable[str]) -> list[int]:
    """The version numbers among these names of files in the folder VERSIONS."""
    return [int(match[1]) for name in names if (match := _VERSION.fullmatch(name))]


def version_name(number: int) -> str:
    """The name of a version's file below the folder of shards."""
    return f"{VERSIONS}/{number:08d}.parquet"


def unused_name(name: str, retired: frozenset[str]) -> str:
    """This shard name or, if it is retired, the first name derived from it that is not."""
    while name in retired:
        name = f"shard-{sha256_json(name)[:16]}.parquet"
    return name


def rename_retired(folder: Path, entry: ShardEntry, retired: frozenset[str]) -> ShardEntry:
    """Rename the file if its name is retired, and return its entry."""
    name = unused_name(entry.file, retired)
    if name == entry.file:
        return entry
    (folder / entry.file).replace(folder / name)
    return replace(entry, file=name, clips=tuple(replace(clip, file=name) for clip in entry.clips))


def scan_shard(path: Path, name: str | None = None) -> ShardEntry:
    """The index entry of a file (to be named `name`), read from the file: hash, size, clips by row group.

    Raises ShardError unless every clip has its own consecutive row groups.
    """
    shard, name = open_shard(path), name or path.name
    _check_names([name], path)
    clips: dict[str, ClipEntry] = {}
    for group in range(shard.num_row_groups):
        with reading(path):
            rows = shard.read_row_group(group, columns=["clip_id", "split"], use_threads=False)
            clip_id, split = rows["clip_id"][0].as_py(), rows["split"][0].as_py()
        clip = clips.get(clip_id, ClipEntry(clip_id, split, name, group, 0, 0))
        if len(rows["clip_id"].unique()) > 1 or clip.row_group + clip.row_groups != group:
            raise ShardError(
                f"{path} mixes clips in its row groups; write it again with curation.shards.writer.write_shards."
            )
        clips[clip_id] = replace(clip, row_groups=clip.row_groups + 1, frames=clip.frames + rows.num_rows)
    return ShardEntry(name, sha256_file(path), path.stat().st_size, tuple(clips.values()))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; waits for other holders. A dead or stopped holder loses the lock."""
    from curation.locks import hold  # POSIX only; reading shards works without it

    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder of shards; check the path.")
    with hold(folder / ".lock", "The folder of shards", timeout_s=_LOCK_TIMEOUT_S, lease_s=LOCK_LEASE_S):
        yield


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary file for a shard whose name is not yet known, locked while its writer lives and then removed."""
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
    """Flush a staged file to disk and give it its final name; replaces any file of that name."""
    with atomic_path(staging.parent / name) as beside:
        staging.replace(beside)


class ShardFolder:
    """A folder of shards on this disk, for `commit`: its files, its index versions, and a lock for writers.

    The lock only avoids duplicate work. Correctness does not depend on it: a stopped process may lose it and continue.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock against other writers, and delete unfinished files of killed writers."""
        with locked(self.folder):
            _sweep(self.folder)
            yield

    def files(self) -> dict[str, int]:
        """Size in bytes of every shard, by name, in the order they were written."""
        found = []
        for path in shard_paths(self.folder):
            with suppress(FileNotFoundError):  # another writer may delete it at the same time
                status = path.stat()
                found.append((status.st_mtime_ns, path.name, status.st_size))
        return {name: size for _, name, size in sorted(found)}

    def index(self) -> Index:
        """The newest index. Raises ShardError if none can be read."""
        return Index.newest(self.versions, self.local)

    def put_aside_damaged(self, names: Iterable[str]) -> frozenset[str]:
        """Rename files whose footer is unreadable, so that no reader opens them; return the names of sound ones."""
        sound = set()
        for name in names:
            try:
                pq.read_metadata(self.folder / name)
                sound.add(name)
            except FileNotFoundError:
                continue
            except _DAMAGE:
                (self.folder / name).rename(self.folder / f"{name}.damaged")
        return frozenset(sound)

    def versions(self) -> list[int]:
        """The numbers of the index's versions."""
        return index_versions(path.name for path in (self.folder / VERSIONS).glob("*"))

    def next_version(self, newest: int) -> int:
        """A number for a version after the newest."""
        return newest + 1

    def create(self, index: Index) -> bool:
        """Write a version of the index under a name that must not exist yet; False if it exists."""
        target = self.folder / version_name(index.version)
        target.parent.mkdir(exist_ok=True)
        with staged(self.folder) as path:
            index.write(path)
            path.chmod(0o644)
            fsync(path)
            try:
                _link(path, target)
            except FileExistsError:
                return False
        fsync(target.parent)
        return True

    def publish(self, index: Index) -> None:
        """Replace index.parquet by this version."""
        with staged(self.folder) as path:
            index.write(path)
            publish(path, INDEX_NAME)

    def local(self, name: str) -> Path:
        """The path of a file, for reading on this disk."""
        return self.folder / name

    def publish_shard(self, name: str) -> None:
        """Publish a file that was written to this disk."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; a missing file is not an error."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def published(self) -> bool:
        """Whether index.parquet is the newest version."""
        newest = max(self.versions(), default=0)
        if not newest:  # a copy of a data set has only index.parquet
            return True
        try:
            return (self.folder / version_name(newest)).read_bytes() == (self.folder / INDEX_NAME).read_bytes()
        except OSError:
            return False


@dataclass(slots=True)
class _Change:
    """A new version of an index, and the work to do once it is valid.

    found: clips to be removed that existed. lost: clips just written that it does not name.
    doomed: files to delete, all of them retired in it.
    """

    base: int
    needless: bool
    index: Index
    found: frozenset[str]
    lost: frozenset[str]
    doomed: frozenset[str]


Rewrite = Callable[[Path, frozenset[str]], ShardEntry]
Gone = Callable[[frozenset[str]], frozenset[str]]  # clip ids -> those of them that were forgotten


def nobody(_: frozenset[str]) -> frozenset[str]:
    """The `gone` of folders without a catalog: no clip is forgotten."""
    return frozenset()


def commit(
    place: ShardFolder,
    rewrite: Rewrite,
    *,
    fresh: Iterable[ShardEntry] = (),
    remove: frozenset[str] = frozenset(),
    gone: Gone = nobody,
    trust_index: bool = True,
) -> frozenset[str]:
    """Make files and index agree, and return which clips of `remove` existed.

    fresh: shards just written; their clips replace those of the same id in other files.
    rewrite: writes a new file in the same folder with only the given clips of a file; called for files that lose some.
    gone: which of these clips were forgotten; called for clips that no index names yet, and its clips are left out.
    trust_index: False reads every file again instead of trusting the index where sizes agree, and restores files that
    the index retired.

    Raises ShardError, after everything else is done, if another process removed a fresh shard before it was indexed.
    """
    fresh = list(fresh)
    mine: set[str] = set()
    with place.exclusive():
        while True:
            before = place.versions()
            try:
                change = _plan(place, rewrite, fresh, remove, gone, trust_index, mine)
            except ShardError:
                if place.versions() == before:
                    raise
                continue  # the writer of another version may have deleted a file this attempt needed
            number = change.index.version
            created = not change.needless and place.create(change.index)
            if change.needless or (
                created and [version for version in place.versions() if version > change.base] == [number]
            ):
                break
            # Another version was made meanwhile. Of two writers that check after writing, at least one sees the other.
            # Shards written for this version stay until the next one retires them: the other writer may need them too.
            place.delete([version_name(number)] if created else [])
        place.delete(change.doomed)
        if not place.published() if change.needless else max(place.versions()) == number:
            place.publish(change.index)
        # delete at once: an old version names clips that may be forgotten
        place.delete(version_name(old) for old in place.versions() if old < number)
    if change.lost:
        raise ShardError(
            f"{', '.join(sorted(change.lost))}: removed from {place.folder} by another process during the write; "
            "write it again if you want to keep it."
        )
    return change.found


def heal(place: ShardFolder, rewrite: Rewrite, gone: Gone) -> Index:
    """The newest index, repaired if it disagrees with the files; if it agrees, reads only names and sizes."""
    index, files = newest_index(place), place.files()
    named = index.sizes()
    place.put_aside_damaged(name for name, size in files.items() if named.get(name) != size)
    if named != place.files() or not place.published():
        commit(place, rewrite, gone=gone)
        index = newest_index(place)
    return index


def _plan(
    place: ShardFolder,
    rewrite: Rewrite,
    fresh: list[ShardEntry],
    remove: frozenset[str],
    gone: Gone,
    trust_index: bool,
    mine: set[str],
) -> _Change:
    """The next version; its shards are already written. `mine` collects their names over all attempts."""
    newest = newest_index(place)
    files = place.files()
    written = {entry.file: entry for entry in fresh if entry.file in files}
    # Shards of a failed attempt, made from an old index: not part of the folder.
    useless = mine - newest.sizes().keys()
    ignored = (useless | newest.retired if trust_index else useless) - written.keys()
    named = newest.sizes() if trust_index else {}
    believed = {name for name, size in named.items() if files.get(name) == size} - written.keys() - ignored
    known = newest.rows("file", believed)
    new = [
        written.get(name) or scan_shard(place.local(name), name)
        for name in files
        if name not in believed and name not in ignored
    ]
    ids = frozenset(clip.clip_id for entry in new for clip in entry.clips)
    remove |= gone(ids) if ids else frozenset()
    # the indexed files that hold clips which are replaced or removed
    touched = {entry.file: entry for entry in known.rows("file", known.rows("clip_id", ids | remove).sizes()).entries()}
    order = {name: number for number, name in enumerate(files)}
    # fresh files win over all others, then the latest
    entries = sorted([*touched.values(), *new], key=lambda entry: (entry.file in written, order[entry.file]))
    owner = {clip.clip_id: entry.file for entry in entries for clip in entry.clips}
    kept, doomed = [], set(ignored & files.keys())
    for entry in entries:
        held = {clip.clip_id for clip in entry.clips}
        keep = frozenset(clip_id for clip_id in held - remove if owner[clip_id] == entry.file)
        if keep == held and entry.file not in newest.retired:
            kept.append(entry)
            continue
        doomed.add(entry.file)
        if keep:
            made = rename_retired(place.folder, rewrite(place.local(entry.file), keep), newest.retired)
            mine.add(made.file)
            place.publish_shard(made.file)
            kept.append(made)
    doomed -= {entry.file for entry in kept}
    index = known.rows("file", touched, others=True).with_entries(kept)
    lost = frozenset(clip.clip_id for entry in fresh for clip in entry.clips) - remove
    lost -= frozenset(index.rows("clip_id", lost).table["clip_id"].to_pylist()) if lost else frozenset()
    index = replace(index, version=newest.version, retired=newest.retired | doomed)
    needless = trust_index and newest.sound and newest.version > 0
    needless = needless and index.retired == newest.retired and index.table.equals(newest.table)
    if not needless:
        index = replace(index, version=place.next_version(newest.version))
    return _Change(
        newest.version, needless, index, remove & owner.keys(), lost - gone(lost) if lost else lost, frozenset(doomed)
    )


def newest_index(place: ShardFolder) -> Index:
    """The newest index of a folder; an empty one if it is missing or damaged."""
    try:
        return place.index()
    except ShardError:
        return Index.empty(max(place.versions(), default=0))


def _link(path: Path, target: Path) -> None:
    """Give a finished file a second name that must not exist yet. Raises FileExistsError if it does."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with target.open("xb") as copy, path.open("rb") as whole:  # no hard links here; readers skip a partial copy
            shutil.copyfileobj(whole, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _sweep(folder: Path) -> None:
    """Delete unfinished files of killed writers: they can be large, and may hold frames of forgotten clips.

    A live writer's file is locked from before its first byte until it has its final name.
    """
    import fcntl

    for path in folder.glob(".*.parquet"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as stream:  # NFS locks only writable files
            if os.fstat(stream.fileno()).st_size:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
