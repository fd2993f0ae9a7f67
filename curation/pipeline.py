"""The stages in order, for a batch of clips: download, observe, judge, teach. No engine in here.

Every stage looks into the catalog and does only what is missing; what fails for a clip is recorded there with its type
and never raised. Any process may die anywhere: files are renamed into place first, completion is recorded last.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from curation.batches import Batch, Funnel, Progress, StageReport, read_batches
from curation.catalog import Attempt, Catalog, ObservationFile, Output
from curation.claims import Claims, Queue
from curation.files import sha256_file
from curation.ingest.failures import FailureCode, LostError, OutageError, StageError, UsageError
from curation.manifest import ClipRef
from curation.observe.people import find_weights
from curation.policy import Policy, find_policy, load_policy, subject_boxes
from curation.policy import judge as judge_observations
from curation.records import ClipSample
from curation.settings import Settings
from curation.shards.index import INDEX_NAME
from curation.state import FOLDERS, State, forget_cached, frames_name, observation_name, state_of
from curation.storage import Store
from curation.workers import spread

POLL_S = 2.0  # how often work that other workers hold is asked for
_SCRATCH_S = 3600.0  # how long a machine keeps its copy of a video that is in the shared storage
Check = Callable[[], None]  # raises LostError once another worker has taken the batch over
_AHEAD = 2  # batches fetched before they are observed: enough to hide the network, little enough to bound the disk


def preflight(settings: Settings) -> Settings:
    """Find what would stop a run before any work is done; returns the settings with everything resolved.

    Raises UsageError: policy, detector or teacher weights, ffmpeg, an output folder that cannot be written.
    """
    from curation.evaluate import detector_ready
    from curation.ffmpeg import ffmpeg_exe
    from curation.ingest.access import check_settings
    from curation.teach.depth import check_teacher

    forget_cached()
    out = settings.out.expanduser().absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"The output folder {out} cannot be written: {error.strerror}.") from error
    for name in FOLDERS:
        if (out / name).exists() and not (out / name).is_dir():
            raise UsageError(
                f"{out / name} is a file where a run keeps a folder; move it away, or choose another --out."
            )
    policy = load_policy(settings.policy)
    ffmpeg_exe()
    weights = find_weights(settings.observe.detector or policy.detector)
    observe_settings = settings.observe.model_copy(update={"detector": str(weights)})
    detector_ready(str(weights), observe_settings)
    download_settings = settings.download
    places = {name: getattr(download_settings, name) for name in ("local_root", "cookies", "proxy_file")}
    places = {name: path and path.expanduser().absolute() for name, path in places.items()}
    if places["local_root"] is not None and not places["local_root"].is_dir():
        raise UsageError(f"The folder of local videos {places['local_root']} is not there; correct --local-root.")
    download_settings = download_settings.model_copy(update=places)
    check_settings(download_settings)
    settings = settings.model_copy(
        update={
            "out": out,
            "policy": find_policy(settings.policy),
            "observe": observe_settings,
            "teacher": check_teacher(settings.teacher),
            "download": download_settings,
        }
    )
    Catalog(settings.database)
    Store(out, settings.storage).check()
    return settings


def check_refs(refs: Sequence[ClipRef], settings: Settings) -> None:
    """Find what would fail every clip of a kind. Raises UsageError."""
    if not refs:
        raise UsageError("The manifest lists no clips; add a row and run again.")
    if settings.download.local_root is None and any(ref.platform == "local" for ref in refs):
        raise UsageError("The manifest has local clips; name the folder they lie in with --local-root (local_root).")


def nobody_else() -> None:
    """The check of a batch that no other worker can take."""


def download(
    settings: Settings, batch: Batch, progress: Progress | None = None, check: Check = nobody_else
) -> StageReport:
    """Fetch the videos that this batch still needs, one after the other, each once.

    A platform that asked to be left alone is left alone: its clips are postponed. check: asked before each video.
    """
    from curation.ingest.download import download as fetch
    from curation.ingest.politeness import Gate

    state = state_of(settings)
    log = _Log(state, "download", len(batch.refs), progress)
    refused = state.catalog.register(batch.refs)
    for ref in batch.refs:
        if ref.clip_id in refused:
            log.refuse(ref, FailureCode.FORGOTTEN)
    wanted = [ref for ref in state.to_download(batch) if ref.clip_id not in refused]
    log.skip(len(batch.refs) - len(refused) - len(wanted))
    by_video: dict[str, list[ClipRef]] = {}
    for ref in wanted:
        by_video.setdefault(ref.video_key, []).append(ref)
    gate = Gate(state.catalog, settings.download)
    state.store.release_older("videos/*/video.*", _SCRATCH_S)  # on a cluster, another machine may have used them
    for key, clips in by_video.items():
        check()
        if gate.wait(clips[0]) is not None:
            log.postpone(len(clips))
            continue
        began = time.time()
        try:
            _make_room(state)
            video = fetch(clips[0], settings.out / "videos", settings.download)
        except StageError as error:
            gate.failed(clips[0], error)
            log.failed(clips, error, began)
            continue
        except (UsageError, OutageError):
            raise
        except Exception as error:  # whatever a file does to a library, the other clips go on
            internal = StageError(FailureCode.INTERNAL, f"fetching ended with {type(error).__name__}")
            log.failed(clips, internal, began)
            continue
        gate.succeeded(clips[0])
        name = state.name_of(video.path)
        state.store.put(name)
        if not state.catalog.record_video(key, video, name):
            state.store.drop([name])  # forgotten while it was fetched
            log.failed(clips, StageError(FailureCode.FORGOTTEN, "removal was requested"), began)
            continue
        log.done(clips, began)
    return log.report()


def _make_room(state: State) -> None:
    """Delete finished videos, oldest first, until the next one fits into the budget; StageError if none is finished."""
    budget = state.settings.download.budget_mb
    if budget is None:
        return
    over = state.catalog.present_bytes() - budget * 2**20
    while over > 0:
        videos = state.catalog.finished_videos(state.policy.hash, state.dataset_hash, limit=16)
        if not videos:
            raise StageError(
                FailureCode.DISK_FULL, "The videos of unfinished clips fill budget_mb; raise it, or lower batch_clips."
            )
        for video in videos:
            state.store.drop([video.path])
            state.catalog.record_evicted([video.video_key])
            over -= video.size_bytes
            if over <= 0:
                break


def observe(
    settings: Settings, batch: Batch, progress: Progress | None = None, check: Check = nobody_else
) -> StageReport:
    """Measure every clip of the batch that has a video and no measurements yet, on all cores.

    check: asked before anything is recorded of a clip.
    """
    state = state_of(settings)
    log = _Log(state, "observe", len(batch.refs), progress)
    wanted = state.to_observe(batch.refs)
    blocked = state.given_up(wanted, ("observe",)) if wanted else frozenset()
    videos = state.videos(wanted)
    tasks = [
        _ObserveTask(
            ref,
            state.name_of(videos[ref.video_key].path),
            videos[ref.video_key].size_bytes,
            settings,
            state.policy,
            state.store,
        )
        for ref in wanted
        if ref.video_key in videos and ref.clip_id not in blocked
    ]
    log.skip(len(batch.refs) - len(tasks))
    began = {task.ref.clip_id: time.time() for task in tasks}
    for task, result in spread(_observe_clip, tasks, settings.workers):
        check()
        ref, start = task.ref, began[task.ref.clip_id]
        if isinstance(result, StageError):
            log.failed([ref], result, start)
        elif isinstance(result, UsageError | OutageError):
            raise result
        elif isinstance(result, BaseException):
            log.failed([ref], StageError(FailureCode.INTERNAL, f"observing ended with {type(result).__name__}"), start)
        else:
            digest = state.catalog.put_provenance(result.provenance)
            name = observation_name(ref)
            state.catalog.record_observations(
                [ObservationFile(ref.clip_id, result.kind, name, result.sha256, digest)]  # type: ignore[arg-type]
            )
            log.done([ref], start)
    return log.report()


def judge(settings: Settings, batch: Batch) -> StageReport:
    """Apply the policy to the batch's measurements; decodes nothing."""
    state = state_of(settings)
    known = state.catalog.verdicts(batch.refs, state.policy.hash)
    files = state.catalog.observations(batch.refs)
    missing = [files[ref.clip_id] for ref in batch.refs if ref.clip_id in files and ref.clip_id not in known]
    judged = state.judge(missing)
    return StageReport("judge", judged, len(batch.refs) - judged)


