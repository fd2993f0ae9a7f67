"""Broken downloads: what is continued, what begins anew, who may use a part, and what is swept away."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from curation.download import resume as parts
from curation.download.resume import PART, PARTS, VALIDATOR, Validator, sweep, workspace
from curation.failures import ClipFailure, FailureCode
from tests.support.servers import Fault

NAME = "/prores.mov"
CUT = Fault(cut=60_000)
KEPT = [f"part/{PART}", f"part/{VALIDATOR}"]


@pytest.fixture
def whole(place, clips):
    """The digest of the video as an undisturbed download stores it."""
    digest = place.fetch(NAME).sha256
    (found,) = place.folder.rglob("video.*")
    found.unlink()
    found.parent.rmdir()
    place.server.requests.clear()
    place.server.headers.clear()
    return digest


def etag(place):
    return f'"{hashlib.sha256((place.server.folder / NAME[1:]).read_bytes()).hexdigest()[:16]}"'


def broken(place):
    """A download that broke off, given up at once; returns how many bytes were kept."""
    place.server.script(NAME, [CUT])
    assert place.failure(NAME, retries=0).code is FailureCode.NETWORK
    assert place.left() == KEPT
    size = place.part().stat().st_size
    assert 0 < size <= 60_000
    return size


def test_a_break_is_continued_within_a_call(place, whole):
    place.server.script(NAME, [CUT, CUT])
    assert place.fetch(NAME).sha256 == whole
    first, second, third = place.ranges()
    assert first is None and second is not None and third is not None
    assert 0 < int(second[6:-1]) < int(third[6:-1])
    conditions = [headers.get("If-Range") for headers in place.server.headers]
    assert conditions[0] is None and conditions[1] == conditions[2] == etag(place)
    assert place.left() == [f"{place.ref(NAME).video_key}/video.mov"]
    assert sorted(p.name for p in place.folder.iterdir()) == [place.ref(NAME).video_key]


def test_a_break_is_continued_by_the_next_call(place, whole):
    size = broken(place)
    assert place.fetch(NAME).sha256 == whole
    assert place.ranges() == [None, f"bytes={size}-"]
    assert len(list(place.folder.rglob("*"))) == 2


def test_progress_goes_on_from_where_it_stopped(place, whole):
    from curation.download.fetch import download

    size = broken(place)
    seen = []
    download(place.ref(NAME), place.folder, place.settings, lambda done, total: seen.append((done, total)))
    total = (place.server.folder / NAME[1:]).stat().st_size
    assert seen[0][0] > size and seen[-1] == (total, total)


@pytest.mark.parametrize("modified_only", [False, True])
@pytest.mark.parametrize("honest", [True, False])
def test_changed_content_of_the_same_length_begins_anew(place, whole, honest, modified_only):
    """Whether the server heeds If-Range or just sends the rest of the new content."""
    file = place.server.folder / NAME[1:]
    no_etag = {"ETag": None} if modified_only else {}
    place.server.script(NAME, [Fault(cut=60_000, headers=no_etag)])
    place.failure(NAME, retries=0)
    changed = bytearray(file.read_bytes())
    changed[100:110] = b"0123456789"  # in the free space of the header: the pictures stay
    file.unlink()
    file.write_bytes(changed)
    later = {"Last-Modified": "Thu, 02 Jan 2025 00:00:00 GMT", **no_etag}
    place.server.script(NAME, Fault(ignore_condition=not honest, ignore_range=honest and modified_only, headers=later))
    video = place.fetch(NAME)
    wanted = place.ranges()
    assert wanted[0] is None and wanted[1] is not None
    assert wanted[2:] == ([] if honest else [None])
    assert video.frames == 60 and place.waits == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(ignore_range=True),
        Fault(headers={"Content-Range": "bytes 7-99/100"}),
        Fault(headers={"Content-Range": None}),
        Fault(headers={"ETag": '"other"'}),
        Fault(headers={"ETag": None}),
        Fault(headers={"Last-Modified": "Thu, 02 Jan 2025 00:00:00 GMT"}),
        Fault(headers={"Content-Encoding": "gzip"}),
        Fault(status=416, headers={"Content-Range": "bytes */100"}),
        Fault(status=412),
    ],
)
def test_an_answer_that_is_not_the_rest_is_not_appended(place, whole, fault):
    broken(place)
    place.server.script(NAME, [fault])
    assert place.fetch(NAME).sha256 == whole
    assert place.ranges()[2:] == ([] if fault.ignore_range else [None])
    assert place.waits == []


def test_the_old_bytes_are_gone_before_a_new_content_is_vouched_for(place):
    broken(place)
    new = Fault(ignore_range=True, headers={"ETag": '"new"'}, cut=0, hang=True)
    place.server.script(NAME, new)
    assert place.failure(NAME, retries=0, timeout_s=0.3).code is FailureCode.TIMEOUT
    assert list(place.folder.iterdir()) == []


def test_an_error_of_the_server_keeps_the_part(place, whole):
    size = broken(place)
    place.server.script(NAME, [Fault(503)])
    assert place.fetch(NAME).sha256 == whole
    assert place.ranges()[1:] == [f"bytes={size}-"] * 2


@pytest.mark.parametrize("code", [404, 410])
def test_a_permanent_failure_drops_the_part(place, code):
    broken(place)
    place.server.script(NAME, Fault(code))
    place.failure(NAME)
    assert list(place.folder.iterdir()) == []


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": 'W/"weak"', "Last-Modified": None},
        {"ETag": None, "Last-Modified": None},
        {"ETag": None, "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT", "Date": "Wed, 01 Jan 2025 00:00:20 GMT"},
        {"ETag": None, "Last-Modified": "yesterday"},
        {"Content-Length": None},
    ],
)
def test_without_a_validator_nothing_is_kept(place, headers):
    hang = Fault(cut=60_000, headers=headers, hang=True)
    place.server.script(NAME, hang)
    assert place.failure(NAME, retries=1, timeout_s=0.3).code is FailureCode.TIMEOUT
    assert place.ranges() == [None, None]
    assert list(place.folder.iterdir()) == []


def spoil_age(part):
    old = time.time() - parts.MAX_AGE_S - 60
    os.utime(part.with_name(VALIDATOR), (old, old))


def spoil_length(part):
    part.write_bytes(part.read_bytes() + bytes(500_000))


def spoil_format(part):
    values = json.loads(part.with_name(VALIDATOR).read_text())
    part.with_name(VALIDATOR).write_text(json.dumps({**values, "format_id": "other"}))


def spoil_validator(part):
    part.with_name(VALIDATOR).write_text('{"total": 3')


def spoil_missing(part):
    part.with_name(VALIDATOR).unlink()


def spoil_empty(part):
    part.write_bytes(b"")


@pytest.mark.parametrize("spoil", [spoil_age, spoil_length, spoil_format, spoil_validator, spoil_missing, spoil_empty])
def test_a_part_that_cannot_be_vouched_for_is_dropped(place, whole, spoil):
    broken(place)
    spoil(place.part())
    assert place.fetch(NAME).sha256 == whole
    assert place.ranges() == [None, None]


def test_wrong_bytes_in_a_part_are_found_and_fetched_anew_once(place, whole):
    size = broken(place)
    place.part().write_bytes(bytes(size))
    assert place.fetch(NAME).sha256 == whole
    assert place.ranges() == [None, f"bytes={size}-", None]


def test_a_server_with_a_damaged_file_is_not_asked_for_ever(place):
    file = place.server.folder / NAME[1:]
    content = bytearray(file.read_bytes())
    file.unlink()
    file.write_bytes(content[:-20_000])
    size = broken(place)
    assert place.failure(NAME).code is FailureCode.CORRUPT
    assert place.ranges() == [None, f"bytes={size}-", None]
    assert list(place.folder.iterdir()) == []


def test_junk_in_a_work_folder_or_at_the_goal_is_never_taken_up(place, whole):
    broken(place)
    work = place.part().parent
    for name in ("fetched", "fetched.mp4", "video.mov", "fetched.ytdl", "fetched-Frag1.part"):
        (work / name).write_bytes(b"junk")
    home = place.folder / place.ref(NAME).video_key
    home.mkdir()
    (home / "video.mov").write_bytes(b"junk")
    assert place.fetch(NAME).sha256 == whole
    assert place.left() == [f"{home.name}/video.mov"]


ALONE = """
import sys
from pathlib import Path
from curation.download.fetch import download
from curation.records import ClipRef
from curation.settings import DownloadSettings

