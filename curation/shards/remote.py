"""The shards of a data set behind a URL: written and rewritten on this disk, uploaded when complete, the index last."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from curation.files import atomic_path, sha256_file
from curation.shards.index import (
    INDEX_NAME,
    VERSIONS,
    Gone,
    Index,
    ShardEntry,
    ShardFolder,
    commit,
    index_versions,
    newest_index,
    nobody,
    read_index,
    rename_retired,
    version_name,
)
from curation.shards.schema import ShardError
from curation.shards.writer import rewrite
from curation.storage import Store

T = TypeVar("T")

_COPIED = re.compile(r"(\.)?(shard-[0-9a-f]{16})(?(1)\..+)\.parquet")  # a shard, or a partial copy by a killed `pull`


class RemoteShardFolder(ShardFolder):
    """A folder of a shared Store. `turn` returns a context that holds a lock shared by all machines.

    number: returns a number greater than the newest version's, never the same one twice. The catalog provides it,
    because not every storage can create a file only if it does not exist.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        turn: Callable[[], AbstractContextManager[None]],
        number: Callable[[int], int],
    ) -> None:
        super().__init__(store.path(name))
        self._store, self._name, self._turn, self._number = store, name, turn, number
        self._sizes: dict[str, int] = {}
        self._brought: set[str] = set()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock against writers of all machines."""
        with self._turn():
            try:
                yield
            finally:  # a remaining copy could later be mistaken for the current file
                for name in self._brought:
                    (self.folder / name).unlink(missing_ok=True)
                self._brought.clear()

    def files(self) -> dict[str, int]:
        """Size in bytes of every shard, by name."""
        self._sizes = self._store.sizes(self._name)
        return {name: self._sizes[name] for name in sorted(self._sizes) if name.startswith("shard-")}

    def put_aside_damaged(self, names: Iterable[str]) -> frozenset[str]:
        """Do nothing: every upload was compared with the original."""
        return frozenset(names)

    def index(self) -> Index:
        """The newest index. Raises ShardError if none can be read."""
        return fetch_index(self._store, f"{self._name}/")

    def versions(self) -> list[int]:
        """The numbers of the index's versions."""
        return index_versions(self._store.sizes(f"{self._name}/{VERSIONS}"))

    def next_version(self, newest: int) -> int:
        """A number for a version after the newest, given to no other writer."""
        return self._number(newest)

    def create(self, index: Index) -> bool:
        """Upload a version of the index under a name that must not exist yet; False if it exists."""
        return self._send_index(index, version_name(index.version), self._store.create)

    def publish(self, index: Index) -> None:
        """Replace index.parquet by this version."""
        self._send_index(index, INDEX_NAME, self._store.put)

    def published(self) -> bool:
        """Whether index.parquet is the newest version."""
        with tempfile.TemporaryDirectory(prefix=".index.", dir=self._store.root) as beside:
            scratch = Store(Path(beside), self._store.url)
            names = (version_name(max(self.versions(), default=0)), INDEX_NAME)
            if names[0] == version_name(0):
                return True
            version, copy = (scratch.get(f"{self._name}/{name}") for name in names)
            with suppress(FileNotFoundError):  # a removal of forgotten clips may delete this scratch folder too
                return version is not None and copy is not None and version.read_bytes() == copy.read_bytes()
            return False

    def _send_index(self, index: Index, file: str, send: Callable[[str], T]) -> T:
        name = f"{self._name}/{file}"
        with atomic_path(self._store.path(name)) as path:
            index.write(path)
        try:
            return send(name)
        finally:
            self._store.path(name).unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        """The path of a file after download; it does not exist if the file does not."""
        self._brought.add(name)
        return self._store.get(f"{self._name}/{name}", self._sizes.get(name)) or self.folder / name

    def publish_shard(self, name: str) -> None:
        """Upload a file that was written to this disk."""
        self._brought.add(name)
        self._store.put(f"{self._name}/{name}")

    def delete(self, names: Iterable[str]) -> None:
        """Delete files on this disk and behind the URL; a missing file is not an error."""
        self._store.drop([f"{self._name}/{name}" for name in names])


def add_shards(place: RemoteShardFolder, staging: Path, entries: Iterable[ShardEntry], gone: Gone = nobody) -> None:
    """Upload shards that were written to `staging`, then the index. gone: as for `commit`."""
    import fcntl

    place.folder.mkdir(parents=True, exist_ok=True)
    retired = newest_index(place).retired
    entries = [rename_retired(staging, entry, retired) for entry in entries]
    for entry in entries:
        with (staging / entry.file).open("r+b") as living:
            fcntl.flock(living, fcntl.LOCK_EX)  # a removal of forgotten clips skips locked files
            path = (staging / entry.file).replace(place.folder / entry.file)
            place.publish_shard(entry.file)
            path.unlink()  # from now on the uploaded file counts: other workers may rewrite it
    commit(place, rewrite, fresh=entries, gone=gone)


def fetch_index(store: Store, folder: str, missing: str = "There is no index.") -> Index:
    """The newest index of a folder (a name that ends with "/", or "") of a Store; leaves no copy on this disk.

    Raises ShardError if none can be read, with the message `missing` if there is none at all.
    """
    store.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".index.", dir=store.root) as beside:
        scratch = Store(Path(beside), store.url)

        def fetch(name: str) -> Path:
            path = scratch.get(folder + name)
            if path is None and name == INDEX_NAME:
                raise ShardError(missing)
            return path or scratch.path(folder + name)

        return Index.newest(lambda: index_versions(store.sizes(folder + VERSIONS)), fetch)


def pull(source: str, folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[ShardEntry, ...]:
    """Copy the data set behind an fsspec URL to a folder, each file checked against the index, the index last.

    Deletes shards that the data set no longer has, also those of an earlier incomplete copy; other files stay.
    Raises ShardError if the index is missing, or a file is not the one it describes.
    """
    store = Store(folder, source)
    if (
        source.removeprefix("file://").startswith("/")
        and Path(source.removeprefix("file://")).resolve() == folder.resolve()
    ):
        raise ShardError(f"{folder} is the data set itself; give another folder for the copy.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = {shard.file for shard in read_index(folder)}
    except FileExistsError as error:
        raise ShardError(f"{folder} is a file; give a folder.") from error
    except ShardError:
        earlier = set()
    index = fetch_index(store, "", f"There is no data set at {source}; give the folder of shards that a run prints.")
    shards = index.entries()
    (folder / INDEX_NAME).unlink(missing_ok=True)  # a reader must not find it before all of its files
    shutil.rmtree(folder / VERSIONS, ignore_errors=True)
    for done, shard in enumerate(shards, 1):
        path = store.get(shard.file, shard.size_bytes)
        if path is None or sha256_file(path) != shard.sha256:
            if path is not None:
                path.unlink()
            raise ShardError(f"{shard.file} is not the file its index describes; try again when no run writes to it.")
        if progress is not None:
            progress(done, len(shards))
    named = {shard.file for shard in shards}
    for path in folder.iterdir():  # removed from the data set since an earlier, possibly incomplete copy
        ours = _COPIED.fullmatch(path.name)
        if path.name in earlier - named or (ours and f"{ours[2]}.parquet" not in named):
            path.unlink(missing_ok=True)
    with atomic_path(folder / INDEX_NAME) as path:
        index.write(path)
    return shards
