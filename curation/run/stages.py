"""The four stages for one batch of clips: download, observe, judge, teach.

Every stage reads the catalog and does only what is missing. A failure of one clip, whatever the error, is recorded
there with its type and never raised: only a wrong set-up, a long outage or a lost lease ends a stage. A process may
die at any point: files are renamed into place first, completion is recorded last.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curation.catalog import Attempt, ObservationFile, Output
from curation.deadlines import time_limit
from curation.download.politeness import Gate
from curation.failures import ENDS_THE_RUN, ClipFailure, FailureCode, UsageError
from curation.files import sha256_file
from curation.judge.criteria import judge as judge_observations
from curation.judge.policy import Policy
from curation.judge.subject import part_taken, subject_boxes
from curation.last_resort import failure_of, keep_text
from curation.pool import run_all
from curation.records import WHOLE, ClipRef, ClipSample, Verdict
from curation.run.batches import Batch, Progress, StageReport
from curation.run.context import RunContext, context_of, forget_cached
from curation.run.dataset import publish, shard_folder
from curation.run.files import (
    announce,
    drop_traces,
    frames_name,
    name_of,
    observation_name,
    readable,
    release,
    videos_here,
)
from curation.run.todo import clips_before
from curation.settings import Settings
from curation.shards.schema import ShardError
from curation.shards.writer import drop_clips, encode_clip, write_tables
from curation.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa

    from curation.download.politeness import Gate

_SCRATCH_S = 3600.0  # how long a machine keeps its copy of a video that is in the shared storage
_FLOOR_S = 1800.0  # the shortest default time limit: on a busy machine any clip may take long
_PER_CLIP_S, _PER_VIDEO_S = 60.0, 1.0  # added for every second of the clip and of its video
Check = Callable[[], None]  # raises LostError once another worker has taken over the batch


def nobody_else() -> None:
    """The check for a batch that no other worker can take."""


def download(
    settings: Settings, batch: Batch, progress: Progress | None = None, check: Check = nobody_else
) -> StageReport:
    """Fetch the videos that this batch still needs, one by one, each once.

    The clips of a blocked platform are postponed. check: called before each video.
    """
    context = context_of(settings)
    log = _Log(context, "download", len(batch.refs), progress)
    announce(context, "videos", "unfinished videos", *(["debug"] if settings.debug_file else []))
    refused = context.catalog.register(batch.refs)
    gone = [ref for ref in batch.refs if ref.clip_id in refused]
    drop_traces(context, gone)  # a process that died before it asked the catalog may have left some
    for ref in gone:
        log.refuse(ref, FailureCode.FORGOTTEN)
    refs = [ref for ref in batch.refs if ref.clip_id not in refused]
    wanted = [clip.ref for clip in clips_before(context, refs, "download") if clip.step == "download"]
    log.skip(len(batch.refs) - len(refused) - len(wanted))
    by_video: dict[str, list[ClipRef]] = {}
    for ref in wanted:
        by_video.setdefault(ref.video_key, []).append(ref)
    gate = Gate(context.catalog, settings.download)
    context.store.release_older("videos/*/video.*", _SCRATCH_S)  # another machine may have observed them
    for clips in by_video.values():
        check()
        began = time.time()
        try:
            asked = gate.wait(clips[0]) is None
            began = time.time()
            if asked:
                _fetch_video(context, gate, clips[0])
        except ENDS_THE_RUN:
            raise
        except Exception as error:  # the last resort: the other clips go on after any error
            if not _refuse_forgotten(context, log, clips):
                log.failed(clips, error, began)
            continue
        if asked:
            log.done(clips, began)
        else:
            log.postpone(len(clips))
    return log.report()


def _refuse_forgotten(context: RunContext, log: _Log, refs: Sequence[ClipRef]) -> list[ClipRef]:
    """Count those of these clips that were forgotten since registration, delete their files, and return them."""
    held = context.catalog.refs(refs)
    gone = [ref for ref in refs if ref.clip_id not in held]
    if gone:
        drop_traces(context, gone)
        for ref in gone:
            log.refuse(ref, FailureCode.FORGOTTEN)
    return gone


def _fetch_video(context: RunContext, gate: Gate, ref: ClipRef) -> None:
    """Fetch one video, store it and record it in the catalog."""
    from curation.download.fetch import download as fetch  # loads PyAV, which a run without downloads does not need

    try:
        _make_room(context)
        video = fetch(ref, context.settings.out / "videos", context.settings.download)
    except ClipFailure as error:
        gate.failed(ref, error)
        raise
    gate.succeeded(ref)
    name = name_of(context, video.path)
    context.store.put(name)
    if not context.catalog.record_video(ref.video_key, video, name):
        context.store.drop([name])  # forgotten while it was fetched
        raise ClipFailure(FailureCode.FORGOTTEN, "removal was requested")


def _make_room(context: RunContext) -> None:
    """Delete finished videos, oldest first, until usage is within the budget. Raises ClipFailure if it cannot be."""
    budget = context.settings.download.budget_mb
    if budget is None:
        return
    over = context.catalog.present_bytes() - budget * 2**20
    while over > 0:
        videos = context.catalog.finished_videos(context.policy.hash, context.dataset_hash, limit=16)
        if not videos:
            raise ClipFailure(
                FailureCode.DISK_FULL, "The videos of unfinished clips fill budget_mb; raise it, or lower batch_clips."
            )
        for video in videos:
            context.store.drop([video.path])
            context.catalog.record_evicted([video.video_key])
            over -= video.size_bytes
            if over <= 0:
                break


def observe(
    settings: Settings, batch: Batch, progress: Progress | None = None, check: Check = nobody_else
) -> StageReport:
    """Measure every clip of the batch that has a video and no measurements yet, on all cores.

    check: called before anything about a clip is recorded.
    """
    context = context_of(settings)
    log = _Log(context, "observe", len(batch.refs), progress)
    tasks = [
        _ObserveTask(
            clip.ref,
            name_of(context, clip.video.path),
            clip.video.size_bytes,
            settings,
            context.policy,
            context.store,
            _limit_s(settings, clip.ref, clip.video.duration_s),
        )
        for clip in clips_before(context, batch.refs, "observe")
        if clip.step == "observe" and clip.video is not None
    ]
    log.skip(len(batch.refs) - len(tasks))
    announce(context, "observations", "frames")
    gone = _refuse_forgotten(context, log, [task.ref for task in tasks])
    tasks = [task for task in tasks if task.ref not in gone]
    began = {task.ref.clip_id: time.time() for task in tasks}
    for task, result in run_all(_observe_clip, tasks, settings.workers, lambda task: task.limit_s):
        check()
        ref, start = task.ref, began[task.ref.clip_id]
        if isinstance(result, ENDS_THE_RUN):
            raise result
        try:
            if isinstance(result, BaseException):
                raise result
            digest = context.catalog.put_provenance(result.provenance)
            name = observation_name(ref)
            left_out = context.catalog.record_observations(
                [ObservationFile(ref.clip_id, result.kind, name, result.sha256, digest)]  # type: ignore[arg-type]
            )
            if left_out and _refuse_forgotten(context, log, [ref]):
                continue
        except ENDS_THE_RUN:
            raise
        except (Exception, SystemExit) as error:  # the last resort; a library in the process may also call exit()
            if not _refuse_forgotten(context, log, [ref]):
                log.failed([ref], error, start)
            continue
        log.done([ref], start)
    return log.report()


def _limit_s(settings: Settings, ref: ClipRef, video_s: float) -> float:
    """How long one stage may work on one clip. Generous: the limit is for work that would never end."""
    if settings.clip_timeout_s is not None:
        return settings.clip_timeout_s
    clip_s = (video_s if ref.end_s is None else min(ref.end_s, video_s)) - (ref.start_s or 0.0)
    return _FLOOR_S + _PER_CLIP_S * max(0.0, clip_s) + _PER_VIDEO_S * video_s


def judge(settings: Settings, batch: Batch) -> StageReport:
    """Apply the policy to the batch's measurements; decodes nothing."""
    context = context_of(settings)
    log = _Log(context, "judge", len(batch.refs), None)
    known = context.catalog.verdicts(batch.refs, context.policy.hash)
    files = context.catalog.observations(batch.refs)
    missing = [files[ref.clip_id] for ref in batch.refs if ref.clip_id in files and ref.clip_id not in known]
    log.skip(len(batch.refs) - len(missing))
    _judge(context, log, missing)
    return log.report()


