"""The files of a run, by their names below its folder: which exist, which can be read, and which must be deleted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from curation.catalog import ObservationFile, StoredVideo
from curation.download.resume import discard
from curation.files import sha256_file
from curation.observe.observations import Observations, read_observations
from curation.records import ClipRef, VideoFile
from curation.run.context import RunContext
from curation.run.derived import Derived, Naming, register

FOLDERS = ("videos", "observations", "frames", "staging", "shards", ".claims")  # below a run's folder


def observation_name(ref: ClipRef) -> str:
    """Name of a clip's measurements. Two levels: a million files in one folder make every listing slow."""
    return f"observations/{ref.clip_id[:2]}/{ref.clip_id}.parquet"


def frames_name(ref: ClipRef) -> str:
    """Name of an accepted clip's frames, which are kept until they are in a shard."""
    return f"frames/{ref.clip_id}.parquet"


def name_of(context: RunContext, path: Path) -> str:
    """The name of a file below the run's folder."""
    return path.relative_to(context.settings.out).as_posix()


def videos_here(context: RunContext, stored: Mapping[str, StoredVideo]) -> dict[str, VideoFile]:
    """Those of these videos whose file exists: on this disk, or behind the URL."""
    present = {key: video for key, video in stored.items() if video.present}
    sizes = context.store.sizes_of([video.path for video in present.values()])
    return {
        key: video.file(context.settings.out)
        for (key, video), size in zip(present.items(), sizes, strict=True)
        if size == video.size_bytes
    }


def readable(context: RunContext, files: Sequence[ObservationFile]) -> dict[str, Observations]:
    """The measurements that can be read, by clip id; a damaged or missing file is left out."""
    store = context.store
    paths = store.get_all([file.path for file in files])
    if store.has_url:  # a local copy may be older than the catalog's record
        for number, (file, path) in enumerate(zip(files, paths, strict=True)):
            if path is not None and sha256_file(path) != file.sha256:
                path.unlink()
                path = store.get(file.path)
                paths[number] = path if path is not None and sha256_file(path) == file.sha256 else None
    read = ((file.clip_id, _read(path)) for file, path in zip(files, paths, strict=True) if path is not None)
    return {clip_id: observations for clip_id, observations in read if observations is not None}


def _read(path: Path) -> Observations | None:
    try:
        return read_observations(path)
    except Exception:  # a damaged file may raise anything; the clip is measured again
        return None


def announce(context: RunContext, *kinds: str) -> None:
    """Register these kinds in the run's list of files made from clips (`run.derived`), before they are written."""
    places: dict[str, tuple[str, Naming]] = {
        "videos": ("videos/{video_key}", "video_key"),
        "unfinished videos": ("videos/.parts/{video_key}", "video_key"),
        "observations": ("observations/{clip_id:.2}/{clip_id}", "clip_id"),
        "frames": ("frames/{clip_id}", "clip_id"),
        "unfinished shards": ("staging/*", "index"),
        "shards": (context.shards, "index"),
        "debug": (str(context.settings.debug_file), "entries"),
    }
    for kind in kinds:
        if kind not in context.derived:
            register(context.settings.out, Derived(kind, *places[kind]))
            context.derived.add(kind)


def drop_traces(context: RunContext, refs: Iterable[ClipRef]) -> None:
    """Delete any files of these forgotten clips, and of the videos they belong to."""
    refs = list(refs)
    for key in {ref.video_key for ref in refs}:
        discard(context.settings.out / "videos", key)
        context.store.drop([f"videos/{key}/{name}" for name in context.store.names(f"videos/{key}")])
    context.store.drop([name(ref) for ref in refs for name in (frames_name, observation_name)])


def release(context: RunContext, refs: Sequence[ClipRef]) -> None:
    """Delete this disk's copies of these clips' files that are also behind the URL; without a URL, delete nothing."""
    if context.store.has_url:
        videos = context.catalog.videos({ref.video_key for ref in refs})
        context.store.release([video.path for video in videos.values()])
        context.store.release([observation_name(ref) for ref in refs])
