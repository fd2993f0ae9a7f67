"""A pool of observing processes, one per core; each loads its detector once and keeps it.

Results come back as small records; frames go through files. Knows nothing of the catalog.

Every process has its own pipe and thread, and shares no lock with others: if it dies or is stopped at any point, only
its own task is lost. It is then killed by its id, and a new process replaces it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from curation.deadlines import TOO_SLOW
from curation.failures import ClipFailure, FailureCode

Task = TypeVar("Task")
Result = TypeVar("Result")

DIED = "the process that worked on it died: out of memory, or a crash in a decoder"
_LONGEST_S = 1e6  # the longest time a timer supports
_SOCKET = 74  # longest path, in bytes, of a temporary folder in which the fork server's socket name still fits


class WorkerError(Exception):
    """Replaces an exception that could not be sent from its process; its traceback is in the notes."""


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int | None,
    limit_s: Callable[[Task], float] | None = None,
) -> Iterator[tuple[Task, Result | BaseException]]:
    """Run function(task) in the pool; yield (task, result or exception) as tasks end.

    limit_s: seconds after which the task's process is killed, including the start of a new process; without it a task
    may take forever. An exception has the traceback of its process in its notes. The result is a ClipFailure if the
    process died (INTERNAL: out of memory, a crash in a decoder) or was killed (TOO_SLOW). Other tasks are unaffected.
    """
    if not tasks:
        return
    pool = _pool(workers or cores())
    pending: dict[Future[Result], Task] = {}
    try:
        for task in tasks:
            pending[pool.submit(function, task, None if limit_s is None else limit_s(task))] = task
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                yield pending.pop(future), error if error is not None else future.result()
    finally:
        for future in pending:
            future.cancel()


class _Pool:
    """`workers` threads, each with a process that it starts when first needed, and again after the process dies."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._orders: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any, float | None] | None] = SimpleQueue()
        self._children: set[_Child] = set()
        for _ in range(workers):
            threading.Thread(target=self._serve, name="worker", daemon=True).start()
        atexit.register(self._kill)

    def submit(self, function: Callable[[Any], Any], task: Any, limit_s: float | None) -> Future[Any]:
        future: Future[Any] = Future()
        self._orders.put((future, function, task, limit_s))
        return future

    def _serve(self) -> None:
        child: _Child | None = None
        while (order := self._orders.get()) is not None:
            future, function, task, limit_s = order
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if child is None or not child.alive():
                    child = self._replace(child)
                result, error = child.run(function, task, limit_s)
            except BaseException as failed:  # any error is the result for the caller that waits for this future
                result, error = None, failed
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
            del order, future, task, result, error  # keep no reference while waiting for the next
        if child is not None:
            self._children.discard(child)
            child.kill()

    def close(self) -> None:
        """Accept no more tasks; queued ones are still done."""
        for _ in range(self.workers):
            self._orders.put(None)

    def _replace(self, child: _Child | None) -> _Child:
        if child is not None:
            self._children.discard(child)
            child.kill()
        new = _Child()
        self._children.add(new)
        return new

    def _kill(self) -> None:
        """Kill all children when this process exits, also stopped ones, which would never end by themselves."""
        for child in tuple(self._children):
            child.kill()


_current: _Pool | None = None
_changing = threading.Lock()


def _pool(workers: int) -> _Pool:
    """The pool with `workers` processes; a pool of another size ends when its queued tasks are done."""
    global _current
    with _changing:
        if _current is None or _current.workers != workers:
            if _current is not None:
                _current.close()
            _current = _Pool(workers)
        return _current


def _context() -> Any:
    """How processes are started. Never as a fork of this one: decoders and OpenVINO hold threads and locks.

    On Linux, as a fork of a process without threads that has already imported torch, because that import takes seconds.
    """
    if sys.platform != "linux" or len(os.fsencode(tempfile.gettempdir())) > _SOCKET:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["curation.forks"])
    return context


class _Child:
    """One process and this end of its pipe. One thread uses it; any thread may kill it."""

    _start = threading.Lock()  # multiprocessing's list of children is not thread-safe

    def __init__(self) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), name="worker", daemon=True)
        with self._start:
            self._process.start()
        theirs.close()  # now only the process has the other end: its death ends every wait here

    def alive(self) -> bool:
        with self._start:
            return self._process.is_alive() and not self._pipe.closed

    def run(self, function: Callable[[Any], Any], task: Any, limit_s: float | None) -> tuple[Any, BaseException | None]:
        """(result, None) or (None, exception) of function(task); the exception is a ClipFailure if the process died."""
        order = pickle.dumps((function, task))
        timer = None if limit_s is None else _Timer(limit_s, self._process.kill)
        try:
            self._pipe.send_bytes(order)
            answer = self._pipe.recv_bytes()
        except (EOFError, OSError):
            answer = None
        late = timer is not None and timer.stop()
        if answer is None or late:
            self.kill()
        if answer is not None:
            return pickle.loads(answer)
        if late:
            return None, ClipFailure(FailureCode.TOO_SLOW, TOO_SLOW.format(limit_s))
        return None, ClipFailure(FailureCode.INTERNAL, DIED)

    def kill(self) -> None:
        self._process.kill()
        with self._start:
            self._process.join(timeout=5)
        self._pipe.close()


class _Timer:
    """Calls `end` after `seconds`, unless stopped before; `stop` returns whether `end` was called."""

    def __init__(self, seconds: float, end: Callable[[], None]) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._called = self._stopped = False
        self._timer = threading.Timer(min(seconds, _LONGEST_S), self._call)
        self._timer.daemon = True
        self._timer.start()

    def _call(self) -> None:
        with self._lock:
            if not self._stopped:
                self._called = True
                self._end()

    def stop(self) -> bool:
        self._timer.cancel()
        with self._lock:
            self._stopped = True
            return self._called


def _work(pipe: Connection) -> None:
    """The loop of a process of the pool, until its parent is gone."""
    _one_core()
    while True:
        try:
            order = pipe.recv_bytes()
        except EOFError:
            return
        answer: tuple[Any, BaseException | None]
        try:
            function, task = pickle.loads(order)
            answer = function(task), None
            packed = pickle.dumps(answer)
        except BaseException as error:  # the parent decides what to do with it
            packed = _packed(error)
        pipe.send_bytes(packed)


def _packed(error: BaseException) -> bytes:
    """An exception as bytes, with its traceback in its notes; replaced by a WorkerError if it cannot be pickled."""
    said = "".join(traceback.format_exception(error))
    try:
        error.add_note(said)
        packed = pickle.dumps((None, error))
        pickle.loads(packed)
    except Exception:  # an exception's own code may do anything
        other = WorkerError("an exception that cannot be sent")
        other.add_note(said)
        return pickle.dumps((None, other))
    return packed


def _one_core() -> None:
    """One process per core: no library may start its own threads."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, when numpy's linear algebra and torch are first imported
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; these processes end with it
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        _die_with(parent.sentinel)


def _die_with(sentinel: Any) -> None:
    """End this process when its parent is gone, however it died: no orphan may keep a core busy."""
    from multiprocessing.connection import wait as wait_for

    def watch() -> None:
        wait_for([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
