"""The stages in order, for a batch of clips: download, observe, judge, teach. No engine in here.

Every stage looks into the catalog and does only what is missing; what fails for a clip is recorded there with its type
and never raised. Any process may die anywhere: files are renamed into place first, completion is recorded last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from curation.catalog import Attempt, Catalog, ObservationFile, Output
from curation.files import sha256_file, sha256_json
from curation.ingest.failures import FailureCode, StageError, UsageError
from curation.manifest import ClipRef
from curation.observe.people import find_weights
from curation.policy import Policy, describe, find_policy, load_policy, subject_boxes
from curation.policy import judge as judge_observations
from curation.records import ClipSample, VideoFile
from curation.settings import Settings
from curation.workers import spread

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Batch:
    """Clips that travel together: the unit of a task and of a shard. `batch_id` depends on the clips alone."""

    index: int
    refs: tuple[ClipRef, ...]
    batch_id: str


@dataclass(frozen=True)
class StageReport:
    """What a stage did with a batch, in clips; `failed` maps a failure code to its number of clips."""

    stage: str
    done: int = 0
    skipped: int = 0
    failed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Funnel:
    """How far the clips of a manifest got."""

    clips: int
    downloaded: int
    observed: int
    accepted: int
    rejected: int
    unknown: int
    failed: dict[str, int]
    rejected_by: dict[str, int]
    sharded: int
    shards: tuple[str, ...]
    folder: str

    def table(self) -> list[dict[str, Any]]:
        """Rows of stage, clips and share, for a table."""
        rows = [
            ("in the manifest", self.clips),
            ("video here or seen", self.downloaded),
            ("observed", self.observed),
            ("accepted", self.accepted),
            *((f"rejected: {reason}", clips) for reason, clips in sorted(self.rejected_by.items())),
            ("undecided", self.unknown),
            *((f"failed: {code}", clips) for code, clips in sorted(self.failed.items())),
            ("in shards", self.sharded),
        ]
        total = max(self.clips, 1)
        return [{"stage": stage, "clips": clips, "share": f"{clips / total:.1%}"} for stage, clips in rows]

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = ["| stage | clips | share |", "|---|---:|---:|"]
        lines += [f"| {row['stage']} | {row['clips']} | {row['share']} |" for row in self.table()]
        return "\n".join(lines)


def read_batches(refs: Sequence[ClipRef], settings: Settings) -> list[Batch]:
    """Cut a manifest into batches: its order, but the clips of one video kept together."""
    by_video: dict[str, list[ClipRef]] = {}
    for ref in refs:
        by_video.setdefault(ref.video_key, []).append(ref)
    batches: list[Batch] = []
    current: list[ClipRef] = []

    def close() -> None:
        if current:
            batches.append(Batch(len(batches), tuple(current), sha256_json([ref.clip_id for ref in current])[:16]))
            current.clear()

    for clips in by_video.values():
        for start in range(0, len(clips), settings.batch_clips):
            part = clips[start : start + settings.batch_clips]
            if len(current) + len(part) > settings.batch_clips:
                close()
            current.extend(part)
    close()
    return batches


def preflight(settings: Settings) -> Settings:
    """Find what would stop a run before any work is done; returns the settings with everything resolved.

    Raises UsageError: policy, detector or teacher weights, ffmpeg, an output folder that cannot be written.
    """
    from curation.evaluate import detector_ready
    from curation.ffmpeg import ffmpeg_exe
    from curation.teach.depth import check_teacher

    out = settings.out.expanduser().absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"The output folder {out} cannot be written: {error.strerror}.") from error
    policy = load_policy(settings.policy)
    ffmpeg_exe()
    weights = find_weights(settings.observe.detector or policy.detector)
    observe_settings = settings.observe.model_copy(update={"detector": str(weights)})
    detector_ready(str(weights), observe_settings)
    root = settings.download.local_root
    if root is not None:
        root = root.expanduser().absolute()
        if not root.is_dir():
            raise UsageError(f"The folder of local videos {root} is not there; correct --local-root.")
    settings = settings.model_copy(
        update={
            "out": out,
            "policy": find_policy(settings.policy),
            "observe": observe_settings,
            "teacher": check_teacher(settings.teacher),
            "download": settings.download.model_copy(update={"local_root": root}),
        }
    )
    Catalog(settings.database)
    return settings


def download(settings: Settings, batch: Batch, progress: Progress | None = None) -> StageReport:
    """Fetch the videos that this batch still needs, one after the other, each once."""
    from curation.ingest.download import download as fetch

    run = _run(settings)
    log = _Log(run, "download", len(batch.refs), progress)
    refused = run.catalog.register(batch.refs)
    for ref in batch.refs:
        if ref.clip_id in refused:
            log.refuse(ref, FailureCode.FORGOTTEN)
    wanted = [ref for ref in _unfinished(run, batch) if ref.clip_id not in refused]
    log.skip(len(batch.refs) - len(refused) - len(wanted))
    by_video: dict[str, list[ClipRef]] = {}
    for ref in wanted:
        by_video.setdefault(ref.video_key, []).append(ref)
    for key, clips in by_video.items():
        began = time.time()
        try:
            video = fetch(clips[0], settings.out / "videos", settings.download)
        except StageError as error:
            log.failed(clips, error, began)
            continue
        if not run.catalog.record_video(key, video, video.path.relative_to(settings.out).as_posix()):
            video.path.unlink(missing_ok=True)  # forgotten while it was fetched
            log.failed(clips, StageError(FailureCode.FORGOTTEN, "removal was requested"), began)
            continue
        log.done(clips, began)
    return log.report()


def observe(settings: Settings, batch: Batch, progress: Progress | None = None) -> StageReport:
    """Measure every clip of the batch that has a video and no measurements yet, on all cores."""
    run = _run(settings)
    log = _Log(run, "observe", len(batch.refs), progress)
    videos = run.videos(batch.refs)
    blocked = run.given_up(batch.refs, ("observe",))
    tasks = [
        _ObserveTask(ref, videos[ref.video_key].path, settings, run.policy)
        for ref in run.to_observe(batch.refs)
        if ref.video_key in videos and ref.clip_id not in blocked
    ]
    log.skip(len(batch.refs) - len(tasks))
    began = {task.ref.clip_id: time.time() for task in tasks}
    for task, result in spread(_observe_clip, tasks, settings.workers):
        ref, start = task.ref, began[task.ref.clip_id]
        if isinstance(result, StageError):
            log.failed([ref], result, start)
        elif isinstance(result, UsageError):
            raise result
        elif isinstance(result, BaseException):
            log.failed([ref], StageError(FailureCode.INTERNAL, f"observing ended with {type(result).__name__}"), start)
        else:
            digest = run.catalog.put_provenance(result.provenance)
            path = _observation_path(settings, ref).relative_to(settings.out).as_posix()
            run.catalog.record_observations(
                [ObservationFile(ref.clip_id, result.kind, path, result.sha256, digest)]  # type: ignore[arg-type]
            )
            log.done([ref], start)
    return log.report()


def judge(settings: Settings, batch: Batch) -> StageReport:
    """Apply the policy to the batch's measurements; decodes nothing."""
    run = _run(settings)
    known = run.catalog.verdicts(batch.refs, run.policy.hash)
    files = run.catalog.observations(batch.refs)
    missing = [files[ref.clip_id] for ref in batch.refs if ref.clip_id in files and ref.clip_id not in known]
    _judge_files(run, missing)
    return StageReport("judge", len(missing), len(batch.refs) - len(missing))


