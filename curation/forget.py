"""Takes every file made from forgotten clips out of a run's folder and its storage.

The catalog forgets first: from then on no writer may add anything of these clips, and each asks it before it writes and
after. What lay there by then, or was written by a process that ended before it could ask, is found here, from the list
of what was derived (`derived.jsonl`) and the catalog's list of what is forgotten; no id need be given again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from curation.derived import Derived, registered
from curation.last_resort import remove_entries
from curation.shards.index import heal, newest_index
from curation.shards.schema import ShardError
from curation.shards.writer import drop_clips, rewrite
from curation.state import State


def remove_forgotten(state: State, clip_ids: Collection[str] = ()) -> None:
    """Delete or rewrite every file of this run that holds something of a forgotten video. Safe to repeat.

    clip_ids: the forgotten clips, as `Catalog.forget` names them; only debug files need them, because an entry there is
    about a clip and may be of one that never got further. Raises UsageError or OutageError where files cannot be
    reached.
    """
    store, names = state.store, [*_names(state.settings.out), *state.store.names("")]
    for kind in registered(state.settings.out):
        if kind.clips == "entries":
            remove_entries(Path(kind.place), clip_ids)
        elif kind.clips == "index":
            for folder in _folders(state, kind):
                _take_out(state, folder)
        else:
            found = kind.ids(iter(names))
            ask = state.catalog.forgotten_clips if kind.clips == "clip_id" else state.catalog.forgotten_videos
            store.drop(sorted({name for key in ask(found) for name in found[key]}))


def _take_out(state: State, folder: str) -> None:
    place = state.place(folder)
    for damaged in place.folder.glob("*.damaged"):  # nobody can say what is in it
        damaged.unlink(missing_ok=True)
    gone = state.catalog.forgotten_clips
    with suppress(ShardError):  # a folder that is not there
        heal(place, rewrite, gone)
        if found := gone(newest_index(place).table["clip_id"].to_pylist()):
            drop_clips(place, found)


def _folders(state: State, kind: Derived) -> list[str]:
    if not kind.place.endswith("*"):
        return [kind.place]
    root = state.settings.out
    return [path.relative_to(root).as_posix() for path in root.glob(kind.place) if path.is_dir()]


def _names(root: Path) -> Iterator[str]:
    return (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
