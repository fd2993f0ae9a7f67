"""The way of a platform's video, by the real download(): only what the extractor finds on the network is replaced.

yt-dlp's own extractor class for YouTube runs, with the part that asks YouTube exchanged for what a test wants it to
have found or met. Everything around it is real: the guard, the choice of a format, the downloaders for files and
streams, the typing of failures.
"""

from __future__ import annotations

import logging
import traceback

import pytest
from yt_dlp.utils import ExtractorError, GeoRestrictedError, UserNotLive

from curation.download.limits import TOO_LARGE
from curation.download.resume import PART, VALIDATOR
from curation.failures import FailureCode
from curation.records import ClipRef
from tests.support.made_clips import SECRETS
from tests.support.servers import Fault, redirect, serve

VIDEO = ClipRef("youtube", "abcdefghijk")
SEGMENTS = 4


@pytest.fixture
def found(monkeypatch):
    """What the extractor finds: set `found.answer` to a dict, or to an error to raise."""

    class Found:
        answer = None

    def extract(self, url):
        assert url == "https://www.youtube.com/watch?v=abcdefghijk"
        if isinstance(Found.answer, BaseException):
            raise Found.answer
        if callable(Found.answer):
            return Found.answer(self)
        return Found.answer

    monkeypatch.setattr("yt_dlp.extractor.youtube.YoutubeIE._real_extract", extract)
    return Found


def video(*formats, **fields):
    return {"id": "abcdefghijk", "title": SECRETS[0], "uploader": SECRETS[1], "formats": list(formats), **fields}


def offer(url, protocol="http", **fields):
    return {
        "format_id": "137",
        "url": url,
        "protocol": protocol,
        "ext": "mp4",
        "vcodec": "avc1.4d401f",
        "height": 36,
        **fields,
    }


def playlist(place, *lines, name="list.m3u8"):
    (place.server.folder / name).write_text(
        "\n".join(["#EXTM3U", "#EXT-X-TARGETDURATION:1", *lines, "#EXT-X-ENDLIST", ""])
    )
    return offer(place.server.url(f"/{name}"), "m3u8_native")


@pytest.fixture
def segments(place, clips):
    """A stream cut into pieces; the lines of its playlist."""
    stream = (clips / "stream.ts").read_bytes()
    size = -(-len(stream) // (SEGMENTS * 188)) * 188
    for n in range(SEGMENTS):
        (place.server.folder / f"s{n}.ts").write_bytes(stream[n * size : (n + 1) * size])
    return [line for n in range(SEGMENTS) for line in ("#EXTINF:0.5,", f"s{n}.ts")]


# --- types


SAID = [
    (ExtractorError("Video unavailable. This video has been removed by the uploader"), FailureCode.REMOVED),
    (ExtractorError("Private video. Sign in if you've been granted access"), FailureCode.PRIVATE),
    (GeoRestrictedError("not available from your location"), FailureCode.GEO),
    (ExtractorError("Sign in to confirm your age. This video may be inappropriate"), FailureCode.AGE),
    (ExtractorError("Join this channel to get access to members-only content"), FailureCode.MEMBERS),
    (ExtractorError("This video is DRM protected"), FailureCode.DRM),
    (ExtractorError("This live event will begin in 3 days."), FailureCode.LIVE),
    (UserNotLive(), FailureCode.LIVE),
    (ExtractorError("Requested format is not available"), FailureCode.NO_FORMAT),
    (ExtractorError("Unable to extract something new"), FailureCode.UNSUPPORTED),
    (ExtractorError("Sign in to confirm you’re not a bot"), FailureCode.BOT_CHECK),
    (ExtractorError("This content isn't available, try again later."), FailureCode.RATE_LIMITED),
]


@pytest.mark.parametrize(("error", "code"), SAID)
def test_what_a_platform_says_is_typed_and_not_asked_again(place, found, error, code):
    found.answer = error
    assert place.failure(VIDEO).code is code
    assert place.waits == []
    assert list(place.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "code", "asked"),
    [
        (403, FailureCode.BOT_CHECK, 1),
        (404, FailureCode.REMOVED, 1),
        (410, FailureCode.REMOVED, 1),
        (412, FailureCode.RATE_LIMITED, 3),
        (429, FailureCode.RATE_LIMITED, 3),
        (500, FailureCode.HTTP_5XX, 3),
    ],
)
@pytest.mark.parametrize("when", ["page", "file"])
def test_what_a_platforms_servers_answer_is_typed(place, found, status, code, asked, when):
    place.server.script("/x", Fault(status))
    url = place.server.url("/x")
    found.answer = video(offer(url)) if when == "file" else lambda ie: ie._download_webpage(url, "abcdefghijk")
    assert place.failure(VIDEO).code is code
    assert place.server.hits["/x"] == asked
    assert len(place.waits) == asked - 1


