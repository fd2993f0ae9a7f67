"""Keeps the part of a broken download, decides whether it may be resumed, and removes it.

All files of an unfinished video are in <folder>/.parts/<video_key>/<work folder>/. Only the process that holds its lock
uses a work folder. The lock ends with the process, however that ends, and the next download of the same video can then
use the folder. A part is resumed only if the server still reports the ETag or Last-Modified that it sent at first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curation.download.headers import content_range, http_date, number
from curation.failures import ClipFailure, Trait
from curation.files import atomic_path

PARTS = ".parts"
FETCHED = "fetched"
PART = f"{FETCHED}.part"
VALIDATOR = "validator.json"
MAX_AGE_S = 24 * 3600.0
_LOCK = "lock"
_GONE = "gone-"
_PATIENCE = 1000
_SWEEP_EVERY_S = 3600.0
_SETTLED_S = 60.0  # RFC 9110, 8.8.2.2: a more recent Last-Modified does not distinguish two versions

_swept: dict[Path, float] = {}


@dataclass(frozen=True, slots=True)
class Validator:
    """How the server identified the content that a part belongs to. `total` in bytes; `etag` is a strong ETag."""

    format_id: str
    total: int
    etag: str | None
    modified: str | None

    @classmethod
    def of(cls, format_id: str, response: Any) -> Validator | None:
        """The validator in a response's headers; None if they do not identify the content."""
        headers = response.headers
        total = content_range(headers)[1] if response.status == 206 else number(headers.get("Content-Length"))
        etag = headers.get("ETag")
        if etag is not None and not etag.startswith('"'):
            etag = None
        modified = headers.get("Last-Modified")
        if etag is None and not _settled(modified, headers.get("Date")):
            return None
        return None if not total or headers.get("Content-Encoding") else cls(format_id, total, etag, modified)

    @property
    def condition(self) -> str:
        """The value of If-Range."""
        return self.etag or self.modified or ""

    def continued_by(self, response: Any, start: int) -> bool:
        """Whether a response is the rest of the same content from byte `start` on."""
        headers = response.headers
        if response.status != 206 or content_range(headers) != (start, self.total) or headers.get("Content-Encoding"):
            return False
        etag, modified = headers.get("ETag"), headers.get("Last-Modified")
        same = etag == self.etag if self.etag else modified == self.modified
        return same and modified in (None, self.modified)

    def write(self, work: Path) -> None:
        """Write it next to the part, before the part's first byte."""
        with atomic_path(work / VALIDATOR) as path:
            path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, work: Path) -> Validator | None:
        """The validator of the part in a work folder; None if there is no part that may be resumed."""
        try:
            validator = cls(**json.loads((work / VALIDATOR).read_text(encoding="utf-8")))
            age = time.time() - (work / VALIDATOR).stat().st_mtime
            size = (work / PART).stat().st_size
        except (OSError, ValueError, TypeError):
            return None
        return validator if 0 < size <= validator.total and age < MAX_AGE_S else None


def _settled(modified: str | None, date: str | None) -> bool:
    changed = http_date(modified)
    now = http_date(date) if date else time.time()
    return changed is not None and now is not None and now - changed >= _SETTLED_S


def drop(work: Path) -> None:
    """Remove the part in a work folder, then its validator: bytes without a validator are never resumed."""
    (work / PART).unlink(missing_ok=True)
    (work / VALIDATOR).unlink(missing_ok=True)


def tidy(work: Path) -> None:
    """Remove everything from a work folder except a part that may be resumed."""
    kept = {_LOCK} if Validator.read(work) is None else {_LOCK, PART, VALIDATOR}
    for path in work.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def workspace(folder: Path, video_key: str) -> Iterator[Path]:
    """A folder in which only this process fetches a video: an unused one, perhaps with a part to resume, or a new one.

    folder: the run's videos folder. After a failure that may pass, the part stays; otherwise everything is removed.
    """
    home = folder / PARTS / video_key
    handle, work = _claim(home)
    keep = False
    try:
        tidy(work)
        yield work
    except BaseException as error:
        keep = (
            Trait.KEEPS_PART in error.code.traits if isinstance(error, ClipFailure) else not isinstance(error, OSError)
        )
        raise
    finally:
        if keep:
            tidy(work)
        if not keep or Validator.read(work) is None:
            _remove(work)
        os.close(handle)
        _remove_if_empty(home)


def discard(folder: Path, video_key: str) -> None:
    """Remove the parts of a video, such as one to be forgotten. The process that uses a part removes it itself."""
    home = folder / PARTS / video_key
    for work in _listed(home):
        if (handle := _lock(work)) is not None:
            _remove(work)
            os.close(handle)
    _remove_if_empty(home)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a videos folder, except parts that may be resumed.

    Safe during downloads. On a file system without locks, only folders unchanged for a day are removed.
    """
    for home in _listed(folder / PARTS):
        for work in _listed(home):
            handle = _lock(work)
            if (handle is not None and Validator.read(work) is None) or _untouched(work):
                _remove(work)
            if handle is not None:
                os.close(handle)
        _remove_if_empty(home)


def sweep_now_and_then(folder: Path) -> None:
    """sweep(), at most once an hour for each folder in a process."""
    now, key = time.monotonic(), folder.absolute()
    if now - _swept.get(key, -_SWEEP_EVERY_S) >= _SWEEP_EVERY_S:
        _swept[key] = now
        sweep(folder)


def _claim(home: Path) -> tuple[int, Path]:
    for work in sorted(_listed(home)):
        if not work.name.startswith(_GONE) and (handle := _lock(work)) is not None:
            return handle, work
    for _ in range(_PATIENCE):  # another process may remove the empty folders between the steps
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            home.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=home))
            if (handle := _lock(work, new=True)) is not None:
                return handle, work
    raise OSError(errno.EAGAIN, "cannot create a work folder")


def _lock(work: Path, *, new: bool = False) -> int | None:
    """Lock a work folder; None if another process holds it, or it is gone. `new`: usable even without locks."""
    try:
        handle = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # gone, or another user's
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except BlockingIOError:
        held = False
    except OSError:
        held = new
    try:
        if held and os.fstat(handle).st_ino == (work / _LOCK).stat().st_ino:
            return handle
    except FileNotFoundError:  # it was removed before it was locked
        pass
    os.close(handle)
    return None


def _remove(work: Path) -> None:
    """Remove a work folder; renamed first, so that no process locks it while it is being emptied."""
    gone = work if work.name.startswith(_GONE) else work.with_name(_GONE + work.name)
    with contextlib.suppress(OSError):
        work.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _listed(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _untouched(work: Path) -> bool:
    try:
        latest = max(path.stat().st_mtime for path in (work, *work.rglob("*")))
    except FileNotFoundError:  # another process is changing it
        return False
    return time.time() - latest > MAX_AGE_S


def _remove_if_empty(home: Path) -> None:
    for path in (home, home.parent):
        with contextlib.suppress(OSError):
            path.rmdir()
