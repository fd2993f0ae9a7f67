"""A minimum rate for each response, and for all responses of a video together.

A socket timeout covers one read: a server that sends one byte a second never reaches it. Here every read from the
connection is timed, below the client's own buffering, and a response whose average stays below the minimum ends as a
timeout. A response just above it, or many responses that are too short to measure, must still reach the minimum average
over the whole video. So every download ends, even one of unknown size.
Only time spent waiting for the server counts, so a client that is slow on purpose passes.
"""

from __future__ import annotations

import http.client
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from curation.failures import ClipFailure, FailureCode

FLOOR_BYTES_PER_S = 1000  # of one response, over a window as long as the request's timeout
LEAST_BYTES_PER_S = 16_000  # of all responses for a video
GRACE = 10  # how far a video may fall behind that, in request timeouts
TOO_MUCH = "The server sends much more data than the setting max_video_mb allows for a video."
TOO_SLOW = f"The server sends less than {LEAST_BYTES_PER_S // 1000} kB a second."


class Pace:
    """The minimum rate over all connections for one video. `waited_s`: time spent waiting for servers so far; `got`:
    bytes of bodies received."""

    def __init__(self, timeout_s: float, most_bytes: int) -> None:
        self._grace_s, self._most = GRACE * timeout_s, most_bytes
        self.waited_s, self.got = 0.0, 0
        self._asked: float | None = None  # start of a request that still waits for its response

    def add(self, seconds: float, count: int = 0) -> None:
        """Count a wait and the bytes it brought. Raises ClipFailure: TIMEOUT below the minimum rate, REFUSED above
        `most_bytes`.

        Inside `asking` it raises TimeoutError instead, because the libraries below accept no other error as the end of
        a request; `check` follows later. Bytes received then are headers, which may never end, and do not count.
        """
        if self._asked is None:
            self.got += count
            self.waited_s += seconds
            if self.got > self._most:
                raise ClipFailure(FailureCode.REFUSED, TOO_MUCH)
            self.check()
        elif self._late(time.monotonic() - self._asked):
            raise TimeoutError("too slow")

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Count the time of a request up to the body of its response, including connecting, redirects and headers."""
        self._asked = began = time.monotonic()
        try:
            yield
        finally:
            self._asked = None
            self.waited_s += time.monotonic() - began

    def check(self) -> None:
        """Raise ClipFailure(TIMEOUT) if the rate so far is below the minimum."""
        if self._late():
            raise ClipFailure(FailureCode.TIMEOUT, TOO_SLOW)

    def _late(self, more_s: float = 0.0) -> bool:
        return self.waited_s + more_s > self._grace_s + self.got / LEAST_BYTES_PER_S


class _Paced(io.RawIOBase):
    """A connection's raw stream. Raises TimeoutError if a window of waiting brings less than the minimum."""

    def __init__(self, raw: io.RawIOBase, window_s: float, pace: Pace | None) -> None:
        self._raw, self._window_s, self._pace = raw, window_s, pace
        self._began = False  # the socket timeout covers the wait for the first byte
        self._waited_s, self._got = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        count = self._raw.readinto(buffer)
        waited = time.monotonic() - began
        if self._pace is not None:
            self._pace.add(waited, count or 0)
        if self._began:
            self._waited_s += waited
            self._got += count or 0
        self._began = True
        if count and self._waited_s >= self._window_s:
            if self._got < FLOOR_BYTES_PER_S * self._waited_s:
                raise TimeoutError("too slow")
            self._waited_s, self._got = 0.0, 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def paced_response(window_s: float, pace: Pace | None = None) -> type[http.client.HTTPResponse]:
    """A response class that enforces the minimum rate over windows of `window_s` seconds.

    pace: the minimum rate over all responses of a video.
    """

    class Response(http.client.HTTPResponse):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.fp = io.BufferedReader(_Paced(self.fp.detach(), window_s, pace))

    return Response
