"""A database that goes away and comes back, and one that stays away: real servers, restarted while processes write."""

from __future__ import annotations

import logging
import multiprocessing
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

import curation.catalog.database
from curation import pipeline
from curation.catalog import Attempt, Catalog, ObservationFile
from curation.catalog.database import Database
from curation.download.politeness import Gate
from curation.failures import FailureCode, OutageError, UsageError
from curation.outages import patience, wait_for
from curation.records import ClipRef, VideoFile
from curation.run.batches import Batch
from curation.run.claims import Claims, Queue
from curation.settings import DownloadSettings, Settings
from tests.support.databases import Line, execute, restarting_server

SERVED = multiprocessing.get_context("forkserver")  # a fork of pytest would carry its threads' locks
SERVED.set_forkserver_preload(["curation.catalog", "pytest"])
SHA = "1" * 64
REFS = [ClipRef("youtube", f"{number:011d}") for number in range(60)]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Callable[..., None]]]:
    with restarting_server() as both:
        yield both


@pytest.fixture
def url(server: tuple[str, Callable[..., None]]) -> str:
    execute(server[0], "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    return server[0]


@pytest.fixture
def line(url: str) -> Iterator[Line]:
    line = Line(url)
    yield line
    line.close()


def write(url: str, stage: str, rounds: int, folder: Path) -> None:
    """What a worker writes, over and over; each round leaves a file, so that its progress is seen from outside."""
    catalog = Catalog(url)
    digest = catalog.put_provenance({"a": 1})
    for number in range(rounds):
        refs = REFS[number % 6 :: 6]
        catalog.register(refs)
        failed = FailureCode.TIMEOUT if number % 2 else None
        catalog.record_attempts(Attempt(ref.clip_id, stage, failed, started_at=number, seconds=1.0) for ref in refs)
        catalog.record_observations(ObservationFile(ref.clip_id, "full", "o", SHA, digest) for ref in refs)
        assert catalog.claim([f"{stage}-{number}"], stage, 3600)
        catalog.take_turn("youtube", "me", per_hour=0, pause_s=1, patience_s=1e6)
        (folder / f"{stage}-{number}").touch()


def everything(url: str) -> dict[str, object]:
    """What the tables say, but for times, ids and workers' names."""
    tries = execute(url, "SELECT clip_id, stage, code, started_at, unresolved FROM attempts")
    measured = execute(url, "SELECT clip_id, kind, path, sha256 FROM observations")
    held = execute(url, "SELECT name, owner FROM leases")
    turns = execute(url, "SELECT count(*) FROM turns")
    return {"tries": Counter(tries), "measured": Counter(measured), "held": Counter(held), "turns": Counter(turns)}


@pytest.mark.parametrize("rounds", [pytest.param(rounds, marks=pytest.mark.slow) for rounds in (12, 240)])
def test_a_restart_is_not_seen_in_the_result(
    server: tuple[str, Callable[..., None]], url: str, tmp_path: Path, rounds: int
) -> None:
    stages = ["download", "observe", "teach"]

    def run_all(name: str, disturb: bool) -> dict[str, object]:
        folder = tmp_path / name
        folder.mkdir()
        writers = [SERVED.Process(target=write, args=(url, stage, rounds, folder)) for stage in stages]
        for writer in writers:
            writer.start()
        for share, mode in ((0.2, "fast"), (0.6, "immediate")) if disturb else ():
            while len(list(folder.iterdir())) < share * rounds * len(stages):
                assert {writer.exitcode for writer in writers} <= {None, 0}
                time.sleep(0.01)
            server[1]("restart", "-m", mode)
        for writer in writers:
            writer.join(timeout=60 + 2 * rounds)
        assert [writer.exitcode for writer in writers] == [0] * len(writers)
        return everything(url)

    disturbed = run_all("disturbed", True)
    execute(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    assert disturbed == run_all("undisturbed", False)


def test_one_line_tells_of_an_outage_and_nothing_of_where(
    server: tuple[str, Callable[..., None]], url: str, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = Catalog(url)
    server[1]("stop", "-m", "fast")
    back = threading.Timer(1.0, server[1], ("start",))
    back.start()
    with caplog.at_level(logging.INFO, "curation"):
        threads = [threading.Thread(target=catalog.register, args=(REFS,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    back.join()
    assert catalog.refs(REFS).keys() == {ref.clip_id for ref in REFS}
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and said[0].startswith("The catalog's database is away: it ")
    assert "127.0.0.1" not in caplog.text and "unish@" not in caplog.text


# --------------------------------------------------------------------------------------- commits without an answer


def test_a_commit_whose_answer_was_lost_counts_once(url: str, line: Line) -> None:
    catalog, there = Catalog(line.url), Catalog(url)
    video = VideoFile(Path("v"), SHA, 7, "h264", 2, 2, 9, 1.5)
    for work in (
        lambda: catalog.register(REFS),
        lambda: catalog.record_attempts(Attempt(ref.clip_id, "observe", FailureCode.CORRUPT) for ref in REFS),
        lambda: catalog.record_video(REFS[0].video_key, video, "videos/v.mp4"),
        lambda: catalog.claim(["a", "b"], "ann", 60),
        lambda: catalog.take_turn("youtube", "me", per_hour=0, pause_s=50),
        lambda: catalog.block("vimeo", "me", FailureCode.BOT_CHECK, None),
    ):
        line.lose = 2
        work()
        assert line.lose == 0, "both answers were lost, and the third came"
    line.lose, line.pause_s = 2, 0.6  # together longer than the shortest block
    catalog.block("tiktok", "me", FailureCode.BOT_CHECK, 0.1)
    history = there.clip(REFS[0].clip_id)
    assert [attempt.code for attempt in history.attempts] == [FailureCode.CORRUPT]
    assert len(there.failures()) == len(REFS)
    assert there.extend("ann", 60) == {"a", "b"}
    assert 45 < there.take_turn("youtube", "me", per_hour=0, pause_s=50).wait_s <= 50, "one turn was taken, not three"
    assert execute(url, "SELECT strikes FROM breakers") == [(1,), (1,)]

    line.lose, line.pause_s = 1, 0.0
    gone = catalog.forget([REFS[0].video_key])
    assert gone.clip_ids == (REFS[0].clip_id,) and gone.files == ("videos/v.mp4",), "known also without the answer"


def test_the_one_who_may_try_a_service_learns_it_also_after_a_lost_answer(url: str, line: Line) -> None:
    catalog = Catalog(line.url)
    catalog.block("youtube", "me", FailureCode.RATE_LIMITED, 1.0)
    time.sleep(1.1)
    line.lose = 1
    assert catalog.take_turn("youtube", "me", per_hour=0, pause_s=5).blocked is None


def test_the_same_try_on_purpose_still_makes_two(url: str) -> None:
    catalog = Catalog(url)
    catalog.register(REFS)
    for _ in range(2):
        catalog.record_attempts([Attempt(REFS[0].clip_id, "observe"), Attempt(REFS[0].clip_id, "observe")])
    assert len(catalog.clip(REFS[0].clip_id).attempts) == 4


# ------------------------------------------------------------------------------------------------ what stays away


def test_what_stays_away_is_an_outage_and_what_is_set_up_wrongly_is_said_at_once(url: str) -> None:
    parsed = sa.make_url(url)
    secret = parsed.set(username="secret-user", database="secret-base")
    for wrong, kind, says in (
        (secret.set(port=1), OutageError, "refuses connections"),
        (secret, UsageError, "no such database or user"),
        (secret.set(host="secret-host.invalid"), UsageError, "host name is unknown"),
        (secret.set(host="/secret-folder"), OutageError, "was away"),
        (parsed.set(query={"sslmode": "require"}), UsageError, "encrypted"),
    ):
        with pytest.raises(kind, match=says) as raised, patience(0.3):
            Catalog(wrong.render_as_string(hide_password=False))
        assert not isinstance(raised.value, UsageError) or kind is UsageError
        told = f"{raised.value} {raised.value.__cause__}"
        assert not any(word in told for word in ("secret", "127.0.0.1", str(parsed.port), str(Path.home())))
        assert raised.value.__suppress_context__, "the driver's text would be shown with a traceback"


WRONG_ADDRESSES = {
    "postgresql://user:secret@secret:secret@secret-host/base": "The catalog URL is not valid",
    "postgresql://user@secret-host:secret/base": "The catalog URL is not valid",
    "sqlite:///secret%00secret/base": "The catalog URL is not valid",
    "postgresql://127.0.0.1:99999/base": "a connection option is wrong",
    "postgresql:///?service=secret": "a connection option is wrong",
    **dict.fromkeys(
        (
            f"postgresql://user@127.0.0.1:1/base?{option}=secret"
            for option in ("sslmode", "target_session_attrs", "keepalives", "hostaddr", "tcp_user_timeout")
        ),
        "a connection option is wrong",
    ),
}


@pytest.mark.parametrize("address", WRONG_ADDRESSES)
def test_a_wrong_address_is_said_at_once_and_not_repeated(address: str) -> None:
    if address.startswith("postgresql"):
        pytest.importorskip("psycopg")
    with pytest.raises(UsageError, match=WRONG_ADDRESSES[address]) as raised, patience(0.1):
        Database(address)
    assert "secret" not in str(raised.value) and raised.value.__suppress_context__


def test_each_outage_has_its_line_also_after_one_that_was_given_up(caplog: pytest.LogCaptureFixture) -> None:
    def away() -> None:
        raise ConnectionError

    caplog.set_level(logging.INFO, "curation.outages")
    for work, kind in ((away, OutageError), (away, OutageError), (lambda: 1 // 0, ZeroDivisionError)):
        with pytest.raises(kind), patience(0.3):
            wait_for("It", work, lambda error: "so" if isinstance(error, ConnectionError) else None)
    assert [record.getMessage() for record in caplog.records] == 2 * ["It is away: so. Waiting for it for up to 0 s."]


def test_who_gives_up_first_leaves_the_line_to_who_waits_longer(caplog: pytest.LogCaptureFixture) -> None:
    until = time.monotonic() + 0.8

    def away() -> None:
        if time.monotonic() < until:
            raise ConnectionError

    def wait(seconds: float) -> None:
        with suppress(OutageError), patience(seconds):
            wait_for("It", away, lambda error: "so" if isinstance(error, ConnectionError) else None)

    caplog.set_level(logging.INFO, "curation.outages")
    threads = [threading.Thread(target=wait, args=(seconds,)) for seconds in (0.2, 0.3, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["It is away", "It is back."]


def test_a_user_without_rights_is_said(url: str) -> None:
    Catalog(url)
    execute(url, "DROP ROLE IF EXISTS reader", "CREATE ROLE reader LOGIN")
    mine = sa.make_url(url).set(username="reader").render_as_string()
    with pytest.raises(UsageError, match="may not create tables in any schema"):
        Catalog(mine)
    execute(url, "GRANT USAGE ON SCHEMA public TO reader")
    with pytest.raises(UsageError, match="lacks permissions"):
        Catalog(mine)


def test_too_many_connections_are_waited_for(url: str) -> None:
    execute(
        url, "DROP ROLE IF EXISTS few", "CREATE ROLE few LOGIN CONNECTION LIMIT 1", "GRANT ALL ON SCHEMA public TO few"
    )
    mine = sa.make_url(url).set(username="few").render_as_string()
    catalog = Catalog(mine)
    engine = sa.create_engine(mine.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.pool.NullPool)
    connection = engine.connect()
    freed = threading.Timer(0.7, connection.close)
    freed.start()
    assert catalog.register(REFS[:1]) == frozenset()
    freed.join()


def test_a_locked_sqlite_file_is_waited_for_longer_than_sqlite_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation.catalog.database, "LOCK_TIMEOUT_S", 0.1)
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(f"sqlite:///{path}")
    writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    writer.execute("BEGIN IMMEDIATE")
    freed = threading.Timer(0.7, writer.rollback)
    freed.start()
    catalog.register(REFS)
    freed.join()
    assert len(catalog.refs(REFS)) == len(REFS)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutageError, match="locked it for too long"), patience(0.3):
        catalog.register(REFS)
    writer.close()


def test_a_sqlite_file_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    catalog = Catalog(f"sqlite:///{tmp_path / 'share' / 'catalog.sqlite'}")
    catalog.register(REFS)
    (tmp_path / "share").rename(tmp_path / "away")
    back = threading.Timer(0.7, (tmp_path / "away").rename, (tmp_path / "share",))
    back.start()
    assert len(catalog.refs(REFS)) == len(REFS)
    back.join()


def test_a_defect_is_not_waited_for(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    calls = []

    def wrong(connection: sa.Connection) -> None:
        calls.append(1)
        connection.execute(sa.text("SELECT nothing FROM nowhere"))

    with pytest.raises((UsageError, sa.exc.DatabaseError)):
        database.run(wrong)
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------------ wrong clocks


@pytest.fixture(params=[-7200.0, 7200.0], ids=["slow", "fast"])
def wrong_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This worker's own clock is two hours off; the server's is right."""
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + request.param)


@pytest.mark.parametrize(("asked_s", "waited"), [(40.0, True), (900.0, False)])
def test_a_worker_whose_clock_is_wrong_waits_as_long_as_any(
    url: str, wrong_clock: None, asked_s: float, waited: bool
) -> None:
    catalog = Catalog(url)
    ref = ClipRef("youtube", "abcdefghijk")
    catalog.block("youtube", "default", FailureCode.RATE_LIMITED, asked_s)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        catalog.unblock("youtube", "default", force=True)

    gate = Gate(catalog, DownloadSettings(pause_s=(0.0, 0.0)), sleep=sleep)
    blocked = gate.wait(ref)
    if waited:
        assert blocked is None and len(slept) == 1 and 30 < slept[0] <= 40
    else:
        assert blocked is not None and slept == []


def test_a_run_whose_clock_is_wrong_neither_hangs_nor_gives_up(
    url: str, tmp_path: Path, wrong_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(out=tmp_path, catalog_url=url, patience_s=60.0)
    catalog = Catalog(url)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        assert len(slept) < 3, "it would ask for hours"
        slept.append(seconds)
        catalog.unblock("youtube", "default", force=True)

    catalog.block("youtube", "default", FailureCode.RATE_LIMITED, 900.0)
    (block,) = catalog.blocks()
    assert 890 < block.left_s <= 900
    with Claims(catalog, tmp_path, 60) as claims:
        queue = Queue(claims, [Batch(0, (), "one")], lambda _: False)
        work = queue.take()
        assert work is not None
        queue.release(work, later=True)
        monkeypatch.setattr(pipeline.time, "sleep", sleep)
        assert not pipeline.wait_for_more(settings, queue), "15 minutes are more than its patience"
        catalog.unblock("youtube", "default", force=True)
        catalog.block("youtube", "default", FailureCode.RATE_LIMITED, 30.0)
        assert pipeline.wait_for_more(settings, queue) and slept, "30 seconds are not"