def _judge(context: RunContext, log: _Log, files: Sequence[ObservationFile]) -> int:
    """Judge the readable measurements; return how many. The next run replaces damaged or missing ones."""
    began = time.time()
    verdicts: list[Verdict] = []
    failed: dict[str, Exception] = {}
    for clip_id, observations in readable(context, files).items():
        try:
            verdicts.append(judge_observations(observations, context.policy))
        except Exception as error:  # the last resort: the other clips are judged after any error
            failed[clip_id] = error
    context.catalog.record_verdicts(verdicts, {file.clip_id: file.sha256 for file in files})
    refs = context.catalog.refs(failed)
    for clip_id, ref in refs.items():
        log.failed([ref], failed[clip_id], began)
    log.judged([verdict.clip_id for verdict in verdicts], began)
    return len(verdicts)


def judge_all(settings: Settings, progress: Progress | None = None) -> int:
    """Judge every measured clip of the catalog under the settings' policy; return how many verdicts are new."""
    forget_cached()  # the policy's file may have changed
    context = context_of(settings)
    log = _Log(context, "judge", 0, None)
    judged = seen = 0
    nowhere = True
    for page in context.catalog.observed():
        known = context.catalog.verdicts([file.clip_id for file in page], context.policy.hash)
        missing = [file for file in page if file.clip_id not in known]
        nowhere = nowhere and len(missing) == len(page)
        nowhere = nowhere and not any(context.store.sizes_of([file.path for file in missing]))
        judged += _judge(context, log, missing)
        context.store.release([file.path for file in missing])
        seen += len(page)
        if progress is not None:
            progress(seen, seen)
    if seen and nowhere and (context.store.has_url or not context.store.path("observations").is_dir()):
        raise UsageError(
            f"{settings.place} holds none of the {seen} measurements; give the --out and --storage of the run."
        )
    return judged