def judge_all(settings: Settings, progress: Progress | None = None) -> int:
    """Judge every measured clip of the catalog under the settings' policy; returns how many were judged anew."""
    forget_cached()  # the policy's file may have changed
    state = state_of(settings)
    judged = seen = 0
    nowhere = True
    for page in state.catalog.observed():
        known = state.catalog.verdicts([file.clip_id for file in page], state.policy.hash)
        missing = [file for file in page if file.clip_id not in known]
        nowhere = nowhere and len(missing) == len(page)
        nowhere = nowhere and not any(state.store.sizes_of([file.path for file in missing]))
        judged += state.judge(missing)
        state.store.release([file.path for file in missing])
        seen += len(page)
        if progress is not None:
            progress(seen, seen)
    if seen and nowhere and (state.store.shared or not state.store.path("observations").is_dir()):
        raise UsageError(
            f"None of {seen} measurements is in {settings.place}; give the --out and --storage of the run."
        )
    return judged


def teach(
    settings: Settings, batch: Batch, progress: Progress | None = None, check: Check = nobody_else
) -> StageReport:
    """Give the batch's accepted clips their teacher depth and write them as shards of the run's data set.

    check: asked before each clip goes into a shard, before the last shard is closed, and before they are recorded.
    """
    from curation.shards.writer import write_shards

    state = state_of(settings)
    log = _Log(state, "teach", len(batch.refs), progress)
    todo = state.to_teach(batch.refs)
    log.skip(len(batch.refs) - len(todo))
    if todo:
        digest = state.catalog.put_provenance(state.dataset)
        began: dict[str, float] = {}

        def samples() -> Iterator[ClipSample]:
            teacher = state.teacher()
            for ref in todo:
                began[ref.clip_id] = time.time()
                try:
                    sample = _sample(state, ref, teacher)
                except StageError as error:
                    log.failed([ref], error, began[ref.clip_id])
                    continue
                check()
                yield sample
                log.through()
            check()

        refs = {ref.clip_id: ref for ref in todo}
        staging = settings.out / "staging" / batch.batch_id
        folder = staging if state.store.shared else state.store.path(state.shards)
        shards = write_shards(samples(), folder, max_bytes=settings.shard_mb * 2**20)
        if state.store.shared:
            state.add_shards(staging, shards)
            shutil.rmtree(staging, ignore_errors=True)
        check()
        written = [(shard, clip) for shard in shards for clip in shard.clips if clip.clip_id in refs]
        left_out = state.catalog.record_outputs(
            Output(clip.clip_id, digest, shard.file, clip.row_group, clip.row_groups, clip.frames, shard.sha256)
            for shard, clip in written
        )
        if left_out:  # forgotten meanwhile: nothing of them may stay
            from curation.shards.writer import drop_clips

            drop_clips(state.place(), left_out)
        for _, clip in written:
            log.done([refs[clip.clip_id]], began[clip.clip_id])
        state.store.drop([frames_name(ref) for ref in todo])
    state.release(batch)
    return log.report()


