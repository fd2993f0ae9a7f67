"""Downloads by the real yt-dlp from a real server on loopback: what is stored, what is typed, how often is asked."""

from __future__ import annotations

import email.utils
import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from yt_dlp.utils import YoutubeDLError

from curation.download.causes import cause_of
from curation.download.fetch import MAX_WAIT_S, _not_live, _options, download
from curation.download.guard import AddressRefused, Guard, GuardedYoutubeDL
from curation.download.limits import Limits
from curation.failures import ClipFailure, FailureCode
from curation.records import ClipRef
from curation.settings import DownloadSettings
from curation.video.index import index_video
from tests.support.made_clips import SECRETS
from tests.support.servers import Fault, redirect, serve

PAGE = b"<!doctype html><html><head><title>Private video of Planted Artist</title></head></html>" * 20


@pytest.fixture(scope="module")
def server(clips):
    with serve(clips) as running:
        yield running


@pytest.fixture
def allowed(server):
    return DownloadSettings(http_hosts=(server.host,), allow_loopback=True, retries=2, timeout_s=5)


class Fetch:
    """download() into a folder of its own, with the waits noted instead of waited."""

    def __init__(self, folder, server, settings):
        self.folder, self.server, self.settings = folder, server, settings
        self.waits = []
        self.ref = None

    def __call__(self, path, **changes):
        self.waits.clear()
        self.ref = ClipRef("http", self.server.url(path))
        settings = self.settings.model_copy(update=changes)
        return download(self.ref, self.folder, settings, sleep=self.waits.append)

    def failure(self, path, **changes):
        with pytest.raises(ClipFailure) as caught:
            self(path, **changes)
        error = caught.value
        # yt-dlp's error, whose text may hold a title, must not travel along for a logger to print
        assert error.__cause__ is None
        assert error.__context__ is None or type(error.__context__) is ValueError  # the latter from our own checks
        assert "http" not in error.message.lower()
        assert not any(secret in error.message for secret in SECRETS)
        assert list(self.folder.iterdir()) == []
        return error.code


@pytest.fixture
def fetch(tmp_path, server, allowed):
    (tmp_path / "videos").mkdir()
    return Fetch(tmp_path / "videos", server, allowed)


def copy(server, name, fault):
    """A new path on the server, so that every test counts its own requests."""
    copy.number += 1
    path = f"/{copy.number}-{name}"
    if (server.folder / name).exists():
        os.link(server.folder / name, server.folder / path[1:])
    server.script(path, fault)
    return path


copy.number = 0


# --- what is stored


def test_a_video_is_stored_alone_verified_and_described(fetch, server, clips):
    video = fetch("/base.mp4")
    home = fetch.folder / fetch.ref.video_key
    assert video.path == home / "video.mp4"
    assert [p.relative_to(fetch.folder) for p in fetch.folder.rglob("*")] == [
        Path(home.name),
        Path(home.name, "video.mp4"),
    ]
    assert video.sha256 == hashlib.sha256(video.path.read_bytes()).hexdigest()
    assert video.size_bytes == video.path.stat().st_size
    assert (video.codec, video.width, video.height, video.frames) == ("h264", 64, 36, 60)
    assert video.duration_s == pytest.approx(2.0)
    assert server.hits["/base.mp4"] == 1
    assert fetch.waits == []


@pytest.mark.parametrize("name", ["tagged.mp4", "tagged.mkv", "tagged.mov"])
def test_planted_tags_do_not_survive(fetch, clips, name):
    planted = (clips / name).read_bytes()
    assert sum(secret.encode() in planted for secret in SECRETS) >= 4
    stored = fetch(f"/{name}").path.read_bytes()
    assert [secret for secret in SECRETS if secret.encode() in stored] == []


def test_cover_art_is_not_taken_for_the_picture(fetch):
    assert (fetch("/tagged.mp4").width, fetch("/tagged.mp4").frames) == (64, 60)
    assert fetch("/edited.mp4").frames == 39