def test_offers_that_cannot_be_taken_are_typed(place, found):
    url = place.server.url("/base.mp4")
    for answer, code in (
        (video(offer(url, height=2160)), FailureCode.NO_FORMAT),
        (video(offer(url, has_drm=True)), FailureCode.DRM),
        (video(offer(url), is_live=True), FailureCode.LIVE),
        (video(offer(url), live_status="is_upcoming"), FailureCode.LIVE),
        (video(offer(url, filesize=10 << 40)), FailureCode.REFUSED),
        (video(offer("file:///etc/hostname", "file")), FailureCode.NO_FORMAT),
        (video(offer("file:///etc/hostname", "https")), FailureCode.REFUSED),
        (video(offer("ftp://127.0.0.1/x", "https")), FailureCode.REFUSED),
    ):
        found.answer = answer
        assert place.failure(VIDEO).code is code
    assert place.server.requests == []


def test_another_extractor_is_never_entered(place, found):
    """A page may send yt-dlp elsewhere: only the platform's own extractor is there to go to."""
    found.answer = {"_type": "url", "url": place.server.url("/base.mp4")}
    assert place.failure(VIDEO).code is FailureCode.UNSUPPORTED
    found.answer = {"_type": "url", "url": place.server.url("/base.mp4"), "ie_key": "Generic"}
    assert place.failure(VIDEO).code is FailureCode.UNSUPPORTED
    assert place.server.requests == []


# --- files


def test_a_platforms_file_is_continued_by_the_same_format_only(place, found):
    url = place.server.url("/prores.mov")
    place.server.script("/prores.mov", [Fault(cut=60_000)])
    found.answer = video(offer(url))
    assert place.failure(VIDEO, retries=0).code is FailureCode.NETWORK
    found.answer = video(offer(url, format_id="136"))
    place.server.script("/prores.mov", [Fault(cut=60_000)])
    assert place.failure(VIDEO, retries=0).code is FailureCode.NETWORK
    assert place.fetch(VIDEO).frames == 60
    first, second, third = place.ranges()
    assert first is None and second is None and third is not None


@pytest.mark.parametrize("changed", [False, True])
def test_a_file_fetched_in_pieces_is_continued_or_begun_anew(place, found, changed):
    """Some platforms give files in pieces of some megabytes; yt-dlp asks for one after the other."""
    path = "/prores.mov"
    found.answer = video(offer(place.server.url(path), downloader_options={"http_chunk_size": 50_000}))
    place.server.script(path, [Fault(), Fault(cut=20_000)])
    assert place.failure(VIDEO, retries=0).code is FailureCode.NETWORK
    kept = place.part().stat().st_size
    assert kept > 40_000
    if changed:
        place.server.script(path, [Fault(headers={"ETag": '"new"'}, ignore_condition=True)])
    whole = place.fetch("/prores.mov").sha256
    place.server.requests.clear()
    if changed:
        place.server.script(path, [Fault(headers={"ETag": '"new"'}, ignore_condition=True)])
    assert place.fetch(VIDEO).sha256 == whole
    wanted = place.ranges()
    assert wanted[0].startswith(f"bytes={kept}-")
    assert (wanted[1] is None) == changed


