"""File locks with a time limit, with the holder's identity, and with a way to bypass a stopped holder.

The kernel releases its lock (flock, through filelock) when the process ends, so the lock of a dead process is free at
once. A stopped process keeps its lock, and no other process can break it. A process that sees no sign of life for the
holder's lease takes the lock of the next generation instead, a separate file, and from then on all processes use that
one. The stopped process may continue later, so a lock here makes two writers rare, not impossible: work done under it
must be correct without it. Call `Hold.check` before a step that is not.

A sign of life is a changed modification time of the lock file, watched for one lease by the watcher's own steady
clock; clocks of two machines are never compared. If a file system does not share locks between machines, they do not
see each other's locks. Unknown here: what is guarded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import Timeout, UnixFileLock

from curation.failures import LostError, OutageError, UsageError

_POLL_S = 0.05
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}


class LockTimeoutError(OutageError):
    """A lock was not free in time; the message names the process that holds it."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock, as written in its file. No host name: `machine` is a random token of the boot.

    started: Unix time in seconds of the process's start, to tell it from another process with the same pid.
    """

    pid: int
    started: float
    machine: str
    lease_s: float

    def __str__(self) -> str:
        if self.machine != machine():
            return f"process {self.pid} of another machine or container"
        return f"process {self.pid}{' (stopped)' if _state(self.pid) in ('T', 't') else ''}"


class Hold:
    """A lock that is held. `check` raises LostError once another process has bypassed this holder."""

    def __init__(self, path: Path, what: str, generation: int) -> None:
        self._path, self._what, self._generation = path, what, generation

    @property
    def lost(self) -> bool:
        """Whether another process has taken over, because this one showed no sign of life for its lease."""
        return _generation(self._path) > self._generation

    def check(self) -> None:
        """Raise LostError if another process has taken over."""
        if self.lost:
            raise LostError(f"{self._what} was taken over by another process while this one was stopped.")


@contextmanager
def hold(path: Path, what: str, timeout_s: float, lease_s: float) -> Iterator[Hold]:
    """Hold the lock file `path`, created if needed in an existing folder; wait for up to `timeout_s` seconds.

    what: the guarded resource, as the start of a sentence ("The shard index"). lease_s: a holder that shows no sign of
    life for this long is bypassed; while this process holds the lock, it shows one three times per lease. `timeout_s`
    must be longer than the lease to allow a bypass. Not reentrant; a forked child does not hold the lock.

    Raises LockTimeoutError (an OutageError) that names the holder, and UsageError if the file system has no locks or
    the file is not writable. Errors of the body, LostError included, are not caught.
    """
    deadline = time.monotonic() + timeout_s
    lock, generation = _acquire(path, what, deadline, timeout_s, lease_s)
    ended = threading.Event()
    file = _file(path, generation)
    try:
        for older in range(generation):  # the holders of these have been bypassed
            _file(path, older).unlink(missing_ok=True)
        _sign(file, lease_s)
        heart = threading.Thread(target=_beat, args=(file, lease_s / 3, ended), name=f"lock {path.name}", daemon=True)
        heart.start()
        yield Hold(path, what, generation)
    finally:
        ended.set()
        with suppress(OSError):  # clear the holder's record; a full or missing disk does not matter here
            os.truncate(file, 0)
        lock.release()


def try_lock(path: Path, what: str) -> UnixFileLock | None:
    """The file's lock, or None while another process has it; creates the file if needed. Any thread may `release` it.

    Raises UsageError if the file system has no locks or the file is not writable.
    """
    lock = UnixFileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UsageError(
                f"{what} cannot be locked: its file system has no locks (flock); choose a folder on a local disk, or "
                "mount it with locks."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(
                f"{what} cannot be locked: {path.name} is not writable; make the folder writable."
            ) from error
        raise
    return lock


def holder(path: Path) -> Holder | None:
    """The process that holds this lock; None if it is free or the holder is unknown."""
    try:
        record = json.loads(_file(path, _generation(path)).read_text())
        return Holder(int(record["pid"]), float(record["started"]), str(record["machine"]), float(record["lease_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@cache
def machine() -> str:
    """A token of this machine's boot and pid namespace: random, the same for all its processes, without a host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        told = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        told = "one machine"  # no /proc: all pids are assumed to be of this machine
    return hashlib.sha256(f"unish {told}".encode()).hexdigest()[:16]


def _acquire(path: Path, what: str, deadline: float, timeout_s: float, lease_s: float) -> tuple[UnixFileLock, int]:
    """The lock of the newest generation, or of the next one if that holder is stopped; and the generation's number."""
    watched: tuple[int, int] | None = None
    since = 0.0
    while True:
        generation = _generation(path)
        lock = try_lock(_file(path, generation), what)
        if lock is None:
            seen = generation, _changed(path, generation)
            if seen != watched:
                watched, since = seen, time.monotonic()
            told = holder(path)
            still_s = max(lease_s, told.lease_s if told is not None else 0.0)
            if time.monotonic() - since > still_s:
                lock = try_lock(_file(path, generation + 1), what)
                generation += 1
        if lock is not None:
            if _generation(path) == generation:
                return lock, generation
            lock.release()  # another process created a newer generation meanwhile
            continue
        if time.monotonic() >= deadline:
            by = holder(path)
            named = "another process" if by is None else str(by)
            raise LockTimeoutError(
                f"{what} is still locked by {named} after {timeout_s:.0f} s; let it finish, or end it, and run "
                "again: finished work is kept."
            )
        time.sleep(_POLL_S)


def _file(path: Path, generation: int) -> Path:
    return path if generation == 0 else path.with_name(f"{path.name}.{generation}")


def _generation(path: Path) -> int:
    """The newest generation: 0 is the lock file itself; the first bypass creates 1."""
    pattern = re.compile(re.escape(path.name) + r"\.([0-9]+)")
    found = (pattern.fullmatch(beside.name) for beside in path.parent.iterdir())
    return max((int(match[1]) for match in found if match), default=0)


def _changed(path: Path, generation: int) -> int:
    """The time of the holder's last sign of life, by its file system; only compared for equality."""
    try:
        return _file(path, generation).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _sign(file: Path, lease_s: float) -> None:
    with suppress(OSError):  # on a full disk a timeout cannot name the holder
        record = {"pid": os.getpid(), "started": _started(), "machine": machine(), "lease_s": lease_s}
        file.write_text(json.dumps(record))


def _beat(file: Path, every_s: float, ended: threading.Event) -> None:
    while not ended.wait(every_s):
        with suppress(OSError):  # a process that bypassed this one deleted the file: `Hold.check` reports it
            os.utime(file)


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third one on; empty if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    return next(iter(_stat(pid)), "")


def _started() -> float:
    """Unix time of this process's start; 0 if unknown."""
    fields = _stat("self")
    if len(fields) < 20:
        return 0.0
    up = float(Path("/proc/uptime").read_text().split()[0])
    return round(time.time() - up + float(fields[19]) / os.sysconf("SC_CLK_TCK"), 2)
