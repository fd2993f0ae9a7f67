"""A floor under the rate of an answer.

A socket's timeout is about one read: a server that sends a byte a second never runs into it. Here every read from the
connection, below TLS and whatever the client's own buffering, is timed, and an answer whose average stays below the
floor ends as a timeout. Only time spent waiting for the server counts, so a client that goes slowly on purpose passes.
"""

from __future__ import annotations

import http.client
import io
import time
from typing import Any

FLOOR_BYTES_PER_S = 1000


class _Paced(io.RawIOBase):
    """A connection's raw stream. Raises TimeoutError where a window of waiting brought less than the floor."""

    def __init__(self, raw: io.RawIOBase, window_s: float) -> None:
        self._raw, self._window_s = raw, window_s
        self._began = False  # how long the first byte takes is the socket's timeout to judge
        self._waited_s, self._got = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        count = self._raw.readinto(buffer)
        if self._began:
            self._waited_s += time.monotonic() - began
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


def paced_response(window_s: float) -> type[http.client.HTTPResponse]:
    """The response class of connections whose answers keep the floor over windows of `window_s` seconds."""

    class Response(http.client.HTTPResponse):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.fp = io.BufferedReader(_Paced(self.fp.detach(), window_s))

    return Response
