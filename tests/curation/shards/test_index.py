"""The index under writers that stop, wake late, die, or do not know of each other."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from curation.catalog import Catalog
from curation.run.claims import Claims
from curation.shards import index, remote, writer
from curation.shards.index import INDEX_NAME, VERSIONS, ShardFolder, heal, newest_index, read_index, shard_paths
from curation.shards.reader import ShardReader
from curation.shards.remote import RemoteShardFolder, add_shards, fetch_index, pull
from curation.shards.schema import ShardError
from curation.shards.verify import verify
from curation.shards.writer import drop_clips, rebuild_index, remove_clips, rewrite, write_shards
from curation.storage import Store

PLENTY = 2**30

# A writer that stands still in the middle of a change of the index: after it has read, before it writes.
STOPPED = """
import os, pathlib, pickle, signal, sys
from curation.shards import index, remote, writer
from curation.shards.writer import write_shards
folder, samples = pathlib.Path(sys.argv[1]), pickle.load(open(sys.argv[2], "rb"))
index.LOCK_LEASE_S = 1.0
plan = index._plan
def stop(*arguments):
    change = plan(*arguments)
    if not (folder / "woke").exists():
        (folder / "woke").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return change
index._plan = stop
write_shards(samples, folder, max_bytes=2**30)
"""


def clips_of(folder: Path) -> set[str]:
    return {clip.clip_id for shard in verify(folder) for clip in shard.clips}


def test_a_writer_that_was_stopped_is_gone_around_and_undoes_nothing(make_clip, tmp_path: Path, monkeypatch) -> None:
    folder, samples = tmp_path / "set", tmp_path / "samples"
    write_shards([make_clip(0), make_clip(1)], folder, max_bytes=PLENTY)
    samples.write_bytes(pickle.dumps([make_clip(2)]))
    with subprocess.Popen([sys.executable, "-c", STOPPED, folder, samples]) as writer:
        try:
            os.waitid(os.P_PID, writer.pid, os.WSTOPPED | os.WNOWAIT)
            monkeypatch.setattr(index, "LOCK_LEASE_S", 1.0)
            for seed in range(3, 9):
                write_shards([make_clip(seed)], folder, max_bytes=PLENTY)
            remove_clips(folder, [make_clip(0).clip_id])
        finally:
            writer.send_signal(signal.SIGCONT)
        assert writer.wait(60) == 0
    assert clips_of(folder) == {make_clip(seed).clip_id for seed in range(1, 9)}


class Worker:
    """A machine with a disk of its own on a shared storage, and the lock that only its catalog knows."""

    def __init__(self, folder: Path, url: str, catalog: Catalog, lease_s: float = 30.0) -> None:
        self.folder = folder

        def turn():
            claims = Claims(catalog, folder, lease_s)
            return _both(claims)

        number = partial(catalog.next_index_version, "set")
        self.place = RemoteShardFolder(Store(folder, url), "set", turn, number)

    def add(self, *samples) -> None:
        entries = write_shards(samples, self.folder / "staging", max_bytes=PLENTY)
        add_shards(self.place, self.folder / "staging", entries)


class _both:
    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def __enter__(self) -> None:
        self._claims.__enter__()
        self._turn = self._claims.hold("index:set")
        self._turn.__enter__()

    def __exit__(self, *error) -> None:
        self._turn.__exit__(*error)
        self._claims.__exit__(*error)


@pytest.mark.parametrize("when", ["before it creates its version", "after it created it"])
def test_a_worker_whose_lease_lapsed_undoes_nothing(make_clip, tmp_path: Path, monkeypatch, when: str) -> None:
    url, catalog = f"file://{tmp_path / 'shared'}", Catalog(f"sqlite:///{tmp_path / 'c.sqlite'}")
    late, other = Worker(tmp_path / "a", url, catalog), Worker(tmp_path / "b", url, catalog)
    late.add(make_clip(0), make_clip(1))
    create, asleep = late.place.create, [True]

    def slow(version) -> bool:
        done = create(version) if when.startswith("after") else None
        if asleep.pop() if asleep else False:
            catalog._database.run(lambda connection: connection.exec_driver_sql("DELETE FROM leases"), write=True)
            for seed in range(2, 7):
                other.add(make_clip(seed))
            drop_clips(other.place, [make_clip(0).clip_id])
        return create(version) if done is None else done

    monkeypatch.setattr(late.place, "create", slow)
    late.add(make_clip(7))
    pull(f"{url}/set", tmp_path / "pulled")
    assert clips_of(tmp_path / "pulled") == {make_clip(seed).clip_id for seed in range(1, 8)}
    copy = tmp_path / "shared" / "set" / INDEX_NAME
    assert index.Index.read(copy, 0).table.equals(fetch_index(Store(tmp_path / "c", url), "set/").table)
    assert len(list((tmp_path / "shared" / "set" / VERSIONS).iterdir())) == 1, "an old version names clips that went"


def test_of_two_writers_at_the_same_moment_none_loses_a_clip(make_clip, tmp_path: Path, monkeypatch) -> None:
    """On a storage that cannot create exclusively, both see each other's version and start over."""
    url, catalog = f"file://{tmp_path / 'shared'}", Catalog(f"sqlite:///{tmp_path / 'c.sqlite'}")
    one, other = Worker(tmp_path / "a", url, catalog), Worker(tmp_path / "b", url, catalog)
    create, first = one.place.create, [True]

    def meanwhile(version) -> bool:
        made = create(version)
        if first.pop() if first else False:
            catalog._database.run(lambda connection: connection.exec_driver_sql("DELETE FROM leases"), write=True)
            # the other one read before this version was there, and writes after it
            monkeypatch.setattr(other.place, "index", lambda: index.Index(0, version.table.slice(0, 0)))
            planned, made_there = index._plan, []

            def plan(*arguments):
                made_there.append(planned(*arguments))
                monkeypatch.undo()
                return made_there[-1]

            monkeypatch.setattr(index, "_plan", plan)
            other.add(make_clip(2))
        return made

    one.add(make_clip(0))
    monkeypatch.setattr(one.place, "create", meanwhile)
    one.add(make_clip(1))
    pull(f"{url}/set", tmp_path / "pulled")
    assert clips_of(tmp_path / "pulled") == {make_clip(seed).clip_id for seed in range(3)}


