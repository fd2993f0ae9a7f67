"""Locks on files, between real processes: stopped, killed and slow ones."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from curation.failures import LostError, OutageError, UsageError
from curation.locks import LockTimeoutError, hold, holder

LEASE_S = 0.6
HOLD = """
import sys
from pathlib import Path
from curation.failures import LostError
from curation.locks import hold
with hold(Path(sys.argv[1]), "The thing", 20, float(sys.argv[2])) as held:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.check()
            print("mine", flush=True)
        except LostError as error:
            print(error, flush=True)
        if line == "end\\n":
            break
print("over", flush=True)
"""


class Child:
    """A process that holds the lock until it is told to end."""

    def __init__(self, path: Path, lease_s: float = LEASE_S) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), str(lease_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.said() == "held"

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, word: str = "check") -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.said()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(lease_s: float = LEASE_S) -> Child:
        children.append(Child(tmp_path / ".lock", lease_s))
        return children[-1]

    yield start
    for each in children:
        each.process.kill()
        each.process.communicate()


def test_one_at_a_time_and_a_dead_holder_is_no_holder(tmp_path: Path, child: Callable[..., Child]) -> None:
    first = child(lease_s=60)
    began = time.monotonic()
    with pytest.raises(LockTimeoutError) as refused, hold(tmp_path / ".lock", "The thing", 0.3, 60):
        pass
    assert time.monotonic() - began < 5
    assert f"The thing is still locked by process {first.process.pid} after" in str(refused.value)
    assert isinstance(refused.value, OutageError)  # nothing of the set-up is wrong
    first.process.kill()
    first.process.wait()
    began = time.monotonic()
    with hold(tmp_path / ".lock", "The thing", 20, 60) as held:
        assert time.monotonic() - began < 1
        held.check()
        told = holder(tmp_path / ".lock")
        assert told is not None and told.pid == os.getpid() and abs(told.started - time.time()) < 3600
    assert holder(tmp_path / ".lock") is None


def test_a_stopped_holder_is_gone_around_and_learns_of_it(tmp_path: Path, child: Callable[..., Child]) -> None:
    stopped = child()
    os.kill(stopped.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with hold(tmp_path / ".lock", "The thing", 20, LEASE_S) as held:
        assert LEASE_S < time.monotonic() - began < 10
        os.kill(stopped.process.pid, signal.SIGCONT)
        assert "was taken over" in stopped.ask()
        assert stopped.ask("end") and stopped.said() == "over"
        held.check()  # the end of the one before takes nothing from this one
        with pytest.raises(LockTimeoutError), hold(tmp_path / ".lock", "The thing", 0.2, 60):
            pass
    began = time.monotonic()
    with hold(tmp_path / ".lock", "The thing", 20, 60):
        assert time.monotonic() - began < 1


def test_a_stopped_holder_is_named_as_stopped(tmp_path: Path, child: Callable[..., Child]) -> None:
    stopped = child(lease_s=60)
    os.kill(stopped.process.pid, signal.SIGSTOP)
    with pytest.raises(LockTimeoutError, match=rf"process {stopped.process.pid} \(stopped\)"):
        while True:  # the kernel stops it in its own time
            with hold(tmp_path / ".lock", "The thing", 0.2, 60):
                pass


def test_a_slow_holder_that_lives_is_waited_for(tmp_path: Path, child: Callable[..., Child]) -> None:
    slow = child()
    with pytest.raises(LockTimeoutError), hold(tmp_path / ".lock", "The thing", 4 * LEASE_S, LEASE_S):
        pass
    assert slow.ask("end") == "mine" and slow.said() == "over"


def test_a_lost_lock_is_an_error_of_its_own() -> None:
    assert not issubclass(LostError, UsageError | OutageError)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:  # no such file system can be mounted by a test
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match="has no locks") as refused, hold(tmp_path / ".lock", "The thing", 1, 1):
        pass
    assert str(tmp_path) not in str(refused.value)
