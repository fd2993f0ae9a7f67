"""The flow `curate`: turns a manifest of ids and times into verdicts and shards, batch by batch, under Prefect.

It decides nothing: settings, order of work and outcome are those of curation.pipeline.run, which does the same
without Prefect. The catalog, not Prefect, records what is done; running the flow again does only what is missing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast
from uuid import UUID

from prefect import State, allow_failure, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.context import FlowRunContext
from prefect.exceptions import FailedRun
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner
from pydantic import Field

from curation import pipeline
from curation.catalog import Funnel
from curation.failures import FailureCode, LostError, OutageError, UsageError
from curation.manifest import read_manifest
from curation.options import Option, options, parameters, settings_of
from curation.records import ClipRef
from curation.run.batches import Batch, StageReport, read_batches
from curation.settings import Settings
from flows import stages
from flows.runners import RunnerName, make_task_runner

_PATHS = ("local_root", "cookies", "proxy_file", "debug_file")


def _parameter(option: Option) -> Any:
    """The type of an option with its bounds, for Prefect's form and parameter validation."""
    kind = list[FailureCode] if option.name == "retry" else option.type
    bounds = [] if option.env else option.field.metadata  # an empty text takes the variable
    return Annotated[(kind, *bounds)] if bounds else kind


def _described(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to the docstring, from which Prefect takes the description of each parameter."""
    lines = []
    for option in options().values():
        said = f"{option.field.description}"
        if option.env:
            said += (
                f" Empty takes {option.env} of the worker's environment: put passwords there, Prefect shows parameters."
            )
        lines.append(f"        {option.name}: {said}\n")
    before, mark, after = (function.__doc__ or "").partition("        parallel_batches:")
    function.__doc__ = "".join([before, *lines, mark, after])
    return function


@flow(name="curate", description="Manifest -> videos -> observations -> verdicts -> shards.", persist_result=False)
@parameters(options().values(), _parameter)
@_described
def curate(
    manifest: Path,
    out: Path,
    *,
    parallel_batches: Annotated[int, Field(ge=1)] = 1,
    stage_timeout_hours: Annotated[float, Field(gt=0)] = 6.0,
    task_runner: RunnerName | None = None,
    cluster: str | None = None,
    **values: Any,
) -> State[None]:
    """Curate every clip of a manifest.

    Relative paths start at the folder where the service or worker was started: the checkout.

    Args:
        manifest: The .csv, .jsonl or .parquet list of platform, video_id, start_s, end_s.
        out: The folder for catalog, videos, observations and shards.
        parallel_batches: Batches observed at once; more than 1 only on a Dask or Ray cluster.
        stage_timeout_hours: A stage that takes longer for one batch is stopped and retried.
        task_runner: threads, dask or ray; if empty, the value of UNISH_TASK_RUNNER, or threads.
        cluster: The address of a running Dask or Ray cluster; if empty, a local one is started.

    Returns:
        Completed when all batches are finished, whatever the verdicts. Failed if the set-up is wrong, if no clip could
        be measured, or if a batch could not be finished.
    """
    logger = get_run_logger()
    try:
        settings = settings_of(out, values)
        _refuse_relative(manifest, out, *(values[name] for name in _PATHS))
        runner = make_task_runner(task_runner, cluster, parallel_batches)
        download = settings.download
        refs = read_manifest(manifest, http_hosts=download.http_hosts, allow_loopback=download.allow_loopback)
        if not refs:
            raise UsageError(f"{manifest.name} lists no clips; add a row and run again.")
        settings = pipeline.preflight(settings)
        batches = read_batches(refs, settings)
        logger.info("%d clips in %d batches -> %s", len(refs), len(batches), settings.place)
        with runner:
            unfinished = _work(runner, settings, batches, parallel_batches, 3600 * stage_timeout_hours)
        return _conclude(settings, refs, unfinished)
    except (UsageError, OutageError) as error:
        return _failed(str(error))


def _refuse_relative(*paths: Path | None) -> None:
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run and run.work_pool_name and not all(path is None or path.is_absolute() for path in paths):
        raise UsageError(
            "A worker of a work pool runs in a temporary folder; give absolute paths for every file and folder."
        )


class _Chain(NamedTuple):
    """One batch in progress: the futures of its four stages, in order."""

    batch: Batch
    futures: dict[str, PrefectFuture[Any]]


def _work(runner: TaskRunner[Any], settings: Settings, batches: list[Batch], lanes: int, timeout_s: float) -> list[str]:
    """Take every batch through the stages; returns one sentence for each unfinished batch.

    Stages overlap between batches, never within one: while batch k is observed, k + 1 is downloaded and k - 1 is
    taught. `lanes` batches are observed at once; downloads run one after the other, because platforms count them.
    Runs that share a catalog share the batches: each takes batches that no live run holds.
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
    """Wait for a batch; returns a sentence if it was not finished.

    Raises UsageError if the set-up is wrong, OutageError if an outage lasted too long, and LostError if another worker
    has taken over the batch.
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
    """Publish the funnel and the failures, and return the final state."""
    funnel = pipeline.funnel(settings, refs)
    create_table_artifact(funnel.table(), "curate-funnel", f"What became of {funnel.clips} clips")
    create_markdown_artifact(_failures(settings, funnel, unfinished), "curate-failures", "What failed, and what to do")
    if unfinished:
        return _failed(
            f"{len(unfinished)} batches were not finished ({unfinished[0]}); run again: finished work is kept."
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
        handler.flush()  # so that --watch shows the warnings before the run ends
    return Completed(message=f"{message}; {failed} failed, see the artifact curate-failures" if failed else message)


def _failures(settings: Settings, funnel: Funnel, unfinished: list[str]) -> str:
    lines = ["| failure | clips | tried again by the next run | what to do |", "|---|---|---|---|"]
    for code, clips in sorted(funnel.failed_by_code.items(), key=lambda item: (-item[1], item[0])):
        known = FailureCode(code)
        lines.append(f"| `{code}` | {clips} | {known.retried} | {known.advice} |")
    if not funnel.failed_by_code:
        lines = ["No clip failed."]
    if unfinished:
        lines += ["", "Not finished; run again, finished work is kept:", ""] + [f"- {line}" for line in unfinished]
    return "\n".join([*lines, "", f"Clip by clip: `curation failures --out {settings.out}`"])


def _failed(message: str) -> State[None]:
    for name in ("prefect.flow_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_said_already)
    get_run_logger().error(message)
    return Failed(message=message)


def _said_already(record: logging.LogRecord) -> bool:
    """Drop the traceback that Prefect logs when a flow ends as Failed; the log already has the sentence."""
    return not (record.exc_info and isinstance(record.exc_info[1], FailedRun))