def test_a_disk_without_links_has_versions_too(make_clip, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for seed in range(3):
        write_shards([make_clip(seed)], tmp_path, max_bytes=PLENTY)
    assert clips_of(tmp_path) == {make_clip(seed).clip_id for seed in range(3)}
    place = ShardFolder(tmp_path)
    assert not place.create(newest_index(place)), "its name exists"


def test_an_index_that_disagrees_with_the_files_is_healed(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(seed) for seed in range(4)], tmp_path, max_bytes=1)
    place = ShardFolder(tmp_path)
    whole, files = read_index(tmp_path), shard_paths(tmp_path)
    stamp = max((tmp_path / VERSIONS).iterdir()).stat().st_mtime_ns
    heal(place, rewrite, index.nobody)
    assert max((tmp_path / VERSIONS).iterdir()).stat().st_mtime_ns == stamp, "nothing to do, nothing done"

    (tmp_path / INDEX_NAME).unlink()
    heal(place, rewrite, index.nobody)
    assert verify(tmp_path) == whole
    shutil.rmtree(tmp_path / VERSIONS)
    (tmp_path / INDEX_NAME).unlink()
    heal(place, rewrite, index.nobody)
    assert verify(tmp_path) == whole
    shutil.rmtree(tmp_path / VERSIONS)
    (tmp_path / INDEX_NAME).unlink()
    rebuild_index(tmp_path)
    assert verify(tmp_path) == whole

    files[0].unlink()
    with files[1].open("r+b") as stream:
        stream.truncate(100)
    assert len(heal(place, rewrite, index.nobody).entries()) == 2
    assert len(verify(tmp_path)) == 2 and files[1].with_name(f"{files[1].name}.damaged").exists()


def test_clips_that_were_forgotten_meanwhile_do_not_stay(make_clip, tmp_path: Path) -> None:
    gone = make_clip(1).clip_id
    write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=PLENTY, gone=lambda ids: ids & {gone})
    assert clips_of(tmp_path) == {make_clip(0).clip_id}
    assert len(shard_paths(tmp_path)) == 1


def test_what_a_late_writer_left_brings_no_forgotten_clip_back(make_clip, tmp_path: Path) -> None:
    """It had written a file anew from an old index, and died before it could see that it was late."""
    write_shards([make_clip(seed) for seed in range(3)], tmp_path, max_bytes=PLENTY)
    gone = make_clip(0).clip_id
    remove_clips(tmp_path, [gone])
    write_shards([make_clip(seed) for seed in range(2)], tmp_path / "late", max_bytes=PLENTY)
    (left,) = shard_paths(tmp_path / "late")
    left.rename(tmp_path / left.name)
    heal(ShardFolder(tmp_path), rewrite, lambda ids: ids & {gone})
    assert clips_of(tmp_path) == {make_clip(1).clip_id, make_clip(2).clip_id}


