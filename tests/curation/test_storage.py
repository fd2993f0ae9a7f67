"""Files behind a URL: on a real S3 server on loopback, and on a second folder through fsspec's file system."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from curation.failures import OutageError, UsageError
from curation.outages import patience
from curation.settings import Settings
from curation.storage import Store
from tests.support.objects import Server, restarting_s3_server, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as url:
        yield url


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return f"file://{tmp_path / 'shared'}"


def write(store: Store, name: str, data: bytes) -> None:
    store.path(name).parent.mkdir(parents=True, exist_ok=True)
    store.path(name).write_bytes(data)


def test_what_one_machine_puts_another_gets(tmp_path: Path, url: str):
    here, there = Store(tmp_path / "a", url), pickle.loads(pickle.dumps(Store(tmp_path / "b", url)))
    names = [f"observations/{n:02x}/{n}.parquet" for n in range(20)]
    for number, name in enumerate(names):
        write(here, name, bytes([number]) * (number + 1))
    here.put_all(names)
    assert there.sizes_of([*names, "nothing"]) == [*range(1, 21), None]
    paths = there.get_all(names)
    assert [path and path.read_bytes() for path in paths] == [bytes([n]) * (n + 1) for n in range(20)]
    assert there.get("nothing") is None
    assert there.sizes("observations/03") == {"3.parquet": 4} and there.sizes("none") == {}
    there.drop([names[3], "nothing"])
    assert Store(tmp_path / "c", url).get(names[3]) is None


def test_a_file_of_another_size_is_not_given_out(tmp_path: Path, url: str):
    here, there = Store(tmp_path / "a", url), Store(tmp_path / "b", url)
    write(here, "video", b"12345")
    here.put("video")
    assert there.get("video", 6) is None and not list((tmp_path / "b").rglob("*.*"))
    assert there.get("video", 5) is not None
    write(here, "video", b"123456")
    here.put("video")
    assert there.get("video", 6).read_bytes() == b"123456", "a stale copy is replaced"


@pytest.mark.slow
def test_large_files_go_in_parts_and_are_read_back(tmp_path: Path, s3: str):
    store = Store(tmp_path / "a", f"{s3}/large")
    write(store, "video", bytes(range(256)) * (120 * 2**12))
    store.put("video")
    assert Store(tmp_path / "b", f"{s3}/large").get("video").stat().st_size == 120 * 2**20


def test_copies_are_released_only_where_the_url_has_them(tmp_path: Path, url: str):
    for store in (Store(tmp_path / "a", url), Store(tmp_path / "b")):
        write(store, "x", b"x")
        store.put("x")
        store.release(["x"])
        assert store.get("x") is not None
    assert not list((tmp_path / "a").glob(".x*"))


def test_what_the_url_does_not_have_is_never_deleted(tmp_path: Path, url: str):
    store = Store(tmp_path / "a", url)
    for name in ("never sent", "sent and changed", "sent"):
        write(store, name, b"1")
    store.put_all(["sent and changed", "sent"])
    write(store, "sent and changed", b"22")
    for path in (tmp_path / "a").iterdir():
        os.utime(path, (0, 0))
    store.release_older("*", 10)
    store.release(["never sent", "sent and changed", "sent"])
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"never sent", "sent and changed"}


def test_many_workers_send_one_file_and_check_one_storage_at_once(tmp_path: Path, url: str):
    data = bytes(range(256)) * 2**12
    stores = [Store(tmp_path / str(n), url) for n in range(4)]
    for store in stores:
        write(store, "x/shard", data)

    def work(store: Store) -> None:
        for _ in range(5):
            store.put("x/shard")
            store.check()
            assert Store(store.root / "other", url).sizes_of(["x/shard"]) == [len(data)]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, stores))


def test_old_copies_go_young_ones_and_unshared_ones_stay(tmp_path: Path, url: str):
    store, alone = Store(tmp_path / "a", url), Store(tmp_path / "b")
    for each in (store, alone):
        for name, age in (("videos/x/video.mp4", 100), ("videos/y/video.mp4", 0)):
            write(each, name, b"x")
            os.utime(each.path(name), (time.time() - age,) * 2)
            each.put(name)
        each.release_older("videos/*/video.*", 50)
    assert [path.parent.name for path in sorted((tmp_path / "a").rglob("video.mp4"))] == ["y"]
    assert len(list((tmp_path / "b").rglob("video.mp4"))) == 2
    assert store.get("videos/x/video.mp4") is not None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://nowhere-at-all/run", "no such bucket"),
        ("file:///dev/null/x", "failed"),
        ("nonsense://x", "cannot be used"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_sentence(tmp_path: Path, s3: str, url: str, said: str):
    with pytest.raises(UsageError, match=said):
        Store(tmp_path, url).check()


@pytest.mark.parametrize(
    ("url", "kind"),
    [("ftp://user:secret@127.0.0.1:1/x", OutageError), ("ftp://user:secret@127.0.0.1:secret/x", UsageError)],
)
def test_a_storage_that_fails_at_the_first_word_is_typed_everywhere(tmp_path: Path, url: str, kind: type[Exception]):
    (tmp_path / "x").write_bytes(b"x")
    for act in (
        lambda store: store.check(),
        lambda store: store.put("x"),
        lambda store: store.create("x"),
        lambda store: store.names("x"),
        lambda store: store.sizes("x"),
        lambda store: store.get("y"),
    ):
        with pytest.raises(kind) as raised, patience(0.01):
            act(Store(tmp_path, url))
        assert "secret" not in str(raised.value) and raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://user:secret@host/run", "ftp://host/run"),
        ("ftp://user:sec@ret@host/run", "ftp://host/run"),
        ("ftp://user:sec/r@et@host/run", "ftp://host/run"),
        ("ftp://user@host/run", "ftp://host/run"),
        ("s3://bucket/run@2", "s3://bucket/run@2"),
    ],
)
def test_no_password_of_a_storage_is_shown(url: str, shown: str):
    assert Settings(out=Path("x"), storage=url).place == shown


def test_a_good_storage_passes_the_check_and_keeps_nothing_of_it(tmp_path: Path, url: str):
    store = Store(tmp_path / "a", url)
    store.check()
    assert store.sizes("") == {} and not list((tmp_path / "a").iterdir())


def test_an_upload_that_arrives_changed_is_noticed(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path / "a", url)
    write(store, "x", b"right")
    whole = store._fs.put_file

    def falsify(path, target, **options):
        wrong = tmp_path / "wrong"
        wrong.write_bytes(b"wrong")
        return whole(str(wrong), target, **options)

    monkeypatch.setattr(store._fs, "put_file", falsify)
    with pytest.raises(OutageError, match="arrived changed"), patience(0.5):
        store.put("x")


@pytest.fixture
def fickle(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Server]]:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # what the libraries below wait for by themselves is not tested here
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with restarting_s3_server(monkeypatch) as both:
        yield both


@pytest.mark.slow
def test_a_storage_that_goes_away_in_the_middle_is_waited_for(
    tmp_path: Path, fickle: tuple[str, Server], caplog: pytest.LogCaptureFixture
):
    url, server = fickle
    here, there = Store(tmp_path / "a", f"{url}/run"), Store(tmp_path / "b", f"{url}/run")
    names = [f"observations/{n:02x}/{n}.parquet" for n in range(40)]
    for name in names:
        write(here, name, name.encode() * 100)
    here.put_all(names[:20])
    server.stop()
    back = threading.Timer(1.5, server.start)
    back.start()
    here.put_all(names[20:])
    back.join()
    server.stop()
    back = threading.Timer(1.5, server.start)
    back.start()
    assert there.sizes("observations/03") == {"3.parquet": here.path(names[3]).stat().st_size}
    back.join()
    paths = there.get_all(names)
    assert [path and path.read_bytes() for path in paths] == [name.encode() * 100 for name in names]
    said = [record.getMessage() for record in caplog.records if record.name == "curation.outages"]
    assert len([line for line in said if line.startswith("The storage s3:// is away: ")]) == 2, "one line each time"
    assert str(server.port) not in "".join(said)


def test_a_storage_that_stays_away_is_an_outage_and_no_fault_of_the_set_up(
    tmp_path: Path, fickle: tuple[str, Server], monkeypatch: pytest.MonkeyPatch
):
    url, server = fickle
    store = Store(tmp_path / "a", f"{url}/run")
    write(store, "x", b"x")
    server.stop()
    with pytest.raises(OutageError, match="finished work is kept") as raised, patience(0.5):
        store.put("x")
    assert not isinstance(raised.value, UsageError) and str(server.port) not in str(raised.value)
    assert raised.value.__suppress_context__, "the library's text names the host"


class Refusal(Exception):
    """What a library makes of an answer with this status."""

    def __init__(self, status: int) -> None:
        super().__init__("https://secret-host/secret-key")
        self.status_code = status


@pytest.mark.parametrize(
    ("error", "tries", "kind"),
    [
        (PermissionError("no"), 1, UsageError),
        (Refusal(403), 1, UsageError),
        (Refusal(400), 1, UsageError),
        (Refusal(503), 2, OutageError),
        (Refusal(429), 2, OutageError),
        (ConnectionResetError("reset"), 2, OutageError),
        (TimeoutError(), 2, OutageError),
        (OSError(errno.EIO, "secret-host"), 2, OutageError),
        (OSError(errno.ENOSPC, "full"), 1, OutageError),
        (ValueError("a defect"), 1, UsageError),
    ],
)
def test_only_what_may_pass_is_tried_again(tmp_path: Path, error: Exception, tries: int, kind: type[Exception]):
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(kind) as raised, patience(0.3):
        Store(tmp_path, f"file://{tmp_path}")._try(fail)
    assert (len(calls) >= 2) == (tries == 2)
    assert "secret" not in str(raised.value)
