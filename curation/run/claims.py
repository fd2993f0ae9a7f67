"""Which worker works on what: names held in the catalog for a while, kept by a heartbeat, and back when a worker dies.

A claim saves doing work twice; it is not what keeps results right. A worker that was asleep for so long that its claims
lapsed may have lost them: `check` says so, before it writes. One that falls asleep between the check and the writing
finishes what another has begun: both write the same bytes under the same names.
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
_GOODBYE_S = 5.0  # how long the end of a worker waits for a database that is away: its claims lapse by themselves
_SIGNS = "The sign of a worker"
_LOST = "This worker stood still for so long that another one took its batch over."


class Claims:
    """What this worker holds. A context manager: at its end all is given back. Safe to share between threads.

    folder: the worker's own, or one that several workers of this machine use; there a dead one is known at once, by a
    file that it had locked. Elsewhere, and for one that is stopped, its claims lapse after so many `seconds` without a
    heartbeat.
    """

    def __init__(self, catalog: Catalog, folder: Path, seconds: float) -> None:
        self._catalog, self._seconds = catalog, seconds
        self._folder = folder / ".claims"
        self._owner = secrets.token_hex(8)
        self._sign: UnixFileLock | None = None
        self._sure: dict[str, float] = {}  # names held, and when each was last known to be, by the steady clock
        self._asking = threading.Lock()  # a heartbeat must not miss a name that is just being taken
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Claims:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / self._owner
        while self._sign is None:  # until no other worker takes it for a dead one's, in the moment before it is locked
            self._sign = try_lock(path, _SIGNS)
        for entry in (path, self._folder):  # or a power cut could leave a claim whose worker nobody knows to be dead
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
        """Give back what workers of this folder held that are dead."""
        for path in self._folder.iterdir():
            try:
                sign = try_lock(path, _SIGNS)
            except UsageError:  # another user's
                continue
            if sign is None:  # alive, or stopped: then its claims lapse
                continue
            try:
                self._catalog.release(path.name)
                path.unlink(missing_ok=True)
            finally:
                sign.release()

    def take(self, name: str) -> bool:
        """Hold a name if no other worker does."""
        with self._asking:
            asked = _steady()
            won = bool(self._catalog.claim([name], self._owner, self._seconds))
            if won:
                self._sure[name] = asked
        return won

    def release(self, name: str) -> None:
        """Give a name back."""
        with self._asking:
            self._sure.pop(name, None)
            self._catalog.release(self._owner, [name])

    def held(self, name: str) -> bool:
        """Whether this worker still holds a name that it took; asks the catalog only if a heartbeat is overdue."""
        sure = self._sure.get(name)
        if sure is not None and _steady() - sure > self._seconds / 2:
            self._extend()
        return name in self._sure

    def check(self, name: str) -> None:
        """Raise LostError if another worker has taken this name: its work must not be written by this one."""
        if not self.held(name):
            raise LostError(_LOST)

    def ticket(self, name: str) -> Ticket:
        """`check` for this name, to be called in another process or on another machine."""
        return Ticket(self._catalog, self._owner, name, self._seconds)

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold a name for a moment; waits for whoever holds it."""
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
    """Seconds that also pass while the machine sleeps, whatever is done to its clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass
class Ticket:
    """Asks on behalf of a worker, anywhere, whether a name is still its own. Safe to pickle before it is called."""

    catalog: Catalog
    owner: str
    name: str
    seconds: float
    _asked: float = field(default=-math.inf, init=False)

    def __call__(self) -> None:
        """Raise LostError if another worker has taken the name; asks the catalog only now and then."""
        now = _steady()
        if now - self._asked > self.seconds / 3:
            if not self.catalog.holds(self.owner, self.name):
                raise LostError(_LOST)
            self._asked = now


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
        """Give a piece back, done or not; to be offered again after `resume` if it should be."""
        self._claims.release(work.batch_id)
        if later:
            self._later.append(work)

    def lost(self, work: Work) -> None:
        """Pass over a piece that another worker has taken meanwhile; offered again like any piece that others hold."""
        self._held.append(work)

    def check(self, work: Work) -> None:
        """Raise LostError if another worker has taken this piece over."""
        self._claims.check(work.batch_id)

    def ticket(self, work: Work) -> Ticket:
        """`check` for this piece, to be called in another process or on another machine."""
        return self._claims.ticket(work.batch_id)

    @property
    def postponed(self) -> int:
        """Pieces to be offered again after `resume`."""
        return len(self._later)

    def resume(self) -> None:
        """Offer again what was left for later."""
        self._fresh.extend(self._later)
        self._later.clear()
