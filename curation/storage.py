"""The files of a run: in its folder on this disk alone, or also behind a URL that other machines share.

A name is a file's path below the folder, and below the URL. All work is done on this disk; `put` uploads a finished
file, `get` downloads one. An upload counts only after it was compared with the original; a download gets its final
name only when it is complete. If the storage is unavailable for a moment, calls wait. This module never decides what
is kept, and knows nothing of clips.
"""

from __future__ import annotations

import errno
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from curation.failures import OutageError, UsageError
from curation.files import atomic_path
from curation.outages import wait_for

T = TypeVar("T")

_LANES = 16  # parallel transfers: small files are limited by latency, not by bandwidth
_MD5 = re.compile(r"[0-9a-f]{32}")


class Store:
    """Files of a run by name. `root`: the folder on this disk; `url`: None, or any fsspec URL, such as s3://bucket/run.

    Safe to pickle and to share between threads. Raises UsageError if the URL's storage cannot be used, OutageError if
    it stays unavailable for too long. Credentials and endpoints are configured in fsspec (its configuration files and
    environment variables).
    """

    def __init__(self, root: Path, url: str | None = None) -> None:
        self.root = root
        self.url = url.rstrip("/") if url else None
        self._remote: Any = None

    def __reduce__(self) -> tuple[type[Store], tuple[Path, str | None]]:
        return Store, (self.root, self.url)

    @property
    def has_url(self) -> bool:
        """Whether files also live behind a URL."""
        return self.url is not None

    def path(self, name: str) -> Path:
        """The file's path on this disk, whether it exists or not."""
        return self.root / name

    def get(self, name: str, size: int | None = None) -> Path | None:
        """The file on this disk, downloaded if needed; None if it does not exist, or not with this size in bytes."""
        path = self.path(name)
        if path.is_file() and size in (None, path.stat().st_size):
            return path
        if not self.has_url:
            return None

        def bring() -> Path | None:
            with atomic_path(path) as beside:
                self._fs.get_file(self._at(name), str(beside))
                if beside.stat().st_size != (self._fs.info(self._at(name))["size"] if size is None else size):
                    raise _Different
            return path

        try:
            return self._try(bring)
        except (FileNotFoundError, _Different):
            return None

    def get_all(self, names: Sequence[str]) -> list[Path | None]:
        """`get` for several files in parallel; results in the order of the names."""
        return self._spread(self.get, names)

    def put(self, name: str) -> None:
        """Upload a finished file, replacing any earlier one; it appears complete or not at all.

        Object stores show an object only when it is complete; elsewhere the file gets a temporary name and is renamed.
        """
        if not self.has_url:
            return
        path, target = self.path(name), self._at(name)
        whole = "s3" in self._protocols or "gcs" in self._protocols or "abfs" in self._protocols

        def send() -> None:
            if whole:
                self._fs.put_file(str(path), target)
                self._compare(path, target)
                return
            folder, _, file = target.rpartition("/")
            beside = f"{folder}/.{file}.{secrets.token_hex(4)}"  # two workers may upload the same file
            self._fs.makedirs(folder, exist_ok=True)
            try:
                self._fs.put_file(str(path), beside)
                try:
                    self._compare(path, beside)
                    self._fs.mv(beside, target)
                except FileNotFoundError:  # a removal of forgotten clips deleted the temporary file: upload it again
                    raise _Garbled from None
            except BaseException:
                with suppress(Exception):
                    self._fs.rm_file(beside)
                raise

        try:
            self._try(send)
        except FileNotFoundError as error:
            raise UsageError(
                f"The storage {self._scheme} has no such bucket or folder; create it and run again."
            ) from error

    def create(self, name: str) -> bool:
        """`put` only if no such file exists; else upload nothing and return False.

        Only S3 does this in one atomic step; elsewhere two simultaneous callers may both get True.
        """
        if "s3" not in self._protocols:
            if self._remote_size(name) is not None:
                return False
            self.put(name)
            return True

        def send() -> bool:
            try:
                self._fs.put_file(str(self.path(name)), self._at(name), mode="create")
            except FileExistsError:
                return False
            self._compare(self.path(name), self._at(name))
            return True

        return self._try(send)

    def put_all(self, names: Sequence[str]) -> None:
        """`put` for several files in parallel."""
        self._spread(self.put, names)

    def drop(self, names: Iterable[str]) -> None:
        """Delete files on this disk and behind the URL; a missing file is not an error."""
        names = list(names)
        for name in names:
            self.path(name).unlink(missing_ok=True)
        if self.has_url:
            self._spread(lambda name: self._try(lambda: self._remove(name)), names)

    def release(self, names: Iterable[str]) -> None:
        """Delete the local copies of files that are also behind the URL, and nothing else."""
        if self.has_url:
            here = [name for name in names if self.path(name).is_file()]
            for name, there in zip(here, self._spread(self._remote_size, here), strict=True):
                with suppress(FileNotFoundError):
                    if there == self.path(name).stat().st_size:
                        self.path(name).unlink()

    def release_older(self, pattern: str, seconds: float) -> None:
        """`release` every local file whose name matches the pattern and that was written more than `seconds` ago."""
        if self.has_url:
            old = []
            for path in self.root.glob(pattern):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > seconds:
                        old.append(path.relative_to(self.root).as_posix())
            self.release(old)

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of the files directly in a folder, by name within it: behind the URL, or here without one."""
        if not self.has_url:
            here = self.path(folder)
            return {path.name: path.stat().st_size for path in here.iterdir()} if here.is_dir() else {}

        def look() -> dict[str, int]:
            self._fs.invalidate_cache()  # another machine may have written in the meantime
            try:
                entries = self._fs.ls(self._at(folder), detail=True)
            except FileNotFoundError:
                return {}
            files = (entry for entry in entries if entry["type"] == "file")
            return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in files}

        return self._try(look)

    def names(self, folder: str) -> list[str]:
        """Names of all files below a folder, at any depth, relative to it; on this disk and behind the URL."""
        here = self.path(folder)
        found = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
        if self.has_url:
            root = self._at(folder).rstrip("/") + "/"

            def look() -> list[str]:
                self._fs.invalidate_cache()
                return [str(path) for path in self._fs.find(root)]

            with suppress(FileNotFoundError):
                found.update(path.removeprefix(root) for path in self._try(look))
        return sorted(found)

    def sizes_of(self, names: Sequence[str]) -> list[int | None]:
        """Sizes in bytes of these files, in order, on this disk or behind the URL; None for one that does not exist."""

        def size(name: str) -> int | None:
            path = self.path(name)
            return path.stat().st_size if path.is_file() else self._remote_size(name)

        return self._spread(size, names)

    def _remote_size(self, name: str) -> int | None:
        try:
            return self._try(lambda: int(self._fs.info(self._at(name))["size"])) if self.has_url else None
        except FileNotFoundError:
            return None

    def check(self) -> None:
        """Raise UsageError unless files can be written, read and deleted behind the URL."""
        if not self.has_url:
            return
        name = f".writable-{secrets.token_hex(4)}"
        with atomic_path(self.path(name)) as path:
            path.write_bytes(b"test of write access\n")
        self.put(name)
        self.path(name).unlink()
        if self.get(name) is None:
            raise UsageError("The storage accepted a file but does not return it; check its settings and run again.")
        self.drop([name])

    @property
    def _fs(self) -> Any:
        if self._remote is None:
            self._remote = self._try(self._connect)  # some file systems connect when created
        return self._remote

    def _connect(self) -> Any:
        import fsspec

        try:
            return fsspec.url_to_fs(self.url, use_listings_cache=False)[0]
        except (ImportError, ValueError) as error:
            # not the error's message, which may quote part of a password
            why = "its library is not installed" if isinstance(error, ImportError) else "no library supports this URL"
            raise UsageError(
                f"The storage {self._scheme} cannot be used: {why}. For S3: pip install 'unish[s3]'."
            ) from None

    @property
    def _scheme(self) -> str:
        return f"{str(self.url).partition('://')[0]}://"

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self._fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _at(self, name: str) -> str:
        return str(self._fs._strip_protocol(f"{self.url}/{name}"))

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def _compare(self, path: Path, target: str) -> None:
        """Raise _Garbled unless the uploaded file equals the local one: by MD5 if the storage provides it."""
        info = self._fs.info(target)
        told = str(info.get("ETag", "")).strip('"')
        if int(info["size"]) != path.stat().st_size:
            raise _Garbled
        if _MD5.fullmatch(told):
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == told:
                    return
        # a multipart upload, encryption by the storage, or a storage without hashes: read the file back
        if _digest(self._fs.open(target, "rb")) != _digest(path.open("rb")):
            raise _Garbled

    def _try(self, work: Callable[[], T]) -> T:
        """Run a transfer; repeat it while the storage is unavailable, because the libraries give up after seconds."""
        try:
            return wait_for(f"The storage {self._scheme}", work, _away)
        except (FileNotFoundError, UsageError, OutageError, _Different):
            raise
        except OSError as error:
            if error.errno in _FULL:
                raise OutageError("The disk is full; free some space and run again: finished work is kept.") from None
            raise self._unusable(error) from None
        except Exception as error:  # each storage library has its own exceptions
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> UsageError:
        # the libraries' messages may name hosts and keys
        return UsageError(
            f"The storage {self._scheme} failed ({type(error).__name__}); check its address and the credentials, and "
            "run again: finished work is kept."
        )

    def _spread(self, work: Callable[[str], T], names: Sequence[str]) -> list[T]:
        if not self.has_url or len(names) < 2:
            return [work(name) for name in names]
        with ThreadPoolExecutor(min(_LANES, len(names))) as lanes:
            return list(lanes.map(work, names))


# Exceptions of storage libraries for a broken connection or an unavailable server, by name, because the libraries are
# not installed everywhere and few of these are OSErrors: botocore, aiohttp, google-auth, azure-core.
_BROKEN_LINES = {
    "HTTPClientError",
    "ConnectionError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServerTimeoutError",
    "ResponseParserError",
    "TransportError",
    "ServiceRequestError",
    "ServiceResponseError",
    "IncompleteReadError",
}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FOR_GOOD = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_FOR_GOOD_NUMBERS = _FULL | {errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL}
_ASK_AGAIN = {408, 409, 425, 429}  # statuses below 500 after which the same request may succeed


def _away(error: BaseException) -> str | None:
    """Why the storage is unavailable, if this error means that it may be back soon; else None."""
    if isinstance(error, _Garbled):
        return "an uploaded file arrived changed"
    if isinstance(error, TimeoutError):
        return "it does not respond in time"
    status = _status(error)
    if status is not None:
        return f"it responds with status {status}" if status >= 500 or status in _ASK_AGAIN else None
    if isinstance(error, OSError):
        return None if isinstance(error, _FOR_GOOD) or error.errno in _FOR_GOOD_NUMBERS else "the connection broke"
    if any(kind.__name__ in _BROKEN_LINES for kind in type(error).__mro__):
        return "the connection broke"
    return None


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, if it has one; fsspec's own errors keep the original as their cause."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        names = ("status", "status_code", "code")
        for value in (told, *(getattr(each, name, None) for name in names)):
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


class _Different(Exception):
    """A downloaded file does not have the expected size."""


class _Garbled(Exception):
    """An uploaded file differs from the original."""


def _digest(stream: Any) -> str:
    with stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
        return digest.hexdigest()
