"""The data set that a run adds to: a folder of shards, on this disk or behind a URL, and the catalog's record of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from curation.catalog import Output
from curation.records import ClipRef
from curation.run.claims import Claims
from curation.run.context import RunContext
from curation.shards.index import Index, ShardEntry, ShardFolder, newest_index
from curation.shards.index import heal as heal_index
from curation.shards.remote import RemoteShardFolder, add_shards
from curation.shards.writer import drop_clips, rewrite

_INDEX_LEASE_S = 30.0


def shard_folder(context: RunContext, name: str | None = None) -> ShardFolder:
    """The folder of shards of the run's data set, or of the one given, to change it."""
    name = name or context.shards
    if not context.store.has_url or name.startswith("staging/"):
        return ShardFolder(context.store.path(name))
    number = partial(context.catalog.next_index_version, name)
    return RemoteShardFolder(context.store, name, partial(_index_turn, context, name), number)


@contextmanager
def _index_turn(context: RunContext, folder: str) -> Iterator[None]:
    name = f"index:{folder.rpartition('-')[2]}"
    with Claims(context.catalog, context.settings.out, _INDEX_LEASE_S) as claims, claims.hold(name):
        yield


def publish(context: RunContext, staging: Path, entries: Sequence[ShardEntry]) -> None:
    """Upload shards from the folder they were written to; the index last."""
    folder = shard_folder(context)
    assert isinstance(folder, RemoteShardFolder)
    add_shards(folder, staging, entries, context.catalog.forgotten_clips)


def heal(context: RunContext) -> Index:
    """Make index, shard files and catalog of the data set agree, and return the index.

    The files decide which clips exist; the catalog decides which of them are forgotten and must go.
    """
    if not (context.store.has_url or context.store.path("shards").is_dir()):
        return Index.empty()
    catalog, folder = context.catalog, shard_folder(context)
    noted = catalog.clips_of_dataset(context.dataset_hash)  # before the index: clips noted later are already in it
    index = heal_index(folder, rewrite, catalog.forgotten_clips)
    here = frozenset(index.table["clip_id"].to_pylist())
    catalog.drop_outputs(noted - here, context.dataset_hash)
    if unnoted := here - noted:
        if gone := catalog.forgotten_clips(unnoted):
            drop_clips(folder, gone)
        digest = catalog.put_provenance(context.dataset)
        found = index.rows("clip_id", unnoted - gone).entries()
        catalog.record_outputs(Output(c.clip_id, digest, c.frames) for shard in found for c in shard.clips)
    return index


def shards_with(context: RunContext, refs: Iterable[ClipRef] | None) -> tuple[str, ...]:
    """Names of the data set's files that hold any of these clips; of all its files for None."""
    index = newest_index(shard_folder(context))
    found = index if refs is None else index.rows("clip_id", {ref.clip_id for ref in refs})
    return tuple(sorted(found.sizes()))


def in_sound_shards(context: RunContext, clip_ids: Iterable[str]) -> frozenset[str]:
    """Those of these clips whose shard is on this disk and has a readable footer.

    A truncated shard is renamed aside, so that its clips are written again.
    """
    folder = shard_folder(context)
    rows = newest_index(folder).rows("clip_id", clip_ids)
    sound = folder.put_aside_damaged(rows.sizes())
    return frozenset(rows.rows("file", sound).table["clip_id"].to_pylist())