@pytest.mark.parametrize("name", ["edited.mp4", "rotated.mp4", "variable.mp4", "vp9.webm"])
def test_frames_times_and_rotation_are_those_of_the_source(fetch, clips, frames_of, name):
    stored = frames_of(fetch(f"/{name}").path)
    source = frames_of(clips / name)
    assert [frame[1:] for frame in stored] == [frame[1:] for frame in source]
    assert [frame[0] for frame in stored] == pytest.approx([frame[0] for frame in source], abs=1e-4)


def test_a_second_download_replaces_the_first_and_a_failed_one_leaves_it(tmp_path, server, clips, allowed):
    path = copy(server, "vp9.webm", [])
    ref = ClipRef("http", server.url(path))
    first = download(ref, tmp_path, allowed).path
    assert first.name == "video.webm"
    server.script(path, Fault(410))
    with pytest.raises(ClipFailure):
        download(ref, tmp_path, allowed)
    assert list(tmp_path.rglob("video.*")) == [first]
    server.script(path, Fault(body=(clips / "base.mp4").read_bytes()))
    assert download(ref, tmp_path, allowed).path.name == "video.mp4"
    assert [p.name for p in tmp_path.rglob("video.*")] == ["video.mp4"]


def test_progress_counts_up_to_the_whole_file(tmp_path, server, clips, allowed):
    seen = []
    download(
        ClipRef("http", server.url("/prores.mov")), tmp_path, allowed, lambda done, total: seen.append((done, total))
    )
    size = (clips / "prores.mov").stat().st_size
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)


def test_an_interrupt_leaves_nothing_behind(tmp_path, server, allowed):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(ClipRef("http", server.url("/base.mp4")), tmp_path, allowed, stop)
    assert list(tmp_path.iterdir()) == []


# --- failures that asking again does not change


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(401), FailureCode.PRIVATE),
        (Fault(403), FailureCode.PRIVATE),
        (Fault(404), FailureCode.REMOVED),
        (Fault(410), FailureCode.REMOVED),
        (Fault(451), FailureCode.GEO),
        (Fault(400), FailureCode.UNSUPPORTED),
        (Fault(404, body=PAGE), FailureCode.REMOVED),
        (Fault(body=PAGE), FailureCode.CORRUPT),  # a page with status 200, called video/mp4
        (Fault(body=PAGE, headers={"Content-Type": "text/html"}), FailureCode.CORRUPT),
        (Fault(body=b""), FailureCode.CORRUPT),
        (Fault(body=b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile:///etc/hostname\n"), FailureCode.CORRUPT),
        (Fault(headers={"Content-Length": "4000"}), FailureCode.CORRUPT),  # too small a length, so no error on the way
        (Fault(headers={"Content-Length": None}, cut=4000), FailureCode.CORRUPT),  # no length, and cut
    ],
)
def test_permanent_failures_are_typed_at_once(fetch, server, fault, code):
    path = copy(server, "header-first.mp4", fault)
    assert fetch.failure(path) is code
    assert not code.transient
    assert server.hits[path] == 1
    assert fetch.waits == []


@pytest.mark.parametrize("name", ["cover-only.mp3", "sound-only.m4a"])
def test_sound_with_or_without_a_cover_is_no_video(fetch, name):
    assert fetch.failure(f"/{name}") is FailureCode.NO_VIDEO


# --- failures that may pass


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(500), FailureCode.HTTP_5XX),
        (Fault(503, body=PAGE), FailureCode.HTTP_5XX),
        (Fault(429), FailureCode.RATE_LIMITED),
        (Fault(cut=1000), FailureCode.NETWORK),
        (Fault(cut=0), FailureCode.NETWORK),
    ],
)
def test_transient_failures_are_tried_as_often_as_asked_with_growing_waits(fetch, server, fault, code):
    path = copy(server, "base.mp4", fault)
    assert fetch.failure(path) is code
    assert code.transient
    assert server.hits[path] == 3
    first, second = fetch.waits
    unit = 5 if code is FailureCode.RATE_LIMITED else 1
    assert unit * 0.5 <= first <= unit * 1.5
    assert unit * 1.0 <= second <= unit * 3.0
    assert fetch.failure(path, retries=0) is code
    assert server.hits[path] == 4


