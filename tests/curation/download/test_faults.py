"""Every fault of a server that a long run meets: its type, how often the server was asked, and what was left behind."""

from __future__ import annotations

import ssl
import subprocess
import time
from dataclasses import dataclass

import pytest
from yt_dlp.networking import Request
from yt_dlp.networking.exceptions import HTTPError, TransportError

from curation.download.causes import cause_of
from curation.download.guard import Guard, GuardedYoutubeDL
from curation.download.resume import PART, VALIDATOR
from curation.failures import FailureCode
from curation.records import ClipRef
from tests.support.servers import Fault, redirect, serve

NAME = "/header-first.mp4"
KEPT = [f"part/{PART}", f"part/{VALIDATOR}"]
PAGE = b"<!doctype html><html><title>Sign in</title><form action=login></form></html>" * 50


@dataclass(frozen=True)
class Case:
    """A fault, for ever or for the next requests, and what must come of it; code None: the video, undisturbed."""

    name: str
    fault: Fault | list[Fault]
    code: FailureCode | None
    asked: int
    kept: bool = False
    waits: tuple[float, ...] | None = None
    retry_after_s: float | None = None
    timeout_s: float = 5.0


CUT = Fault(cut=1200)
CASES = [
    Case("unauthorised", Fault(401), FailureCode.PRIVATE, 1, waits=()),
    Case("forbidden", Fault(403), FailureCode.PRIVATE, 1, waits=()),
    Case("not found", Fault(404, body=PAGE), FailureCode.REMOVED, 1, waits=()),
    Case("gone", Fault(410), FailureCode.REMOVED, 1, waits=()),
    Case("legal reasons", Fault(451), FailureCode.GEO, 1, waits=()),
    Case("slow down", Fault(429), FailureCode.RATE_LIMITED, 3),
    Case(
        "slow down a little",
        Fault(429, {"Retry-After": "90"}),
        FailureCode.RATE_LIMITED,
        3,
        waits=(90, 90),
        retry_after_s=90,
    ),
    Case("slow down once", [Fault(429, {"Retry-After": "90"})], None, 2, waits=(90,)),
    Case(
        "slow down much",
        Fault(429, {"Retry-After": "3600"}),
        FailureCode.RATE_LIMITED,
        1,
        waits=(),
        retry_after_s=3600,
    ),
    Case("error", Fault(500), FailureCode.HTTP_5XX, 3),
    Case("unavailable", Fault(503, body=PAGE), FailureCode.HTTP_5XX, 3),
    Case("unavailable for a little", [Fault(503, {"Retry-After": "90"})], None, 2, waits=(90,)),
    Case(
        "unavailable for long",
        Fault(503, {"Retry-After": "3600"}),
        FailureCode.HTTP_5XX,
        1,
        waits=(),
        retry_after_s=3600,
    ),
    Case("no answer", Fault(hang=True), FailureCode.TIMEOUT, 3, timeout_s=0.3),
    Case("silence in mid-body", Fault(cut=1200, hang=True), FailureCode.TIMEOUT, 3, kept=True, timeout_s=0.3),
    Case("drip", Fault(drip_s=0.01), FailureCode.TIMEOUT, 3, timeout_s=0.4),
    Case("disconnect before the body", Fault(cut=0), FailureCode.NETWORK, 3),
    Case("disconnect in mid-body", CUT, FailureCode.NETWORK, 3, kept=True),
    Case("two disconnects", [CUT, CUT], None, 3),
    # each try after the first asks for the rest, is told of another length, and asks for the whole
    Case("length too long", Fault(headers={"Content-Length": "99999"}, cut=99999), FailureCode.NETWORK, 5, kept=True),
    Case("length too short", Fault(headers={"Content-Length": "4000"}), FailureCode.CORRUPT, 1, waits=()),
    Case("no length, and cut", Fault(headers={"Content-Length": None}, cut=4000), FailureCode.CORRUPT, 1, waits=()),
    Case("changed in between", [CUT, Fault(headers={"ETag": '"new"'}, ignore_condition=True)], None, 3),
    Case("login page", Fault(body=PAGE), FailureCode.CORRUPT, 1, waits=()),
    Case("nothing", Fault(body=b""), FailureCode.CORRUPT, 1, waits=()),
    Case("redirect to a private address", redirect("http://10.0.0.1/a.mp4"), FailureCode.REFUSED, 1, waits=()),
    Case("redirect to a file", redirect("file:///etc/hostname"), FailureCode.REFUSED, 1, waits=()),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_fault_is_typed_counted_and_leaves_no_scratch(place, case):
    place.server.script(NAME, case.fault)
    home = place.ref(NAME).video_key
    if case.code is None:
        assert place.fetch(NAME, timeout_s=case.timeout_s).frames == 60
        assert place.left() == [f"{home}/video.mp4"]
    else:
        error = place.failure(NAME, timeout_s=case.timeout_s, http_hosts=(place.server.host, "10.0.0.1"))
        assert (error.code, error.retry_after_s) == (case.code, case.retry_after_s)
        assert place.left() == (KEPT if case.kept else [])
        assert [path.name for path in place.folder.iterdir()] == ([".parts"] if case.kept else [])
    assert place.server.hits[NAME] == case.asked
    assert case.waits is None or tuple(place.waits) == case.waits
    assert case.code is None or case.code.transient or case.asked == 1


def test_a_name_that_does_not_resolve_is_a_network_failure(place):
    ref = ClipRef("http", "http://nowhere.invalid/a.mp4")
    assert place.failure(ref, http_hosts=("nowhere.invalid",)).code is FailureCode.NETWORK
    assert len(place.waits) == 2
    assert place.server.requests == [] and list(place.folder.iterdir()) == []


def test_a_closed_port_is_a_network_failure_and_is_tried_again(place):
    with serve(place.server.folder) as closed:
        ref = ClipRef("http", closed.url(NAME))
    assert place.failure(ref, http_hosts=(closed.host,)).code is FailureCode.NETWORK
    assert len(place.waits) == 2 and list(place.folder.iterdir()) == []


def test_a_slow_client_is_no_drip(place):
    """What counts is the time spent waiting for bytes, not the time between reads."""
    size = (place.server.folder / "base.mp4").stat().st_size
    began = time.monotonic()
    assert place.fetch("/base.mp4", timeout_s=0.3, bytes_per_s=size).frames == 60
    assert time.monotonic() - began > 0.6


def certificate(folder):
    """A certificate for 127.0.0.1 that nobody signed."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


@pytest.mark.parametrize("fault", [Fault(drip_s=0.01), Fault(404, body=PAGE, drip_s=0.01)])
def test_a_drip_ends_under_tls_and_in_an_error_page_too(place, tmp_path, fault):
    options = {"socket_timeout": 0.4, "nocheckcertificate": True}
    with serve(place.server.folder, {NAME: fault}, tls=certificate(tmp_path)) as server:
        guard = Guard((server.host,), allow_loopback=True)
        with GuardedYoutubeDL(guard, options, extractors=False) as ydl:
            try:
                response = ydl.urlopen(Request(server.url(NAME)))
            except HTTPError as error:
                response = error.response
            began = time.monotonic()
            with pytest.raises(TransportError) as caught:
                response.read()
            assert time.monotonic() - began < 3
            assert cause_of(caught.value).code is FailureCode.TIMEOUT


def test_dripping_headers_end_as_a_timeout(place):
    """Each byte comes in time, the answer never begins."""
    import socket
    import threading

    stop = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not stop.wait(0.01):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        ref = ClipRef("http", f"http://{host}/a.mp4")
        error = place.failure(ref, http_hosts=(host,), timeout_s=0.3, retries=0)
        stop.set()
        thread.join()
    assert error.code is FailureCode.TIMEOUT
