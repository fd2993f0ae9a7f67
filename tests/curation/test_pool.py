"""The pool of processes. It stands alone, because every process of the pool imports the file with its task."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from curation.failures import ClipFailure, FailureCode
from curation.pool import WorkerError, run_all


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """The processes are there before a limit of a few seconds counts."""
    assert len(list(run_all(_pid, [0.2, 0.2, 0.2], 2))) == 3


def test_a_worker_that_dies_costs_its_own_clip_only():
    results = dict(run_all(_die_on_three, list(range(6)), 2))
    died = results.pop(3)
    assert results == {n: n * n for n in (0, 1, 2, 4, 5)}
    assert isinstance(died, ClipFailure) and died.code is FailureCode.INTERNAL


def test_a_worker_that_is_stopped_is_killed_and_replaced(tmp_path: Path):
    tasks = [(number, str(tmp_path)) for number in range(8)]
    began = time.monotonic()
    results = {task[0]: result for task, result in run_all(_stop_on_three, tasks, 2, lambda task: 2.5)}
    stopped = results.pop(3)
    assert results == {n: n * n for n in (0, 1, 2, 4, 5, 6, 7)}, "others go on"
    assert isinstance(stopped, ClipFailure) and stopped.code is FailureCode.TOO_SLOW
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    pids = {result for _, result in run_all(_pid, [0.3] * 4, 2)}
    assert len(pids) == 2 and os.getpid() not in pids, "as many as before"


def test_a_task_that_never_ends_is_ended_and_one_within_its_limit_is_not():
    results = dict(run_all(_sleep, [99.0, 0.01], 2, lambda seconds: 1.0 if seconds > 1 else 60.0))
    assert isinstance(results[99.0], ClipFailure) and results[99.0].code is FailureCode.TOO_SLOW
    assert results[0.01] == 0.01


def test_workers_are_kept_between_calls():
    first = {result for _, result in run_all(_pid, [0.2] * 4, 2)}
    assert {result for _, result in run_all(_pid, [0.2] * 4, 2)} == first and len(first) == 2


@pytest.mark.parametrize("what", ["plain", "unsendable", "exit", "unsendable result", "staged"])
def test_whatever_a_task_raises_comes_back_with_its_traceback(what: str):
    ((_, error),) = run_all(_raise, [what], 2)
    expected = {"plain": ValueError, "exit": SystemExit, "staged": ClipFailure, "unsendable": WorkerError}
    assert type(error) is expected.get(what, type(error)) and isinstance(error, BaseException)
    if what != "unsendable result":
        assert "_raise" in error.__notes__[0]
    assert dict(run_all(_sleep, [0.01], 2)) == {0.01: 0.01}


def test_a_task_that_cannot_be_sent_is_its_own_failure():
    results = list(run_all(_sleep, [0.01, lambda: None], 2))  # type: ignore[list-item]
    assert sorted(type(result).__name__ for _, result in results)[1] == "float" and len(results) == 2


def _die_on_three(number: int) -> int:
    if number == 3:
        os._exit(9)
    return number * number


def _stop_on_three(task: tuple[int, str]) -> int:
    number, folder = task
    if number == 3:
        (Path(folder) / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return number * number


def _sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def _pid(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


class _Unsendable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("said")


def _raise(what: str) -> object:
    if what == "plain":
        raise ValueError("said")
    if what == "unsendable":
        raise _Unsendable(1, 2)
    if what == "exit":
        raise SystemExit(3)
    if what == "staged":
        raise ClipFailure(FailureCode.CORRUPT, "said", 1.0)
    return lambda: None


def test_a_pool_of_another_size_takes_the_place_of_the_first():
    ((_, old),) = run_all(_pid, [0.01], 1)
    assert isinstance(old, int) and len(list(run_all(_pid, [0.01, 0.01], 2))) == 2
    for _ in range(200):
        try:
            os.kill(old, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a process of the first pool is still there")
