"""Data sets behind a URL: written by several workers at once, and copied to a disk without harm to what is there."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from curation.catalog import Catalog
from curation.shards.index import INDEX_NAME, ClipEntry, Index, ShardEntry, read_index
from curation.shards.remote import RemoteShardFolder, add_shards, pull
from curation.shards.schema import ShardError
from curation.shards.verify import verify
from curation.shards.writer import drop_clips, write_shards
from curation.storage import Store


class Worker:
    """A machine with a scratch folder of its own on a shared storage."""

    def __init__(self, folder: Path, url: str, make_clip) -> None:
        self.folder, self.make_clip = folder, make_clip
        catalog = Catalog(f"sqlite:///{folder.parent / 'catalog.sqlite'}")
        number = partial(catalog.next_index_version, "set")
        self.place = RemoteShardFolder(Store(folder, url), "set", nullcontext, number)

    def write(self, *clips: str) -> list[ShardEntry]:
        samples = [self.make_clip(ord(clip), clip_id=clip) for clip in clips]
        return write_shards(samples, self.folder / "staging", max_bytes=2**30)

    def add(self, entries: list[ShardEntry]) -> None:
        add_shards(self.place, self.folder / "staging", entries)


def clips_of(folder: Path) -> list[str]:
    return sorted(clip.clip_id for shard in verify(folder) for clip in shard.clips)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'shared'}"


def test_workers_whose_shards_overlap_lose_no_clip(
    tmp_path: Path, url: str, make_clip, monkeypatch: pytest.MonkeyPatch
):
    a, b = Worker(tmp_path / "a", url, make_clip), Worker(tmp_path / "b", url, make_clip)
    mine, theirs = a.write("c", "d"), b.write("c", "e")
    sent = a.place.publish_shard

    def send(name: str) -> None:  # B is quicker: it commits between A's sending and A's commit
        sent(name)
        monkeypatch.setattr(a.place, "publish_shard", sent)
        b.add(theirs)

    monkeypatch.setattr(a.place, "publish_shard", send)
    a.add(mine)
    pull(f"{url}/set", tmp_path / "pulled")
    assert clips_of(tmp_path / "pulled") == ["c", "d", "e"]
    assert not list((tmp_path / "a" / "set").glob("shard-*")), "no copy stays that could be taken for the shard"


def test_a_second_copy_takes_over_what_changed_and_keeps_what_is_foreign(tmp_path: Path, url: str, make_clip):
    worker, folder = Worker(tmp_path / "a", url, make_clip), tmp_path / "pulled"
    worker.add(worker.write("a", "b"))
    worker.add(worker.write("c"))
    pull(f"{url}/set", folder)
    (folder / "shard-of-somebody.parquet").write_bytes(b"not ours")
    drop_clips(worker.place, ["c"])
    pull(f"{url}/set", folder)
    assert {path.name for path in folder.glob("shard-*")} > {"shard-of-somebody.parquet"}
    assert len(list(folder.glob("shard-*"))) == 2


def test_a_copy_that_cannot_be_made_harms_nothing(tmp_path: Path, url: str, make_clip):
    worker, folder = Worker(tmp_path / "a", url, make_clip), tmp_path / "pulled"
    worker.add(worker.write("a"))
    pull(f"{url}/set", folder)
    with pytest.raises(ShardError, match="no data set"):
        pull(f"{url}/typo", folder)
    shared = tmp_path / "shared" / "set"
    for source in (str(shared), f"file://{shared}"):
        with pytest.raises(ShardError, match="itself"):
            pull(source, shared)
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="is a file"):
        pull(f"{url}/set", tmp_path / "file")
    assert clips_of(folder) == clips_of(shared) == ["a"]


@pytest.mark.parametrize("name", ["../../.bashrc", "/nowhere/shard-0.parquet", "shard-/../../x.parquet", ".bashrc", ""])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str):
    source, folder = tmp_path / "a" / "b" / "source", tmp_path / "home" / "data" / "copy"
    source.mkdir(parents=True)
    folder.mkdir(parents=True)
    for mine in (tmp_path / "home" / ".bashrc", tmp_path / "a" / ".bashrc"):
        mine.write_bytes(b"mine")
    clip = ClipEntry("0123456789abcdef", None, name, 0, 1, 1)
    entry = ShardEntry(name, hashlib.sha256(b"mine").hexdigest(), 4, (clip,))
    before = sorted(tmp_path.rglob("*"))
    for index in (Index.empty(1).with_entries([entry]), Index(1, Index.empty().table, frozenset({name}))):
        index.write(source / INDEX_NAME)
        with pytest.raises(ShardError, match="names a file that cannot be a shard"):
            pull(f"file://{source}", folder)
    index.write(folder / INDEX_NAME)
    with pytest.raises(ShardError, match="names a file that cannot be a shard"):
        read_index(folder)
    written = {source / INDEX_NAME, folder / INDEX_NAME}
    assert set(tmp_path.rglob("*")) - written == set(before)


@pytest.mark.parametrize("died", ["between files", "in a file"])
def test_a_copy_after_one_that_was_cut_short_keeps_no_clip_that_went(tmp_path: Path, url: str, make_clip, died: str):
    worker, folder = Worker(tmp_path / "a", url, make_clip), tmp_path / "pulled"
    worker.add(worker.write("a"))
    (going,) = worker.write("b")
    worker.add([going])
    worker.add(worker.write("c"))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    pull(f"{url}/set", folder)
    if died == "in a file":
        (folder / f".{going.file[:-8]}.x7z.parquet").write_bytes((folder / going.file).read_bytes())
    drop_clips(worker.place, ["b"])
    with pytest.raises(KeyboardInterrupt):
        pull(f"{url}/set", folder, die)
    pull(f"{url}/set", folder)
    assert clips_of(folder) == ["a", "c"]
    assert not [path for path in folder.iterdir() if going.file[:-8] in path.name]
