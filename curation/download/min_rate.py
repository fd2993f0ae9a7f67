"""A floor under the rate of an answer, and of all answers of a video together.

A socket's timeout is about one read: a server that sends a byte a second never runs into it. Here every read from the
connection, below TLS and whatever the client's own buffering, is timed, and an answer whose average stays below the
floor ends as a timeout. One that keeps just above it, or comes in many small pieces that each are too short to be
judged, still meets the least average over all: so every download has an end, also one whose size nobody knows.
Only time spent waiting for the server counts, so a client that goes slowly on purpose passes.
"""

from __future__ import annotations

import http.client
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from curation.failures import ClipFailure, FailureCode

FLOOR_BYTES_PER_S = 1000  # of one answer, over a window of the request's timeout
LEAST_BYTES_PER_S = 16_000  # of all answers for a video
GRACE = 10  # request timeouts by which a video may fall behind that
TOO_MUCH = "The server sends much more than a video of the size that the setting max_video_mb allows."
TOO_SLOW = f"The server sends less than {LEAST_BYTES_PER_S // 1000} kB a second."


class Pace:
    """What all connections for one video keep together. `waited_s`: for its servers so far; `got`: bytes of their
    bodies."""

    def __init__(self, timeout_s: float, most_bytes: int) -> None:
        self._grace_s, self._most = GRACE * timeout_s, most_bytes
        self.waited_s, self.got = 0.0, 0
        self._asked: float | None = None  # when the request began whose answer has not begun

    def add(self, seconds: float, count: int = 0) -> None:
        """Count a wait and what it brought. Raises ClipFailure: TIMEOUT where too little came for so long, REFUSED
        where more came than `most_bytes`.

        While asking, TimeoutError: the libraries below take no other for the end of a request, and `check` is for
        after it. What comes then is no part of a body and counts for nothing: there may be headers for ever.
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
        """Count the time of a whole request up to the body of its answer: connecting, redirects and headers too."""
        self._asked = began = time.monotonic()
        try:
            yield
        finally:
            self._asked = None
            self.waited_s += time.monotonic() - began

    def check(self) -> None:
        """Raise ClipFailure(TIMEOUT) where too little came for so long."""
        if self._late():
            raise ClipFailure(FailureCode.TIMEOUT, TOO_SLOW)

    def _late(self, more_s: float = 0.0) -> bool:
        return self.waited_s + more_s > self._grace_s + self.got / LEAST_BYTES_PER_S


class _Paced(io.RawIOBase):
    """A connection's raw stream. Raises TimeoutError where a window of waiting brought less than the floor."""

    def __init__(self, raw: io.RawIOBase, window_s: float, pace: Pace | None) -> None:
        self._raw, self._window_s, self._pace = raw, window_s, pace
        self._began = False  # how long the first byte takes is the socket's timeout to judge
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
    """The response class of connections whose answers keep the floor over windows of `window_s` seconds.

    pace: what they keep together with all others of a video.
    """

    class Response(http.client.HTTPResponse):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.fp = io.BufferedReader(_Paced(self.fp.detach(), window_s, pace))

    return Response
