"""The stages in order, for a batch of clips: download, observe, judge, teach. No workflow engine here.

Every stage reads the catalog and does only what is missing. A failure of one clip, whatever the error, is recorded
there with its type and never raised: only a wrong set-up, a long outage or a lost lease ends a stage. A process may
die at any point: files are renamed into place first, completion is recorded last.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

from curation.catalog import Catalog, Funnel
from curation.download.credentials import check_settings
from curation.failures import FailureCode, LostError, UsageError
from curation.judge.policy import find_policy, load_policy
from curation.last_resort import check_debug_file
from curation.people.detector import detector_ready
from curation.people.weights import find_weights
from curation.records import ClipRef
from curation.run import stages
from curation.run.batches import Batch, Progress, StageReport, read_batches
from curation.run.claims import Claims, Queue
from curation.run.context import context_of, forget_cached
from curation.run.dataset import heal, shards_with
from curation.run.files import FOLDERS
from curation.run.todo import finished
from curation.settings import Settings
from curation.storage import Store
from curation.teach.teacher import check_teacher
from curation.video.ffmpeg import ffmpeg_exe

POLL_S = 2.0  # how often a worker asks for batches that other workers hold
_AHEAD = 2  # batches fetched before they are observed: enough to hide the network, few enough to bound disk use


def preflight(settings: Settings) -> Settings:
    """Check everything that could stop a run before any work is done; return the settings with all paths resolved.

    Raises UsageError for the policy, detector or teacher weights, ffmpeg, or an output folder or debug file that is not
    writable.
    """
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
                f"{out / name} is a file, but a run needs a folder there; move the file, or choose another --out."
            )
    debug_file = settings.debug_file and settings.debug_file.expanduser().absolute()
    if debug_file is not None:
        check_debug_file(debug_file)
    policy = load_policy(settings.policy)
    ffmpeg_exe()
    weights = find_weights(settings.observe.detector or policy.detector)
    observe_settings = settings.observe.model_copy(update={"detector": str(weights)})
    detector_ready(str(weights), observe_settings)
    download_settings = settings.download
    places = {name: getattr(download_settings, name) for name in ("local_root", "cookies", "proxy_file")}
    places = {name: path and path.expanduser().absolute() for name, path in places.items()}
    if places["local_root"] is not None and not places["local_root"].is_dir():
        raise UsageError(f"The folder of local videos {places['local_root']} does not exist; correct --local-root.")
    download_settings = download_settings.model_copy(update=places)
    check_settings(download_settings)
    settings = settings.model_copy(
        update={
            "out": out,
            "policy": find_policy(settings.policy),
            "observe": observe_settings,
            "teacher": check_teacher(settings.teacher),
            "download": download_settings,
            "debug_file": debug_file,
        }
    )
    Catalog(settings.database)
    Store(out, settings.storage).check()
    return settings


def check_refs(refs: Sequence[ClipRef], settings: Settings) -> None:
    """Raise UsageError for a mistake that would make every clip of a platform fail."""
    if not refs:
        raise UsageError("The manifest lists no clips; add a row and run again.")
    if settings.download.local_root is None and any(ref.platform == "local" for ref in refs):
        raise UsageError("The manifest has local clips; give their folder of videos with --local-root (local_root).")


def funnel(settings: Settings, refs: Sequence[ClipRef] | None) -> Funnel:
    """How far these clips, or all of the catalog, got."""
    context = context_of(settings)
    counts = context.catalog.funnel(refs, context.policy.hash, context.dataset_hash)
    if refs is not None and counts.clips < len(refs):
        forgotten = {("download", FailureCode.FORGOTTEN.value): len(refs) - counts.clips}
        counts = replace(counts, clips=len(refs), failed=counts.failed | forgotten)
    return replace(
        counts,
        shards=shards_with(context, refs),
        folder=f"{settings.place}/{context.shards}",
        postponed={block.service.partition("-")[0]: block.left_s for block in context.catalog.blocks()},
    )


def run(settings: Settings, refs: Sequence[ClipRef], progress: Callable[[str, int, int], None] | None = None) -> Funnel:
    """The whole job without a workflow engine: batch k is observed while batch k + 1 is fetched.

    Workers that share a catalog may run the same manifest at once: each takes the batches that no other worker holds,
    and those of dead workers. progress: called with (stage, clips done, total clips). Raises UsageError before any
    work, and OutageError if the database or the storage stays unavailable for too long.
    """
    settings = preflight(settings)
    check_refs(refs, settings)
    done = dict.fromkeys(("download", "observe", "teach"), 0)

    def advance(batch: Batch, *names: str) -> None:
        for stage in names:
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
                    work = partial(stages.download, settings, batch, shown("download"), check)
                    fetching.append((batch, fetcher.submit(work)))
                while queue.passed:
                    advance(queue.passed.pop(), *done)
                if fetching:
                    batch, fetched = fetching.popleft()
                    check = partial(queue.check, batch)
                    try:
                        report = fetched.result()
                        advance(batch, "download")
                        stages.observe(settings, batch, shown("observe"), check)
                        advance(batch, "observe")
                        stages.judge(settings, batch)
                        stages.teach(settings, batch, shown("teach"), check)
                        advance(batch, "teach")
                    except LostError:
                        queue.lost(batch)
                        continue
                    queue.release(batch, later=report.postponed > 0)
                elif not wait_for_more(settings, queue):
                    break
    finally:
        fetcher.end()
    return funnel(settings, refs)


class _Fetcher:
    """Downloads batches one by one, in a daemon thread, so that a long wait never delays process exit."""

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
    """The batches, shared one by one among all workers of the catalog.

    Where machines share files, the catalog alone decides whether a batch is done. On one disk the files are checked
    too, because one may be damaged or missing.
    """
    context = context_of(settings)
    with Claims(context.catalog, settings.out, settings.lease_s) as claims:
        index = heal(context)
        trusting = context.store.has_url and index.version > 0  # without an index this is a different storage
        yield Queue(claims, batches, lambda batch: finished(context, batch.refs), trusting=trusting)


def wait_for_more(settings: Settings, queue: Queue[Batch]) -> bool:
    """Wait a little for batches of other workers, or for a platform that limits requests; False to end the run.

    A platform that is blocked for longer than `settings.patience_s` is left to a later run.
    """
    if queue.waiting:
        time.sleep(POLL_S)
        return True
    if not queue.postponed:
        return False
    catalog = context_of(settings).catalog
    blocks = catalog.blocks()
    if blocks and min(block.left_s for block in blocks) > settings.patience_s:
        return False
    time.sleep(POLL_S)
    while blocks and catalog.blocks() == blocks:
        time.sleep(POLL_S)
    queue.resume()
    return True


def postponed(platform: str, left_s: float) -> str:
    """A sentence for the user about a platform that limits requests, with a time by this machine's clock."""
    when = time.strftime("%H:%M on %d %B", time.localtime(time.time() + left_s))
    limits = f"{platform} is limiting requests from this machine"
    return f"{limits}; its clips are postponed, not failed. Run again after {when}."