def teach(
    settings: Settings, batch: Batch, progress: Progress | None = None, check: Check = nobody_else
) -> StageReport:
    """Give the batch's accepted clips their teacher depth and write them as shards of the run's data set.

    check: called before each clip goes into a shard, before the last shard is closed, and before clips are recorded.
    """
    context = context_of(settings)
    log = _Log(context, "teach", len(batch.refs), progress)
    clips = {clip.ref: clip for clip in clips_before(context, batch.refs, "teach") if clip.step == "teach"}
    todo = list(clips)
    log.skip(len(batch.refs) - len(todo))
    if todo:
        digest = context.catalog.put_provenance(context.dataset)
        began: dict[str, float] = {}
        refs = {ref.clip_id: ref for ref in todo}  # less those that failed
        announce(context, "shards", "unfinished shards")

        def encoded() -> Iterator[pa.Table]:
            teacher = _teacher(context)
            for ref in todo:
                began[ref.clip_id] = time.time()
                video = clips[ref].known.video
                try:
                    with time_limit(_limit_s(settings, ref, video.duration_s if video else 0.0)):
                        table = encode_clip(build_clip_sample(context, ref, teacher))
                except Exception as error:  # the last resort: the other clips go on after any error
                    if isinstance(error, ENDS_THE_RUN) and not isinstance(error, ShardError):
                        raise
                    del refs[ref.clip_id]
                    if _refuse_forgotten(context, log, [ref]):
                        continue
                    log.failed([ref], error, began[ref.clip_id])
                    continue
                check()
                yield table
                log.through()
            check()

        staging = settings.out / "staging" / batch.batch_id
        folder = staging if context.store.has_url else context.store.path(context.shards)
        gone = context.catalog.forgotten_clips
        try:
            shards = write_tables(encoded(), folder, max_bytes=settings.shard_mb * 2**20, gone=gone)
            if context.store.has_url:
                publish(context, staging, shards)
                shutil.rmtree(staging, ignore_errors=True)
        except ENDS_THE_RUN:
            raise
        except Exception as error:  # no shard of this batch is recorded anywhere: the next run writes all of them
            shutil.rmtree(staging, ignore_errors=True)
            log.not_through()
            for ref in refs.values():
                log.failed([ref], error, began.get(ref.clip_id, time.time()))
            return log.report()
        check()
        written = [clip for shard in shards for clip in shard.clips if clip.clip_id in refs]
        left_out = context.catalog.record_outputs(Output(clip.clip_id, digest, clip.frames) for clip in written)
        if left_out:  # forgotten in the meantime: nothing of them may stay
            drop_clips(shard_folder(context), left_out)
            _refuse_forgotten(context, log, [refs.pop(clip_id) for clip_id in left_out])
        for clip in (clip for clip in written if clip.clip_id in refs):
            log.done([refs[clip.clip_id]], began[clip.clip_id])
        context.store.drop([frames_name(ref) for ref in todo])
    release(context, batch.refs)
    return log.report()


