"""A pool of processes, one per core, that observe clips; each loads its detector once and keeps it.

Results travel back as small records; frames go through files. Knows nothing of the catalog.

Every process has a pipe and a thread of its own, and shares no lock with others: one that dies, or is stopped in the
middle of anything, costs its own task and no more. It is killed by its id and another one takes its place.
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
_LONGEST_S = 1e6  # what a timer can wait for
_SOCKET = 74  # bytes of a temporary folder's path in which the socket of a fork server has a name short enough


class WorkerError(Exception):
    """Stands for an exception that could not be sent from its process; its traceback is in the notes."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int | None,
    limit_s: Callable[[Task], float] | None = None,
) -> Iterator[tuple[Task, Result | BaseException]]:
    """Run function(task) in the pool; yields (task, result or exception) as they end.

    limit_s: the seconds after which the process that has the task is killed, the start of a new process included;
    without it a task may take for ever. An exception has the traceback of its process in its notes. Two ends have a
    ClipFailure for their result: INTERNAL where the process died (out of memory, a crash in a decoder), TOO_SLOW where
    it was killed. Other tasks never notice.
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
    """So many threads, each with a process that it starts when it is first needed, and anew after its death."""

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
            except BaseException as failed:  # whatever it is, it is the answer to whoever waits for this future
                result, error = None, failed
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
            del order, future, task, result, error  # nothing is held while waiting for the next
        if child is not None:
            self._children.discard(child)
            child.kill()

    def close(self) -> None:
        """Take no more orders; those that wait are still done."""
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
        """At the end of this process: also those that were stopped, and would be waited for in vain."""
        for child in tuple(self._children):
            child.kill()


_current: _Pool | None = None
_changing = threading.Lock()


def _pool(workers: int) -> _Pool:
    """The pool of this many; one of another number ends when it has done what it was given."""
    global _current
    with _changing:
        if _current is None or _current.workers != workers:
            if _current is not None:
                _current.close()
            _current = _Pool(workers)
        return _current


def _context() -> Any:
    """How processes are made. Never as a fork of this one: decoders and OpenVINO hold threads and their locks.

    On Linux as a fork of one that has no threads and has imported torch already, which takes each of them seconds.
    """
    if sys.platform != "linux" or len(os.fsencode(tempfile.gettempdir())) > _SOCKET:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["curation.forks"])
    return context


class _Child:
    """One process and this end of its pipe. One thread uses it; any may kill it."""

    _start = threading.Lock()  # multiprocessing's list of children is not for several threads

    def __init__(self) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), name="worker", daemon=True)
        with self._start:
            self._process.start()
        theirs.close()  # the only other end is the process's: its death ends every wait here

    def alive(self) -> bool:
        with self._start:
            return self._process.is_alive() and not self._pipe.closed

    def run(self, function: Callable[[Any], Any], task: Any, limit_s: float | None) -> tuple[Any, BaseException | None]:
        """(result, None) or (None, exception) of function(task); a ClipFailure where the process died before."""
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
    """Calls `end` after so many seconds, unless it was stopped; `stop` tells whether it had been called by then."""

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
    """What a process of the pool does until its parent is gone."""
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
        except BaseException as error:  # the parent's to judge
            packed = _packed(error)
        pipe.send_bytes(packed)


def _packed(error: BaseException) -> bytes:
    """An exception as bytes, its traceback in its notes; one that cannot travel is replaced."""
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
    from multiprocessing.connection import wait as wait_for

    def watch() -> None:
        wait_for([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