def funnel(settings: Settings, refs: Sequence[ClipRef] | None) -> Funnel:
    """How far these clips, or all of the catalog, got."""
    state = state_of(settings)
    counts = state.catalog.funnel(refs, state.policy.hash, state.dataset_hash)
    failed: dict[str, int] = {}
    for (_, code), clips in counts.failed.items():
        failed[code] = min(failed.get(code, 0) + clips, counts.clips)
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
        folder=f"{settings.place}/{state.shards}",
        postponed={block.service.partition("-")[0]: block.left_s for block in state.catalog.blocks()},
    )


def run(settings: Settings, refs: Sequence[ClipRef], progress: Callable[[str, int, int], None] | None = None) -> Funnel:
    """The whole job without an engine: batch k is observed while batch k + 1 is fetched.

    Workers that share a catalog may run the same manifest at once: each takes the batches that no other is at, and
    what a dead one held. progress: called with (stage, clips done, clips in all). Raises UsageError before any work,
    and OutageError where the database or the storage is away for longer than it is waited for.
    """
    settings = preflight(settings)
    check_refs(refs, settings)
    done = dict.fromkeys(("download", "observe", "teach"), 0)

    def advance(batch: Batch, *stages: str) -> None:
        for stage in stages:
            done[stage] = min(done[stage] + len(batch.refs), len(refs))
            if progress is not None:
                progress(stage, done[stage], len(refs))

    def shown(stage: str) -> Progress | None:
        return None if progress is None else lambda now, _: progress(stage, done[stage] + now, len(refs))

    fetcher = _Fetcher()
    fetching: deque[tuple[Batch, Future[StageReport]]] = deque()
    try:
        with shared_work(settings, read_batches(refs, settings)) as queue:
            while True:
                while len(fetching) < _AHEAD and (batch := queue.take()) is not None:
                    check = partial(queue.check, batch)
                    work = partial(download, settings, batch, shown("download"), check)
                    fetching.append((batch, fetcher.submit(work)))
                while queue.passed:
                    advance(queue.passed.pop(), *done)
                if fetching:
                    batch, fetched = fetching.popleft()
                    check = partial(queue.check, batch)
                    try:
                        report = fetched.result()
                        advance(batch, "download")
                        observe(settings, batch, shown("observe"), check)
                        advance(batch, "observe")
                        judge(settings, batch)
                        teach(settings, batch, shown("teach"), check)
                        advance(batch, "teach")
                    except LostError:
                        queue.lost(batch)
                        continue
                    queue.leave(batch, later=report.postponed > 0)
                elif not wait_for_more(settings, queue):
                    break
    finally:
        fetcher.end()
    return funnel(settings, refs)