def _teacher(context: RunContext) -> Any:
    """The teacher. A loading error ends the run, because every other clip would meet the same error."""
    try:
        return context.teacher()
    except ENDS_THE_RUN:
        raise
    except Exception as error:
        said = failure_of(error).message
        if context.settings.debug_file is not None:
            keep_text(context.settings.debug_file, [], "teach", error)
        raise UsageError(f"The depth teacher cannot be loaded: {said}.") from None


_NOT_HERE = "the video file is missing; the next run fetches it again"


class _Log:
    """Counts a stage's clips, shows progress, and records every attempt in the catalog."""

    def __init__(self, context: RunContext, stage: str, total: int, progress: Progress | None) -> None:
        self._state, self._stage, self._total, self._progress = context, stage, total, progress
        self._done = self._skipped = self._postponed = self._unrecorded = 0
        self._failed: dict[str, int] = {}

    def _show(self) -> None:
        if self._progress is not None:
            seen = self._done + self._skipped + self._postponed + self._unrecorded + sum(self._failed.values())
            self._progress(seen, self._total)

    def skip(self, clips: int) -> None:
        self._skipped += clips
        self._show()

    def postpone(self, clips: int) -> None:
        self._postponed += clips
        self._show()

    def refuse(self, ref: ClipRef, code: FailureCode) -> None:
        """Count a failed clip about which nothing may be recorded."""
        self._failed[code.value] = self._failed.get(code.value, 0) + 1
        self._show()

    def through(self) -> None:
        """Show a clip as done; its result is recorded later, together with others."""
        self._unrecorded += 1
        self._show()

    def done(self, refs: Sequence[ClipRef], began: float) -> None:
        self._record(refs, None, "", began)
        self._done += len(refs)
        self._unrecorded = max(0, self._unrecorded - len(refs))
        self._show()

    def not_through(self) -> None:
        """Clips shown as done will not be recorded."""
        self._unrecorded = 0

    def judged(self, clip_ids: Sequence[str], began: float) -> None:
        """Count verdicts. A success enters the history only after an earlier failure, because verdicts are many."""
        before = [each.clip_id for each in self._state.catalog.failures(clip_ids) if each.stage == self._stage]
        self._record(list(self._state.catalog.refs(before).values()), None, "", began)
        self._done += len(clip_ids)

    def failed(self, refs: Sequence[ClipRef], error: BaseException, began: float) -> None:
        """Record a failure with its code and a fixed message; an unexpected error's text goes to the debug file only.

        error: anything; see `failure_of`.
        """
        failure = failure_of(error)
        self._record(refs, failure.code, failure.message, began)
        unexpected = failure.code is FailureCode.INTERNAL or failure is not error
        if unexpected and self._state.settings.debug_file is not None:
            with suppress(OSError):  # such as a full disk: the run matters more
                keep_text(self._state.settings.debug_file, refs, self._stage, error)
        self._failed[failure.code.value] = self._failed.get(failure.code.value, 0) + len(refs)
        self._show()

    def _record(self, refs: Sequence[ClipRef], code: FailureCode | None, message: str, began: float) -> None:
        seconds = time.time() - began
        self._state.catalog.record_attempts(
            Attempt(ref.clip_id, self._stage, code, message, started_at=began, seconds=seconds) for ref in refs
        )

    def report(self) -> StageReport:
        return StageReport(self._stage, self._done, self._skipped, dict(sorted(self._failed.items())), self._postponed)