def test_a_file_that_came_through_after_failures_is_the_undisturbed_one(fetch, server):
    path = copy(server, "base.mp4", [Fault(503), Fault(cut=5000)])
    assert fetch(path).sha256 == fetch("/base.mp4").sha256
    assert server.hits[path] == 3
    # no leftover of the cut answer was taken up: the file was asked for from its beginning each time
    assert {wanted for _, asked, wanted in server.requests if asked == path} == {None}


def test_waits_are_what_the_server_asks_for(fetch, server):
    path = copy(server, "base.mp4", [Fault(429, {"Retry-After": "40"}), Fault(503, {"Retry-After": "20"})])
    fetch(path)
    assert fetch.waits == [40, 20]
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    path = copy(server, "base.mp4", [Fault(429, {"Retry-After": date})])
    fetch(path)
    assert 50 < fetch.waits[0] <= 61


def test_a_server_that_asks_for_a_long_wait_is_left_alone(fetch, server):
    path = copy(server, "base.mp4", Fault(429, {"Retry-After": str(int(MAX_WAIT_S) + 1)}))
    assert fetch.failure(path) is FailureCode.RATE_LIMITED
    assert server.hits[path] == 1
    assert fetch.waits == []


def test_a_server_that_does_not_answer_is_a_timeout(fetch, server):
    path = copy(server, "base.mp4", Fault(hang=True))
    assert fetch.failure(path, timeout_s=0.3, retries=1) is FailureCode.TIMEOUT
    assert server.hits[path] == 2


def test_a_closed_port_is_a_network_failure(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        settings = DownloadSettings(http_hosts=(host,), allow_loopback=True, retries=0)
        with pytest.raises(ClipFailure) as caught:
            download(ClipRef("http", f"http://{host}/a.mp4"), tmp_path, settings)
    assert caught.value.code is FailureCode.NETWORK


# --- where requests may go


def test_a_host_that_is_not_listed_is_not_asked(fetch, server):
    before = sum(server.hits.values())
    assert fetch.failure("/base.mp4", http_hosts=()) is FailureCode.REFUSED
    assert fetch.failure("/base.mp4", http_hosts=("example.org", "127.0.0.1:1")) is FailureCode.REFUSED
    assert sum(server.hits.values()) == before


def test_loopback_is_not_asked_unless_allowed(fetch, server):
    before = sum(server.hits.values())
    assert fetch.failure("/base.mp4", allow_loopback=False) is FailureCode.REFUSED
    assert sum(server.hits.values()) == before


def test_a_redirect_to_a_listed_host_is_followed(fetch, server):
    path = copy(server, "base.mp4", redirect("/base.mp4"))
    assert fetch(path).frames == 60


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/a.mp4",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:10.0.0.1]/a.mp4",
        "https://example.org/a.mp4",
        "file:///etc/hostname",
        "ftp://127.0.0.1/a.mp4",
        "data:video/mp4,abc",
        "//10.0.0.1/a.mp4",
    ],
)
def test_a_redirect_elsewhere_is_refused(fetch, server, location):
    path = copy(server, "base.mp4", redirect(location))
    hosts = (server.host, "10.0.0.1", "169.254.169.254", "::ffff:10.0.0.1")  # listed, and refused all the same
    assert fetch.failure(path, http_hosts=hosts) is FailureCode.REFUSED
    assert server.hits[path] == 1


