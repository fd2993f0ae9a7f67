"""Limits how often all workers of a session together ask a platform.

The times are in the catalog, which all workers share; the gate only takes a turn there and waits for it. It sends
nothing and stores no host name: the host of a plain link goes into the catalog as a short hash.
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

MAX_PATIENCE_S = 3660.0  # enough for any hourly budget; the gate sleeps no longer than this

NAP_S = 60.0  # the gate waits for a breaker that closes within this time


class Turns(Protocol):
    """The catalog's part: atomic across processes and machines, with one clock."""

    def take_turn(self, service: str, session: str, *, per_hour: int, pause_s: float, patience_s: float) -> Turn:
        """Reserve the next time at least `pause_s` after the last one, at most `per_hour` (0: no limit) in an hour."""
        ...

    def block(self, service: str, session: str, code: FailureCode, retry_after_s: float | None) -> float:
        """Open the breaker, longer each time in a row, at least for `retry_after_s`; the Unix time when it closes."""
        ...

    def unblock(self, service: str, session: str) -> None:
        """Close the breaker."""
        ...


@dataclass(frozen=True, slots=True)
class Blocked:
    """This service must not be asked before the Unix time `until`, by the catalog's clock."""

    code: FailureCode
    until: float


class Gate:
    """Called around every fetch: wait, then failed or succeeded. One gate serves many videos of many platforms."""

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
        """Sleep until this video's platform may be asked; Blocked at once if its breaker stays open for over NAP_S, or
        its hourly budget for over MAX_PATIENCE_S.
        """
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
        """Open the breaker of a service that asks for proof of a human or limits requests."""
        service = service_of(ref)
        if service is not None and Trait.BLOCKS in error.code.traits:
            self._catalog.block(service, self._settings.session, error.code, error.retry_after_s)

    def succeeded(self, ref: ClipRef) -> None:
        """Close the breaker: a service that delivers a video does not block this machine."""
        service = service_of(ref)
        if service is not None:
            self._catalog.unblock(service, self._settings.session)


def service_of(ref: ClipRef) -> str | None:
    """The service that turns belong to: a platform; "http-" and 12 hex digits for a host and port; None if local."""
    if ref.platform == "local":
        return None
    if ref.platform != "http":
        return ref.platform
    parts = urlsplit(ref.video_id)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return "http-" + hashlib.sha256(f"{parts.hostname}:{port}".encode()).hexdigest()[:12]
