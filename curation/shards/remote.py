"""The shards of a data set behind a URL: written and rewritten on this disk, sent when whole, the index last."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from curation.files import sha256_file
from curation.shards.index import INDEX_NAME, Place, ShardEntry, commit, read_index
from curation.shards.schema import ShardError
from curation.shards.writer import rewrite
from curation.storage import Store


class RemotePlace(Place):
    """A folder of a shared Store. `turn` gives a lock that all machines know, for as long as it is open."""

    def __init__(self, store: Store, name: str, turn: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(store.path(name))
        self._store, self._name, self._turn = store, name, turn
        self._sizes: dict[str, int] = {}
        self._brought: set[str] = set()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder among all machines."""
        with self._turn():
            try:
                yield
            finally:  # a copy that stayed could later be taken for what is there by then
                for name in self._brought:
                    (self.folder / name).unlink(missing_ok=True)
                self._brought.clear()

    def files(self) -> dict[str, int]:
        """Bytes of every shard, by name."""
        self._sizes = self._store.sizes(self._name)
        return {name: self._sizes[name] for name in sorted(self._sizes) if name.startswith("shard-")}

    def fetch(self, name: str) -> Path:
        """A file, brought here; the path of nothing if there is none."""
        if name == INDEX_NAME:  # an earlier copy says nothing about now
            (self.folder / name).unlink(missing_ok=True)
        self._brought.add(name)
        return self._store.get(f"{self._name}/{name}", self._sizes.get(name)) or self.folder / name

    def send(self, name: str) -> None:
        """Send what was written here."""
        self._store.put(f"{self._name}/{name}")

    def delete(self, name: str) -> None:
        """Take a file away, here and there."""
        self._store.drop([f"{self._name}/{name}"])


def add_shards(place: RemotePlace, staging: Path, entries: Iterable[ShardEntry]) -> None:
    """Send shards that were written to `staging`, then the index."""
    entries = list(entries)
    place.folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        (staging / entry.file).replace(place.folder / entry.file)
        place.send(entry.file)
        (place.folder / entry.file).unlink()  # what is there decides from now on: others may rewrite it
    commit(place, rewrite, fresh=entries)


def pull(source: str, folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[ShardEntry, ...]:
    """Copy the data set behind an fsspec URL to a folder, each file checked against the index, the index last.

    Raises ShardError where the index is missing, or a file is not the one that it describes.
    """
    store = Store(folder, source)
    if (
        source.removeprefix("file://").startswith("/")
        and Path(source.removeprefix("file://")).resolve() == folder.resolve()
    ):
        raise ShardError(f"{folder} is the data set itself; name another folder to copy it to.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = {shard.file for shard in read_index(folder)}
    except FileExistsError as error:
        raise ShardError(f"{folder} is a file; name a folder.") from error
    except ShardError:
        earlier = set()
    with tempfile.TemporaryDirectory(prefix=".pull.", dir=folder) as beside:
        fetched = Store(Path(beside), source).get(INDEX_NAME)
        if fetched is None:
            raise ShardError(f"There is no data set at {source}; give the folder of shards that a run prints.")
        shards = read_index(Path(beside))
        (folder / INDEX_NAME).unlink(missing_ok=True)  # a reader must not find it before all of its files
        for done, shard in enumerate(shards, 1):
            path = store.get(shard.file, shard.size_bytes)
            if path is None or sha256_file(path) != shard.sha256:
                if path is not None:
                    path.unlink()
                raise ShardError(
                    f"{shard.file} is not the file its index describes; run again when no run writes to it."
                )
            if progress is not None:
                progress(done, len(shards))
        for name in earlier - {shard.file for shard in shards}:  # taken out of the data set since an earlier copy
            (folder / name).unlink(missing_ok=True)
        fetched.replace(folder / INDEX_NAME)
    return shards
