"""Removes every file made from forgotten clips from a run's folder and its storage.

The catalog forgets first: from then on no writer may add anything of these clips, and each writer asks the catalog
before and after it writes. Files that existed by then, or that a process wrote and died before it asked, are found here
from the list of derived files (`derived.jsonl`) and the catalog's list of forgotten clips; no ids are needed.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from curation.failures import UsageError
from curation.last_resort import remove_entries
from curation.run.context import RunContext
from curation.run.dataset import shard_folder
from curation.run.derived import Derived, registered
from curation.shards.index import VERSIONS, ShardFolder, heal, newest_index, version_name
from curation.shards.remote import RemoteShardFolder
from curation.shards.writer import drop_clips, rewrite


def remove_forgotten(context: RunContext) -> None:
    """Delete or rewrite every file of this run that holds something of a forgotten video. Safe to repeat.

    Files that a stopped process has not finished writing are out of reach until it continues. The first error is
    raised after everything else is done: UsageError for a debug file that cannot be changed, ShardError for an
    unreadable shard, OSError for a full disk. OutageError is raised at once if the catalog or the storage is
    unavailable.
    """
    faults: list[Exception] = []
    for work in _works(context):
        try:
            work()
        except (UsageError, OSError) as error:  # a ShardError is a UsageError
            faults.append(error)
    if faults:
        raise faults[0]


def _works(context: RunContext) -> Iterator[Callable[[], object]]:
    """The steps of the removal; each can fail without harm to the others."""
    store, catalog, out = context.store, context.catalog, context.settings.out
    names = store.names("")

    def drop(kind: Derived) -> None:
        found = kind.ids(names)
        gone = catalog.forgotten_clips if kind.clips == "clip_id" else catalog.forgotten_videos
        store.drop(sorted({name for key in gone(found) for name in found[key]}))

    def gone(ids: frozenset[str]) -> frozenset[str]:
        return catalog.forgotten_clips(ids) | catalog.forgotten_videos(ids)

    for kind in registered(out):
        if kind.clips == "entries":
            yield partial(remove_entries, Path(kind.place), gone)
        elif kind.clips == "index":
            yield from (partial(_take_out, context, folder) for folder in _folders(context, kind))
        else:
            yield partial(drop, kind)
    for scratch in out.glob(".index.*"):  # a live reader that uses this copy of an index fetches it again
        yield partial(shutil.rmtree, scratch, ignore_errors=True)


def _take_out(context: RunContext, folder: str) -> None:
    place, gone = shard_folder(context, folder), context.catalog.forgotten_clips
    shared = isinstance(place, RemoteShardFolder)
    if not (shared or place.folder.is_dir()):
        return
    _sweep(context, place, folder)
    heal(place, rewrite, gone)
    if found := gone(newest_index(place).table["clip_id"].to_pylist()):
        drop_clips(place, found)
    _sweep(context, place, folder)  # `heal` may have renamed damaged files aside


def _sweep(context: RunContext, place: ShardFolder, folder: str) -> None:
    """Delete unfinished files of dead writers, damaged files, and all versions of the index but the newest.

    A file that a live writer has locked is kept; a live writer writes again what is deleted elsewhere.
    """
    with place.exclusive():
        patterns = ["*.damaged"]  # it is unknown which clips they hold
        if isinstance(place, RemoteShardFolder):
            subfolders = (folder, f"{folder}/{VERSIONS}")
            context.store.drop(
                f"{each}/{name}" for each in subfolders for name in context.store.sizes(each) if name[0] == "."
            )
            if place.folder.is_dir():
                with ShardFolder(place.folder).exclusive():  # this deletes unfinished files
                    pass
            patterns = ["[!.]*", f"{VERSIONS}/*"]  # local copies of files behind a URL are disposable
        for path in [path for pattern in patterns for path in place.folder.glob(pattern)]:
            with suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        newest = newest_index(place).version
        place.delete(version_name(number) for number in place.versions() if number < newest)


def _folders(context: RunContext, kind: Derived) -> list[str]:
    if not kind.place.endswith("*"):
        return [kind.place]
    root = context.settings.out
    return [path.relative_to(root).as_posix() for path in root.glob(kind.place) if path.is_dir()]
