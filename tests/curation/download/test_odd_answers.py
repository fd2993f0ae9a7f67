"""Servers whose headers are nonsense, and servers that are slow on purpose: always typed, never for ever."""

from __future__ import annotations

import time
from itertools import product

import pytest

from curation.download.headers import http_date
from curation.download.resume import PART, VALIDATOR
from curation.failures import FailureCode
from tests.curation.download.test_platforms import VIDEO, found, playlist, video  # noqa: F401 - `found` is a fixture
from tests.support.servers import Fault

NAME = "/base.mp4"
ODD = {
    "words": "garbage",
    "nothing": "",
    "negative": "-5",
    "huge": "9" * 40,
    "foreign": "½ \xe9\xff",
    "no number": "NaN",
    "year 99999": "Fri, 31 Dec 99999 23:59:59 GMT",
    "before time": "Mon, 01 Jan 0001 00:00:00 +2359",
    "no zone": "Mon, 01 Jan 2025 00:00:00 -" + "9" * 500,
    "no day": "Mon, 99 Zzz 2025 99:99:99 GMT",
    "two": "1, 2",
}
OTHERS = ("Last-Modified", "Date", "ETag", "Content-Range", "Content-Type", "Set-Cookie", "Accept-Ranges", "Server")
ALL = 10**9  # the whole body; and then the connection ends, as it must where the length is nonsense


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("headers", [("Content-Length",), OTHERS], ids=["length", "others"])
def test_odd_headers_beside_a_whole_video_cost_nothing_or_are_typed(place, headers: tuple[str, ...], kind: str):
    place.server.script(NAME, Fault(headers=dict.fromkeys(headers, ODD[kind]), cut=ALL))
    if headers == ("Content-Length",) and kind in ("huge", "two"):
        assert place.failure(NAME, retries=0).code in (FailureCode.NETWORK, FailureCode.REFUSED)
    else:
        assert place.fetch(NAME, retries=0).frames == 60


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "headers", [("Content-Length",), ("Content-Range",), OTHERS], ids=["length", "range", "others"]
)
def test_odd_headers_beside_the_rest_of_a_broken_download_are_typed(place, headers: tuple[str, ...], kind: str):
    odd = Fault(headers=dict.fromkeys(headers, ODD[kind]), ignore_condition=True, cut=ALL)
    place.server.script(NAME, [Fault(cut=2000), odd])
    if headers == ("Content-Length",) and kind == "two":
        assert place.failure(NAME, retries=1).code is FailureCode.NETWORK
    else:
        assert place.fetch(NAME, retries=3).frames == 60


@pytest.mark.parametrize(("status", "kind"), [*product((429, 503), ODD)])
def test_an_odd_retry_after_is_ignored(place, status: int, kind: str):
    place.server.script(NAME, Fault(status, {"Retry-After": ODD[kind]}))
    error = place.failure(NAME, retries=0)
    assert error.code is {429: FailureCode.RATE_LIMITED, 503: FailureCode.HTTP_5XX}[status]
    assert error.retry_after_s in ((0.0,) if kind == "before time" else (None,))


LOCATIONS = [*ODD.values(), "http://[::1", "http://a:99999/", "//", "http://\xff/", "::::", "?", "http://", "\x01"]


@pytest.mark.parametrize("location", LOCATIONS)
def test_an_odd_redirect_is_typed(place, location: str):
    place.server.script(NAME, Fault(302, {"Location": location}, body=b""))
    assert isinstance(place.failure(NAME, retries=0).code, FailureCode)


def test_a_date_is_seconds_or_none():
    assert http_date("Wed, 01 Jan 2025 00:00:00 GMT") == 1735689600.0
    assert [http_date(text) for kind, text in ODD.items() if kind != "before time"] == [None] * (len(ODD) - 1)


# --- slow on purpose


@pytest.mark.parametrize("length", [{}, {"Content-Length": None}], ids=["announced", "unknown"])
def test_a_body_that_never_ends_is_given_up_by_its_average(place, length: dict):
    """Faster than the floor of one window, so that only the average over all tells."""
    (place.server.folder / "slow.mp4").write_bytes(bytes(300_000))  # at most 4 kB/s: over a minute
    place.server.script("/slow.mp4", Fault(headers=length, drip_s=0.05, drip=200))
    began = time.monotonic()
    error = place.failure("/slow.mp4", timeout_s=0.2, retries=3)
    assert (error.code, place.waits) == (FailureCode.TIMEOUT, []), "it is not begun again within the same call"
    assert time.monotonic() - began < 20
    assert place.left() == ([] if length else [f"part/{PART}", f"part/{VALIDATOR}"]), "what came is kept"


def test_many_tiny_segments_are_given_up_by_their_average(place, found):  # noqa: F811
    place.server.script("/tiny.ts", Fault(body=b"xx", drip_s=0.1))
    lines = [line for _ in range(1000) for line in ("#EXTINF:0.5,", "tiny.ts")]
    found.answer = video(playlist(place, *lines))
    began = time.monotonic()
    assert place.failure(VIDEO, timeout_s=0.2, retries=3).code is FailureCode.TIMEOUT
    assert time.monotonic() - began < 20


def test_segments_that_fail_each_time_first_are_given_up(place, found):  # noqa: F811
    """The waits between the tries count: here each is noted, not waited."""
    place.server.script("/shy.ts", [fault for _ in range(400) for fault in (Fault(503), Fault(body=b"xx"))])
    lines = [line for _ in range(400) for line in ("#EXTINF:0.5,", "shy.ts")]
    found.answer = video(playlist(place, *lines))
    assert place.failure(VIDEO, timeout_s=1, retries=3).code is FailureCode.TIMEOUT
    assert sum(place.waits) < 100 and place.server.hits["/shy.ts"] < 200


def test_a_client_that_goes_slowly_by_itself_is_not_given_up(place):
    size = (place.server.folder / NAME[1:]).stat().st_size
    assert place.fetch(NAME, bytes_per_s=size // 2, timeout_s=0.1).frames == 60
