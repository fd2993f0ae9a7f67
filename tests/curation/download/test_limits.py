"""Limits of size, disk space and rate; the user's cookies and proxy."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import traceback
from collections import namedtuple

import pytest

from curation.download.credentials import check_settings, cookie_text, proxy_address
from curation.download.fetch import download
from curation.download.limits import NO_ROOM, TOO_LARGE
from curation.failures import ClipFailure, FailureCode, UsageError
from curation.records import ClipRef
from curation.settings import DownloadSettings
from tests.support.servers import Fault, redirect

NAME = "/prores.mov"
JUNK = b"junk" * 400_000  # 1.6 MB
Usage = namedtuple("Usage", "total used free")


# --- size


def test_an_announced_size_over_the_limit_is_refused_before_the_body(place):
    place.server.script(NAME, Fault(body=JUNK, cut=100, hang=True))  # the body never comes, and nobody waits for it
    error = place.failure(NAME, max_video_mb=1)
    assert (error.code, error.message) == (FailureCode.REFUSED, TOO_LARGE)
    assert "max_video_mb" in error.message
    assert place.server.hits[NAME] == 1 and list(place.folder.iterdir()) == []


def test_a_size_that_was_not_announced_is_counted(place):
    place.server.script(NAME, Fault(body=JUNK, headers={"Content-Length": None}))
    assert place.failure(NAME, max_video_mb=1).message == TOO_LARGE
    assert place.server.hits[NAME] == 1 and list(place.folder.iterdir()) == []
    assert place.failure(NAME, max_video_mb=2).code is FailureCode.CORRUPT


def test_the_whole_of_a_continued_video_counts(place):
    (place.server.folder / "large.mp4").write_bytes(JUNK)
    place.server.script("/large.mp4", [Fault(cut=900_000)])
    assert place.failure("/large.mp4", retries=0).code is FailureCode.NETWORK
    assert place.failure("/large.mp4", max_video_mb=1).message == TOO_LARGE
    assert list(place.folder.iterdir()) == []


# --- disk


@pytest.fixture
def disk(monkeypatch):
    """A disk whose free space is a list of answers, the last one for ever."""
    answers = []

    def usage(path):
        return Usage(0, 0, answers.pop(0) if len(answers) > 1 else answers[0])

    monkeypatch.setattr("curation.download.limits.shutil.disk_usage", usage)
    return answers


def test_a_disk_that_is_nearly_full_is_not_begun_on(place, disk, names):
    disk[:] = [(100 << 20) - 1]
    error = place.failure(NAME, min_free_mb=100)
    assert (error.code, error.message) == (FailureCode.DISK_FULL, NO_ROOM)
    assert place.server.requests == [] and place.waits == []
    assert place.failure(ClipRef("youtube", "abcdefghijk"), min_free_mb=100).code is FailureCode.DISK_FULL
    assert names == []  # nor is a platform's page read first
    disk[:] = [(100 << 20) + 10_000_000]
    assert place.fetch(NAME, min_free_mb=100).frames == 60


def test_a_video_and_its_clean_copy_must_fit(place, disk):
    size = (place.server.folder / NAME[1:]).stat().st_size
    disk[:] = [(100 << 20) + 2 * size - 1]
    assert place.failure(NAME, min_free_mb=100).code is FailureCode.DISK_FULL
    assert place.server.hits[NAME] == 1 and list(place.folder.iterdir()) == []
    disk[:] = [(100 << 20) + 2 * size]
    assert place.fetch(NAME, min_free_mb=100).frames == 60


def test_a_disk_that_fills_up_on_the_way_is_noticed(place, disk):
    body = bytes(40 << 20)
    place.server.script(NAME, Fault(body=body, headers={"Content-Length": None}))
    plenty = 10 << 30
    disk[:] = [plenty, plenty, plenty, 0]
    seen = []
    settings = place.settings.model_copy(update={"min_free_mb": 100})
    with pytest.raises(ClipFailure) as caught:
        download(place.ref(NAME), place.folder, settings, lambda done, total: seen.append(done))
    assert caught.value.code is FailureCode.DISK_FULL
    assert 10 << 20 < max(seen) < 20 << 20
    assert place.server.hits[NAME] == 1 and list(place.folder.iterdir()) == []


def test_local_copies_leave_the_space_free_too(place, disk):
    disk[:] = [10]
    error = place.failure(ClipRef("local", "base.mp4"), min_free_mb=1, local_root=place.server.folder)
    assert error.code is FailureCode.DISK_FULL


# --- rate


def test_a_plain_file_comes_no_faster_than_asked(place):
    size = (place.server.folder / NAME[1:]).stat().st_size
    began = time.monotonic()
    place.fetch(NAME, bytes_per_s=size)
    assert time.monotonic() - began > 0.9


# --- cookies

SECRET = "s3cr3t-cookie-value"
COOKIES = f"# Netscape HTTP Cookie File\n\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\t{SECRET}\n"


@pytest.fixture
def jar(tmp_path):
    path = tmp_path / "cookies.txt"
    path.write_text(COOKIES)
    path.chmod(0o400)
    return path


def test_cookies_are_sent_and_their_file_is_left_alone(place, jar, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    before = jar.read_bytes(), jar.stat()
    place.server.script(NAME, [Fault(503), Fault(headers={"Set-Cookie": "session=changed; Max-Age=9999"})])
    copies = []

    def look(done, total):
        copies.extend(path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes())

    settings = place.settings.model_copy(update={"cookies": jar})
    download(place.ref(NAME), place.folder, settings, look, sleep=place.waits.append)
    assert [headers["Cookie"] for headers in place.server.headers] == [f"session={SECRET}"] * 2
    assert set(copies) == {jar}
    after = jar.read_bytes(), jar.stat()
    assert after[0] == before[0]
    assert (after[1].st_mtime_ns, after[1].st_ino, after[1].st_mode) == (
        before[1].st_mtime_ns,
        before[1].st_ino,
        before[1].st_mode,
    )
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "text",
    [
        COOKIES + f'{{"name": "{SECRET}"}}\n',
        COOKIES.replace("\t", " "),
        COOKIES.replace("\t0\t", "\tsoon\t"),
        f"#HttpOnly_127.0.0.1\tFALSE\t{SECRET}\n",
    ],
)
def test_a_file_that_is_no_cookie_file_is_refused_without_quoting_it(place, jar, text, caplog, capfd):
    jar.chmod(0o600)
    jar.write_text(text)
    settings = place.settings.model_copy(update={"cookies": jar})
    for attempt in (check_settings, lambda settings: place.fetch(NAME, cookies=jar)):
        with pytest.raises(UsageError, match="cookies") as caught:
            attempt(settings)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text + "".join(capfd.readouterr())
    assert place.server.requests == []


def test_good_settings_pass_and_unreadable_files_do_not(place, jar, tmp_path):
    proxy = tmp_path / "proxy.txt"
    proxy.write_text("http://127.0.0.1:8080\n")
    check_settings(DownloadSettings())
    check_settings(DownloadSettings(cookies=jar, proxy_file=proxy))
    assert cookie_text(jar).count(SECRET) == 1
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        for field in ("cookies", "proxy_file"):
            with pytest.raises(UsageError, match=field):
                check_settings(DownloadSettings.model_validate({field: path}))
    for pause in ((3.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(UsageError, match="pause_s"):
            check_settings(DownloadSettings(pause_s=pause))


# --- proxy

WORD = "s3cr3tword"


def proxy_file(tmp_path, text):
    path = tmp_path / "proxy.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"ftp://{WORD}:1080",
        f"{WORD}:8080",
        f"http://{WORD}:99999",
        f"http://{WORD}:0",
        f"http://{WORD}/path",
        f"http://{WORD}?q",
        f"http://{WORD} x:80",
        f"http://{WORD}\nhttp://{WORD}\n",
        f"http://[{WORD}",
        "http://",
        f"file:///{WORD}",
    ],
)
def test_a_file_without_a_proxy_is_refused_without_quoting_it(tmp_path, text):
    path = proxy_file(tmp_path, text)
    with pytest.raises(UsageError, match="proxy_file") as caught:
        check_settings(DownloadSettings(proxy_file=path))
    assert WORD not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("scheme", ["http", "https", "socks5", "socks5h"])
def test_addresses_of_proxies_are_read(tmp_path, scheme):
    address = f"{scheme}://user:{WORD}@[::1]:1080"
    assert proxy_address(proxy_file(tmp_path, f"  {address}\r\n")) == address


@pytest.fixture
def names(monkeypatch):
    """The names this machine resolves."""
    asked = []
    real = socket.getaddrinfo

    def resolve(host, *rest, **options):
        asked.append(host)
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def behind(proxy):
    return {"proxy_file": proxy, "http_hosts": ("clips.example.org", "10.0.0.1"), "allow_loopback": False}


def test_a_named_proxy_on_loopback_is_used_for_everything(place, tmp_path, names, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    path = proxy_file(tmp_path, f"http://user:{WORD}@{place.server.host}\n")
    ref = ClipRef("http", f"http://clips.example.org{NAME}")
    place.server.script(NAME, [Fault(cut=60_000)])
    assert place.fetch(ref, **behind(path)).frames == 60
    assert set(names) == {"127.0.0.1"}
    assert [wanted is None for wanted in place.ranges()] == [True, False]  # broken and continued
    assert all(headers["Host"] == "clips.example.org" for headers in place.server.headers)
    assert all("Proxy-Authorization" in headers for headers in place.server.headers)
    assert WORD not in caplog.text + "".join(capfd.readouterr())


def test_the_guard_judges_urls_behind_a_proxy_as_well(place, tmp_path):
    path = proxy_file(tmp_path, f"http://{place.server.host}")
    settings = behind(path)
    for location in ("http://10.0.0.1/a.mp4", "http://127.0.0.1/a.mp4", "http://elsewhere.example.org/a.mp4"):
        place.server.script(NAME, redirect(location))
        ref = ClipRef("http", f"http://clips.example.org{NAME}")
        assert place.failure(ref, **settings).code is FailureCode.REFUSED
    assert set(place.server.hits) == {NAME} and place.server.hits[NAME] == 3
    drip = Fault(drip_s=0.01)
    place.server.script(NAME, drip)
    assert place.failure(ref, **settings, timeout_s=0.3, retries=0).code is FailureCode.TIMEOUT


def test_a_proxy_that_fails_is_a_network_failure_and_not_named(place, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for scheme in ("http", "https", "socks5"):
        path = proxy_file(tmp_path, f"{scheme}://{WORD}:pass{WORD}@127.0.0.1:{port}")
        ref = ClipRef("http", f"http://clips.example.org{NAME}")
        error = place.failure(ref, **behind(path), retries=1)
        assert error.code is FailureCode.NETWORK
        said = "".join(traceback.format_exception(error)) + repr(error)
        assert WORD not in said and str(port) not in said
        assert len(place.waits) == 1
    assert WORD not in caplog.text + "".join(capfd.readouterr())
    place.server.script(NAME, Fault(407))
    path = proxy_file(tmp_path, f"http://{place.server.host}")
    assert place.failure(ref, **behind(path)).code is FailureCode.NETWORK


class Socks:
    """A SOCKS5 proxy that leads every name to one server; `asked`: the names."""

    def __init__(self, target):
        self.target, self.asked = target, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"socks5://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError), client, socket.create_connection(self.target) as server:
            client.recv(2 + client.recv(2, socket.MSG_PEEK)[1])
            client.sendall(b"\x05\x00")
            head = client.recv(5)
            assert head[:4] == b"\x05\x01\x00\x03"  # by name: the proxy resolves
            self.asked.append(client.recv(head[4]).decode())
            client.recv(2)
            client.sendall(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50")
            threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
            self._copy(server, client)

    def _copy(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)


def test_a_socks_proxy_resolves_the_names_and_keeps_the_pace(place, tmp_path, names):
    host, port = place.server.host.split(":")
    socks = Socks((host, int(port)))
    path = proxy_file(tmp_path, socks.address)
    ref = ClipRef("http", f"http://clips.example.org{NAME}")
    assert place.fetch(ref, **behind(path)).frames == 60
    assert socks.asked == ["clips.example.org"]
    assert set(names) == {"127.0.0.1"}
    place.server.script(NAME, Fault(drip_s=0.01))
    assert place.failure(ref, **behind(path), timeout_s=0.3, retries=0).code is FailureCode.TIMEOUT
    socks.listener.close()