@pytest.mark.parametrize("ext", ["mp4", "php", "exe", "../../../x", "mp4/../../x", ""])
def test_neither_title_nor_suffix_becomes_a_path(place, found, ext):
    found.answer = video(
        offer(place.server.url("/base.mp4"), ext=ext), id="../../id", ext=ext, playlist_title="../../../list"
    )
    found.answer["title"] = "../../../../title"
    before = set(place.folder.parent.iterdir())
    if ext in ("mp4", ""):
        assert place.fetch(VIDEO).frames == 60
        assert place.left() == [f"{VIDEO.video_key}/video.mp4"]
    else:  # yt-dlp itself will not have it
        assert place.failure(VIDEO).code is FailureCode.UNSUPPORTED
        assert list(place.folder.iterdir()) == []
    assert set(place.folder.parent.iterdir()) - before == {place.folder}


# --- streams


def test_a_stream_is_fetched_through_the_guard(place, found, segments):
    found.answer = video(playlist(place, *segments))
    assert place.fetch(VIDEO).frames == 60
    assert [path for _, path, _ in place.server.requests] == ["/list.m3u8", *(f"/s{n}.ts" for n in range(SEGMENTS))]
    assert place.left() == [f"{VIDEO.video_key}/video.mp4"]


FOREIGN = ["http://10.0.0.1/s.ts", "http://169.254.169.254/s.ts", "http://[fd00::1]/s.ts", "file:///etc/hostname"]


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("how", ["segment", "redirect", "key", "map"])
def test_a_stream_with_a_foreign_piece_is_refused(place, found, segments, foreign, how):
    place.server.script("/away.ts", redirect(foreign))
    lines = {
        "segment": [*segments[:4], "#EXTINF:0.5,", foreign],
        "redirect": [*segments[:4], "#EXTINF:0.5,", "away.ts"],
        "key": [f'#EXT-X-KEY:METHOD=AES-128,URI="{foreign}"', *segments],
        "map": [f'#EXT-X-MAP:URI="{foreign}"', *segments],
    }[how]
    found.answer = video(playlist(place, *lines))
    assert place.failure(VIDEO).code is FailureCode.REFUSED
    assert place.waits == [] and list(place.folder.iterdir()) == []


def test_loopback_is_refused_to_platforms_in_every_place(place, found, segments):
    url = place.server.url("/base.mp4")
    for answer in (video(offer(url)), video(playlist(place, *segments)), lambda ie: ie._download_webpage(url, "x")):
        found.answer = answer
        assert place.failure(VIDEO, allow_loopback=False).code is FailureCode.REFUSED
    assert place.server.requests == []


@pytest.mark.parametrize(
    ("fault", "code", "asked"),
    [
        ([Fault(cut=300), Fault(503)], None, 3),
        (Fault(cut=0), FailureCode.NETWORK, 3),
        (Fault(404), FailureCode.REMOVED, 1),
        (Fault(403), FailureCode.BOT_CHECK, 1),
    ],
)
def test_a_segment_that_fails_is_tried_again_by_itself_and_a_stream_is_never_continued(
    place, found, segments, fault, code, asked
):
    place.server.script("/s2.ts", fault)
    found.answer = video(playlist(place, *segments))
    if code is None:
        assert place.fetch(VIDEO).frames == 60
        assert place.server.hits["/s0.ts"] == 1
    else:
        retries = 2 if code.transient and code is not FailureCode.BOT_CHECK else 0
        assert place.failure(VIDEO).code is code
        assert place.server.hits["/s0.ts"] == 1 + retries  # each try of the whole begins anew
        asked *= 1 + retries
        assert list(place.folder.iterdir()) == []
    assert place.server.hits["/s2.ts"] == asked


def test_a_stream_counts_as_a_whole_and_comes_no_faster_than_asked(place, found, segments):
    import time

    size = sum((place.server.folder / f"s{n}.ts").stat().st_size for n in range(SEGMENTS))
    found.answer = video(playlist(place, *segments))
    began = time.monotonic()
    assert place.fetch(VIDEO, bytes_per_s=2 * size).frames == 60
    assert time.monotonic() - began > 0.4
    for n in range(SEGMENTS):
        (place.server.folder / f"s{n}.ts").write_bytes(bytes(400_000))
    place.server.requests.clear()
    assert place.failure(VIDEO, max_video_mb=1).message == TOO_LARGE
    assert len(place.server.requests) == 1 + 3


