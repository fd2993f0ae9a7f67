"""Locks on files: with a time limit, naming who holds them, and a way around a holder that stands still.

The kernel's lock (flock, through filelock) ends with its process, however that ended, so what a dead process held is
free at once. A stopped process keeps it, and nobody can break it: whoever has seen no sign of life for the holder's
lease takes the lock of the next generation instead, a file of its own beside the first, and from then on everybody
takes that one. The stopped process may wake and go on, so a lock here makes two writers rare, never impossible: what
is done under it must be right without it. Ask `Hold.check` before a step that is not.

A sign of life is a changed time of the lock file, watched for a lease by the watcher's own steady clock; no two
machines' clocks are ever compared. Where locks are not shared between machines, two machines do not see each other.
Never known here: what is guarded.
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
    """A lock was not to be had in time; the sentence names the process that holds it."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock, as written into its file. Tells no host: `machine` is a random token of its present boot.

    started: Unix time of the process's start in seconds, so that its number cannot be mistaken for another's.
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
    """A lock that is held. `check` raises LostError once it is known that another process went around this one."""

    def __init__(self, path: Path, what: str, generation: int) -> None:
        self._path, self._what, self._generation = path, what, generation

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken over, because this process gave no sign of life for its lease."""
        return _generation(self._path) > self._generation

    def check(self) -> None:
        """Raise LostError if somebody else has taken over."""
        if self.lost:
            raise LostError(f"{self._what} was taken over by another process while this one stood still.")


@contextmanager
def hold(path: Path, what: str, timeout_s: float, lease_s: float) -> Iterator[Hold]:
    """Hold the lock file `path`, made if need be in a folder that is there; wait for up to `timeout_s` seconds.

    what: the thing guarded, to begin a sentence with ("The shard index"). lease_s: a holder that shows no sign of life
    for so long is gone around; while held, this process shows one three times as often. To get around at all,
    `timeout_s` must be longer. Not reentrant, and not for a fork: a forked child holds nothing.

    Raises LockTimeoutError (an OutageError) that names the holder, and UsageError where the file system knows no locks
    or the file may not be written. Other errors of the body, LostError among them, pass.
    """
    deadline = time.monotonic() + timeout_s
    lock, generation = _acquire(path, what, deadline, timeout_s, lease_s)
    ended = threading.Event()
    file = _file(path, generation)
    try:
        for older in range(generation):  # whoever holds one of these has been gone around
            _file(path, older).unlink(missing_ok=True)
        _sign(file, lease_s)
        heart = threading.Thread(target=_beat, args=(file, lease_s / 3, ended), name=f"lock {path.name}", daemon=True)
        heart.start()
        yield Hold(path, what, generation)
    finally:
        ended.set()
        with suppress(OSError):  # nobody is to be named for it any more; a full or vanished disk does not matter here
            os.truncate(file, 0)
        lock.release()


def try_lock(path: Path, what: str) -> UnixFileLock | None:
    """The file's lock, made if need be, or None while another has it; `release` gives it up, in any thread.

    Raises UsageError where the file system knows no locks or the file may not be written.
    """
    lock = UnixFileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UsageError(
                f"{what} cannot be locked: its file system knows no locks (flock); choose a folder on a local disk, or "
                "mount it with locks."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(
                f"{what} cannot be locked: {path.name} may not be written; make the folder writable."
            ) from error
        raise
    return lock


def holder(path: Path) -> Holder | None:
    """Who holds this lock, if that is known and it is held."""
    try:
        record = json.loads(_file(path, _generation(path)).read_text())
        return Holder(int(record["pid"]), float(record["started"]), str(record["machine"]), float(record["lease_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@cache
def machine() -> str:
    """A token of this machine's boot and process numbering: random, the same for all its processes, no host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        told = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        told = "one machine"  # no /proc: process numbers are taken at their word
    return hashlib.sha256(f"unish {told}".encode()).hexdigest()[:16]


def _acquire(path: Path, what: str, deadline: float, timeout_s: float, lease_s: float) -> tuple[UnixFileLock, int]:
    """The lock of the newest generation, or of the next one where the newest stands still; and which one that is."""
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
            lock.release()  # another one went further around meanwhile
            continue
        if time.monotonic() >= deadline:
            by = holder(path)
            named = "another process" if by is None else str(by)
            raise LockTimeoutError(
                f"{what} is still held by {named} after {timeout_s:.0f} s; let that one finish, or end it, and run "
                "again: what is done is kept."
            )
        time.sleep(_POLL_S)


def _file(path: Path, generation: int) -> Path:
    return path if generation == 0 else path.with_name(f"{path.name}.{generation}")


def _generation(path: Path) -> int:
    """The newest generation: 0 is the lock file itself, and the first to be gone around makes 1."""
    pattern = re.compile(re.escape(path.name) + r"\.([0-9]+)")
    found = (pattern.fullmatch(beside.name) for beside in path.parent.iterdir())
    return max((int(match[1]) for match in found if match), default=0)


def _changed(path: Path, generation: int) -> int:
    """When the holder last showed itself, as its file system counts; only ever compared for being the same."""
    try:
        return _file(path, generation).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _sign(file: Path, lease_s: float) -> None:
    with suppress(OSError):  # a full disk: then a timeout names nobody
        record = {"pid": os.getpid(), "started": _started(), "machine": machine(), "lease_s": lease_s}
        file.write_text(json.dumps(record))


def _beat(file: Path, every_s: float, ended: threading.Event) -> None:
    while not ended.wait(every_s):
        with suppress(OSError):  # taken away by whoever went around: `Hold.check` will say so
            os.utime(file)


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third one on; empty where there are none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    return next(iter(_stat(pid)), "")


def _started() -> float:
    """Unix time of this process's start, 0 where it is not told."""
    fields = _stat("self")
    if len(fields) < 20:
        return 0.0
    up = float(Path("/proc/uptime").read_text().split()[0])
    return round(time.time() - up + float(fields[19]) / os.sysconf("SC_CLK_TCK"), 2)
