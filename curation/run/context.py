"""What a run knows and what is still to do, for one process: catalog, policy, files, and the data set they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from curation.catalog import Catalog, ObservationFile, Output
from curation.failures import FailureCode, Trait
from curation.files import sha256_file, sha256_json
from curation.judge.criteria import judge as judge_observations
from curation.judge.policy import Policy, describe, load_policy
from curation.judge.subject import part_taken
from curation.observe.observations import Observations
from curation.observe.sampling import SAMPLER
from curation.people.weights import find_weights
from curation.records import WHOLE, ClipRef, Verdict, VideoFile
from curation.run.batches import Batch
from curation.run.claims import Claims
from curation.run.derived import Derived, Naming, register
from curation.settings import Settings
from curation.shards.index import Index, Place, ShardEntry, newest_index
from curation.storage import Store
from curation.video.hdr import OPERATOR

FOLDERS = ("videos", "observations", "frames", "staging", "shards", ".claims")  # below a run's own
_INDEX_LEASE_S = 30.0


class RunContext:
    """What the stages share within a process. Files go by their names below the run's folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.out, settings.storage)
        self.catalog = Catalog(settings.database)
        self.policy: Policy = load_policy(settings.policy)
        self._teacher: Any = None
        self._same: dict[str, bool] = {}
        self._derived: set[str] = set()

    # the data set

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """What every clip of the data set has in common: the policy, the measurements and the teacher it came from."""
        from curation.shards.schema import SCHEMA_VERSION

        return {
            "schema": SCHEMA_VERSION,
            "policy": describe(self.policy) | {"detector": Path(self.policy.detector).name},
            "observe": self._identity(),
            "frame_long_side": self.settings.observe.frame_long_side,
            "teacher": self._teacher_identity(),
        }

    @cached_property
    def dataset_hash(self) -> str:
        """The hash under which the catalog keeps `dataset`."""
        return sha256_json(self.dataset)

    @cached_property
    def shards(self) -> str:
        """Name of this data set's folder: one for every combination of policy, detector and teacher."""
        return f"shards/{self.policy.name}-{self._teacher_identity()['name']}-{self.dataset_hash[:8]}"

    def place(self, folder: str | None = None) -> Place:
        """The folder of shards of this data set, or of another one, for those who change it."""
        folder = folder or self.shards
        if not self.store.shared or folder.startswith("staging/"):
            return Place(self.store.path(folder))
        from curation.shards.remote import RemotePlace

        number = partial(self.catalog.next_index_version, folder)
        return RemotePlace(self.store, folder, partial(self._index_turn, folder), number)

    def add_shards(self, staging: Path, entries: Sequence[ShardEntry]) -> None:
        """Send shards of a shared run from the folder they were written to; the index last."""
        from curation.shards.remote import RemotePlace, add_shards

        place = self.place()
        assert isinstance(place, RemotePlace)
        add_shards(place, staging, entries, self.catalog.forgotten_clips)

    def heal(self) -> Index:
        """Make index, shard files and catalog of the data set agree, and return the index.

        The files decide which clips there are; the catalog decides which of them may not be there.
        """
        from curation.shards.index import heal
        from curation.shards.writer import drop_clips, rewrite

        if not (self.store.shared or self.store.path("shards").is_dir()):
            return Index.empty()
        noted = self.catalog.clips_of_dataset(self.dataset_hash)  # before the index: what is noted later is in it
        index = heal(self.place(), rewrite, self.catalog.forgotten_clips)
        here = frozenset(index.table["clip_id"].to_pylist())
        self.catalog.drop_outputs(noted - here, self.dataset_hash)
        if unnoted := here - noted:
            if gone := self.catalog.forgotten_clips(unnoted):
                drop_clips(self.place(), gone)
            digest = self.catalog.put_provenance(self.dataset)
            found = index.rows("clip_id", unnoted - gone).entries()
            self.catalog.record_outputs(Output(c.clip_id, digest, c.frames) for shard in found for c in shard.clips)
        return index

    def shards_with(self, refs: Iterable[ClipRef] | None) -> tuple[str, ...]:
        """The files of the data set that hold any of these clips, or all files, by name."""
        index = newest_index(self.place())
        found = index if refs is None else index.rows("clip_id", {ref.clip_id for ref in refs})
        return tuple(sorted(found.sizes()))

    @contextmanager
    def _index_turn(self, folder: str) -> Iterator[None]:
        name = f"index:{folder.rpartition('-')[2]}"
        with Claims(self.catalog, self.settings.out, _INDEX_LEASE_S) as claims, claims.turn(name):
            yield

    def _teacher_identity(self) -> dict[str, Any]:
        """The teacher as far as it changes numbers; not its number format, so that machines may share the work."""
        from curation.teach.teacher import teacher_identity

        return _cached_identity(teacher_identity, self.settings.teacher)

    def _identity(self) -> dict[str, Any]:
        settings = self.settings.observe
        return {
            "detector_sha256": _weights_hash(str(find_weights(settings.detector or self.policy.detector))),
            "long_side": settings.detector_long_side,
            "confidence": settings.detector_confidence,
            "sampler": SAMPLER,
            "sample_fps": settings.sample_fps,
            "hdr": OPERATOR,
        }

    def teacher(self) -> Any:
        """The teacher, loaded when the first clip needs it."""
        from curation.teach.teacher import load_teacher

        if self._teacher is None:
            self._teacher = load_teacher(self.settings.teacher)
        return self._teacher

    # what is derived from clips

    def derives(self, *kinds: str) -> None:
        """Say what is about to be written, in the run's list of what is made from clips."""
        places: dict[str, tuple[str, Naming]] = {
            "videos": ("videos/{video_key}", "video_key"),
            "unfinished videos": ("videos/.parts/{video_key}", "video_key"),
            "observations": ("observations/{clip_id:.2}/{clip_id}", "clip_id"),
            "frames": ("frames/{clip_id}", "clip_id"),
            "unfinished shards": ("staging/*", "index"),
            "shards": (self.shards, "index"),
            "debug": (str(self.settings.debug_file), "entries"),
        }
        for kind in kinds:
            if kind not in self._derived:
                register(self.settings.out, Derived(kind, *places[kind]))
                self._derived.add(kind)

    def drop_traces(self, refs: Iterable[ClipRef]) -> None:
        """Delete what may lie here of clips that were forgotten, all clips of their videos with them."""
        from curation.download.resume import discard

        refs = list(refs)
        for key in {ref.video_key for ref in refs}:
            discard(self.settings.out / "videos", key)
            self.store.drop([f"videos/{key}/{name}" for name in self.store.names(f"videos/{key}")])
        self.store.drop([name(ref) for ref in refs for name in (frames_name, observation_name)])

    # what is there

    def name_of(self, path: Path) -> str:
        """The name of a file below the run's folder."""
        return path.relative_to(self.settings.out).as_posix()

    def videos(self, refs: Iterable[ClipRef]) -> dict[str, VideoFile]:
        """The videos that are really there, by video key; of a shared run perhaps not yet on this disk."""
        stored = self.catalog.videos({ref.video_key for ref in refs})
        present = {key: video for key, video in stored.items() if video.present}
        sizes = self.store.sizes_of([video.path for video in present.values()])
        return {
            key: video.file(self.settings.out)
            for (key, video), size in zip(present.items(), sizes, strict=True)
            if size == video.size_bytes
        }

    def readable(self, files: Sequence[ObservationFile]) -> dict[str, Observations]:
        """The measurements that can be read, by clip id; a damaged or missing file is left out."""
        paths = self.store.get_all([file.path for file in files])
        if self.store.shared:  # a copy of an earlier time says something else than the catalog
            for number, (file, path) in enumerate(zip(files, paths, strict=True)):
                if path is not None and sha256_file(path) != file.sha256:
                    path.unlink()
                    path = self.store.get(file.path)
                    paths[number] = path if path is not None and sha256_file(path) == file.sha256 else None
        read = ((file.clip_id, _read(path)) for file, path in zip(files, paths, strict=True) if path is not None)
        return {clip_id: observations for clip_id, observations in read if observations is not None}

    # what is to do

    def to_download(self, batch: Batch) -> list[ClipRef]:
        """Clips that still need pixels and have no video: to be observed, or accepted and not yet in a shard."""
        blocked = self.given_up(batch.refs, ("download", "observe", "teach"))
        needed = {ref.clip_id for ref in self.to_observe(batch.refs)}
        untaught = self.to_teach(batch.refs)
        frames = self.store.sizes_of([frames_name(ref) for ref in untaught])
        cropped = self._cropped(untaught)
        needed |= {r.clip_id for r, size in zip(untaught, frames, strict=True) if size is None or r.clip_id in cropped}
        wanted = [ref for ref in batch.refs if ref.clip_id in needed and ref.clip_id not in blocked]
        if not wanted:
            return []
        here = self.videos(wanted)
        retry = FailureCode.having(Trait.REFETCH) & set(self.settings.retry)
        anew = {a.clip_id for a in self.catalog.failures(wanted) if a.code in retry}
        return [ref for ref in wanted if ref.video_key not in here or ref.clip_id in anew]

    def _cropped(self, refs: Sequence[ClipRef]) -> frozenset[str]:
        """Clips of which a part of the picture is taken: kept frames, which are of the whole, are no use for them."""
        if self.policy.border.copies != "crop":
            return frozenset()
        read = self.readable(list(self.catalog.observations(refs).values()))
        return frozenset(clip_id for clip_id, found in read.items() if part_taken(found, self.policy) != WHOLE)

    def to_observe(self, refs: Sequence[ClipRef]) -> list[ClipRef]:
        """Clips without measurements by this detector, or with key frames only that leave the policy undecided."""
        files = self.catalog.observations(refs)
        read = self.readable(list(files.values()))
        verdicts = self.catalog.verdicts(refs, self.policy.hash)
        todo = []
        for ref in refs:
            file, observations = files.get(ref.clip_id), read.get(ref.clip_id)
            if file is None or observations is None or not self._measured_as_asked(file):
                todo.append(ref)
            elif file.kind == "keyframes":
                verdict = verdicts.get(ref.clip_id) or self._verdict(observations)
                if verdict is not None and verdict.decision == "unknown":
                    todo.append(ref)
        return todo

    def _verdict(self, observations: Observations) -> Verdict | None:
        try:
            return judge_observations(observations, self.policy)
        except Exception:  # the stage that judges comes upon it too, and records it
            return None

    def _measured_as_asked(self, file: ObservationFile) -> bool:
        if file.provenance_hash not in self._same:
            value = self.catalog.provenance(file.provenance_hash) or {}
            detector = value.get("detector", {})
            found = {
                "detector_sha256": detector.get("sha256"),
                "long_side": detector.get("long_side"),
                "confidence": detector.get("confidence"),
                "sampler": value.get("sampler"),
                "sample_fps": value.get("sample_fps"),
                "hdr": value.get("hdr"),
            }
            self._same[file.provenance_hash] = found == self._identity()
        return self._same[file.provenance_hash]

    def to_teach(self, refs: Sequence[ClipRef]) -> list[ClipRef]:
        """Accepted clips that this data set lacks, given up ones excepted.

        A clip whose measurements are of other settings, and could not be made anew, is not of this data set.
        """
        verdicts = self.catalog.verdicts(refs, self.policy.hash)
        accepted = [ref for ref in refs if ref.clip_id in verdicts and verdicts[ref.clip_id].decision == "accept"]
        files = self.catalog.observations(accepted)
        accepted = [r for r in accepted if r.clip_id in files and self._measured_as_asked(files[r.clip_id])]
        written = self.catalog.outputs(accepted, self.dataset_hash)
        held = written.keys() if self.store.shared else self._in_sound_shards(written)  # what is sent is compared
        blocked = self.given_up(accepted, ("teach",))
        return [ref for ref in accepted if ref.clip_id not in blocked and ref.clip_id not in held]

    def finished(self, batch: Batch) -> bool:
        """Whether the catalog says that nothing is left to do for any clip of the batch; looks at no file."""
        files = self.catalog.observations(batch.refs)
        verdicts = self.catalog.verdicts(batch.refs, self.policy.hash)
        written = self.catalog.outputs(batch.refs, self.dataset_hash)

        def done(ref: ClipRef) -> bool:
            file, verdict = files.get(ref.clip_id), verdicts.get(ref.clip_id)
            if file is None or verdict is None or not self._measured_as_asked(file):
                return False
            if verdict.decision == "unknown":
                return file.kind == "full"
            return verdict.decision == "reject" or ref.clip_id in written

        left = [ref for ref in batch.refs if not done(ref)]
        return not left or len(self.given_up(left, ("download", "observe", "judge", "teach"))) == len(left)

    def _in_sound_shards(self, clip_ids: Iterable[str]) -> frozenset[str]:
        """Clips whose shard is there with a readable end; a cut one is put aside, so that they are written again."""
        place = self.place()
        rows = newest_index(place).rows("clip_id", clip_ids)
        sound = place.put_aside_damaged(rows.sizes())
        return frozenset(rows.rows("file", sound).table["clip_id"].to_pylist())

    def given_up(self, refs: Sequence[ClipRef], stages: Sequence[str]) -> frozenset[str]:
        """Clips whose last try failed for good in one of these stages, unless the user asked to try again."""
        return frozenset(
            attempt.clip_id
            for attempt in self.catalog.failures(refs)
            if attempt.stage in stages
            and attempt.code is not None
            and not attempt.transient
            and Trait.SETTINGS not in attempt.code.traits
            and attempt.code.value not in self.settings.retry
        )

    def release(self, batch: Batch) -> None:
        """Free this disk of what a batch has behind the URL; keeps everything where there is none."""
        if self.store.shared:
            videos = self.catalog.videos({ref.video_key for ref in batch.refs})
            self.store.release([video.path for video in videos.values()])
            self.store.release([observation_name(ref) for ref in batch.refs])


def observation_name(ref: ClipRef) -> str:
    """Name of a clip's measurements. Two levels: a million files in one folder make every listing slow."""
    return f"observations/{ref.clip_id[:2]}/{ref.clip_id}.parquet"


def frames_name(ref: ClipRef) -> str:
    """Name of an accepted clip's frames, which are kept until they lie in a shard."""
    return f"frames/{ref.clip_id}.parquet"


@lru_cache(maxsize=4)
def context_of(settings: Settings) -> RunContext:
    """This process's state of a run."""
    return RunContext(settings)


def forget_cached() -> None:
    """Look anew at the files behind the settings: they may have changed."""
    for cache in (context_of, _weights_hash, _cached_identity):
        cache.cache_clear()


@lru_cache(maxsize=4)
def _weights_hash(path: str) -> str:
    return sha256_file(Path(path))


@lru_cache(maxsize=4)
def _cached_identity(function: Callable[[Any], dict[str, Any]], settings: Any) -> dict[str, Any]:
    return function(settings)


def _read(path: Path) -> Observations | None:
    from curation.observe.observations import read_observations

    try:
        return read_observations(path)
    except Exception:  # a damaged file may raise anything; the clip is measured anew
        return None