@dataclass(frozen=True)
class _ObserveTask:
    ref: ClipRef
    video: str
    video_bytes: int
    settings: Settings
    policy: Policy
    store: Store
    limit_s: float


@dataclass(frozen=True)
class _Observed:
    kind: str
    sha256: str
    provenance: dict[str, Any]


def _observe_clip(task: _ObserveTask) -> _Observed:
    """In an observing process: `_observe_here`, with every error typed while its whole chain of causes is known."""
    try:
        return _observe_here(task)
    except (ClipFailure, *ENDS_THE_RUN):
        raise
    except Exception as error:
        raise failure_of(error) from error


def _observe_here(task: _ObserveTask) -> _Observed:
    """Prescreen and measure a clip; keep its frames if the policy accepts it with the whole picture."""
    from curation.observe.frames import write_frames
    from curation.observe.observations import write_observations
    from curation.observe.observe import observe, prescreen
    from curation.people.detector import detector_for

    settings, store = task.settings.observe, task.store
    assert settings.detector is not None  # resolved by preflight
    video = store.get(task.video, task.video_bytes)
    if video is None:
        raise ClipFailure(FailureCode.NETWORK, _NOT_HERE)
    detector = detector_for(settings, settings.detector)
    observations = prescreen(task.ref, video, settings, detector, task.policy.prescreen_share)
    if observations is None or judge_observations(observations, task.policy).decision != "reject":
        observations, frames = observe(task.ref, video, settings, detector)
        accepted = judge_observations(observations, task.policy).decision == "accept"
        if accepted and part_taken(observations, task.policy) == WHOLE:
            write_frames(frames, store.path(frames_name(task.ref)))
            store.put(frames_name(task.ref))
    name = observation_name(task.ref)
    write_observations(observations, store.path(name))
    store.put(name)
    return _Observed(observations.kind, sha256_file(store.path(name)), observations.provenance)


def build_clip_sample(context: RunContext, ref: ClipRef, teacher: Any) -> ClipSample:
    """One accepted clip with its frames, the subject's boxes on the training grid, and the teacher's depth."""
    import numpy as np

    from curation.observe.frames import read_frames, sample_frames

    settings = context.settings.observe
    file = context.catalog.observations([ref])[ref.clip_id]
    observations = readable(context, [file]).get(ref.clip_id)
    if observations is None:
        raise ClipFailure(FailureCode.NETWORK, "the measurements are missing; the next run makes them again")
    part = part_taken(observations, context.policy)
    kept = context.store.get(frames_name(ref)) if part == WHOLE else None  # kept frames show the whole picture
    frames = None if kept is None else read_frames(kept)
    if (
        frames is None
        or max(frames.width, frames.height) != settings.frame_long_side
        or not np.array_equal(frames.times_s, observations.sample_times_s)  # kept by a run with other settings
    ):
        video = videos_here(context, context.catalog.videos([ref.video_key])).get(ref.video_key)
        if video is None or (path := context.store.get(name_of(context, video.path), video.size_bytes)) is None:
            raise ClipFailure(FailureCode.NETWORK, _NOT_HERE)
        frames = sample_frames(ref, path, settings, part)
    boxes, confidence = subject_boxes(observations, context.policy)
    boxes *= np.array([frames.width, frames.height] * 2, np.float32)
    return ClipSample(
        clip_id=ref.clip_id,
        split=ref.split,
        frames=frames,
        boxes=boxes,
        box_confidence=confidence,
        depth=teacher(frames, ref.clip_id),
        provenance=context.dataset | {"teacher": teacher.provenance} | ({} if part == WHOLE else {"crop": list(part)}),
    )
