"""A pool of processes, one per core, that observe clips; each loads its detector once and keeps it.

Results travel back as small records; frames go through files. Knows nothing of the catalog.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: decoders and OpenVINO hold threads, and a forked copy of their locks may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_core)
    atexit.register(pool.shutdown, wait=False, cancel_futures=True)
    return pool


def _one_core() -> None:
    """One process per core: no library may start threads of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, when numpy's linear algebra and torch are first imported
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; workers end with it
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        _die_with(parent.sentinel)


def _die_with(sentinel: Any) -> None:
    """End this worker when its parent is gone, however the parent died: no orphan keeps a core busy."""
    import threading
    from multiprocessing.connection import wait as wait_for

    def watch() -> None:
        wait_for([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def spread(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None
) -> Iterator[tuple[Task, Result | BaseException]]:
    """Run function(task) in the pool; yields (task, result or exception) as they end.

    A worker that dies (out of memory, a crash in a decoder) breaks the pool: what had not ended is then run again one
    at a time, so that only the task that kills its worker fails, with a BrokenProcessPool for its result.
    """
    count = workers or cores()
    if not tasks:
        return
    pending: dict[Future[Result], Task] = {}
    left = list(tasks)
    try:
        pool = _pool(count)
        pending = {pool.submit(function, task): task for task in tasks}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                task = pending.pop(future)
                left.remove(task)
                yield task, error if error is not None else future.result()
    except BrokenProcessPool:
        _pool.cache_clear()
        for task in left:
            yield task, _alone(function, task)
        _pool(1).shutdown(wait=False)
        _pool.cache_clear()
    finally:
        for future in pending:
            future.cancel()


def _alone(function: Callable[[Task], Result], task: Task) -> Result | BaseException:
    future = _pool(1).submit(function, task)
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        _pool.cache_clear()
    return error if error is not None else future.result()
