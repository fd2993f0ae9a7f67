"""What `prefect deployment run curate --watch` shows: one live line per stage, and warnings and errors.

Prefect's own watch prints every event and log of a run, several lines a second. This one asks the server for the run's
state, the progress that its stages publish, and its warnings and errors. Without a terminal, it prints a plain line
from time to time. It reads the run and never changes it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import ArtifactSort, LogSort
from prefect.exceptions import FlowRunWaitTimeout, FlowRunWatchError, PrefectHTTPStatusError
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import Artifact, FlowRun, State

POLL_S = 1.0
SAY_S, SAY_SHARE = 30.0, 0.05  # minimum time and progress between two plain lines about one stage
QUIET_S = 600.0  # after this time a plain line follows any progress, however small
RECENT_S = 30.0  # minimum time span that a forecast is based on
DEAF_S = 15.0  # the watch ends if the server does not answer for this long
LAST_WORDS_S = 3.0  # the logs of a failed run may arrive this long after its end
STAGES = ("download", "observe", "teach")
_ENDED = "Finished in state "  # start of Prefect's own last log line; the command says the same


class Pace:
    """Forecasts the end of a stage from its recent speed: over half of the time so far, but at least RECENT_S.

    The first progress value does not count: it includes the work of an earlier run, or the time for starting.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()
        self._began: float | None = None
        self._share = 0.0

    def add(self, now_s: float, share: float) -> None:
        """Record that `share` (0 to 1) of the stage is done at `now_s`."""
        if share > self._share:
            self._share = share
            if self._began is not None:
                self._seen.append((now_s, share))
            else:
                self._began = now_s
        if self._began is not None:
            recent_s = max(RECENT_S, (now_s - self._began) / 2)
            while len(self._seen) > 2 and self._seen[1][0] <= now_s - recent_s:
                self._seen.popleft()

    def left_s(self, now_s: float) -> float | None:
        """Seconds until the stage is done, None while there is too little data."""
        if len(self._seen) < 2:
            return None
        (first_s, first), (last_s, share) = self._seen[0], self._seen[-1]
        steps, took_s, idle_s = len(self._seen) - 1, last_s - first_s, now_s - last_s
        if idle_s > took_s / steps:  # the next step is overdue, so it is slower than the ones before
            each_s, gain = (took_s + idle_s) / (steps + 1), (share - first) / steps
            return max(0.0, (1 - share) / gain * each_s - each_s)
        return max(0.0, (1 - share) / (share - first) * took_s - idle_s)


@dataclass
class Stage:
    """One stage. share: done, from 0 to 1; clips: the same in words; left_s: seconds left, None if unknown."""

    name: str
    share: float = 0.0
    clips: str = ""
    left_s: float | None = None
    pace: Pace = field(default_factory=Pace)

    def left(self) -> str:
        """The forecast in words, empty if there is none."""
        return "" if self.left_s is None or self.share >= 1 else f"about {_duration(self.left_s)} left"


class Board:
    """The stages of a run, and the sentence that is shown before they begin."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.status = ""

    def update(self, artifacts: list[Artifact], now_s: float) -> None:
        """Update from the progress that the run has published. now_s: a monotonic clock, in seconds."""
        published = {str(artifact.key).removeprefix("curate-"): artifact for artifact in artifacts}
        before: Stage | None = None
        for name in STAGES:
            if name in published:
                stage = self.stages.setdefault(name, Stage(name))
                stage.share = cast(float, published[name].data) / 100
                stage.clips = published[name].description or ""
                stage.pace.add(now_s, stage.share)
                stage.left_s = stage.pace.left_s(now_s)
                if before is not None and before.share < 1 and stage.left_s is not None and before.left_s is not None:
                    stage.left_s = max(stage.left_s, before.left_s)  # a stage cannot end before the previous one
                before = stage

    def __rich__(self) -> Table | Text:
        if not self.stages:
            return Text(self.status)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(width=30)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for stage in self.stages.values():
            bar = ProgressBar(total=1.0, completed=stage.share)
            table.add_row(stage.name, bar, stage.clips, Text(stage.left(), style="cyan"))
        return table


async def watch_flow_run(flow_run_id: UUID, console: Console, timeout: int | None = None) -> FlowRun:
    """Show a run until it ends, and return it; replaces Prefect's function of the same name.

    timeout: seconds. Raises FlowRunWaitTimeout, and FlowRunWatchError if the server does not answer any more.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _watch(flow_run_id, console)
    except TimeoutError:
        raise FlowRunWaitTimeout(
            f"Flow run with ID {flow_run_id} exceeded watch timeout of {timeout} seconds"
        ) from None
    except asyncio.CancelledError:  # Ctrl-C
        advice = f"to end the run: prefect flow-run cancel {flow_run_id}"
        console.print(f"Stopped watching. The run continues as long as its service runs; {advice}", soft_wrap=True)
        raise