def test_a_part_of_a_file_is_not_continued_as_a_stream(place, found, segments):
    place.server.script("/prores.mov", [Fault(cut=60_000)])
    found.answer = video(offer(place.server.url("/prores.mov")))
    place.failure(VIDEO, retries=0)
    assert place.left() == [f"part/{PART}", f"part/{VALIDATOR}"]
    found.answer = video(playlist(place, *segments))
    assert place.fetch(VIDEO).frames == 60


# --- nothing personal


def scan(folder, words):
    """The words found in any file's name or content."""
    return [
        (path.name, word)
        for path in folder.rglob("*")
        for word in words
        if word in str(path.relative_to(folder)) or (path.is_file() and word.encode() in path.read_bytes())
    ]


def test_no_planted_word_is_stored_raised_or_logged(place, clips, found, caplog, capfd):
    """Words in the container's tags, in headers (also broken ones), in error pages, titles and cookies of a site."""
    for name in ("urllib3", "urllib3.connectionpool", "requests", "yt_dlp"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    headers = {
        "Content-Disposition": f'attachment; filename="{SECRETS[0]}.mp4"',
        "X-Amz-Meta-Artist": SECRETS[1],
        "Set-Cookie": f'name="{SECRETS[4]}"',
        "X-Broken\x01": SECRETS[3],
        "Location": f"/{SECRETS[0]}",
    }
    page = f"<title>{SECRETS[0]}</title>{SECRETS[1]} {SECRETS[4]}".encode() * 200
    errors, names = [], ("tagged.mp4", "tagged.mkv", "tagged.mov")
    for name in names:
        (place.server.folder / name).hardlink_to(clips / name)
        assert any(word.encode() in (clips / name).read_bytes() for word in SECRETS)
        place.server.script(f"/{name}", Fault(headers=headers))
        place.fetch(f"/{name}")
        found.answer = video(offer(place.server.url(f"/{name}")), description=SECRETS[4], thumbnail=SECRETS[0])
        place.fetch(VIDEO)
        place.server.script(f"/{name}", Fault(cut=2000, headers=headers))
        errors.append(place.failure(f"/{name}", retries=0))  # its part is kept
        errors.append(place.failure(VIDEO, retries=0))
    url = place.server.url("/x.mp4")
    for status in (200, 400, 401, 403, 404, 410, 416, 429, 451, 500, 503):
        place.server.script("/x.mp4", Fault(status, body=page, headers=headers))
        errors.append(place.failure("/x.mp4", retries=0))
        found.answer = lambda ie: ie._download_json(url, SECRETS[0], note=SECRETS[1])
        errors.append(place.failure(VIDEO, retries=0))
    for error, _ in SAID:
        text = f"{getattr(error, 'orig_msg', '')} {SECRETS[0]}"
        found.answer = ExtractorError(text, expected=True)
        errors.append(place.failure(VIDEO))
    with serve(place.server.folder) as other:
        place.server.script("/x.mp4", redirect(other.url(f"/{SECRETS[0].replace(' ', '%20')}")))
        errors.append(place.failure("/x.mp4"))
    said = "".join("".join(traceback.format_exception(error)) + repr(error) for error in errors)
    said += caplog.text + "".join(capfd.readouterr()) + "".join(str(vars(record)) for record in caplog.records)
    words = (*SECRETS, SECRETS[0].replace(" ", "%20"))
    assert [word for word in words if word in said] == []
    finished = [path for path in place.folder.rglob("video.*") if path.is_file()]
    assert len(finished) == len(names) + 1
    for path in place.folder.rglob("*"):
        if path.name == PART:  # the beginning of the file as it came, until it is whole or a day old
            path.unlink()
    assert scan(place.folder, words) == []
