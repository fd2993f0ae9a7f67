"""Claims: names that a worker holds in the catalog, keeps by a heartbeat, and loses when it dies.

A claim avoids duplicate work; correct results do not depend on it. A worker that was suspended until its claims lapsed
may have lost them: `check` tells it before it writes. If it is suspended between the check and the write, it and the
new holder write the same bytes under the same names.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from filelock import UnixFileLock

from curation.failures import LostError, OutageError, UsageError
from curation.files import fsync
from curation.locks import try_lock
from curation.outages import patience

if TYPE_CHECKING:
    from curation.catalog import Catalog

_POLL_S = 0.2
_GOODBYE_S = 5.0  # how long a worker that ends waits for an unavailable database: its claims lapse by themselves
_SIGNS = "The lock file of a worker"
_LOST = "This worker sent no heartbeat for so long that another worker took over its batch."


class Claims:
    """The names that this worker holds. A context manager that releases all of them on exit. Thread-safe.

    folder: the worker's own, or shared by several workers of this machine. Workers with the same folder notice at once
    that one of them died, because its lock file is free. The claims of any other dead worker, and of a stopped one,
    lapse after `seconds` without a heartbeat.
    """

    def __init__(self, catalog: Catalog, folder: Path, seconds: float) -> None:
        self._catalog, self._seconds = catalog, seconds
        self._folder = folder / ".claims"
        self._owner = secrets.token_hex(8)
        self._sign: UnixFileLock | None = None
        self._sure: dict[str, float] = {}  # names held, and when the catalog last confirmed each, by the steady clock
        self._asking = threading.Lock()  # a heartbeat must not miss a name that is being taken
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Claims:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / self._owner
        while self._sign is None:  # before it is locked, another worker may treat this file as a dead worker's
            self._sign = try_lock(path, _SIGNS)
        for entry in (path, self._folder):  # else, after a power cut, a claim could remain with no sign that it is dead
            fsync(entry)
        self.release_dead()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        if self._heart is not None:
            self._heart.join(timeout=_GOODBYE_S)
        with suppress(UsageError, OutageError), patience(_GOODBYE_S):  # the claims lapse by themselves
            self._catalog.release(self._owner)
        if self._sign is not None:
            (self._folder / self._owner).unlink(missing_ok=True)
            self._sign.release()

    def release_dead(self) -> None:
        """Release the claims of dead workers of this folder."""
        for path in self._folder.iterdir():
            try:
                sign = try_lock(path, _SIGNS)
            except UsageError:  # another user's file
                continue
            if sign is None:  # alive, or stopped: the claims of a stopped worker lapse
                continue
            try:
                self._catalog.release(path.name)
                path.unlink(missing_ok=True)
            finally:
                sign.release()

    def take(self, name: str) -> bool:
        """Claim a name; False if another worker holds it."""
        with self._asking:
            asked = _steady()
            won = bool(self._catalog.claim([name], self._owner, self._seconds))
            if won:
                self._sure[name] = asked
        return won

    def release(self, name: str) -> None:
        """Release a name."""
        with self._asking:
            self._sure.pop(name, None)
            self._catalog.release(self._owner, [name])

    def held(self, name: str) -> bool:
        """Whether this worker still holds a name it claimed; asks the catalog only if a heartbeat is overdue."""
        sure = self._sure.get(name)
        if sure is not None and _steady() - sure > self._seconds / 2:
            self._extend()
        return name in self._sure

    def check(self, name: str) -> None:
        """Raise LostError if another worker has taken this name: this worker must then not write its result."""
        if not self.held(name):
            raise LostError(_LOST)

    def ticket(self, name: str) -> Ticket:
        """`check` for this name, to be called in another process or on another machine."""
        return Ticket(self._catalog, self._owner, name, self._seconds)

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold a name within the context; waits while another worker holds it."""
        while not self.take(name):
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            self.release(name)

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            with suppress(UsageError, OutageError):  # the next beat tries again
                self._extend()

    def _extend(self) -> None:
        with self._asking:
            asked = _steady()
            mine = self._catalog.extend(self._owner, self._seconds)
            self._sure = {name: asked for name in self._sure if name in mine}


def _steady() -> float:
    """Seconds on a clock that also runs while the machine sleeps, and that no clock change affects."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass
class Ticket:
    """Checks from any process or machine that a worker still holds a name. Safe to pickle before it is called."""

    catalog: Catalog
    owner: str
    name: str
    seconds: float
    _asked: float = field(default=-math.inf, init=False)

    def __call__(self) -> None:
        """Raise LostError if another worker has taken the name; asks the catalog at most every third of the lease."""
        now = _steady()
        if now - self._asked > self.seconds / 3:
            if not self.catalog.holds(self.owner, self.name):
                raise LostError(_LOST)
            self._asked = now


class Claimable(Protocol):
    """A piece of work with an id that is the same for all workers."""

    @property
    def batch_id(self) -> str:
        """The id."""


Work = TypeVar("Work", bound=Claimable)


class Queue(Generic[Work]):
    """One worker's queue over a list of work that all workers share; it gives out only what no other worker holds.

    finished: whether a piece is done, by the catalog alone. A piece that another worker held is offered again later,
    because that worker may have died, unless it is finished by then. trusting: call `finished` also before a piece is
    first offered. `passed` collects the finished pieces that were not given out. When `take` returns None and
    `waiting` is 0, nothing is left.
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
        """Number of pieces that other workers held at the last request."""
        return len(self._held)

    def take(self) -> Work | None:
        """Claim and return the next free piece; None if there is none at this moment."""
        while self._fresh:
            if (work := self._try(self._fresh.popleft(), self._trusting)) is not None:
                return work
        if self._held:
            self._claims.release_dead()
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

    def release(self, work: Work, *, later: bool = False) -> None:
        """Release a piece, done or not. later: offer it again after `resume`."""
        self._claims.release(work.batch_id)
        if later:
            self._later.append(work)

    def lost(self, work: Work) -> None:
        """Put back a piece that another worker has taken; offered again like any piece that others hold."""
        self._held.append(work)

    def check(self, work: Work) -> None:
        """Raise LostError if another worker has taken over this piece."""
        self._claims.check(work.batch_id)

    def ticket(self, work: Work) -> Ticket:
        """`check` for this piece, to be called in another process or on another machine."""
        return self._claims.ticket(work.batch_id)

    @property
    def postponed(self) -> int:
        """Number of pieces that `resume` offers again."""
        return len(self._later)

    def resume(self) -> None:
        """Offer again the pieces released with `later`."""
        self._fresh.extend(self._later)
        self._later.clear()
