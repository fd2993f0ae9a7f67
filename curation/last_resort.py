"""Turns an unexpected exception into a typed failure of one clip, with a fixed message.

The exception's own text may hold a title, an address or a path, so it is stored only if the user names a debug file.
There every entry begins with the ids of its clips and video, so that it can be found when they are forgotten.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from curation.failures import DISK_ERRORS, ClipFailure, FailureCode, UsageError
from curation.files import cut_short, fsync
from curation.records import ClipRef

_FULL = re.compile(  # pyarrow, torch and SQLite give the system's error only in their text
    rf"\[errno (?:{'|'.join(str(number) for number in sorted(DISK_ERRORS))})\]"
    r"|no space left on device|disk quota exceeded|file too large|disk is full",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(r"^CUDA out of memory|Insufficient memory|DefaultCPUAllocator: can't allocate memory")
_ENTRY = re.compile(rb'\{"clips": \[')  # no line of a traceback matches, because those are indented
_UNFINISHED = ".unfinished"  # suffix of a new file before it replaces the debug file


def failure_of(error: BaseException) -> ClipFailure:
    """The typed failure for any exception of a stage; a ClipFailure is returned unchanged.

    DISK_FULL or OUT_OF_MEMORY if that is the cause; else INTERNAL, with the name of the class if that is Python's or
    this program's own, and never with the exception's text.
    """
    if isinstance(error, ClipFailure):
        return error
    chain = list(_chain(error))
    if any(isinstance(link, OSError) and link.errno in DISK_ERRORS for link in chain):
        return ClipFailure(FailureCode.DISK_FULL)
    if any(isinstance(link, MemoryError) or _NO_MEMORY.search(str(link)) for link in chain):
        return ClipFailure(FailureCode.OUT_OF_MEMORY, "there was not enough memory")
    if any(not isinstance(link, ClipFailure | UsageError) and _FULL.search(str(link)) for link in chain):
        return ClipFailure(FailureCode.DISK_FULL)
    kind = type(error)
    known = kind.__module__ == "builtins" or kind.__module__.partition(".")[0] == "curation"
    named = f" ({kind.__name__})" if known else ""
    return ClipFailure(FailureCode.INTERNAL, f"an unexpected error{named}; --debug-file PATH records its traceback")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [link.__cause__, link.__context__]


def check_debug_file(path: Path) -> None:
    """Raise UsageError unless entries can be appended to this file, and only its owner can read them."""
    os.close(_open(path))


def keep_text(path: Path, refs: Sequence[ClipRef], stage: str, error: BaseException) -> None:
    """Append an exception with its full traceback, under the ids of its clips and video. Raises UsageError."""
    head = {
        "clips": [ref.clip_id for ref in refs],
        "video": refs[0].video_key if refs else "",
        "stage": stage,
        "time": round(time.time(), 3),
    }
    said = "".join(traceback.format_exception(error))
    entry = json.dumps(head) + "\n" + "".join(f"  {line}\n" for line in said.splitlines()) + "\n"
    with _locked(path) as handle, os.fdopen(os.dup(handle), "ab") as file:
        file.write((("\n" if cut_short(handle) else "") + entry).encode("utf-8", "backslashreplace"))


def remove_entries(path: Path, gone: Callable[[frozenset[str]], frozenset[str] | set[str]]) -> int:
    """Remove all entries about forgotten clips or videos from a debug file, and return how many; 0 without a file.

    gone: given the clip ids and video keys of all entries, returns those to remove. An entry whose first line was cut
    short by a full disk or a crash is removed too. A new file replaces the old one in one step. Other processes wait to
    write until then.
    """
    if not path.exists():
        _drop_unfinished(path)
        return 0
    with _locked(path) as handle:
        _drop_unfinished(path)
        with os.fdopen(os.dup(handle), "rb") as file:
            file.seek(0)
            lines = file.readlines()
        about = {number: _about(line) for number, line in enumerate(lines) if _ENTRY.match(line)}
        going = gone(frozenset().union(*(ids for ids in about.values() if ids)))
        kept: list[bytes] = []
        removed, keep = 0, True
        for number, line in enumerate(lines):
            if number in about:
                ids = about[number]
                keep = ids is not None and ids.isdisjoint(going)
                removed += not keep
            if keep:
                kept.append(line)
        if removed:
            new, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent)
            try:
                with os.fdopen(new, "wb") as file:
                    file.writelines(kept)
                    file.flush()
                    os.fsync(file.fileno())
                Path(beside).rename(path)
            except BaseException:
                Path(beside).unlink(missing_ok=True)
                raise
            fsync(path.parent)
    return removed


def _about(head: bytes) -> frozenset[str] | None:
    """The ids of an entry's clips and video; None if its first line was cut short."""
    try:
        value = json.loads(head)
    except ValueError:
        return None
    return frozenset({*value["clips"], value["video"]} - {""})


def _drop_unfinished(path: Path) -> None:
    """Delete files of killed removals, which hold entries. The caller has the lock, so no live process uses them."""
    for beside in path.parent.glob(f"{glob.escape(f'.{path.name}.')}*{_UNFINISHED}"):
        beside.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file under an exclusive lock; if another process replaced it meanwhile, the new file."""
    while True:
        handle = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), path.lstat()):
                yield handle
                return
        except FileNotFoundError:
            continue
        finally:
            os.close(handle)


def _open(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        said = "it is a link" if path.is_symlink() else error.strerror
        raise UsageError(f"The debug file {path} cannot be written ({said}); give another path.") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(handle)
        raise UsageError(
            f"The debug file {path} must be your own file, readable only by you; chmod 600 it, or give another path."
        )
    return handle