def judge_all(settings: Settings, progress: Progress | None = None) -> int:
    """Judge every measured clip of the catalog under the settings' policy; returns how many were judged anew."""
    run = _run(settings)
    judged = seen = 0
    for page in run.catalog.observed():
        known = run.catalog.verdicts([file.clip_id for file in page], run.policy.hash)
        missing = [file for file in page if file.clip_id not in known]
        _judge_files(run, missing)
        judged += len(missing)
        seen += len(page)
        if progress is not None:
            progress(seen, seen)
    return judged


def teach(settings: Settings, batch: Batch, progress: Progress | None = None) -> StageReport:
    """Give the batch's accepted clips their teacher depth and write them as shards of the run's data set."""
    from curation.shards.writer import write_shards

    run = _run(settings)
    log = _Log(run, "teach", len(batch.refs), progress)
    todo = run.to_teach(batch.refs)
    log.skip(len(batch.refs) - len(todo))
    if not todo:
        return log.report()
    digest = run.catalog.put_provenance(run.dataset)
    began: dict[str, float] = {}

    def samples() -> Iterator[ClipSample]:
        teacher = run.teacher()
        for ref in todo:
            began[ref.clip_id] = time.time()
            try:
                yield _sample(run, ref, teacher)
            except StageError as error:
                log.failed([ref], error, began[ref.clip_id])

    refs = {ref.clip_id: ref for ref in todo}
    for shard in write_shards(samples(), run.shards, max_bytes=settings.shard_mb * 2**20):
        mine = [clip for clip in shard.clips if clip.clip_id in refs]
        left_out = run.catalog.record_outputs(
            Output(clip.clip_id, digest, shard.file, clip.row_group, clip.row_groups, clip.frames, shard.sha256)
            for clip in mine
        )
        if left_out:  # forgotten meanwhile: nothing of them may stay
            from curation.shards.writer import remove_clips

            remove_clips(run.shards, left_out)
        for clip in mine:
            log.done([refs[clip.clip_id]], began[clip.clip_id])
    for ref in todo:
        _frames_path(settings, ref).unlink(missing_ok=True)
    return log.report()