class _Fetcher:
    """Downloads, one after the other, beside the rest. Its thread holds up no end of the process: it may sleep long."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Future[StageReport], Callable[[], StageReport]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="download", daemon=True).start()

    def submit(self, work: Callable[[], StageReport]) -> Future[StageReport]:
        future: Future[StageReport] = Future()
        self._waiting.put((future, work))
        return future

    def end(self) -> None:
        self._waiting.put(None)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            future, work = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)


@contextmanager
def shared_work(settings: Settings, batches: Sequence[Batch]) -> Iterator[Queue[Batch]]:
    """The batches, given out one by one among all workers of the catalog.

    Where machines share files, what the catalog calls done is believed; on one disk it is looked at again, because a
    file may be damaged or gone.
    """
    state = state_of(settings)
    with Claims(state.catalog, settings.out, settings.lease_s) as claims:
        trusting = state.store.shared and INDEX_NAME in state.store.sizes(state.shards)  # or it is another storage
        yield Queue(claims, batches, state.finished, trusting=trusting)


def wait_for_more(settings: Settings, queue: Queue[Batch]) -> bool:
    """Wait a little for what other workers hold, or for a platform that asked to be left alone; False to end the run.

    What must be left alone for longer than `settings.patience_s` is for another run.
    """
    if queue.waiting:
        time.sleep(POLL_S)
        return True
    if not queue.postponed:
        return False
    catalog = state_of(settings).catalog
    blocks = catalog.blocks()
    if blocks and min(block.left_s for block in blocks) > settings.patience_s:
        return False
    time.sleep(POLL_S)
    while blocks and catalog.blocks() == blocks:
        time.sleep(POLL_S)
    queue.resume()
    return True


def postponed(platform: str, left_s: float) -> str:
    """A sentence for the user about a platform that asked to be left alone, with a time by this machine's clock."""
    when = time.strftime("%H:%M on %d %B", time.localtime(time.time() + left_s))
    return f"{platform} asked to be left alone; its clips are fetched by a run after {when}."


