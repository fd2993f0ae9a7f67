"""How often a platform is asked, by all workers of a session together.

The times themselves live in the catalog, which every worker shares; the gate only asks it for a turn and waits for it.
It sends nothing, and it stores no host name: a plain link's host goes into the catalog as a short hash.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from curation.catalog.turns import Turn
from curation.failures import ClipFailure, FailureCode, Trait
from curation.records import ClipRef
from curation.settings import DownloadSettings

MAX_PATIENCE_S = 3660.0  # an hourly budget is always waited for; longer waits are not slept through

NAP_S = 60.0  # a breaker that opens for less is waited for


class Turns(Protocol):
    """The catalog's side: atomic across processes and machines, by one clock."""

    def take_turn(self, service: str, session: str, *, per_hour: int, pause_s: float, patience_s: float) -> Turn:
        """Reserve the next time at least `pause_s` after the last one, at most `per_hour` (0: any) in an hour."""
        ...

    def block(self, service: str, session: str, code: FailureCode, retry_after_s: float | None) -> float:
        """Open the breaker, longer each time in a row and never shorter than asked; the unix time it ends."""
        ...

    def unblock(self, service: str, session: str) -> None:
        """Close the breaker."""
        ...


@dataclass(frozen=True, slots=True)
class Blocked:
    """This service may not be asked before the unix time `until` of the catalog's clock."""

    code: FailureCode
    until: float


class Gate:
    """Called around every fetch: wait, then failed or succeeded. One gate may serve many videos of many platforms."""

    def __init__(
        self,
        catalog: Turns,
        settings: DownloadSettings,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._catalog, self._settings = catalog, settings
        self._sleep = sleep

    def wait(self, ref: ClipRef) -> Blocked | None:
        """Sleep until this video's platform may be asked; Blocked at once if that is over MAX_PATIENCE_S away."""
        service = service_of(ref)
        if service is None:
            return None
        polite = ref.platform != "http"
        while True:
            turn = self._catalog.take_turn(
                service,
                self._settings.session,
                per_hour=self._settings.videos_per_hour if polite else 0,
                pause_s=random.uniform(*self._settings.pause_s) if polite else 0.0,
                patience_s=MAX_PATIENCE_S,
            )
            if turn.blocked is None:
                if turn.wait_s > 0:
                    self._sleep(turn.wait_s)
                return None
            if turn.wait_s > NAP_S:
                return Blocked(turn.blocked, turn.until)
            self._sleep(max(1.0, turn.wait_s))

    def failed(self, ref: ClipRef, error: ClipFailure) -> None:
        """A service that takes this machine for a robot, or asks for fewer requests, is left alone by all workers."""
        service = service_of(ref)
        if service is not None and Trait.BLOCKS in error.code.traits:
            self._catalog.block(service, self._settings.session, error.code, error.retry_after_s)

    def succeeded(self, ref: ClipRef) -> None:
        """A service that gave a video has nothing against this machine."""
        service = service_of(ref)
        if service is not None:
            self._catalog.unblock(service, self._settings.session)


def service_of(ref: ClipRef) -> str | None:
    """What turns are taken for: a platform; "http-" and 12 hex digits for a host and port; None for a local file."""
    if ref.platform == "local":
        return None
    if ref.platform != "http":
        return ref.platform
    parts = urlsplit(ref.video_id)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return "http-" + hashlib.sha256(f"{parts.hostname}:{port}".encode()).hexdigest()[:12]