host, path, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
settings = DownloadSettings(http_hosts=(host,), allow_loopback=True, retries=0, timeout_s=60, min_free_mb=0)
download(ClipRef("http", f"http://{host}{path}"), out, settings)
"""


@pytest.fixture
def hanging(place):
    """A process whose download has brought some bytes and waits for more."""
    place.server.script(NAME, [Fault(cut=60_000, hang=True)])
    command = [sys.executable, "-c", ALONE, place.server.host, NAME, str(place.folder)]
    process = subprocess.Popen(command, cwd=Path.cwd())
    try:
        for _ in range(600):
            if any(path.stat().st_size > 10_000 for path in place.folder.rglob(PART)):
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_process_leaves_its_part_to_the_next(place, whole, hanging):
    place.server.script(NAME, [])
    hanging.send_signal(signal.SIGKILL)
    hanging.wait()
    size = place.part().stat().st_size
    assert place.left() == KEPT
    assert place.fetch(NAME).sha256 == whole
    assert place.ranges() == [None, f"bytes={size}-"]
    assert len(list(place.folder.rglob("*"))) == 2


def test_a_part_in_use_is_neither_used_nor_swept_by_another(place, whole, hanging):
    part = place.part()
    assert place.fetch(NAME).sha256 == whole
    assert place.ranges() == [None, None]
    spoil_age(part)
    sweep(place.folder)
    assert part.exists()  # in use, however old
    os.utime(part.with_name(VALIDATOR))
    hanging.kill()
    hanging.wait()
    sweep(place.folder)
    assert part.exists()  # it may still be gone on with
    spoil_age(part)
    sweep(place.folder)
    assert not (place.folder / PARTS).exists()


def test_an_interrupt_keeps_the_part(place):
    def stop(done, total):
        raise KeyboardInterrupt

    from curation.download.fetch import download

    with pytest.raises(KeyboardInterrupt):
        download(place.ref(NAME), place.folder, place.settings, stop)
    assert place.left() == KEPT


# --- work folders


def failing(folder, key, code=FailureCode.NETWORK, content=b"abc"):
    with pytest.raises(ClipFailure), workspace(folder, key) as work:
        Validator("0", 10, '"a"', None).write(work)
        (work / PART).write_bytes(content)
        raise ClipFailure(code, "")
    return work


def test_two_at_once_never_share_a_work_folder(tmp_path):
    kept = failing(tmp_path, "a")
    with workspace(tmp_path, "a") as first, workspace(tmp_path, "a") as second:
        assert first == kept and second != first
        assert (first / PART).read_bytes() == b"abc"
        assert not (second / PART).exists()
    assert list(tmp_path.iterdir()) == []


def test_many_at_once_keep_their_folders_to_themselves(tmp_path):
    """Taking, keeping, removing and sweeping at the same time; a lock is one thread's as it is one process's."""
    end = time.monotonic() + 1.5

    def work(seed):
        chance = random.Random(seed)
        while time.monotonic() < end:
            if chance.random() < 0.2:
                sweep(tmp_path)
            with contextlib.suppress(ClipFailure), workspace(tmp_path, f"{chance.randrange(2)}") as folder:
                owner = folder / "owner"
                assert not owner.exists()
                owner.write_text(f"{seed}")
                Validator("0", 10, '"a"', None).write(folder)
                (folder / PART).write_bytes(b"abc")
                time.sleep(chance.choice((0, 0.002)))
                assert owner.read_text() == f"{seed}"
                if chance.random() < 0.5:
                    raise ClipFailure(FailureCode.NETWORK, "")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


@pytest.mark.parametrize("code", list(FailureCode))
def test_parts_are_kept_after_failures_of_the_way_only(tmp_path, code):
    kept = failing(tmp_path, "a", code).exists()
    assert kept == (code in ("network", "timeout", "http_5xx", "rate_limited"))
    assert kept == (tmp_path / PARTS).exists()


def test_a_file_system_without_locks_shares_nothing_and_is_swept_after_a_day(tmp_path, monkeypatch):
    def unsupported(handle, operation):
        raise OSError(95, "not supported")

    kept = failing(tmp_path, "a")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with workspace(tmp_path, "a") as work:
        assert work != kept
        sweep(tmp_path)
        assert work.exists() and kept.exists()
    old = time.time() - parts.MAX_AGE_S - 60
    for path in (*kept.iterdir(), kept):
        os.utime(path, (old, old))
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_removes_what_is_of_no_use_and_nothing_else(tmp_path):
    video = tmp_path / "0123456789abcdef"
    video.mkdir()
    (video / "video.mp4").write_bytes(b"x")
    old = time.time() - parts.MAX_AGE_S - 60
    for path in (video / "video.mp4", video):
        os.utime(path, (old, old))
    abandoned = tmp_path / PARTS / "a" / "tmp1"
    abandoned.mkdir(parents=True)
    (abandoned / PART).write_bytes(b"x")
    kept = failing(tmp_path, "b")
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([video, tmp_path / PARTS])
    assert list((tmp_path / PARTS).iterdir()) == [kept.parent]
    assert (kept / PART).exists()


def test_a_forgotten_video_leaves_no_part(tmp_path):
    failing(tmp_path, "a")
    kept = failing(tmp_path, "b")
    parts.discard(tmp_path, "a")
    assert list((tmp_path / PARTS).iterdir()) == [kept.parent]
    parts.discard(tmp_path, "b")
    parts.discard(tmp_path, "never-there")
    assert list(tmp_path.iterdir()) == []


def test_sweeps_are_rare(tmp_path, monkeypatch):
    swept = []
    monkeypatch.setattr(parts, "sweep", swept.append)
    clock = [1000.0]
    monkeypatch.setattr(parts.time, "monotonic", lambda: clock[0])
    for seconds in (0, 10, 3000, 589, 1, 5, 3700):
        clock[0] += seconds
        parts.sweep_now_and_then(tmp_path)
    assert len(swept) == 3