def test_a_redirect_to_another_server_on_loopback_never_reaches_it(fetch, server, clips):
    with serve(clips) as other:
        path = copy(server, "base.mp4", redirect(other.url("/base.mp4")))
        assert fetch.failure(path) is FailureCode.REFUSED
        assert not other.hits


def test_a_redirect_loop_ends(fetch, server):
    path = copy(server, "loop.mp4", [])
    server.script(path, redirect(path))
    assert fetch.failure(path) is FailureCode.UNSUPPORTED
    assert server.hits[path] < 40


def resolver(monkeypatch, address, port):
    """Let every name resolve to one address; returns the names that were asked for."""
    asked = []
    real = socket.getaddrinfo

    def resolve(host, service, *rest, **options):
        asked.append(host)
        return real(address, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


@pytest.mark.parametrize("address", ["10.0.0.1", "127.0.0.1", "169.254.169.254"])
def test_a_name_that_resolves_to_a_private_address_is_refused(tmp_path, server, monkeypatch, address):
    asked = resolver(monkeypatch, address, int(server.host.split(":")[1]))
    before = sum(server.hits.values())
    with pytest.raises(ClipFailure) as caught:
        download(
            ClipRef("http", "http://clips.example.org/base.mp4"),
            tmp_path,
            DownloadSettings(http_hosts=("clips.example.org",)),
        )
    assert caught.value.code is FailureCode.REFUSED
    assert asked == ["clips.example.org"]
    assert sum(server.hits.values()) == before


def test_the_address_that_was_judged_is_the_one_that_is_asked(tmp_path, server, monkeypatch):
    asked = resolver(monkeypatch, "127.0.0.1", int(server.host.split(":")[1]))
    settings = DownloadSettings(http_hosts=("clips.example.org",), allow_loopback=True)
    assert download(ClipRef("http", "http://clips.example.org/base.mp4"), tmp_path, settings).frames == 60
    assert asked == ["clips.example.org"]


@pytest.mark.parametrize(
    ("platform", "video_id", "host"),
    [
        ("youtube", "-bcdefghijk", "www.youtube.com"),
        ("bilibili", "BV1xx411c7mD", "www.bilibili.com"),
        ("tiktok", "7123456789012345678", "www.tiktok.com"),
        ("vimeo", "76979871", "vimeo.com"),
    ],
)
def test_each_platform_asks_its_own_host_through_the_guard(tmp_path, server, monkeypatch, platform, video_id, host):
    """No platform is reached: every name resolves to loopback, which the guard refuses to a platform's extractor."""
    asked = resolver(monkeypatch, "127.0.0.1", int(server.host.split(":")[1]))
    before = sum(server.hits.values())
    with pytest.raises(ClipFailure) as caught:
        download(ClipRef(platform, video_id), tmp_path, DownloadSettings())
    assert caught.value.code is FailureCode.REFUSED
    assert asked[0] == host
    assert sum(server.hits.values()) == before


@pytest.mark.parametrize(
    ("platform", "video_id"),
    [
        ("youtube", "--exec=touch"),
        ("youtube", "a/../../../x"),
        ("local", "../secret.mp4"),
        ("http", "file:///etc/hostname"),
        ("ftp", "a"),
    ],
)
def test_an_id_that_never_went_through_a_manifest_is_refused(tmp_path, platform, video_id):
    with pytest.raises(ClipFailure) as caught:
        download(ClipRef(platform, video_id), tmp_path / "videos", DownloadSettings(local_root=tmp_path))
    assert caught.value.code is FailureCode.REFUSED


def test_the_guard_knows_urls(server):
    guard = Guard(None, allow_loopback=False)
    for url in (
        "http://10.0.0.1/",
        server.url("/"),
        "file:///etc/passwd",
        "http://[::1]/",
        "nonsense",
        "http://a:b:c/",
    ):
        with pytest.raises(AddressRefused):
            guard.check_url(url)
    guard.check_url("https://example.org/a")
    with pytest.raises(AddressRefused):
        Guard(("example.org:8080",), allow_loopback=False).check_url("https://example.org/a")


# --- which format


def formats(*given):
    """A platform's offer as yt-dlp's extractors describe it."""
    fields = ("format_id", "vcodec", "acodec", "height", "protocol")
    return [
        {**dict(zip(fields, values, strict=True)), "url": f"https://cdn.example.org/{values[0]}", "ext": "mp4"}
        for values in given
    ]


def chosen(tmp_path, offer, **settings):
    settings = DownloadSettings(**settings)
    options = _options(tmp_path, settings, Limits(settings, tmp_path, None), time.sleep)
    with GuardedYoutubeDL(Guard(None, allow_loopback=False), options, extractors=False) as ydl:
        assert not ydl.cache.enabled
        info = {"id": "x", "title": "x", "extractor": "x", "extractor_key": "X", "formats": offer}
        return ydl.process_ie_result(info, download=False)["format_id"]


def test_h264_without_sound_is_preferred_below_the_cap(tmp_path):
    offer = formats(
        ("muxed-low", "avc1.42001E", "mp4a.40.2", 360, "https"),
        ("h264-720", "avc1.4d401f", "none", 720, "https"),
        ("h264-1080", "avc1.640028", "none", 1080, "https"),
        ("vp9-1080", "vp9", "none", 1080, "https"),
        ("av1-2160", "av01.0.12M.08", "none", 2160, "https"),
        ("h264-1440", "avc1.640032", "none", 1440, "https"),
        ("sound", "none", "mp4a.40.2", None, "https"),
    )
    assert chosen(tmp_path, offer) == "h264-1080"
    assert chosen(tmp_path, offer, max_height=720) == "h264-720"
    assert chosen(tmp_path, offer, max_height=400) == "muxed-low"
    assert chosen(tmp_path, [f for f in offer if not f["vcodec"].startswith("avc")]) == "vp9-1080"


def sizes(*given, **rest):
    """An offer of h264 formats in ascending order, named by their size such as 1080x1920."""
    rest = {"vcodec": "avc1.640028", "acodec": "none", "protocol": "https", "ext": "mp4", **rest}
    named = [(name, f"https://cdn.example.org/{name}", *map(int, name.split("x"))) for name in given]
    return [{**rest, "format_id": name, "url": url, "width": w, "height": h, "tbr": w * h} for name, url, w, h in named]


@pytest.mark.parametrize("rest", [{}, {"acodec": "mp4a"}, {"vcodec": "hvc1"}, {"protocol": "m3u8_native"}], ids=str)
@pytest.mark.parametrize(
    ("offer", "best"),
    [
        (("720x1280",), "720x1280"),
        (("720x1280", "1080x1920"), "1080x1920"),
        (("576x1024", "720x1280", "1080x1920"), "1080x1920"),
        (("144x256", "240x426", "360x640", "480x854", "720x1280", "1080x1920", "1440x2560"), "1080x1920"),
        (("640x360", "1280x720", "1920x1080", "2560x1440"), "1920x1080"),
        (("540x540", "1080x1080", "2160x2160"), "1080x1080"),
        (("540x542", "1080x1084"), "1080x1084"),  # yt-dlp rounds their aspect ratio to 1
        (("1084x1080",), "1084x1080"),
    ],
)
def test_the_cap_is_on_the_short_side(tmp_path, offer, best, rest):
    assert chosen(tmp_path, sizes(*offer, **rest)) == best


def test_portrait_formats_are_chosen_by_the_same_order_as_others(tmp_path):
    h265 = sizes("1080x1920", vcodec="h265", acodec="mp4a.40.2")
    assert chosen(tmp_path, h265 + sizes("576x1024", acodec="mp4a.40.2")) == "576x1024"  # h264 first
    assert chosen(tmp_path, h265 + sizes("576x1024", vcodec="vp9")) == "576x1024"  # then without sound
    assert chosen(tmp_path, sizes("576x1024") + sizes("720x1280", protocol="rtmp")) == "576x1024"
    assert chosen(tmp_path, sizes("720x1280", "1080x1920"), max_height=720) == "720x1280"
    with pytest.raises(YoutubeDLError, match="not available"):
        chosen(tmp_path, sizes("720x1280", "1080x1920"), max_height=480)


def test_formats_of_unknown_size_are_taken_where_no_other_fits(tmp_path):
    for field in ("width", "height"):
        for rest in ({}, {"acodec": "mp4a.40.2"}, {"vcodec": None, "acodec": None}):
            unknown = [{**f, field: None} for f in sizes("720x1280", **rest)]
            if field == "width":
                unknown[0]["height"] = 720
            assert chosen(tmp_path, unknown) == "720x1280"
            assert chosen(tmp_path, sizes("2160x3840", acodec="mp4a.40.2") + unknown) == "720x1280"
    assert chosen(tmp_path, [{**f, "height": None} for f in sizes("720x1280")] + sizes("360x640")) == "360x640"


def test_streams_that_only_ffmpeg_could_fetch_are_not_chosen(tmp_path):
    offer = formats(
        ("hls", "avc1.4d401f", "none", 480, "m3u8_native"),
        ("rtmp", "avc1.4d401f", "none", 1080, "rtmp"),
        ("socket", "avc1.4d401f", "none", 720, "websocket_frag"),
    )
    assert chosen(tmp_path, offer) == "hls"


def test_an_offer_above_the_cap_or_without_a_picture_is_no_format(tmp_path):
    for offer in (
        formats(("h264-2160", "avc1.640033", "none", 2160, "https")),
        formats(("sound", "none", "mp4a.40.2", None, "https")),
    ):
        with pytest.raises(YoutubeDLError) as caught:
            chosen(tmp_path, offer)
        assert cause_of(caught.value).code is FailureCode.NO_FORMAT
    locked = [{**f, "has_drm": True} for f in formats(("h264", "avc1.640033", "none", 720, "https"))]
    with pytest.raises(YoutubeDLError) as caught:
        chosen(tmp_path, locked)
    assert cause_of(caught.value).code is FailureCode.DRM


def test_live_streams_are_not_begun():
    for info in ({"is_live": True}, {"live_status": "is_upcoming"}, {"live_status": "is_live"}):
        with pytest.raises(ClipFailure) as caught:
            _not_live(info)
        assert caught.value.code is FailureCode.LIVE
    assert _not_live({"live_status": "was_live"}) is None


# --- local files


@pytest.fixture
def root(tmp_path, clips):
    folder = tmp_path / "root"
    (folder / "set").mkdir(parents=True)
    (folder / "set" / "a.mov").write_bytes((clips / "tagged.mov").read_bytes())
    return folder


def local(root, name, folder):
    return download(ClipRef("local", name), folder, DownloadSettings(local_root=root))


def test_a_local_file_is_copied_clean_and_left_as_it_is(root, tmp_path):
    source = root / "set" / "a.mov"
    before = source.read_bytes(), source.stat().st_mtime_ns
    video = local(root, "set/a.mov", tmp_path / "videos")
    assert video.frames == index_video(source).times_s.size == 60
    assert not any(secret.encode() in video.path.read_bytes() for secret in SECRETS)
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before
    assert len(list((tmp_path / "videos").rglob("*"))) == 2


def test_links_are_followed_below_the_root_only(root, tmp_path, clips):
    (root / "inside.mp4").symlink_to(root / "set" / "a.mov")
    (root / "outside.mp4").symlink_to(clips / "base.mp4")
    (root / "up").symlink_to(clips)
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    assert local(root, "inside.mp4", tmp_path / "videos").frames == 60
    for name, code in (
        ("outside.mp4", FailureCode.REFUSED),
        ("up/base.mp4", FailureCode.REFUSED),
        ("loop.mp4", FailureCode.REFUSED),
        ("none.mp4", FailureCode.REMOVED),
        ("set", FailureCode.REFUSED),
    ):
        with pytest.raises(ClipFailure) as caught:
            local(root, name, tmp_path / "videos")
        assert caught.value.code is code, name
        assert str(tmp_path) not in caught.value.message


def test_the_root_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert local(tmp_path / "link", "set/a.mov", tmp_path / "videos").frames == 60


def test_a_root_that_is_not_there_does_not_make_its_files_gone(tmp_path):
    with pytest.raises(ClipFailure) as caught:
        local(tmp_path / "not-mounted", "a.mp4", tmp_path / "videos")
    assert caught.value.code is FailureCode.REFUSED


def test_a_pipe_is_not_waited_for(root, tmp_path):
    os.mkfifo(root / "pipe.mp4")
    with pytest.raises(ClipFailure) as caught:
        local(root, "pipe.mp4", tmp_path / "videos")
    assert caught.value.code is FailureCode.REFUSED


def test_without_a_root_no_local_file_is_read(tmp_path):
    with pytest.raises(ClipFailure) as caught:
        download(ClipRef("local", "a.mp4"), tmp_path, DownloadSettings())
    assert caught.value.code is FailureCode.REFUSED


# --- the machine


def test_nothing_is_said_by_a_success_or_a_failure(fetch, server, capfd, caplog):
    caplog.set_level(0)
    fetch("/tagged.mp4")
    path = copy(server, "base.mp4", Fault(404, body=PAGE))
    with pytest.raises(ClipFailure):
        fetch(path)
    with pytest.raises(ClipFailure):
        fetch("/cover-only.mp3")
    said = "".join(capfd.readouterr()) + caplog.text
    assert not any(secret in said for secret in SECRETS)
    assert said == ""


ALONE = """
import json, resource, sys
from pathlib import Path
from curation.download.fetch import download
from curation.failures import ClipFailure
from curation.download.limits import Limits
from curation.records import ClipRef
from curation.settings import DownloadSettings

out, host, root, limit = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
settings = DownloadSettings(http_hosts=(host,), allow_loopback=True, local_root=root, retries=0)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
codes = []
for ref in (ClipRef("http", f"http://{host}/prores.mov"), ClipRef("local", "prores.mov")):
    try:
        codes.append(download(ref, out, settings).frames)
    except ClipFailure as error:
        codes.append(error.code)
print(json.dumps(codes))
"""


def alone(server, out, limit, home):
    """Both ways to get a file, in a process of its own with a home folder of its own."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", ALONE, str(out), server.host, str(server.folder), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_a_full_disk_is_typed_wherever_it_happens(server, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same place."""
    assert alone(server, tmp_path / "videos", 100_000, tmp_path) == ["disk_full", "disk_full"]
    assert list((tmp_path / "videos").iterdir()) == []


def test_configuration_and_plugins_of_the_user_are_not_read_and_no_cache_is_written(server, tmp_path):
    home = tmp_path / "home"
    plugin = home / ".config/yt-dlp/plugins/mine/yt_dlp_plugins/extractor/mine.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(f"from pathlib import Path\nPath({str(home / 'plugin-ran')!r}).touch()\n")
    (home / ".config/yt-dlp/config").write_text("--write-info-json\n--write-description\n--max-filesize 1\n")
    before = sorted(home.rglob("*"))
    assert alone(server, tmp_path / "videos", 0, home) == [60, 60]
    assert sorted(home.rglob("*")) == before
    assert {p.name for p in (tmp_path / "videos").rglob("*") if p.is_file()} == {"video.mov"}


def test_an_error_that_is_no_full_disk_is_not_hidden(tmp_path, server, allowed, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr("curation.download.fetch.fsync", fail)
    with pytest.raises(OSError, match="broken disk"):
        download(ClipRef("http", server.url("/base.mp4")), tmp_path, allowed)