def funnel(settings: Settings, refs: Sequence[ClipRef] | None) -> Funnel:
    """How far these clips, or all of the catalog, got."""
    run = _run(settings)
    digest = sha256_json(run.dataset)
    counts = run.catalog.funnel(refs, run.policy.hash, digest)
    failed: dict[str, int] = {}
    for (_, code), clips in counts.failed.items():
        failed[code] = failed.get(code, 0) + clips
    if refs is not None and counts.clips < len(refs):
        failed[FailureCode.FORGOTTEN.value] = len(refs) - counts.clips
    return Funnel(
        clips=counts.clips if refs is None else len(refs),
        downloaded=counts.downloaded,
        observed=counts.observed,
        accepted=counts.accepted,
        rejected=counts.rejected,
        unknown=counts.unknown,
        failed=failed,
        rejected_by=counts.rejected_by,
        sharded=counts.sharded,
        shards=counts.shards,
        folder=str(run.shards),
    )


def run(settings: Settings, refs: Sequence[ClipRef], progress: Callable[[str, int, int], None] | None = None) -> Funnel:
    """The whole job without an engine: batch k is observed while batch k + 1 is fetched.

    progress: called with (stage, clips done, clips in all). Raises UsageError before any work is done.
    """
    settings = preflight(settings)
    batches = read_batches(refs, settings)
    total = len(refs)

    def shown(stage: str, before: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(stage, before + done, total)

    with ThreadPoolExecutor(1) as fetcher:
        before = 0
        starts = []
        for batch in batches:
            starts.append(before)
            before += len(batch.refs)
        fetched = [
            fetcher.submit(download, settings, b, shown("download", s)) for b, s in zip(batches, starts, strict=True)
        ]
        try:
            for batch, start, future in zip(batches, starts, fetched, strict=True):
                future.result()
                observe(settings, batch, shown("observe", start))
                judge(settings, batch)
                teach(settings, batch, shown("teach", start))
        finally:
            for future in fetched:
                future.cancel()
    return funnel(settings, refs)


class _Run:
    """What the stages share within a process: catalog, policy, and what is still to do."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.catalog = Catalog(settings.database)
        self.policy: Policy = load_policy(settings.policy)
        self._teacher: Any = None
        self._same: dict[str, bool] = {}

    @property
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

    @property
    def shards(self) -> Path:
        """Folder of this data set: one for every combination of policy, detector and teacher."""
        teacher = self._teacher_identity()["name"]
        return self.settings.out / "shards" / f"{self.policy.name}-{teacher}-{sha256_json(self.dataset)[:8]}"

    def _teacher_identity(self) -> dict[str, Any]:
        """The teacher as far as it changes numbers; not its number format, so that machines may share the work."""
        from curation.teach.depth import teacher_identity

        return _cached_identity(teacher_identity, self.settings.teacher)

    def _identity(self) -> dict[str, Any]:
        settings = self.settings.observe
        return {
            "detector_sha256": _weights_hash(str(find_weights(settings.detector or self.policy.detector))),
            "long_side": settings.detector_long_side,
            "confidence": settings.detector_confidence,
            "sample_fps": settings.sample_fps,
        }

    def teacher(self) -> Any:
        """The teacher, loaded when the first clip needs it."""
        from curation.teach.depth import load_teacher

        if self._teacher is None:
            self._teacher = load_teacher(self.settings.teacher)
        return self._teacher

    def videos(self, refs: Sequence[ClipRef]) -> dict[str, VideoFile]:
        """The videos that are really on this disk, by video key."""
        stored = self.catalog.videos({ref.video_key for ref in refs})
        files = {key: video.file(self.settings.out) for key, video in stored.items() if video.present}
        return {key: file for key, file in files.items() if file.path.is_file()}

    def to_observe(self, refs: Sequence[ClipRef]) -> list[ClipRef]:
        """Clips without measurements by this detector, or with key frames only that leave the policy undecided."""
        files = self.catalog.observations(refs)
        verdicts = self.catalog.verdicts(refs, self.policy.hash)
        todo = []
        for ref in refs:
            file = files.get(ref.clip_id)
            if file is None or not self._measured_as_asked(file):
                todo.append(ref)
            elif file.kind == "keyframes":
                verdict = verdicts.get(ref.clip_id)
                decision = verdict.decision if verdict else self._decision(file)
                if decision == "unknown":
                    todo.append(ref)
        return todo

    def _decision(self, file: ObservationFile) -> str:
        from curation.observe.observations import read_observations

        return judge_observations(read_observations(self.settings.out / file.path), self.policy).decision

    def _measured_as_asked(self, file: ObservationFile) -> bool:
        if not (self.settings.out / file.path).is_file():
            return False
        if file.provenance_hash not in self._same:
            value = self.catalog.provenance(file.provenance_hash) or {}
            detector = value.get("detector", {})
            found = {
                "detector_sha256": detector.get("sha256"),
                "long_side": detector.get("long_side"),
                "confidence": detector.get("confidence"),
                "sample_fps": value.get("sample_fps"),
            }
            self._same[file.provenance_hash] = found == self._identity()
        return self._same[file.provenance_hash]

    def to_teach(self, refs: Sequence[ClipRef]) -> list[ClipRef]:
        """Accepted clips that this data set lacks, given up ones excepted."""
        verdicts = self.catalog.verdicts(refs, self.policy.hash)
        accepted = [ref for ref in refs if ref.clip_id in verdicts and verdicts[ref.clip_id].decision == "accept"]
        written = self.catalog.outputs(accepted, sha256_json(self.dataset))
        blocked = self.given_up(accepted, ("teach",))
        return [
            ref
            for ref in accepted
            if ref.clip_id not in blocked
            and not (ref.clip_id in written and (self.shards / written[ref.clip_id].shard).is_file())
        ]

    def given_up(self, refs: Sequence[ClipRef], stages: Sequence[str]) -> frozenset[str]:
        """Clips whose last try failed for good in one of these stages, unless the user asked to try again."""
        return frozenset(
            attempt.clip_id
            for attempt in self.catalog.failures(refs)
            if attempt.stage in stages
            and attempt.code is not None
            and not attempt.code.transient
            and attempt.code.value not in self.settings.retry
        )


@lru_cache(maxsize=4)
def _run(settings: Settings) -> _Run:
    return _Run(settings)


@lru_cache(maxsize=4)
def _weights_hash(path: str) -> str:
    return sha256_file(Path(path))


@lru_cache(maxsize=4)
def _cached_identity(function: Callable[[Any], dict[str, Any]], settings: Any) -> dict[str, Any]:
    return function(settings)


def _unfinished(run: _Run, batch: Batch) -> list[ClipRef]:
    """Clips that still need pixels and have no video here: to be observed, or accepted and not yet in a shard."""
    blocked = run.given_up(batch.refs, ("download", "observe", "teach"))
    needed = {ref.clip_id for ref in run.to_observe(batch.refs)}
    needed |= {ref.clip_id for ref in run.to_teach(batch.refs) if not _frames_path(run.settings, ref).is_file()}
    here = run.videos(batch.refs)
    retry = {FailureCode.CORRUPT.value, FailureCode.NO_VIDEO.value} & set(run.settings.retry)
    anew = {a.clip_id for a in run.catalog.failures(batch.refs) if a.code and a.code.value in retry}
    return [
        ref
        for ref in batch.refs
        if ref.clip_id in needed and ref.clip_id not in blocked and (ref.video_key not in here or ref.clip_id in anew)
    ]


class _Log:
    """Counts a stage's clips, shows progress, and records every try in the catalog."""

    def __init__(self, run: _Run, stage: str, total: int, progress: Progress | None) -> None:
        self._run, self._stage, self._total, self._progress = run, stage, total, progress
        self._done = self._skipped = 0
        self._failed: dict[str, int] = {}

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(self._done + self._skipped + sum(self._failed.values()), self._total)

    def skip(self, clips: int) -> None:
        self._skipped += clips
        self._show()

    def refuse(self, ref: ClipRef, code: FailureCode) -> None:
        """Count a clip of which nothing may be recorded."""
        self._failed[code.value] = self._failed.get(code.value, 0) + 1
        self._show()

    def done(self, refs: Sequence[ClipRef], began: float) -> None:
        self._record(refs, None, "", began)
        self._done += len(refs)
        self._show()

    def failed(self, refs: Sequence[ClipRef], error: StageError, began: float) -> None:
        self._record(refs, error.code, error.message, began)
        self._failed[error.code.value] = self._failed.get(error.code.value, 0) + len(refs)
        self._show()

    def _record(self, refs: Sequence[ClipRef], code: FailureCode | None, message: str, began: float) -> None:
        seconds = time.time() - began
        self._run.catalog.record_attempts(
            Attempt(ref.clip_id, self._stage, code, message, started_at=began, seconds=seconds) for ref in refs
        )

    def report(self) -> StageReport:
        return StageReport(self._stage, self._done, self._skipped, dict(sorted(self._failed.items())))


@dataclass(frozen=True)
class _ObserveTask:
    ref: ClipRef
    path: Path
    settings: Settings
    policy: Policy


@dataclass(frozen=True)
class _Observed:
    kind: str
    sha256: str
    provenance: dict[str, Any]


def _observe_clip(task: _ObserveTask) -> _Observed:
    """In a worker: prescreen, measure, and keep the frames of a clip that the policy accepts."""
    from curation.observe.observations import write_observations
    from curation.observe.observe import detector_for, observe, prescreen
    from curation.observe.samples import write_frames

    settings = task.settings.observe
    assert settings.detector is not None  # resolved by preflight
    detector = detector_for(settings, settings.detector)
    path = _observation_path(task.settings, task.ref)
    observations = prescreen(task.ref, task.path, settings, detector)
    if observations is None or judge_observations(observations, task.policy).decision != "reject":
        observations, frames = observe(task.ref, task.path, settings, detector)
        if judge_observations(observations, task.policy).decision == "accept":
            write_frames(frames, _frames_path(task.settings, task.ref))
    write_observations(observations, path)
    return _Observed(observations.kind, sha256_file(path), observations.provenance)


def _observation_path(settings: Settings, ref: ClipRef) -> Path:
    # Two levels: a million files in one folder make every listing slow.
    return settings.out / "observations" / ref.clip_id[:2] / f"{ref.clip_id}.parquet"


def _frames_path(settings: Settings, ref: ClipRef) -> Path:
    return settings.out / "frames" / f"{ref.clip_id}.parquet"


def _judge_files(run: _Run, files: Sequence[ObservationFile]) -> None:
    from curation.observe.observations import read_observations

    verdicts = [judge_observations(read_observations(run.settings.out / file.path), run.policy) for file in files]
    run.catalog.record_verdicts(verdicts, {file.clip_id: file.sha256 for file in files})


def _sample(run: _Run, ref: ClipRef, teacher: Any) -> ClipSample:
    """One accepted clip with its frames, the subject's boxes on the training grid, and the teacher's depth."""
    import numpy as np

    from curation.observe.observations import read_observations
    from curation.observe.observe import sample_frames
    from curation.observe.samples import read_frames

    frames = read_frames(_frames_path(run.settings, ref))
    if frames is None:
        videos = run.videos([ref])
        if ref.video_key not in videos:
            raise StageError(FailureCode.NETWORK, "the video is not here; it will be fetched by the next run")
        frames = sample_frames(ref, videos[ref.video_key].path, run.settings.observe)
    file = run.catalog.observations([ref])[ref.clip_id]
    observations = read_observations(run.settings.out / file.path)
    boxes, confidence = subject_boxes(observations, run.policy)
    boxes *= np.array([frames.width, frames.height] * 2, np.float32)
    return ClipSample(
        clip_id=ref.clip_id,
        split=ref.split,
        frames=frames,
        boxes=boxes,
        box_confidence=confidence,
        depth=teacher(frames, ref.clip_id),
        provenance=run.dataset | {"teacher": teacher.provenance},
    )
