"""The flow `curate`: a manifest of ids and times becomes verdicts and shards, batch by batch, watched by Prefect.

It decides nothing: settings, order of work and outcome are those of curation.pipeline.run, which does the same job
without Prefect. The catalog, not Prefect, knows what is done; running the flow again does only what is missing.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast
from uuid import UUID

from prefect import State, allow_failure, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.context import get_run_context
from prefect.exceptions import FailedRun
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner
from pydantic import Field, ValidationError

from curation import pipeline
from curation.catalog import Funnel
from curation.failures import TRIES, FailureCode, LostError, OutageError, Trait, UsageError
from curation.manifest import read_manifest
from curation.records import ClipRef
from curation.run.batches import Batch, StageReport, read_batches
from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings, VideoLimits
from flows import stages
from flows.runners import RunnerName, make_task_runner

_TEACHER = TeacherSettings()
_OBSERVE = ObserveSettings()
_DOWNLOAD = DownloadSettings()


@flow(name="curate", description="Manifest -> videos -> observations -> verdicts -> shards.", persist_result=False)
def curate(
    manifest: Path,
    out: Path,
    policy: Path = Path("default"),
    detector: str | None = None,
    teacher: Literal["moge", "folder", "none"] = _TEACHER.kind,
    teacher_model: str = _TEACHER.model,
    teacher_name: str | None = None,
    num_tokens: Annotated[int, Field(ge=1)] = _TEACHER.num_tokens,
    teacher_batch: Annotated[int, Field(ge=1)] = _TEACHER.batch_size,
    device: str = "auto",
    sample_fps: Annotated[float, Field(gt=0)] = _OBSERVE.sample_fps,
    detector_long_side: Annotated[int, Field(ge=64, multiple_of=32)] = _OBSERVE.detector_long_side,
    detector_confidence: Annotated[float, Field(gt=0, lt=1)] = _OBSERVE.detector_confidence,
    prescreen_key_frames: Annotated[int, Field(ge=2)] = _OBSERVE.prescreen_key_frames,
    frame_long_side: Annotated[int, Field(ge=14, multiple_of=14)] = _OBSERVE.frame_long_side,
    max_height: Annotated[int, Field(ge=144)] = _DOWNLOAD.max_height,
    download_timeout_s: Annotated[float, Field(gt=0)] = _DOWNLOAD.timeout_s,
    download_retries: Annotated[int, Field(ge=0)] = _DOWNLOAD.retries,
    http_hosts: list[str] = [],  # noqa: B006 - never changed, and None would be one more case in the form
    local_root: Path | None = None,
    allow_loopback: bool = False,
    catalog_url: str | None = None,
    storage: str | None = None,
    lease_s: Annotated[float, Field(ge=3)] = 120.0,
    patience_s: Annotated[float, Field(ge=0)] = 3600.0,
    session: str = _DOWNLOAD.session,
    videos_per_hour: Annotated[int, Field(ge=0)] = _DOWNLOAD.videos_per_hour,
    pause_s: tuple[float, float] = _DOWNLOAD.pause_s,
    bytes_per_s: Annotated[int | None, Field(ge=1)] = None,
    max_video_mb: Annotated[int, Field(ge=1)] = _DOWNLOAD.max_video_mb,
    min_free_mb: Annotated[int, Field(ge=0)] = _DOWNLOAD.min_free_mb,
    budget_mb: Annotated[int | None, Field(ge=1)] = None,
    cookies: Path | None = None,
    proxy_file: Path | None = None,
    batch_clips: Annotated[int, Field(ge=1)] = 32,
    workers: Annotated[int | None, Field(ge=1)] = None,
    limits: VideoLimits = _DOWNLOAD.limits,
    clip_timeout_s: Annotated[float | None, Field(gt=0)] = None,
    debug_file: Path | None = None,
    shard_mb: Annotated[int, Field(ge=1)] = 512,
    retry: list[FailureCode] = [],  # noqa: B006
    parallel_batches: Annotated[int, Field(ge=1)] = 1,
    stage_timeout_hours: Annotated[float, Field(gt=0)] = 6.0,
    task_runner: RunnerName | None = None,
    cluster: str | None = None,
) -> State[None]:
    """Curate every clip of a manifest.

    Relative paths start at the folder where the service or worker was started: the checkout.

    Args:
        manifest: The .csv, .jsonl or .parquet list of platform, video_id, start_s, end_s.
        out: The folder for catalog, videos, observations and shards.
        policy: `default`, `paper`, or the path of a policy file.
        detector: ultralytics weights; empty takes the policy's.
        teacher: Which depth teacher runs on accepted clips; none writes shards without depth.
        teacher_model: A Hugging Face id, a local file, or the depth folder.
        teacher_name: The name recorded for a folder teacher, such as megasam.
        num_tokens: MoGe-2 tokens per frame; 777 is the native grid of 518x294.
        teacher_batch: Frames per forward pass of the teacher.
        device: auto, cpu, cuda or cuda:N, for detector and teacher.
        sample_fps: Rate of detector samples and of training frames.
        detector_long_side: Longer side of the detector's input in pixels, a multiple of 32.
        detector_confidence: Boxes below this are not stored.
        prescreen_key_frames: Clips with fewer key frames among their samples skip the prescreen.
        frame_long_side: Longer side of training frames in pixels, a multiple of 14.
        max_height: No stream whose short side is over this is fetched: 1080 takes 1920x1080 and 1080x1920.
        download_timeout_s: Seconds without an answer before a request is given up.
        download_retries: Further tries after a transient failure.
        http_hosts: Hosts (host or host:port) allowed for platform http.
        local_root: The folder below which platform local may read.
        allow_loopback: Permit loopback addresses; for tests and demonstrations only.
        catalog_url: An SQLAlchemy URL for a catalog that machines share; empty takes UNISH_CATALOG_URL of the worker's
            environment, or SQLite in the output folder. Prefect shows parameters: a password belongs into neither.
        storage: An fsspec URL, such as s3://bucket/run, where machines share videos, measurements and shards; empty
            takes UNISH_STORAGE, or keeps everything in the output folder.
        lease_s: A run that is silent for so long loses its batches to others on the same catalog.
        patience_s: A platform that must be left alone for longer is left to another run.
        session: A name for the address that platforms see; workers behind one address share its rates.
        videos_per_hour: At most so many videos per platform and session; 0 for no limit.
        pause_s: Least and most seconds between two videos of a platform.
        bytes_per_s: No video is fetched faster than this.
        max_video_mb: Larger videos are not fetched.
        min_free_mb: Disk space that a download leaves free.
        budget_mb: Videos kept at once; the oldest finished ones make room for new ones.
        cookies: A Netscape cookie file, for platforms that ask for one; neither changed nor logged.
        proxy_file: A file whose one line is the address of a proxy; never logged.
        batch_clips: Clips per batch, the unit of a task and of a shard.
        workers: Observing processes; empty is one per core.
        limits: What a video file may ask of a process before it is refused: pixels, frames, tracks.
        clip_timeout_s: Seconds for one clip in a stage; empty is a generous limit by its length.
        debug_file: A file on the machine that works, where unexpected errors are kept with all they say.
        shard_mb: A shard file is closed before it grows beyond this.
        retry: Failure codes to try again although they are permanent, such as corrupt.
        parallel_batches: Batches observed at once; more than 1 only on a Dask or Ray cluster.
        stage_timeout_hours: A stage that takes longer for one batch is given up and tried again.
        task_runner: threads, dask or ray; empty takes UNISH_TASK_RUNNER, or threads.
        cluster: The address of a running Dask or Ray cluster; empty starts a local one.

    Returns:
        Completed when the run went through, whatever the verdicts. Failed if the set-up is wrong, if nothing could be
        measured, or if a batch could not be finished.
    """
    logger = get_run_logger()
    try:
        settings = Settings(
            out=out,
            policy=policy,
            download=DownloadSettings(
                max_height=max_height,
                timeout_s=download_timeout_s,
                retries=download_retries,
                http_hosts=tuple(http_hosts),
                local_root=local_root,
                allow_loopback=allow_loopback,
                session=session,
                videos_per_hour=videos_per_hour,
                pause_s=pause_s,
                bytes_per_s=bytes_per_s,
                max_video_mb=max_video_mb,
                min_free_mb=min_free_mb,
                budget_mb=budget_mb,
                cookies=cookies,
                proxy_file=proxy_file,
                limits=limits,
            ),
            observe=ObserveSettings(
                detector=detector,
                sample_fps=sample_fps,
                detector_long_side=detector_long_side,
                detector_confidence=detector_confidence,
                prescreen_key_frames=prescreen_key_frames,
                frame_long_side=frame_long_side,
                device=device,
                limits=limits,
            ),
            teacher=TeacherSettings(
                kind=teacher,
                model=teacher_model,
                name=teacher_name,
                num_tokens=num_tokens,
                batch_size=teacher_batch,
                device=device,
            ),
            batch_clips=batch_clips,
            workers=workers,
            clip_timeout_s=clip_timeout_s,
            debug_file=debug_file,
            shard_mb=shard_mb,
            retry=tuple(retry),
            catalog_url=catalog_url or os.environ.get("UNISH_CATALOG_URL"),
            lease_s=lease_s,
            patience_s=patience_s,
            storage=storage or os.environ.get("UNISH_STORAGE"),
        )
        _refuse_relative(manifest, out, local_root, cookies, proxy_file, debug_file)
        runner = make_task_runner(task_runner, cluster, parallel_batches)
        refs = read_manifest(manifest, http_hosts=settings.download.http_hosts, allow_loopback=allow_loopback)
        if not refs:
            raise UsageError(f"{manifest.name} lists no clips; add a row and run again.")
        settings = pipeline.preflight(settings)
        batches = read_batches(refs, settings)
        logger.info("%d clips in %d batches -> %s", len(refs), len(batches), settings.place)
        with runner:
            unfinished = _work(runner, settings, batches, parallel_batches, 3600 * stage_timeout_hours)
        return _conclude(settings, refs, unfinished)
    except ValidationError as error:
        return _failed("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))
    except (UsageError, OutageError) as error:
        return _failed(str(error))


def _refuse_relative(*paths: Path | None) -> None:
    run = get_run_context().flow_run  # type: ignore[union-attr]
    if run and run.work_pool_name and not all(path is None or path.is_absolute() for path in paths):
        raise UsageError(
            "A worker of a work pool runs in a temporary folder; give absolute paths for every file and folder."
        )


class _Chain(NamedTuple):
    """One batch on its way: the futures of its four stages, in order."""

    batch: Batch
    futures: dict[str, PrefectFuture[Any]]


def _work(runner: TaskRunner[Any], settings: Settings, batches: list[Batch], lanes: int, timeout_s: float) -> list[str]:
    """Take every batch through the stages; what batches could not be finished, a sentence each.

    Stages overlap between batches, never within one: while batch k is observed, k + 1 is fetched and k - 1 has its
    teacher. `lanes` batches are observed at once; downloads go one after the other, because platforms count them.
    Runs that share a catalog share the batches: each takes what no other is at, and what a dead one held.
    """
    total = sum(len(batch.refs) for batch in batches)
    bars = {
        stage: cast(UUID, create_progress_artifact(0.0, f"curate-{stage}", f"0 of {total} clips"))
        for stage in ("download", "observe", "teach")
    }
    chains: list[_Chain] = []
    open_chains: deque[_Chain] = deque()
    unfinished: list[str] = []
    before = 0
    with pipeline.shared_work(settings, batches) as queue:
        while True:
            while len(open_chains) < lanes + 2 and (batch := queue.take()) is not None:
                while queue.passed:
                    before += len(queue.passed.pop().refs)
                futures: dict[str, PrefectFuture[Any]] = {}
                for stage, behind in (("download", 1), ("observe", lanes), ("judge", 0), ("teach", lanes)):
                    arguments: dict[str, Any] = {"settings": settings, "batch": batch}
                    if stage in bars:
                        arguments["check"] = queue.ticket(batch)
                        arguments["bar"] = stages.Bar(bars[stage], before, len(batch.refs), total)
                    wait_for: list[Any] = [*futures.values()][-1:]
                    if behind and len(chains) >= behind:
                        wait_for.append(allow_failure(chains[-behind].futures[stage]))
                    name = f"{stage}-{batch.index}"
                    task = getattr(stages, stage).with_options(timeout_seconds=timeout_s, task_run_name=name)
                    futures[stage] = runner.submit(task, arguments, wait_for=wait_for)
                chains.append(_Chain(batch, futures))
                open_chains.append(chains[-1])
                del chains[:-lanes]
                before = min(before + len(batch.refs), total)
            if open_chains:
                chain = open_chains[0]
                try:
                    unfinished += _finish(chain)
                except LostError:
                    queue.lost(open_chains.popleft().batch)
                    continue
                open_chains.popleft()
                report = chain.futures["download"].result(raise_on_failure=False)
                queue.release(chain.batch, later=isinstance(report, StageReport) and report.postponed > 0)
            elif not pipeline.wait_for_more(settings, queue):
                return unfinished


def _finish(chain: _Chain) -> list[str]:
    """Wait for a batch; a sentence if it did not go through.

    Raises UsageError if the set-up turned out wrong, OutageError if something was away for too long, and LostError if
    another worker has taken the batch over.
    """
    for stage, future in chain.futures.items():
        future.wait()
        state = future.state
        if not state.is_completed():
            error = future.result(raise_on_failure=False) if state.is_failed() else None
            if isinstance(error, UsageError | OutageError | LostError):
                raise error
            return [f"batch {chain.batch.index}, {stage}: {(state.message or state.name or '').partition(chr(10))[0]}"]
    return []


def _conclude(settings: Settings, refs: list[ClipRef], unfinished: list[str]) -> State[None]:
    """Publish the funnel and the failures, and say how the run ended."""
    funnel = pipeline.funnel(settings, refs)
    create_table_artifact(funnel.table(), "curate-funnel", f"What became of {funnel.clips} clips")
    create_markdown_artifact(_failures(settings, funnel, unfinished), "curate-failures", "What failed, and what to do")
    if unfinished:
        return _failed(
            f"{len(unfinished)} batches were not finished ({unfinished[0]}); run again, what is done is kept."
        )
    if not funnel.observed:
        code, clips = max(funnel.failed_by_code.items(), key=lambda item: item[1], default=("internal", funnel.clips))
        return _failed(f"None of {funnel.clips} clips could be measured; {clips} x {code}: {FailureCode(code).advice}")
    for platform, left_s in funnel.postponed.items():
        get_run_logger().warning("%s", pipeline.postponed(platform, left_s))
    message = f"{funnel.accepted} of {funnel.clips} clips accepted, {funnel.sharded} in {len(funnel.shards)} shards"
    failed = sum(funnel.failed_by_code.values())
    get_run_logger().info(message)
    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()  # who watches a run reads its warnings before its end
    return Completed(message=f"{message}; {failed} failed, see the artifact curate-failures" if failed else message)


def _failures(settings: Settings, funnel: Funnel, unfinished: list[str]) -> str:
    lines = ["| failure | clips | again by itself | what to do |", "|---|---|---|---|"]
    for code, clips in sorted(funnel.failed_by_code.items(), key=lambda item: (-item[1], item[0])):
        known = FailureCode(code)
        again = f"up to {TRIES} times" if Trait.THRICE in known.traits else "may work" if known.transient else "no"
        lines.append(f"| `{code}` | {clips} | {again} | {known.advice} |")
    if not funnel.failed_by_code:
        lines = ["No clip failed."]
    if unfinished:
        lines += ["", "Not finished; run again, what is done is kept:", ""] + [f"- {line}" for line in unfinished]
    return "\n".join([*lines, "", f"Clip by clip: `curation failures --out {settings.out}`"])


def _failed(message: str) -> State[None]:
    for name in ("prefect.flow_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_said_already)
    get_run_logger().error(message)
    return Failed(message=message)


def _said_already(record: logging.LogRecord) -> bool:
    """Prefect logs a long traceback of its own when a flow ends as Failed; the sentence is in the log already."""
    return not (record.exc_info and isinstance(record.exc_info[1], FailedRun))