def test_a_reader_that_opens_while_files_are_replaced_finds_a_whole_folder(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(seed, frames=2) for seed in range(9)], tmp_path, max_bytes=PLENTY)
    script = (
        "import pathlib, sys; from curation.shards.writer import remove_clips\n"
        "for clip in sys.argv[2:]: remove_clips(pathlib.Path(sys.argv[1]), [clip])"
    )
    going = [make_clip(seed).clip_id for seed in range(8)]
    opened = 0
    with subprocess.Popen([sys.executable, "-c", script, tmp_path, *going]) as writer:
        while writer.poll() is None:
            assert make_clip(8).clip_id in ShardReader(tmp_path).clips
            opened += 1
            time.sleep(0.002)
        assert writer.returncode == 0 and opened > 8
    assert clips_of(tmp_path) == {make_clip(8).clip_id}


class Unlocked(ShardFolder):
    """A folder in the hands of a writer that lost its lock without knowing."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        yield


def test_a_writer_that_lost_deletes_nothing_that_the_winner_names(make_clip, tmp_path: Path) -> None:
    """Both take out the same clip, so both write a file of the same name; the one that is late wrote it first."""
    write_shards([make_clip(seed) for seed in range(3)], tmp_path, max_bytes=PLENTY)
    going = frozenset({make_clip(0).clip_id})
    asleep, wake, written, go_on, deleted, done = (threading.Event() for _ in range(6))

    class Late(Unlocked):
        def create(self, version: index.Index) -> bool:
            if not written.is_set():
                written.set()
                go_on.wait(30)
            return super().create(version)

        def delete(self, names: Iterable[str]) -> None:
            names = list(names)
            super().delete(names)
            if written.is_set() and not deleted.is_set() and any(name.startswith("shard") for name in names):
                deleted.set()
                done.wait(30)

    class Other(ShardFolder):
        def create(self, version: index.Index) -> bool:
            go_on.set()
            deleted.wait(1)
            return super().create(version)

    def slow(path: Path, keep: frozenset[str]) -> index.ShardEntry:
        if not asleep.is_set():
            asleep.set()
            wake.wait(30)
        return rewrite(path, keep)

    with ThreadPoolExecutor(1) as late:
        removal = late.submit(index.commit, Late(tmp_path), slow, remove=going)
        asleep.wait(30)
        write_shards([make_clip(3)], tmp_path, max_bytes=PLENTY)
        wake.set()
        written.wait(30)
        index.commit(Other(tmp_path), rewrite, remove=going)
        done.set()
        removal.result(30)
    assert clips_of(tmp_path) == {make_clip(seed).clip_id for seed in (1, 2, 3)}


def test_what_a_loser_wrote_does_not_stay(make_clip, tmp_path: Path) -> None:
    """Its file holds a clip that went meanwhile: it must not be taken for one that a crash kept out of the index."""
    write_shards([make_clip(seed) for seed in range(3)], tmp_path, max_bytes=PLENTY)

    class Late(Unlocked):
        def create(self, version: index.Index) -> bool:
            if make_clip(1).clip_id in ShardReader(tmp_path).clips:
                remove_clips(tmp_path, [make_clip(1).clip_id])
            return super().create(version)

    index.commit(Late(tmp_path), rewrite, remove=frozenset({make_clip(0).clip_id}))
    assert clips_of(tmp_path) == {make_clip(2).clip_id}
    heal(ShardFolder(tmp_path), rewrite, index.nobody)
    assert clips_of(tmp_path) == {make_clip(2).clip_id}


def test_a_plan_whose_files_were_replaced_is_made_again(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(seed) for seed in range(3)], tmp_path, max_bytes=PLENTY)
    first = [True]

    def slow(path: Path, keep: frozenset[str]) -> index.ShardEntry:
        if first.pop() if first else False:
            remove_clips(tmp_path, [make_clip(1).clip_id])
        return rewrite(path, keep)

    index.commit(Unlocked(tmp_path), slow, remove=frozenset({make_clip(0).clip_id}))
    assert clips_of(tmp_path) == {make_clip(2).clip_id}


def test_a_writer_that_deletes_late_deletes_nothing_written_since(make_clip, tmp_path: Path) -> None:
    clips = [make_clip(0), make_clip(1)]
    write_shards(clips, tmp_path, max_bytes=PLENTY)

    class Late(Unlocked):
        def delete(self, names: Iterable[str]) -> None:
            names = list(names)
            if any(name.startswith("shard") for name in names):
                heal(ShardFolder(tmp_path), rewrite, index.nobody)
                for _ in range(2):  # by then the version that retired the name is gone, and others followed
                    write_shards(clips, tmp_path, max_bytes=PLENTY)
            super().delete(names)

    index.commit(Late(tmp_path), rewrite, remove=frozenset(clip.clip_id for clip in clips))
    assert clips_of(tmp_path) == {clip.clip_id for clip in clips}


@pytest.mark.parametrize("crash", [True, False])
def test_clips_written_again_after_their_removal_stay(make_clip, tmp_path: Path, monkeypatch, crash: bool) -> None:
    """Another writer comes between the file and its index, and goes on alone where the first one dies."""
    clips = [make_clip(0), make_clip(1)]
    write_shards(clips, tmp_path, max_bytes=PLENTY)
    remove_clips(tmp_path, [clip.clip_id for clip in clips])
    update = writer.update_index

    def between(*arguments) -> None:
        monkeypatch.undo()
        write_shards([make_clip(2)], tmp_path, max_bytes=PLENTY)
        if not crash:
            update(*arguments)

    monkeypatch.setattr(writer, "update_index", between)
    write_shards(clips, tmp_path, max_bytes=PLENTY)
    assert clips_of(tmp_path) == {make_clip(seed).clip_id for seed in range(3)}


@pytest.mark.parametrize("crash", [True, False])
def test_clips_sent_again_after_their_removal_stay(make_clip, tmp_path: Path, monkeypatch, crash: bool) -> None:
    url, catalog = f"file://{tmp_path / 'shared'}", Catalog(f"sqlite:///{tmp_path / 'c.sqlite'}")
    one, other = Worker(tmp_path / "a", url, catalog), Worker(tmp_path / "b", url, catalog)
    one.add(make_clip(0), make_clip(1))
    drop_clips(one.place, [make_clip(0).clip_id, make_clip(1).clip_id])

    def between(*arguments, **options) -> frozenset[str]:
        monkeypatch.undo()
        other.add(make_clip(2))
        return frozenset() if crash else index.commit(*arguments, **options)

    monkeypatch.setattr(remote, "commit", between)
    one.add(make_clip(0), make_clip(1))
    pull(f"{url}/set", tmp_path / "pulled")
    assert clips_of(tmp_path / "pulled") == {make_clip(seed).clip_id for seed in range(3)}


def test_a_fresh_shard_that_somebody_took_away_is_no_success(make_clip, tmp_path: Path, monkeypatch) -> None:
    update = writer.update_index

    def taken(folder: Path, entries: list[index.ShardEntry], gone: index.Gone) -> None:
        (folder / entries[0].file).unlink()
        update(folder, entries, gone)

    monkeypatch.setattr(writer, "update_index", taken)
    with pytest.raises(ShardError, match=f"{make_clip(0).clip_id}: removed from .* write it again"):
        write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=1)
    assert clips_of(tmp_path) == {make_clip(1).clip_id}
    write_shards([make_clip(0)], tmp_path, max_bytes=1, gone=lambda ids: ids)  # forgotten: meant to be away


def test_a_shard_from_a_backup_is_taken_back_by_a_rebuild(make_clip, tmp_path: Path) -> None:
    (entry,) = write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=PLENTY)
    backup = (tmp_path / entry.file).read_bytes()
    remove_clips(tmp_path, [clip.clip_id for clip in entry.clips])
    (tmp_path / entry.file).write_bytes(backup)
    rebuild_index(tmp_path)
    assert clips_of(tmp_path) == {make_clip(0).clip_id, make_clip(1).clip_id}
    heal(ShardFolder(tmp_path), rewrite, index.nobody)
    assert clips_of(tmp_path) == {make_clip(0).clip_id, make_clip(1).clip_id}


@pytest.mark.parametrize("cut", [0, 40])
@pytest.mark.parametrize("older", [False, True])
def test_a_damaged_newest_version_is_repaired(make_clip, tmp_path: Path, cut: int, older: bool) -> None:
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    whole = verify(tmp_path)
    (newest,) = (tmp_path / VERSIONS).iterdir()
    if older:  # a writer that died before it took the old version away
        newest = newest.rename(newest.with_name("00000002.parquet"))
        shutil.copy(newest, newest.with_name("00000001.parquet"))
    os.truncate(newest, newest.stat().st_size - cut if cut else 0)
    with pytest.raises(ShardError, match="is not the newest index; rebuild"):
        verify(tmp_path)
    rebuild_index(tmp_path)
    assert verify(tmp_path) == whole
    assert len(list((tmp_path / VERSIONS).iterdir())) == 1


def test_a_damaged_newest_version_is_healed_by_a_run(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    whole = verify(tmp_path)
    (newest,) = (tmp_path / VERSIONS).iterdir()
    os.truncate(newest, 40)
    heal(ShardFolder(tmp_path), rewrite, index.nobody)
    assert verify(tmp_path) == whole


def test_a_version_that_is_listed_and_not_there_is_passed_over(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    whole = verify(tmp_path)
    (newest,) = (tmp_path / VERSIONS).iterdir()
    newest.unlink()
    newest.symlink_to("nowhere")
    assert read_index(tmp_path) == whole, "from index.parquet"
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(ShardError, match="listed but cannot be opened; rebuild the index"):
        read_index(tmp_path)
    rebuild_index(tmp_path)
    assert verify(tmp_path) == whole
