"""The stages of curation as Prefect tasks: each takes one batch of clips and calls one function of curation.run.stages.

A clip's failure is recorded in the catalog and does not fail the task. A task fails only after an unexpected error, and
is then retried, which is safe because the stages do only what is missing. The tasks are at module level so that Dask
and Ray workers can import them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import httpx
from prefect import State, task
from prefect.artifacts import aupdate_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.logging import get_run_logger

from curation.failures import LostError, OutageError, UsageError
from curation.run import stages as work
from curation.run.batches import Batch, StageReport, StageStopped
from curation.settings import Settings

RETRY_DELAYS_S = [5.0, 60.0]
REFRESH_S = 1.0  # interval between updates of a progress bar
SAY_S = 60.0  # interval between log lines about progress


@dataclass(frozen=True)
class Bar:
    """The progress artifact of one stage of a run, and the position of a batch in it.

    before: clips of earlier batches; clips: clips of this batch; total: clips of the run.
    """

    artifact: UUID
    before: int
    clips: int
    total: int

    async def show(self, done: int) -> None:
        """Write that `done` clips of this batch are done. If the server does not answer, only the bar is lost."""
        clips = self.before + done
        try:
            await aupdate_progress_artifact(self.artifact, 100.0 * clips / self.total, f"{clips} of {self.total} clips")
        except httpx.HTTPError as error:
            get_run_logger().warning("The progress bar could not be updated: %s", error)


def worth_retrying(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """A retry helps neither a wrong set-up, nor an outage that already lasted too long, nor a lost batch."""
    return not isinstance(state.data, UsageError | OutageError | LostError)


_stage = partial(
    task,
    retries=len(RETRY_DELAYS_S),
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)


@_stage(name="download")
async def download(settings: Settings, batch: Batch, bar: Bar, check: work.Check = work.nobody_else) -> StageReport:
    """Download and verify the batch's videos."""
    return await _in_thread(partial(work.download, settings, batch, check=check), bar)


@_stage(name="observe")
async def observe(settings: Settings, batch: Batch, bar: Bar, check: work.Check = work.nobody_else) -> StageReport:
    """Decode each clip once and store its observations."""
    return await _in_thread(partial(work.observe, settings, batch, check=check), bar)


@_stage(name="judge")
async def judge(settings: Settings, batch: Batch) -> StageReport:
    """Apply the policy to the observations."""
    return await _in_thread(partial(work.judge, settings, batch), None)


@_stage(name="teach")
async def teach(settings: Settings, batch: Batch, bar: Bar, check: work.Check = work.nobody_else) -> StageReport:
    """Run the depth teacher on accepted clips and write the batch's shard."""
    return await _in_thread(partial(work.teach, settings, batch, check=check), bar)


@dataclass
class _Progress:
    """The pipeline's callback for (done, total): it only stores the number, which the event loop shows."""

    done: int = 0
    given_up: bool = False

    def __call__(self, done: int, total: int) -> None:
        if self.given_up:  # the task has timed out: end the stage at its next clip
            raise StageStopped("the task that ran this stage was stopped")
        self.done = done


async def _in_thread(stage: Callable[..., StageReport], bar: Bar | None) -> StageReport:
    """Run a blocking stage in a thread, so that the task's timeout takes effect whatever the stage waits for."""
    logger = get_run_logger()
    progress = _Progress()
    refresh = asyncio.create_task(_refresh(progress, bar)) if bar else None
    try:
        call = partial(stage, progress=progress) if bar else stage
        report = await anyio.to_thread.run_sync(call, abandon_on_cancel=True)
    finally:
        progress.given_up = True
        if refresh:
            refresh.cancel()
            with suppress(asyncio.CancelledError):
                await refresh
    if bar:
        await bar.show(bar.clips)
    failed = ", ".join(f"{code} {clips}" for code, clips in sorted(report.failed.items())) or "none"
    logger.info("%s: %d done, %d done before, failed: %s", report.stage, report.done, report.skipped, failed)
    return report


async def _refresh(progress: _Progress, bar: Bar) -> None:
    logger = get_run_logger()
    shown = said = 0
    began = told = time.monotonic()
    while True:
        await asyncio.sleep(REFRESH_S)
        if progress.done != shown:
            shown = progress.done
            await bar.show(shown)
        if shown != said and time.monotonic() - told >= SAY_S:
            said, told = shown, time.monotonic()
            left = (told - began) / shown * (bar.clips - shown)
            logger.info("%d of %d clips, about %.0f s left in this batch", bar.before + shown, bar.total, left)
