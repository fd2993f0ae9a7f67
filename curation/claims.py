"""Which worker works on what: names held in the catalog for a while, kept by a heartbeat, and back when a worker dies.

A claim saves doing work twice; it is not what keeps results right. A worker that was asleep for so long that its claims
lapsed may finish what another has begun: both write the same bytes under the same names.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Generic, Protocol, TypeVar

from curation.ingest.failures import UsageError

if TYPE_CHECKING:
    from curation.catalog import Catalog

_POLL_S = 0.2


class Claims:
    """What this worker holds. A context manager: at its end all is given back. Safe to share between threads.

    folder: the worker's own, or one that several workers of this machine use; there a dead one is known at once, by a
    file that it had locked. Elsewhere its claims lapse after so many `seconds` without a heartbeat.
    """

    def __init__(self, catalog: Catalog, folder: Path, seconds: float) -> None:
        self._catalog, self._seconds = catalog, seconds
        self._folder = folder / ".claims"
        self._owner = secrets.token_hex(8)
        self._sign: IO[bytes] | None = None
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Claims:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / self._owner
        while self._sign is None:
            sign = path.open("wb")
            fcntl.flock(sign, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_ino == os.fstat(sign.fileno()).st_ino:
                self._sign = sign
            else:  # another worker took it for a dead one's in the moment before it was locked
                sign.close()
        self.bury()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        if self._heart is not None:
            self._heart.join(timeout=self._seconds)
        with suppress(UsageError):  # the claims lapse by themselves
            self._catalog.release(self._owner)
        if self._sign is not None:
            (self._folder / self._owner).unlink(missing_ok=True)
            self._sign.close()

    def bury(self) -> None:
        """Give back what workers of this folder held that are dead."""
        for sign in self._folder.iterdir():
            with suppress(OSError), sign.open("r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody alive has it
                self._catalog.release(sign.name)
                sign.unlink()

    def take(self, name: str) -> bool:
        """Hold a name if no other worker does."""
        return bool(self._catalog.claim([name], self._owner, self._seconds))

    def leave(self, name: str) -> None:
        """Give a name back."""
        self._catalog.release(self._owner, [name])

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Hold a name for a moment; waits for whoever holds it."""
        while not self.take(name):
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            self.leave(name)

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            with suppress(UsageError):  # a database that is away for a moment; the next beat tries again
                self._catalog.extend(self._owner, self._seconds)


class Claimable(Protocol):
    """A piece of work that all workers know by the same id."""

    @property
    def batch_id(self) -> str:
        """The id."""


Work = TypeVar("Work", bound=Claimable)


class Queue(Generic[Work]):
    """Pieces of work, of which several workers have the same list; each gives out what no other is at.

    finished: whether a piece is done, by the catalog alone. A piece that another worker held is offered again later,
    unless it is finished by then: that worker may have died. trusting: ask `finished` also of pieces never offered.
    `passed` collects what was passed over. When `take` gives None and `waiting` is 0, nothing is left.
    """

    def __init__(
        self, claims: Claims, work: Sequence[Work], finished: Callable[[Work], bool], *, trusting: bool = False
    ) -> None:
        self._claims, self._finished, self._trusting = claims, finished, trusting
        self._fresh = deque(work)
        self._held: deque[Work] = deque()
        self._later: list[Work] = []
        self.passed: list[Work] = []

    @property
    def waiting(self) -> int:
        """Pieces that other workers held when last asked."""
        return len(self._held)

    def take(self) -> Work | None:
        """The next piece that is free, held from now on; None if there is none at this moment."""
        while self._fresh:
            if (work := self._try(self._fresh.popleft(), self._trusting)) is not None:
                return work
        if self._held:
            self._claims.bury()
        for _ in range(len(self._held)):
            if (work := self._try(self._held.popleft(), True)) is not None:
                return work
        return None

    def _try(self, work: Work, ask: bool) -> Work | None:
        if ask and self._finished(work):
            self.passed.append(work)
        elif self._claims.take(work.batch_id):
            return work
        else:
            self._held.append(work)
        return None

    def leave(self, work: Work, *, later: bool = False) -> None:
        """Give a piece back, done or not; to be offered again after `resume` if it should be."""
        self._claims.leave(work.batch_id)
        if later:
            self._later.append(work)

    @property
    def postponed(self) -> int:
        """Pieces to be offered again after `resume`."""
        return len(self._later)

    def resume(self) -> None:
        """Offer again what was left for later."""
        self._fresh.extend(self._later)
        self._later.clear()
