"""Servers whose answers never end, in every part of an answer: no memory is filled, and none is waited for for ever."""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from yt_dlp.networking import Request
from yt_dlp.networking.exceptions import HTTPError

from curation.download.guard import PAGE_BYTES, Guard, GuardedYoutubeDL
from curation.failures import ClipFailure, FailureCode
from curation.records import ClipRef
from tests.curation.download.test_platforms import VIDEO, found, offer, playlist, video  # noqa: F401 - `found` is a fixture
from tests.support.servers import Fault

NAME = "/base.mp4"
MOST = 1 << 29  # bytes that such a server sends before it gives up itself


class Endless:
    """A server that answers each request with `head`, and then `more` again and again, until the client leaves.

    sent: bytes so far. pause_s: between two of `more`.
    """

    def __init__(self, head: bytes, more: bytes, pause_s: float) -> None:
        self._head, self._more, self._pause_s = head, more, pause_s
        self.sent = 0
        self.stop = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(1 << 16)
                connection.sendall(self._head)
                while self.sent < MOST and not self.stop.wait(self._pause_s):
                    connection.sendall(self._more)
                    self.sent += len(self._more)
            except OSError:
                pass  # the client left, as it should


@contextmanager
def endless(head: bytes, more: bytes, pause_s: float = 0) -> Iterator[Endless]:
    server = Endless(head, more, pause_s)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.listener.shutdown(socket.SHUT_RDWR)
        server.listener.close()
        thread.join()


def bomb(size: int) -> bytes:
    """So many zeros, as gzip."""
    packer = zlib.compressobj(9, wbits=31)
    return packer.compress(bytes(size)) + packer.flush()


@pytest.mark.parametrize("length", [b"", b"Content-Length: 1500000000\r\n"], ids=["unknown", "announced"])
def test_the_body_of_a_redirect_is_not_read(place, length: bytes):
    location = place.server.url(NAME).encode()
    head = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n" + length + b"\r\n"
    with endless(head, bytes(1 << 20)) as server:
        hosts = (server.host, place.server.host)
        ref = ClipRef("http", f"http://{server.host}/a.mp4")
        assert place.fetch(ref, http_hosts=hosts, retries=0).frames == 60
        assert server.sent < 32 << 20, "what the system holds for a connection, and no more"


def test_a_compressed_body_of_a_redirect_is_not_unpacked(place):
    packed = bomb(100 << 20)
    head = f"HTTP/1.1 302 Found\r\nLocation: {place.server.url(NAME)}\r\nContent-Encoding: gzip\r\n\r\n".encode()
    with endless(head, packed, pause_s=60) as server:
        hosts = (server.host, place.server.host)
        ref = ClipRef("http", f"http://{server.host}/a.mp4")
        began = time.monotonic()
        assert place.fetch(ref, http_hosts=hosts, retries=0).frames == 60
        assert time.monotonic() - began < 4, "the body is not waited for"


def test_a_loop_of_redirects_with_endless_bodies_ends(place):
    with endless(b"HTTP/1.1 302 Found\r\nLocation: /again.mp4\r\n\r\n", bytes(1 << 16)) as server:
        ref = ClipRef("http", f"http://{server.host}/a.mp4")
        assert place.failure(ref, http_hosts=(server.host,), retries=0).code is FailureCode.UNSUPPORTED


@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"503 No"])
def test_a_page_is_read_whole_up_to_a_size(status: bytes):
    with endless(b"HTTP/1.1 " + status + b"\r\n\r\n", bytes(1 << 20)) as server:
        with GuardedYoutubeDL(Guard((server.host,), allow_loopback=True), {}, extractors=False) as ydl:
            try:
                page = ydl.urlopen(Request(f"http://{server.host}/"))
            except HTTPError as error:
                page = error.response
            with pytest.raises(ClipFailure) as caught:
                page.read()
            assert caught.value.code is FailureCode.UNSUPPORTED
        assert server.sent < 2 * PAGE_BYTES


def test_a_page_is_unpacked_up_to_a_size_and_smaller_ones_are_read_whole(place):
    packed = {"Content-Encoding": "gzip"}
    place.server.script("/large", Fault(200, packed, bomb(PAGE_BYTES + 1)))
    place.server.script("/small", Fault(200, packed, bomb(PAGE_BYTES)))
    with GuardedYoutubeDL(Guard((place.server.host,), allow_loopback=True), {}, extractors=False) as ydl:
        assert len(ydl.urlopen(Request(place.server.url("/small"))).read()) == PAGE_BYTES
        with pytest.raises(ClipFailure):
            ydl.urlopen(Request(place.server.url("/large"))).read()


def test_a_playlist_without_end_is_typed(place, found):  # noqa: F811
    with endless(b"HTTP/1.1 200 OK\r\n\r\n", b"#EXTINF:0.5,\na.ts\n" * 60_000) as server:
        found.answer = video(offer(f"http://{server.host}/list.m3u8", "m3u8_native"))
        assert place.failure(VIDEO, retries=0).code is FailureCode.UNSUPPORTED
        assert server.sent < 2 * PAGE_BYTES


def test_a_segment_that_would_fill_the_memory_is_refused(place, found, monkeypatch):  # noqa: F811
    monkeypatch.setattr("curation.download.limits.SEGMENT_BYTES", 4 << 20)
    place.server.script("/a.ts", Fault(200, body=bytes(3 << 20)))
    with endless(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 20)) as server:
        names = ("a.ts", "a.ts", f"http://{server.host}/b.ts")
        found.answer = video(playlist(place, *(line for name in names for line in ("#EXTINF:0.5,", name))))
        assert place.failure(VIDEO, retries=0).code is FailureCode.TOO_LARGE
        assert place.server.hits["/a.ts"] == 2, "each segment counts by itself"
        assert server.sent < 32 << 20


@pytest.mark.parametrize("more", [b"X: " + b"y" * 60_000 + b"\r\n", b"1;" + b"y" * 60_000 + b"\r\nx\r\n"])
def test_what_comes_around_the_pieces_of_a_body_has_an_end(place, more: bytes):
    """Lines after the last piece, and remarks beside the size of each."""
    last = b"1\r\nx\r\n" + (b"0\r\n" if more.startswith(b"X") else b"")
    with endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + last, more * 10) as server:
        ref = ClipRef("http", f"http://{server.host}/a.mp4")
        assert place.failure(ref, http_hosts=(server.host,), max_video_mb=1, retries=0).code is FailureCode.REFUSED
        assert server.sent < MOST


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    ("more", "pause_s"),
    [(CONTINUE, 0.01), (CONTINUE * 1000, 0.001), (b"HTTP/1.1 100 Continue\r\n" + b"X: y\r\n" * 90 + b"\r\n", 0.01)],
    ids=["slow", "fast", "with headers"],
)
def test_an_answer_that_never_begins_is_given_up(place, more: bytes, pause_s: float):
    with endless(b"", more, pause_s) as server:
        ref = ClipRef("http", f"http://{server.host}/a.mp4")
        began = time.monotonic()
        error = place.failure(ref, http_hosts=(server.host,), timeout_s=0.1, retries=3)
        assert (error.code, place.waits) == (FailureCode.TIMEOUT, [])
        assert time.monotonic() - began < 8