async def _watch(flow_run_id: UUID, console: Console) -> FlowRun:
    board = Board()
    deaf_since: float | None = None
    async with get_client() as client:
        words = _Words(client, flow_run_id, console)
        with _shown(board, console) as say:
            while True:
                now_s = time.monotonic()
                try:
                    run = await client.read_flow_run(flow_run_id)
                    board.status = _status(run)
                    board.update(await _progress(client, flow_run_id), now_s)
                    await words.read()
                    deaf_since = None
                except (httpx.HTTPError, PrefectHTTPStatusError) as error:
                    deaf_since = deaf_since or now_s
                    if now_s - deaf_since > DEAF_S:
                        raise FlowRunWatchError(
                            f"The Prefect server does not answer any more ({type(error).__name__}); finished work is "
                            "kept. See: python -m flows.service status"
                        ) from error
                else:
                    say(now_s)
                    if run.state is not None and run.state.is_final():
                        break
                await asyncio.sleep(POLL_S)
        await words.last(run.state)
    return run


def _status(run: FlowRun) -> str:
    state = run.state
    if state is None or state.type == StateType.SCHEDULED:
        late = state is not None and state.name == "Late"
        return (
            "waiting: another run is active, or no worker is running (python -m flows.service status)"
            if late
            else "waiting"
        )
    return "checking the set-up" if state.type == StateType.RUNNING else "starting"


async def _progress(client: PrefectClient, flow_run_id: UUID) -> list[Artifact]:
    return await client.read_artifacts(
        artifact_filter=filters.ArtifactFilter(
            flow_run_id=filters.ArtifactFilterFlowRunId(any_=[flow_run_id]),
            type=filters.ArtifactFilterType(any_=["progress"]),
        ),
        sort=ArtifactSort.CREATED_DESC,
    )


class _Words:
    """Prints each warning and error of a run once."""

    def __init__(self, client: PrefectClient, flow_run_id: UUID, console: Console) -> None:
        self._client, self._flow_run_id, self._console = client, flow_run_id, console
        self._known: set[UUID] = set()
        self._newest: datetime | None = None
        self._said = ""

    async def read(self) -> None:
        """Print new messages. Several processes send logs, so older ones may arrive late."""
        wanted = filters.LogFilter(
            flow_run_id=filters.LogFilterFlowRunId(any_=[self._flow_run_id]),
            level=filters.LogFilterLevel(ge_=logging.WARNING),
        )
        if self._newest:
            wanted.timestamp = filters.LogFilterTimestamp(after_=self._newest - timedelta(seconds=10))
        offset = 0
        while logs := await self._client.read_logs(wanted, offset=offset, sort=LogSort.TIMESTAMP_ASC):
            offset += len(logs)
            for log in logs:
                if log.id not in self._known and not log.message.startswith(_ENDED):
                    style = "red" if log.level >= logging.ERROR else "yellow"
                    self._print(f"{log.timestamp.astimezone():%H:%M:%S} {log.message}", style)
                    self._said += log.message
                self._known.add(log.id)
                self._newest = max(self._newest or log.timestamp, log.timestamp)

    async def last(self, state: State) -> None:
        """Print the messages that arrive after the end, and the final state unless a message already gave it."""
        await self.read()
        message = (state.message or "").strip()
        deadline = time.monotonic() + (0 if state.is_completed() else LAST_WORDS_S)
        while message not in self._said and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S / 2)
            await self.read()
        if message not in self._said:
            self._print(message, "green" if state.is_completed() else "red")

    def _print(self, message: str, style: str) -> None:
        self._console.print(Text(message, style), soft_wrap=True)


@contextmanager
def _shown(board: Board, console: Console) -> Iterator[Callable[[float], None]]:
    """Show the board inside the context; yields a function to call, with the time, when the board has changed."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(board, console=console, refresh_per_second=2) as live:
            yield lambda _: live.update(board)
    else:
        plain = _Plain(board, console)
        yield plain.say


class _Plain:
    """The board as lines for a log: one from time to time while a stage progresses, and one when it is done."""

    def __init__(self, board: Board, console: Console) -> None:
        self._board, self._console = board, console
        self._status = ""
        self._told: dict[str, tuple[float, float]] = {}

    def say(self, now_s: float) -> None:
        if not self._board.stages and self._board.status != self._status:
            self._status = self._board.status
            self._console.print(Text(self._status), soft_wrap=True)
        for stage in self._board.stages.values():
            told_s, share = self._told.setdefault(stage.name, (now_s, 0.0))
            since_s, moved = now_s - told_s, stage.share - share
            due = stage.share >= 1 or since_s >= QUIET_S or (since_s >= SAY_S and moved >= SAY_SHARE)
            if moved > 0 and due:
                self._told[stage.name] = (now_s, stage.share)
                line = ", ".join(filter(None, (f"{stage.name}: {stage.clips}", stage.left())))
                self._console.print(Text(line), soft_wrap=True)


def _duration(seconds: float) -> str:
    """In words, rounded to the precision of a forecast."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s" if seconds < 20 else f"{round(seconds / 5) * 5} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