_NOT_HERE = "the video is not here; it will be fetched by the next run"


class _Log:
    """Counts a stage's clips, shows progress, and records every try in the catalog."""

    def __init__(self, state: State, stage: str, total: int, progress: Progress | None) -> None:
        self._state, self._stage, self._total, self._progress = state, stage, total, progress
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
        """Count a clip of which nothing may be recorded."""
        self._failed[code.value] = self._failed.get(code.value, 0) + 1
        self._show()

    def through(self) -> None:
        """Show a clip as done whose result is recorded later, together with others."""
        self._unrecorded += 1
        self._show()

    def done(self, refs: Sequence[ClipRef], began: float) -> None:
        self._record(refs, None, "", began)
        self._done += len(refs)
        self._unrecorded = max(0, self._unrecorded - len(refs))
        self._show()

    def failed(self, refs: Sequence[ClipRef], error: StageError, began: float) -> None:
        self._record(refs, error.code, error.message, began)
        self._failed[error.code.value] = self._failed.get(error.code.value, 0) + len(refs)
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

    settings, store = task.settings.observe, task.store
    assert settings.detector is not None  # resolved by preflight
    video = store.get(task.video, task.video_bytes)
    if video is None:
        raise StageError(FailureCode.NETWORK, _NOT_HERE)
    detector = detector_for(settings, settings.detector)
    observations = prescreen(task.ref, video, settings, detector, task.policy.prescreen_share)
    if observations is None or judge_observations(observations, task.policy).decision != "reject":
        observations, frames = observe(task.ref, video, settings, detector)
        if judge_observations(observations, task.policy).decision == "accept":
            write_frames(frames, store.path(frames_name(task.ref)))
            store.put(frames_name(task.ref))
    name = observation_name(task.ref)
    write_observations(observations, store.path(name))
    store.put(name)
    return _Observed(observations.kind, sha256_file(store.path(name)), observations.provenance)


def _sample(state: State, ref: ClipRef, teacher: Any) -> ClipSample:
    """One accepted clip with its frames, the subject's boxes on the training grid, and the teacher's depth."""
    import numpy as np

    from curation.observe.observe import sample_frames
    from curation.observe.samples import read_frames

    settings = state.settings.observe
    file = state.catalog.observations([ref])[ref.clip_id]
    observations = state.readable([file]).get(ref.clip_id)
    if observations is None:
        raise StageError(FailureCode.NETWORK, "the measurements are not here; they will be made by the next run")
    kept = state.store.get(frames_name(ref))
    frames = None if kept is None else read_frames(kept)
    if (
        frames is None
        or max(frames.width, frames.height) != settings.frame_long_side
        or not np.array_equal(frames.times_s, observations.sample_times_s)  # kept by a run with other settings
    ):
        video = state.videos([ref]).get(ref.video_key)
        if video is None or (path := state.store.get(state.name_of(video.path), video.size_bytes)) is None:
            raise StageError(FailureCode.NETWORK, _NOT_HERE)
        frames = sample_frames(ref, path, settings)
    boxes, confidence = subject_boxes(observations, state.policy)
    boxes *= np.array([frames.width, frames.height] * 2, np.float32)
    return ClipSample(
        clip_id=ref.clip_id,
        split=ref.split,
        frames=frames,
        boxes=boxes,
        box_confidence=confidence,
        depth=teacher(frames, ref.clip_id),
        provenance=state.dataset | {"teacher": teacher.provenance},
    )
