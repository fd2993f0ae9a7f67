"""The catalog on SQLite, and on a real PostgreSQL server where one is installed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import curation.catalog.database
from curation.catalog import Attempt, Catalog, Funnel, Known, ObservationFile, Output, forgotten_digest
from curation.catalog.database import Database
from curation.catalog.leases import Lease
from curation.catalog.tables import metadata
from curation.catalog.turns import Block, Turn
from curation.failures import FailureCode, OutageError, UsageError
from curation.files import sha256_json
from curation.outages import patience
from curation.records import ClipRef, CriterionResult, Decision, Outcome, Verdict, VideoFile
from tests.support.databases import catalog_benchmark, postgres_server
from tests.support.examples import examples

POLICY, OTHER_POLICY = "a" * 64, "b" * 64
SHA, OTHER_SHA = "1" * 64, "2" * 64
SERVED = multiprocessing.get_context("forkserver")  # fresh processes, which need not import all of this each time
SERVED.set_forkserver_preload([__name__])


def ref(video: int, clip: int = 0) -> ClipRef:
    return ClipRef("youtube", f"video-{video:05d}", clip * 10_000_000, (clip + 1) * 10_000_000, "train")


def video_file(path: str = "videos/k/video.mp4") -> VideoFile:
    return VideoFile(Path(path), SHA, 2**40, "h264", 1920, 1080, 300, 10.01)


def observation(of: ClipRef, provenance: str, sha256: str = SHA) -> ObservationFile:
    return ObservationFile(of.clip_id, "full", f"observations/{of.clip_id}.parquet", sha256, provenance, 1e9)


def verdict(of: ClipRef, decision: Decision = "accept", reason: str = "one_person", policy: str = POLICY) -> Verdict:
    outcomes: dict[Decision, Outcome] = {"accept": "pass", "reject": "fail", "unknown": "unknown"}
    criteria = (
        CriterionResult("one_shot", "pass"),
        CriterionResult(reason, outcomes[decision], ("2 people in 31% of the frames", "0.4 s"), {"people": 0.31}),
    )
    return Verdict(of.clip_id, "paper", policy, decision, criteria)


def output(of: ClipRef, provenance: str, frames: int = 60) -> Output:
    return Output(of.clip_id, provenance, frames)


# ------------------------------------------------------------------------------------------------------- databases


@pytest.fixture(scope="session")
def empty_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file to copy."""
    path = tmp_path_factory.mktemp("catalog") / "catalog.sqlite"
    Catalog(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    """The benchmark, which makes catalogs and servers."""
    return catalog_benchmark()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of our own."""
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'catalog.sqlite'}"
    url = request.getfixturevalue("postgres")
    execute(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    return url


# Several processes at once: that takes a server long, so it waits for the slow tests there.
TOGETHER = pytest.mark.parametrize("url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture
def catalog(url: str) -> Catalog:
    return Catalog(url)


def execute(url: str, *statements: str) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


# ------------------------------------------------------------------------------------------------------ round trips


def test_everything_comes_back_as_it_went_in(catalog: Catalog) -> None:
    clip = ref(1)
    whole = ClipRef("local", "dances/a b.mp4")
    assert catalog.register([clip, whole, clip]) == frozenset()
    assert catalog.refs([clip.clip_id, whole, ref(9)]) == {clip.clip_id: clip, whole.clip_id: whole}

    assert catalog.record_video(clip.video_key, video_file(), "videos/k/video.mp4")
    stored = catalog.videos([clip.video_key, whole.video_key])
    assert set(stored) == {clip.video_key}
    assert stored[clip.video_key].file(Path("/out")) == video_file("/out/videos/k/video.mp4")
    assert stored[clip.video_key].present
    catalog.record_evicted([clip.video_key])
    assert not catalog.videos([clip.video_key])[clip.video_key].present

    provenance = {"detector": {"sha256": SHA, "confidence": 0.1}, "dance": "naïve"}
    digest = catalog.put_provenance(provenance)
    assert digest == sha256_json(provenance) == catalog.put_provenance(provenance)
    assert catalog.provenance(digest) == provenance
    assert catalog.provenance(SHA) is None

    assert catalog.record_observations([observation(clip, digest)]) == frozenset()
    assert catalog.observations([clip, whole]) == {clip.clip_id: observation(clip, digest)}
    assert catalog.record_verdicts([verdict(clip, "reject")], {clip.clip_id: SHA}) == frozenset()
    assert catalog.verdicts([clip, whole], POLICY) == {clip.clip_id: verdict(clip, "reject")}
    assert catalog.verdicts([clip], OTHER_POLICY) == {}
    assert catalog.record_outputs([output(clip, digest)]) == frozenset()
    assert catalog.outputs([clip, whole], digest) == {clip.clip_id: output(clip, digest)}
    assert catalog.outputs([clip], OTHER_SHA) == {}

    tries = [
        Attempt(clip.clip_id, "download", FailureCode.NETWORK, "no answer", 100.5, 2.25),
        Attempt(clip.clip_id, "download", None, "", 200.5, 1.0),
    ]
    assert catalog.record_attempts(tries) == frozenset()
    history = catalog.clip(clip.clip_id[:9])
    assert history.ref == clip
    assert history.video == catalog.videos([clip.video_key])[clip.video_key]
    assert [replace(attempt, worker="", transient=False) for attempt in history.attempts] == tries
    assert [attempt.transient for attempt in history.attempts] == [bool(t.code and t.code.transient) for t in tries]
    assert history.observation == observation(clip, digest)
    assert history.verdicts == (verdict(clip, "reject"),)
    assert history.outputs == (output(clip, digest),)
    worker = history.attempts[0].worker
    assert worker.endswith(f"/{os.getpid()}")
    assert socket.gethostname() not in worker


def test_figures_that_are_no_numbers_are_left_out(catalog: Catalog) -> None:
    catalog.register([ref(1)])
    catalog.record_observations([observation(ref(1), catalog.put_provenance({}))])
    odd = CriterionResult("height", "unknown", (), {"mean": float("nan"), "max": float("inf"), "min": 0.25})
    catalog.record_verdicts([Verdict(ref(1).clip_id, "p", POLICY, "unknown", (odd,))], {ref(1).clip_id: SHA})
    assert catalog.verdicts([ref(1)], POLICY)[ref(1).clip_id].criteria == (replace(odd, measured={"min": 0.25}),)


def test_recording_again_changes_nothing_but_history(catalog: Catalog) -> None:
    refs = [ref(n) for n in range(3)]
    digest = catalog.put_provenance({"a": 1})
    snapshots = []
    for _ in range(2):
        catalog.register(refs)
        for clip in refs:
            catalog.record_video(clip.video_key, video_file(), "videos/k/video.mp4")
        catalog.record_observations([observation(clip, digest) for clip in refs] * 2)
        catalog.record_verdicts([verdict(clip) for clip in refs] * 2, {clip.clip_id: SHA for clip in refs})
        catalog.record_outputs([output(clip, digest) for clip in refs] * 2)
        snapshots.append(catalog.funnel(None, POLICY))
    assert snapshots[0] == snapshots[1]
    assert snapshots[0] == Funnel(3, 3, 3, 3, 0, 0, 3, {}, {}, {}, {digest: 3})


def test_no_number_of_an_index_is_given_twice(catalog: Catalog) -> None:
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: catalog.next_index_version("shards/a", 3), range(24)))
    assert sorted(given) == list(range(4, 28))
    assert catalog.next_index_version("shards/a", 90) == 91, "a number that the storage has counts, too"
    assert catalog.next_index_version("shards/b", 0) == 1


def test_a_changed_split_is_taken_over(catalog: Catalog) -> None:
    catalog.register([ref(1)])
    for split in ("test", None, "train"):
        moved = replace(ref(1), split=split)
        catalog.register([moved])
        assert catalog.refs([moved]) == {moved.clip_id: moved}


def test_new_measurements_drop_the_verdicts_on_old_ones(catalog: Catalog) -> None:
    catalog.register([ref(1), ref(2)])
    digest = catalog.put_provenance({})
    shas = {ref(1).clip_id: SHA, ref(2).clip_id: SHA}
    catalog.record_observations([observation(ref(1), digest), observation(ref(2), digest)])
    catalog.record_verdicts([verdict(ref(1)), verdict(ref(2)), verdict(ref(1), policy=OTHER_POLICY)], shas)
    catalog.record_observations([observation(ref(1), digest, OTHER_SHA), observation(ref(2), digest)])
    assert set(catalog.verdicts([ref(1), ref(2)], POLICY)) == {ref(2).clip_id}
    assert catalog.verdicts([ref(1)], OTHER_POLICY) == {}
    # a judge that still holds the old measurements comes too late
    assert catalog.record_verdicts([verdict(ref(1)), verdict(ref(2))], shas) == {ref(1).clip_id}
    assert set(catalog.verdicts([ref(1), ref(2)], POLICY)) == {ref(2).clip_id}


def test_records_of_unknown_clips_are_left_out_and_named(catalog: Catalog) -> None:
    catalog.register([ref(1)])
    digest = catalog.put_provenance({})
    missing = {ref(2).clip_id}
    both = [ref(1), ref(2)]
    assert catalog.record_attempts([Attempt(clip.clip_id, "observe") for clip in both]) == missing
    assert catalog.record_observations([observation(clip, digest) for clip in both]) == missing
    assert catalog.record_verdicts(map(verdict, both), {clip.clip_id: SHA for clip in both}) == missing
    assert catalog.record_outputs([output(clip, digest) for clip in both]) == missing
    assert not catalog.record_video(ref(2).video_key, video_file(), "videos/k/video.mp4")
    assert catalog.funnel(None, POLICY) == Funnel(1, 0, 1, 1, 0, 0, 1, {}, {}, {}, {digest: 1})


def test_one_reading_says_of_each_clip_what_the_tables_say_one_by_one(catalog: Catalog) -> None:
    refs = [ref(number // 3, number % 3) for number in range(600)]  # more than go into one statement
    catalog.register(refs)
    digest, other = catalog.put_provenance({"made": "by this"}), catalog.put_provenance({"made": "by another"})
    for number in range(0, 200, 2):
        catalog.record_video(ref(number).video_key, video_file(), f"videos/{number}/video.mp4")
    catalog.record_observations(observation(clip, digest) for clip in refs[::3])
    for policy, judged in ((POLICY, refs[::6]), ("other", refs[::3])):
        catalog.record_verdicts(
            [verdict(clip, policy=policy) for clip in judged], {clip.clip_id: SHA for clip in judged}
        )
    catalog.record_outputs(
        [*(output(clip, digest) for clip in refs[::12]), *(output(clip, other) for clip in refs[::9])]
    )
    tries = [("observe", FailureCode.CORRUPT), ("download", FailureCode.GEO), ("teach", None)]
    catalog.record_attempts(Attempt(clip.clip_id, *each) for clip in refs[1::5] for each in tries)
    unknown = ref(9999)
    asked = [*refs[::-1], unknown]
    known = catalog.known(asked, POLICY, digest)
    stored = catalog.videos(clip.video_key for clip in refs)
    measured, judged, written = (
        catalog.observations(asked), catalog.verdicts(asked, POLICY), catalog.outputs(asked, digest),
    )  # fmt: skip
    failed = catalog.failures(asked)
    assert known == {
        clip.clip_id: Known(
            stored.get(clip.video_key),
            measured.get(clip.clip_id),
            judged.get(clip.clip_id),
            written.get(clip.clip_id),
            tuple(each for each in failed if each.clip_id == clip.clip_id),
        )
        for clip in asked
    }
    assert known[unknown.clip_id] == Known() and known[refs[0].clip_id].output is not None and failed


def test_failures_are_the_last_tries_that_failed(catalog: Catalog) -> None:
    first, second, third = refs = [ref(n) for n in range(3)]
    catalog.register(refs)
    geo, late = FailureCode.GEO, FailureCode.TIMEOUT
    catalog.record_attempts(
        [
            Attempt(first.clip_id, "download", late, "first", 1.0),
            Attempt(first.clip_id, "download", geo, "second", 2.0),
            Attempt(first.clip_id, "observe", None, "", 3.0),  # another stage heals nothing
            Attempt(second.clip_id, "download", late, "first", 1.0),
            Attempt(second.clip_id, "download", None, "", 2.0),
        ]
    )
    catalog.record_attempt(Attempt(third.clip_id, "observe", FailureCode.CORRUPT, "half a file"))
    found = {(attempt.clip_id, attempt.stage): attempt for attempt in catalog.failures()}
    assert set(found) == {(first.clip_id, "download"), (third.clip_id, "observe")}
    assert found[first.clip_id, "download"].message == "second"
    assert found[first.clip_id, "download"].code is geo
    assert catalog.failures([first, second]) == [found[first.clip_id, "download"]]
    assert catalog.failures(code=FailureCode.CORRUPT) == [found[third.clip_id, "observe"]]
    assert catalog.failures([second], code=geo) == catalog.failures([]) == []
    assert catalog.funnel(None, POLICY).failed == {("download", "geo"): 1, ("observe", "corrupt"): 1}


def test_the_funnel_counts_by_decision_and_first_reason(catalog: Catalog) -> None:
    refs = [ref(n // 2, n % 2) for n in range(8)]
    catalog.register(refs)
    one, two = catalog.put_provenance({"teacher": "one"}), catalog.put_provenance({"teacher": "two"})
    for clip in refs[::2][:3]:
        catalog.record_video(clip.video_key, video_file(), "videos/k/video.mp4")
    catalog.record_observations([observation(clip, one) for clip in refs[:6]])
    judged = [
        verdict(refs[0]),
        verdict(refs[1], "reject", "one_person"),
        verdict(refs[2], "reject", "one_person"),
        verdict(refs[3], "reject", "height"),
        verdict(refs[4], "unknown", "height"),
        verdict(refs[0], "reject", "overlap", OTHER_POLICY),
    ]
    catalog.record_verdicts(judged, {clip.clip_id: SHA for clip in refs})
    catalog.record_outputs([output(refs[0], one), output(refs[0], two)])
    whole = Funnel(
        clips=8,
        downloaded=6,
        observed=6,
        accepted=1,
        rejected=3,
        unknown=1,
        sharded=1,
        failed={},
        rejected_by={"one_person": 2, "height": 1},
        unknown_by={"height": 1},
        datasets={one: 1, two: 1},
    )
    assert catalog.funnel(None, POLICY) == catalog.funnel(refs + refs, POLICY) == whole
    assert catalog.funnel(refs, POLICY, two) == replace(whole, datasets={two: 1})
    assert catalog.funnel(None, OTHER_POLICY).rejected_by == {"overlap": 1}
    assert catalog.funnel([], POLICY) == Funnel(0, 0, 0, 0, 0, 0, 0, {}, {}, {}, {})
    assert catalog.funnel([refs[1], refs[6]], POLICY).downloaded == 1


def test_a_clip_is_found_by_the_start_of_its_id(catalog: Catalog) -> None:
    refs = [ref(n) for n in range(40)]
    catalog.register(refs)
    ids = sorted(clip.clip_id for clip in refs)
    assert all(catalog.clip(clip.clip_id).ref == clip for clip in refs[:3])
    crowded = Counter(id_[0] for id_ in ids).most_common(1)[0][0]
    with pytest.raises(UsageError, match="Several clips"):
        catalog.clip(crowded)
    unused = next(f"{n:04x}" for n in range(16**4) if not any(id_.startswith(f"{n:04x}") for id_ in ids))
    with pytest.raises(UsageError, match="No clip"):
        catalog.clip(unused)
    for wrong in ("", "xyz", "%", "A", ids[0] + "0"):
        with pytest.raises(UsageError, match="not a clip id"):
            catalog.clip(wrong)


@pytest.mark.parametrize("count", [1500, pytest.param(5000, marks=pytest.mark.slow)])
def test_thousands_of_ids_at_once(catalog: Catalog, count: int) -> None:
    refs = [ref(n) for n in range(count)]
    ids = {clip.clip_id for clip in refs}
    catalog.register(refs)
    digest = catalog.put_provenance({})
    assert catalog.record_observations([observation(clip, digest) for clip in refs]) == frozenset()
    assert catalog.record_verdicts([verdict(clip) for clip in refs], dict.fromkeys(ids, SHA)) == frozenset()
    assert catalog.record_outputs([output(clip, digest) for clip in refs]) == frozenset()
    failed = [Attempt(clip.clip_id, "teach", FailureCode.DISK_FULL) for clip in refs]
    assert catalog.record_attempts(failed) == frozenset()
    for answer in (catalog.refs(refs), catalog.observations(refs), catalog.verdicts(refs, POLICY)):
        assert set(answer) == ids
    assert set(catalog.outputs(refs, digest)) == {attempt.clip_id for attempt in catalog.failures(refs)} == ids
    counts = catalog.funnel(refs, POLICY)
    assert counts == catalog.funnel(None, POLICY)
    assert (counts.clips, counts.observed, counts.accepted, counts.sharded) == (count,) * 4
    assert counts.failed == {("teach", "disk_full"): count}
    pages = list(catalog.observed(page=499))
    assert [len(page) for page in pages] == [499] * (count // 499) + [count % 499]
    assert [file.clip_id for page in pages for file in page] == sorted(ids)
    assert len(catalog.forget(refs[:1200]).clip_ids) == 1200
    assert catalog.funnel(None, POLICY).clips == count - 1200


# -------------------------------------------------------------------------------------------------- nothing that tells


@pytest.mark.parametrize("path", ["/videos/a.mp4", "../a.mp4", "videos/../../a.mp4", ""])
def test_only_paths_below_the_work_folder_are_kept(catalog: Catalog, path: str) -> None:
    catalog.register([ref(1)])
    digest = catalog.put_provenance({})
    with pytest.raises(ValueError, match="relative"):
        catalog.record_video(ref(1).video_key, video_file(), path)
    with pytest.raises(ValueError, match="relative"):
        catalog.record_observations([replace(observation(ref(1), digest), path=path)])


@pytest.mark.parametrize("place", ["/home/me/yolo.pt", "C:\\me\\yolo.pt", "https://example.org/yolo.pt"])
def test_provenance_tells_no_place(catalog: Catalog, place: str) -> None:
    for value in ({"weights": place}, {"models": [{"file": place}]}, {place: 1}, {"models": ({"a": (place,)},)}):
        with pytest.raises(ValueError, match="provenance"):
            catalog.put_provenance(value)
    catalog.put_provenance({"weights": "Ruicheng/moge-2-vitl-normal"})


def test_forgetting_removes_all_of_a_video_and_nothing_else(catalog: Catalog) -> None:
    gone, kept = [ref(1, 0), ref(1, 1)], [ref(2, 0)]
    fill(catalog, gone + kept)
    digest = catalog.put_provenance({"a": 1})
    before = catalog.clip(kept[0].clip_id)
    answer = catalog.forget([gone[1].clip_id])
    assert answer.video_keys == (gone[0].video_key,)
    assert answer.clip_ids == tuple(sorted(clip.clip_id for clip in gone))
    expected = {f"videos/{gone[0].video_key}/video.mp4"} | {f"observations/{clip.clip_id}.parquet" for clip in gone}
    assert set(answer.files) == expected
    assert answer.scrubbed
    assert catalog.forgotten_clips([*gone, *kept, ref(1, 2)]) == {clip.clip_id for clip in gone}
    assert catalog.clip(kept[0].clip_id) == before
    assert catalog.funnel(None, POLICY).clips == 1
    assert not catalog.videos([gone[0].video_key])
    # a worker that was busy with them comes too late, and nobody brings them back
    ids = {clip.clip_id for clip in gone}
    assert catalog.register(gone + kept) == ids
    assert catalog.record_observations([observation(clip, digest) for clip in gone]) == ids
    assert not catalog.record_video(gone[0].video_key, video_file(), "videos/k/video.mp4")
    # again, by video key, by a reference that was never registered, and by what nobody knows
    assert catalog.forget([gone[0].video_key]).files == ()
    assert catalog.forget([ref(7)]).clip_ids == ()
    assert catalog.register([ref(7, 4)]) == {ref(7, 4).clip_id}
    assert catalog.forget([kept[0].video_key]).clip_ids == (kept[0].clip_id,)
    assert catalog.funnel(None, POLICY) == Funnel(0, 0, 0, 0, 0, 0, 0, {}, {}, {}, {})


def fill(catalog: Catalog, refs: list[ClipRef]) -> None:
    """Everything that can be known of these clips."""
    digest = catalog.put_provenance({"a": 1})
    catalog.register(refs)
    for key in {clip.video_key for clip in refs}:
        catalog.record_video(key, video_file(), f"videos/{key}/video.mp4")
    catalog.record_observations([observation(clip, digest) for clip in refs])
    catalog.record_verdicts([verdict(clip, "reject") for clip in refs], {clip.clip_id: SHA for clip in refs})
    catalog.record_outputs([output(clip, digest) for clip in refs])
    catalog.record_attempts([Attempt(clip.clip_id, "download", FailureCode.GEO, "blocked here") for clip in refs])


def test_forgotten_bytes_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(f"sqlite:///{path}")
    # some builds of SQLite zero what they delete; it must not be left to luck
    sa.event.listen(catalog._database._engine, "connect", lambda raw, _: raw.execute("PRAGMA secure_delete=OFF"))
    refs = [ref(n, m) for n in range(90) for m in range(2)]
    fill(catalog, refs)
    gone = [clip for clip in refs if clip.video_id in {f"video-{n:05d}" for n in range(0, 90, 3)}]
    traces = {trace.encode() for clip in gone for trace in (clip.clip_id, clip.video_id)}
    before = written(path)
    assert all(trace in before for trace in traces)
    assert catalog.forget(gone).scrubbed
    after = written(path)
    assert [trace for trace in traces if trace in after] == []
    for clip in gone:  # the hash is the one place where the key, its first digits, is left
        digest = forgotten_digest(clip.platform, clip.video_id)
        assert after.count(clip.video_key.encode()) == after.count(digest.encode()) > 0
    assert all(clip.clip_id.encode() in after for clip in refs if clip not in gone)


def written(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(path.name + "*")))


def test_a_reader_in_the_way_of_scrubbing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation.catalog.database, "LOCK_TIMEOUT_S", 0.1)
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(f"sqlite:///{path}")
    catalog.register([ref(1)])
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM clips").fetchone() == (1,)
    answer = catalog.forget([ref(1)])
    assert answer.clip_ids == (ref(1).clip_id,)
    assert not answer.scrubbed
    reader.close()
    assert catalog.forget([ref(1)]).scrubbed
    assert ref(1).video_id.encode() not in written(path)


# ------------------------------------------------------------------------------------------------- opening, migrating


def differences(connection: sa.Connection) -> list[Any]:
    """Between the tables that the migrations made and those of the code."""
    return compare_metadata(MigrationContext.configure(connection), metadata)


def test_migrations_make_the_tables_the_code_uses(url: str) -> None:
    for _ in range(2):
        catalog = Catalog(url)
        catalog.register([ref(1)])
        assert catalog._database.run(differences) == []
    assert catalog.funnel(None, POLICY).clips == 1
    migrations = ScriptDirectory(str(Path(curation.catalog.database.__file__).parent / "migrations"))
    assert migrations.get_current_head() == curation.catalog.database.SCHEMA


def test_a_newer_schema_is_refused(url: str) -> None:
    Catalog(url)
    execute(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(UsageError, match="newer version"):
        Catalog(url)


def open_catalog(url: str, barrier: multiprocessing.synchronize.Barrier) -> None:
    barrier.wait(timeout=60)
    Catalog(url).register([ref(os.getpid())])


@TOGETHER
def test_several_processes_open_a_new_catalog_at_once(url: str) -> None:
    barrier = SERVED.Barrier(4)
    run_together([SERVED.Process(target=open_catalog, args=(url, barrier)) for _ in range(4)])
    assert Catalog(url).funnel(None, POLICY).clips == 4


def test_the_catalog_travels_to_other_processes(url: str) -> None:
    catalog = Catalog(url)
    catalog.register([ref(1)])
    assert pickle.loads(pickle.dumps(catalog)).refs([ref(1)]) == catalog.refs([ref(1)])
    # a child made by fork uses the parent's object, while the parent goes on
    child = os.fork()
    if child == 0:
        status = 1
        try:
            catalog.record_attempts([Attempt(ref(1).clip_id, "observe") for _ in range(50)])
            status = 0
        finally:
            os._exit(status)
    catalog.record_attempts([Attempt(ref(1).clip_id, "download") for _ in range(50)])
    assert os.waitpid(child, 0)[1] == 0
    history = catalog.clip(ref(1).clip_id).attempts
    assert Counter(attempt.stage for attempt in history) == {"observe": 50, "download": 50}
    assert len({attempt.worker for attempt in history}) == 2


def test_sqlite_is_set_up_for_many_writers(tmp_path: Path) -> None:
    names = ("journal_mode", "busy_timeout", "synchronous", "foreign_keys")
    database = Catalog(f"sqlite:///{tmp_path / 'new' / 'catalog.sqlite'}")._database
    pragmas = database.run(lambda c: {name: c.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names})
    assert pragmas == {"journal_mode": "wal", "busy_timeout": 60_000, "synchronous": 1, "foreign_keys": 1}


def test_what_is_no_usable_database_is_named_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation.catalog.database, "LOCK_TIMEOUT_S", 0.1)
    path = tmp_path / "catalog.sqlite"
    Catalog(f"sqlite:///{path}")
    (tmp_path / "text").write_text("not a database at all, but long enough to be taken for one" * 20)
    (tmp_path / "folder").mkdir()
    for url, says in {
        f"sqlite:///file:{path}?mode=ro&uri=true": "read-only",
        f"sqlite:///{tmp_path / 'text'}": "not a database",
        f"sqlite:///{tmp_path / 'folder'}": "cannot be opened",
        f"sqlite:///{tmp_path / 'text' / 'catalog.sqlite'}": "folder cannot be created",
        "sqlite://": "in memory",
        "mysql://localhost/x": "SQLite or PostgreSQL",
        "catalog.sqlite": "not valid",
    }.items():
        with pytest.raises(UsageError, match=says):
            Catalog(url)
    catalog = Catalog(f"sqlite:///{path}")
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutageError, match="locked it for too long"), patience(0.3):
        catalog.register([ref(1)])
    assert catalog.refs([ref(1)]) == {}, "readers do not wait for a writer"
    writer.close()


def test_a_server_that_may_only_read_is_named_in_a_sentence(postgres: str) -> None:
    Catalog(postgres)
    with pytest.raises(UsageError, match="read-only"):
        Catalog(postgres + "?options=-c%20default_transaction_read_only%3Don")


# ------------------------------------------------------------------------------------------------------ many writers


def run_together(processes: list[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


RECORDS = 200


def write_records(url: str, stage: str, barrier: multiprocessing.synchronize.Barrier) -> None:
    catalog = Catalog(url)
    digest = catalog.put_provenance({"a": 1})
    barrier.wait(timeout=60)
    for start in range(0, RECORDS, 10):
        refs = [ref(n) for n in reversed(range(start, start + 10))]
        catalog.record_attempts([Attempt(clip.clip_id, stage) for clip in refs])
        catalog.record_observations([observation(clip, digest) for clip in refs])
        catalog.record_verdicts(map(verdict, refs), {clip.clip_id: SHA for clip in refs})


@TOGETHER
def test_two_processes_writing_at_once_lose_nothing(url: str) -> None:
    catalog = Catalog(url)
    refs = [ref(n) for n in range(RECORDS)]
    catalog.register(refs)
    barrier = SERVED.Barrier(2)
    run_together([SERVED.Process(target=write_records, args=(url, stage, barrier)) for stage in ("observe", "teach")])
    counts = catalog.funnel(None, POLICY)
    assert (counts.clips, counts.observed, counts.accepted) == (RECORDS,) * 3
    tries = catalog._database.run(lambda c: c.execute(sa.text("SELECT clip_id, stage FROM attempts")).all())
    assert Counter(map(tuple, tries)) == {(clip.clip_id, stage): 1 for clip in refs for stage in ("observe", "teach")}


def write_for_ever(url: str) -> None:
    catalog = Catalog(url)
    refs = [ref(n) for n in range(100)]
    while True:
        catalog.record_attempts([Attempt(clip.clip_id, "observe", FailureCode.TIMEOUT) for clip in refs])


@TOGETHER
def test_a_killed_writer_leaves_whole_transactions(url: str) -> None:
    catalog = Catalog(url)
    refs = [ref(n) for n in range(100)]
    catalog.register(refs)
    written_before = 0
    for _ in range(2):
        writer = SERVED.Process(target=write_for_ever, args=(url,))
        writer.start()
        deadline = time.monotonic() + 60
        while len(catalog.clip(refs[0].clip_id).attempts) < written_before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        again = Catalog(url)
        tries = {len(again.clip(clip.clip_id).attempts) for clip in refs}
        assert len(tries) == 1, "a batch was written in part"
        written_before = tries.pop()
        assert len(again.failures()) == 100
    again.record_attempts([Attempt(clip.clip_id, "observe") for clip in refs])
    assert again.failures() == []
    if url.startswith("sqlite"):
        assert again._database.run(lambda c: c.exec_driver_sql("PRAGMA integrity_check").scalar()) == "ok"
        assert again._database.run(lambda c: c.exec_driver_sql("PRAGMA foreign_key_check").all()) == []


# ----------------------------------------------------------------------------------------------------------- leases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time the catalog believes, in a list of one."""
    time_ = [1_800_000_000.0]
    monkeypatch.setattr(Database, "now", lambda *_: time_[0])
    return time_


def test_a_lease_is_held_until_it_lapses_or_is_given_back(catalog: Catalog, clock: list[float]) -> None:
    assert catalog.claim(["b", "a", "a"], "ann", 60) == {"a", "b"}
    assert catalog.claim(["a", "b", "c"], "bob", 90) == {"c"}
    assert catalog.claim(["a", "c"], "ann", 60) == {"a"}, "what one holds one can claim again"
    clock[0] += 50
    assert catalog.extend("ann", 60) == {"a", "b"}
    clock[0] += 30
    assert catalog.leases() == [Lease("a", "ann", 30.0), Lease("b", "ann", 30.0), Lease("c", "bob", 10.0)]
    clock[0] += 30
    assert catalog.claim(["a", "c"], "bob", 60) == {"a", "c"}, "lapsed at this very moment"
    assert catalog.extend("ann", 60) == {"b"}, "b has lapsed, but nobody took it"
    catalog.release("ann", ["a"])
    assert [lease.name for lease in catalog.leases()] == ["a", "b", "c"], "that one was bob's"
    catalog.release("bob", ["a", "nothing"])
    catalog.release("ann")
    assert catalog.leases() == [Lease("c", "bob", 60.0)]
    assert catalog.extend("ann", 60) == frozenset()
    assert catalog.claim([], "ann", 60) == frozenset()
    clock[0] += 60 + 24 * 3600 + 1
    assert len(catalog.leases()) == 1
    catalog.claim(["z"], "ann", 60)
    assert [lease.name for lease in catalog.leases()] == ["z"], "lapsed long ago"


def test_leases_go_by_the_database_s_clock(catalog: Catalog) -> None:
    catalog.claim(["a"], "ann", 0.05)
    assert catalog.claim(["a"], "bob", 60) == frozenset()
    time.sleep(0.1)
    assert catalog.claim(["a"], "bob", 60) == {"a"}
    assert 55 < catalog.leases()[0].expires_in_s <= 60


NAMES = 420


def claim_all(url: str, owner: str, barrier: multiprocessing.synchronize.Barrier, folder: Path) -> None:
    catalog = Catalog(url)
    names = [f"batch-{n:04d}" for n in range(NAMES)]
    random.Random(owner).shuffle(names)
    barrier.wait(timeout=60)
    won: set[str] = set()
    for first in range(0, len(names), 60):
        won |= catalog.claim(names[first : first + 60], owner, 600)
        assert catalog.extend(owner, 600) == won
    (folder / owner).write_text("\n".join(won))


@TOGETHER
def test_a_name_is_never_held_twice(url: str, tmp_path: Path) -> None:
    Catalog(url)
    barrier = SERVED.Barrier(3)
    owners = ["ann", "bob", "eve"]
    run_together([SERVED.Process(target=claim_all, args=(url, owner, barrier, tmp_path)) for owner in owners])
    held = [name for owner in owners for name in (tmp_path / owner).read_text().split()]
    assert sorted(held) == [f"batch-{n:04d}" for n in range(NAMES)]


# ------------------------------------------------------------------------------------------------- turns, breakers


def test_turns_keep_their_distance_and_the_hour(catalog: Catalog, clock: list[float]) -> None:
    now = clock[0]
    waits = [catalog.take_turn("youtube", "me", per_hour=3, pause_s=10).wait_s for _ in range(3)]
    assert waits == [0, 10, 20]
    full = catalog.take_turn("youtube", "me", per_hour=3, pause_s=10)
    assert full == Turn(3600.0, FailureCode.RATE_LIMITED, now + 3600)
    assert catalog.take_turn("youtube", "me", per_hour=3, pause_s=10, patience_s=3600) == Turn(3600, None, now + 3600)
    assert catalog.take_turn("youtube", "you", per_hour=3, pause_s=10).wait_s == 0
    assert catalog.take_turn("vimeo", "me", per_hour=3, pause_s=10).wait_s == 0
    assert catalog.take_turn("youtube", "me", per_hour=0, pause_s=10, patience_s=4000).wait_s == 3610
    clock[0] += 7300
    assert catalog.take_turn("youtube", "me", per_hour=3, pause_s=10).wait_s == 0
    asked = sa.text("SELECT at FROM turns WHERE service = 'youtube' AND session = 'me'")
    kept = catalog._database.run(lambda connection: connection.execute(asked).all())
    assert kept == [(clock[0],)], "what is older than an hour is no longer needed"


def test_a_breaker_opens_longer_each_time_and_closes_with_a_success(catalog: Catalog, clock: list[float]) -> None:
    def turn() -> Turn:
        return catalog.take_turn("youtube", "me", per_hour=0, pause_s=5)

    bot, limited = FailureCode.BOT_CHECK, FailureCode.RATE_LIMITED
    for hours in (0.25, 1, 4, 12, 12):
        until = clock[0] + hours * 3600
        assert catalog.block("youtube", "me", bot, None) == until
        assert catalog.block("youtube", "me", limited, 60) == until, "still the same block"
        assert catalog.blocks() == [Block("youtube", "me", bot, until)]
        assert turn() == Turn(hours * 3600, bot, until)
        assert catalog.take_turn("youtube", "you", per_hour=0, pause_s=0).blocked is None
        clock[0] = until
        assert catalog.blocks() == []
        assert turn() == Turn(0, None, until), "one may try"
        assert turn() == Turn(600, bot, until + 600), "the others wait for what it finds"
        assert catalog.blocks() == [Block("youtube", "me", bot, until + 600)]
    clock[0] += 600
    assert turn().blocked is None, "the one who tried is lost: another one may"
    assert turn().blocked is bot
    catalog.unblock("youtube", "me")
    assert catalog.blocks() == []
    assert [turn().wait_s, turn().wait_s] == [5, 10]
    assert catalog.block("youtube", "me", limited, 7200) == clock[0] + 7200, "a first block again, but what was asked"
    assert catalog.block("youtube", "me", limited, 9000) == clock[0] + 9000
    catalog.unblock("youtube", "me")
    assert catalog.blocks(), "a success of a request from before the block says nothing"
    catalog.unblock("youtube", "me", force=True)
    assert catalog.block("youtube", "me", limited, 3) == clock[0] + 3, "who says how long is believed"
    clock[0] += 3
    assert turn().blocked is None
    assert catalog.block("youtube", "me", limited, 3) == clock[0] + 3600, "but not twice"
    assert catalog.block("youtube", "me", limited, 1e9) == clock[0] + 7 * 24 * 3600
    catalog.unblock("youtube", "nobody")


def test_who_is_out_of_patience_does_not_use_up_the_one_try(catalog: Catalog, clock: list[float]) -> None:
    for _ in range(2):
        catalog.take_turn("youtube", "me", per_hour=0, pause_s=2000, patience_s=9000)
    catalog.block("youtube", "me", FailureCode.BOT_CHECK, None)
    clock[0] += 900
    turn = catalog.take_turn("youtube", "me", per_hour=0, pause_s=2000)
    assert turn == Turn(3100, FailureCode.RATE_LIMITED, clock[0] + 3100)
    turn = catalog.take_turn("youtube", "me", per_hour=0, pause_s=2000, patience_s=9000)
    assert turn == Turn(3100, None, clock[0] + 3100)
    assert catalog.blocks()[0].until == turn.until + 600, "it has its ten minutes from when its turn comes"


def assert_polite(times: list[float], per_hour: int, pauses: list[float]) -> None:
    """Half a millisecond of tolerance: sums of Unix times are not exact."""
    for earlier, later, pause in zip(times, times[1:], pauses[1:], strict=False):
        assert later - earlier >= pause - 5e-4
    for first, beyond in zip(times, times[per_hour:], strict=False):
        assert not per_hour or beyond - first >= 3600 - 5e-4


@given(
    asked=st.lists(st.tuples(st.floats(0, 2000), st.floats(0, 900), st.floats(0, 3000)), min_size=1, max_size=30),
    per_hour=st.integers(0, 5),
)
@settings(max_examples=examples(20), deadline=None, suppress_health_check=list(HealthCheck))
def test_any_order_of_asking_is_polite(
    empty_catalog: Path, asked: list[tuple[float, float, float]], per_hour: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="unish-catalog-") as folder, pytest.MonkeyPatch.context() as patched:
        path = shutil.copy(empty_catalog, folder)
        now = 1_800_000_000.0
        patched.setattr(Database, "now", lambda *_: now)
        catalog = Catalog(f"sqlite:///{path}")
        granted, pauses = [], []
        for later, pause, patience in asked:
            now += later
            turn = catalog.take_turn("s", "s", per_hour=per_hour, pause_s=pause, patience_s=patience)
            assert turn.until == pytest.approx(now + turn.wait_s, abs=1e-3)
            if turn.blocked is None:
                granted.append(turn.until)
                pauses.append(pause)
            # no later than it must be
            before = granted[:-1] if turn.blocked is None else granted
            reasons = [now, *(time_ + pause for time_ in before[-1:])]
            reasons += [before[-per_hour] + 3600] if per_hour and len(before) >= per_hour else []
            assert turn.until == pytest.approx(max(reasons), abs=1e-3)
            assert (turn.wait_s > patience) == (turn.blocked is FailureCode.RATE_LIMITED)
        assert_polite(granted, per_hour, pauses)


def take_turns(url: str, barrier: multiprocessing.synchronize.Barrier, file: Path) -> None:
    catalog = Catalog(url)
    barrier.wait(timeout=60)
    taken = [catalog.take_turn("youtube", "me", per_hour=30, pause_s=7, patience_s=1e6) for _ in range(50)]
    file.write_text("\n".join(repr(turn.until) for turn in taken))


@TOGETHER
def test_processes_take_turns_together(url: str, tmp_path: Path) -> None:
    Catalog(url)
    barrier = SERVED.Barrier(4)
    files = [tmp_path / f"turns-{n}" for n in range(4)]
    run_together([SERVED.Process(target=take_turns, args=(url, barrier, file)) for file in files])
    times = sorted(float(line) for file in files for line in file.read_text().split())
    assert len(times) == 200
    assert_polite(times, 30, [7.0] * 200)


# ------------------------------------------------------------------------------------------------ making room


def test_finished_videos_are_the_ones_nobody_needs(catalog: Catalog) -> None:
    names = ["reject", "unknown", "key_unknown", "accepted", "written", "dead", "dying", "unjudged", "both", "healed"]
    refs = {name: ref(n) for n, name in enumerate(names)}
    second = ref(names.index("both"), 1)
    catalog.register([*refs.values(), second])
    assert catalog.present_bytes() == 0
    for clip in refs.values():
        catalog.record_video(clip.video_key, video_file(), "videos/k/video.mp4")
    assert catalog.present_bytes() == len(refs) * 2**40
    one, two = catalog.put_provenance({"teacher": "one"}), catalog.put_provenance({"teacher": "two"})
    catalog.record_observations([observation(clip, one) for clip in [*refs.values(), second]])
    catalog.record_observations([replace(observation(refs["key_unknown"], one), kind="keyframes")])
    decided = {"reject": "reject", "unknown": "unknown", "key_unknown": "unknown", "accepted": "accept"}
    decided |= {"written": "accept", "both": "reject"}
    judged = [verdict(refs[name], decision) for name, decision in decided.items()]
    catalog.record_verdicts(judged, {clip.clip_id: SHA for clip in refs.values()})
    catalog.record_outputs([output(refs["written"], one)])
    tries = [
        Attempt(refs["dead"].clip_id, "observe", FailureCode.CORRUPT),
        Attempt(refs["dying"].clip_id, "observe", FailureCode.CORRUPT),
        Attempt(refs["dying"].clip_id, "observe", FailureCode.TIMEOUT),
        Attempt(refs["healed"].clip_id, "observe", FailureCode.CORRUPT),
        Attempt(refs["healed"].clip_id, "observe"),
    ]
    catalog.record_attempts(tries)

    def finished(provenance: str | None, limit: int = 100) -> list[str]:
        keys = {clip.video_key: name for name, clip in refs.items()}
        return [keys[video.video_key] for video in catalog.finished_videos(POLICY, provenance, limit)]

    assert finished(one) == finished(None) == ["reject", "unknown", "written", "dead"]
    assert finished(two) == ["reject", "unknown", "dead"]
    assert finished(one, 2) == ["reject", "unknown"]
    catalog.record_attempt(Attempt(second.clip_id, "teach", FailureCode.NO_VIDEO))
    catalog.record_video(refs["reject"].video_key, video_file(), "videos/k/video.mp4")
    assert finished(one) == ["unknown", "written", "dead", "both", "reject"], "fetched again: the newest"
    catalog.record_evicted([refs["written"].video_key])
    assert finished(one) == ["unknown", "dead", "both", "reject"]
    assert catalog.present_bytes() == (len(refs) - 1) * 2**40


def test_a_clip_added_to_a_downloaded_video_is_downloaded(catalog: Catalog) -> None:
    catalog.register([ref(1, 0), ref(2, 0)])
    catalog.record_video(ref(1).video_key, video_file(), "videos/k/video.mp4")
    catalog.register([ref(1, n) for n in range(3)] + [ref(2, 1)])
    catalog.record_video(ref(1).video_key, video_file(), "videos/k/video.mp4")
    assert catalog.funnel(None, POLICY).downloaded == 3


def add_clips(url: str, number: int, barrier: multiprocessing.synchronize.Barrier) -> None:
    catalog = Catalog(url)
    barrier.wait(timeout=60)
    for video in range(30):
        if number == 0:
            catalog.record_video(ref(video).video_key, video_file(), "videos/k/video.mp4")
        else:
            catalog.register([ref(video, number)])
            code = FailureCode.TIMEOUT if (video + number) % 2 else None
            catalog.record_attempt(Attempt(ref(video).clip_id, "observe", code))


@TOGETHER
def test_counts_hold_while_clips_videos_and_failures_come_at_once(url: str) -> None:
    catalog = Catalog(url)
    catalog.register([ref(video) for video in range(30)])
    barrier = SERVED.Barrier(3)
    run_together([SERVED.Process(target=add_clips, args=(url, number, barrier)) for number in range(3)])
    counts = catalog.funnel(None, POLICY)
    assert counts == catalog.funnel([ref(video, number) for video in range(30) for number in range(3)], POLICY)
    assert counts.clips == counts.downloaded == 90
    last = [catalog.clip(ref(video).clip_id).attempts[-1] for video in range(30)]
    assert catalog.failures() == sorted((a for a in last if a.code), key=lambda attempt: attempt.clip_id)


# ------------------------------------------------------------------------------------------------ older catalogs


def test_a_catalog_of_the_first_version_is_upgraded_with_its_rows(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(curation.catalog.database.__file__).parent / "migrations"
    config = Config()
    config.set_main_option("script_location", str(folder))
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    clips = [ref(1, 0), ref(1, 1), ref(2, 0)]
    of_clip = {clip: (clip.clip_id, "youtube", clip.video_id, clip.video_key) for clip in clips}
    tries = [
        (clips[0], "download", "timeout", True),
        (clips[0], "download", None, False),
        (clips[0], "observe", "corrupt", False),
        (clips[1], "download", "geo", False),
        (clips[1], "download", "timeout", True),
        (clips[2], "observe", None, False),
    ]
    execute(
        url,
        *(
            f"INSERT INTO clips VALUES ('{id_}', '{platform}', '{video}', '{key}', {clip.start_us}, {clip.end_us}, "
            "'train', 1.0)"
            for clip, (id_, platform, video, key) in of_clip.items()
        ),
        f"INSERT INTO videos VALUES ('{ref(1).video_key}', 'v.mp4', '{SHA}', 7, 'h264', 2, 2, 9, 1.5, 1.0, true)",
        *(
            "INSERT INTO attempts (clip_id, stage, code, transient, message, started_at, seconds, worker) VALUES "
            f"('{clip.clip_id}', '{stage}', {repr(code) if code else 'NULL'}, {str(transient).lower()}, '', 1, 1, 'w')"
            for clip, stage, code, transient in tries
        ),
    )
    catalog = Catalog(url)
    failed = {(attempt.clip_id, attempt.stage, attempt.code) for attempt in catalog.failures()}
    assert failed == {
        (clips[0].clip_id, "observe", FailureCode.CORRUPT),
        (clips[1].clip_id, "download", FailureCode.TIMEOUT),
    }
    counts = catalog.funnel(None, POLICY)
    assert (counts.clips, counts.downloaded) == (3, 2)
    assert counts == catalog.funnel(clips, POLICY)
    assert len(catalog.clip(clips[0].clip_id).attempts) == 3
    assert catalog.present_bytes() == 7
    catalog.record_attempt(Attempt(clips[1].clip_id, "download"))
    assert catalog.funnel(None, POLICY).failed == {("observe", "corrupt"): 1}
    assert catalog.claim(["a"], "ann", 60) == {"a"}
    assert catalog._database.run(differences) == []


# ------------------------------------------------------------------------------------------------------------- size


def test_every_query_uses_an_index(tmp_path: Path) -> None:
    """On 100,000 clips no question reads a whole table that has more to it than is asked for."""
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(f"sqlite:///{path}")
    digest = catalog.put_provenance({})
    ids = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 99999)"
    execute(
        f"sqlite:///{path}",
        f"{ids} INSERT INTO clips SELECT printf('%016x', i), 'youtube', 'v' || (i/2), printf('%016x', i/2), i, i+1, "
        "NULL, 0 FROM n",
        f"{ids} INSERT INTO videos SELECT printf('%016x', i), 'v', 's', 1, 'h264', 1, 1, 1, 1, 0, 1, 2 FROM n "
        "WHERE i < 40000",
        f"{ids} INSERT INTO attempts SELECT i, printf('%016x', i), 'download', CASE i % 5 WHEN 0 THEN 'geo' END, 0, "
        "'', 0, 0, '', i % 5 = 0 FROM n",
        f"{ids} INSERT INTO observations SELECT printf('%016x', i), 'full', 'o', 's', '{digest}', 0 FROM n",
        f"{ids} INSERT INTO verdicts SELECT printf('%016x', i), '{POLICY}', 'p', "
        "CASE i % 4 WHEN 0 THEN 'accept' ELSE 'reject' END, CASE i % 4 WHEN 0 THEN NULL ELSE 'r' || (i % 4) END, "
        "'[]', 's', 0 FROM n",
        f"{ids} INSERT INTO outputs SELECT printf('%016x', i), '{digest}', 60, 0 FROM n WHERE i % 4 = 0",
    )
    statements: list[tuple[str, Any]] = []

    @sa.event.listens_for(catalog._database._engine, "before_cursor_execute")
    def note(_1: object, _2: object, statement: str, parameters: Any, _3: object, _4: object) -> None:
        if not statement.startswith(("BEGIN", "PRAGMA", "VACUUM")):
            statements.append((statement, parameters))

    whole = catalog.funnel(None, POLICY)
    questions = len(statements)
    assert questions <= 8, "the whole catalog is counted by the database, in a handful of questions"
    assert whole.failed == {("download", "geo"): 20_000}
    assert (whole.clips, whole.downloaded, whole.observed, whole.accepted) == (100_000, 80_000, 100_000, 25_000)
    assert (whole.sharded, whole.datasets) == (25_000, {digest: 25_000})
    assert whole.rejected_by == {"r1": 25_000, "r2": 25_000, "r3": 25_000}

    some = [f"{n:016x}" for n in range(100)]
    catalog.funnel(None, POLICY, digest)
    catalog.failures()
    catalog.failures(code=FailureCode.GEO)
    catalog.present_bytes()
    whole_catalog = len(statements)
    catalog.funnel(some, POLICY)
    catalog.funnel(some, POLICY, digest)
    catalog.failures(some)
    catalog.refs(some)
    catalog.videos(some)
    catalog.observations(some)
    catalog.verdicts(some, POLICY)
    catalog.outputs(some, digest)
    catalog.provenance(digest)
    next(catalog.observed())
    catalog.clip("00000000000000f0")
    catalog.register([ref(1)])
    catalog.record_attempts([Attempt(id_, "download") for id_ in some])
    catalog.record_evicted(some)
    catalog.forget(some[:2])
    scans = set()
    with sqlite3.connect(path) as database:
        for number, (statement, parameters) in enumerate(statements):
            one = parameters[0] if isinstance(parameters, list) else parameters
            for *_, step in database.execute(f"EXPLAIN QUERY PLAN {statement}", one).fetchall():
                # what asks of some clips must look each of them up; a search by policy or stage alone finds a million
                narrow = "clip_id[=>]|video_key=|rowid=|provenance |forgotten "
                if re.search("SCAN|SEARCH", step) and not re.search(
                    "INDEX" if number < whole_catalog else narrow, step
                ):
                    scans.add((step, statement))
    assert scans == set()


def test_the_benchmark_makes_a_catalog_that_holds_together(url: str, bench: ModuleType) -> None:
    """What it writes past the Catalog is what the Catalog would have written: all and some are counted alike."""
    shown: list[int] = []
    catalog = bench.fill(url, 600, shown.append)
    assert shown == [600]
    counts = catalog.funnel(None, bench.POLICY)
    assert counts == catalog.funnel([bench.ref(number) for number in range(600)], bench.POLICY)
    assert (counts.clips, counts.downloaded, counts.observed, sum(counts.failed.values())) == (600, 540, 540, 60)
    assert counts.accepted + counts.rejected == 540
    assert len(catalog.leases()) == bench.LEASES
    assert all(milliseconds > 0 for milliseconds in bench.measure(catalog, 600, 1).values())


# -------------------------------------------------------------------------------------------------------- invariants


class CatalogMachine(RuleBasedStateMachine):
    """The catalog against plain dictionaries, under any order of operations."""

    template: Path
    refs: ClassVar = [ref(n // 2, n % 2) for n in range(6)]
    some = st.lists(st.sampled_from(refs), max_size=4)

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="unish-catalog-"))
        shutil.copy(self.template, self.folder / "catalog.sqlite")
        self.catalog = Catalog(f"sqlite:///{self.folder / 'catalog.sqlite'}")
        self.digest = self.catalog.put_provenance({})
        self.clips: dict[str, ClipRef] = {}
        self.gone: set[str] = set()
        self.videos: set[str] = set()
        self.observed: dict[str, str] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.outputs: dict[str, str] = {}
        self.last: dict[tuple[str, str], FailureCode | None] = {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def held(self, refs: list[ClipRef]) -> tuple[list[ClipRef], set[str]]:
        known = [clip for clip in refs if clip.clip_id in self.clips]
        return known, {clip.clip_id for clip in refs} - set(self.clips)

    @rule(refs=some)
    def register(self, refs: list[ClipRef]) -> None:
        refused = {clip.clip_id for clip in refs if clip.video_id in self.gone}
        assert self.catalog.register(refs) == refused
        self.clips |= {clip.clip_id: clip for clip in refs if clip.clip_id not in refused}

    @rule(clip=st.sampled_from(refs))
    def download(self, clip: ClipRef) -> None:
        held = any(clip.video_key == other.video_key for other in self.clips.values())
        assert self.catalog.record_video(clip.video_key, video_file(), f"videos/{clip.video_key}/v.mp4") == held
        if held:
            self.videos.add(clip.video_key)

    @rule(refs=some, stage=st.sampled_from(["download", "observe"]), code=st.sampled_from([None, *FailureCode][:4]))
    def attempt(self, refs: list[ClipRef], stage: str, code: FailureCode | None) -> None:
        known, missing = self.held(refs)
        assert self.catalog.record_attempts([Attempt(clip.clip_id, stage, code) for clip in refs]) == missing
        self.last |= {(clip.clip_id, stage): code for clip in known}

    @rule(refs=some, sha=st.sampled_from([SHA, OTHER_SHA]))
    def observe(self, refs: list[ClipRef], sha: str) -> None:
        known, missing = self.held(refs)
        assert self.catalog.record_observations([observation(clip, self.digest, sha) for clip in refs]) == missing
        for clip in known:
            if self.observed.get(clip.clip_id) != sha:
                self.verdicts.pop(clip.clip_id, None)
            self.observed[clip.clip_id] = sha

    @rule(refs=some, sha=st.sampled_from([SHA, OTHER_SHA]), decision=st.sampled_from(["accept", "reject", "unknown"]))
    def judge(self, refs: list[ClipRef], sha: str, decision: Decision) -> None:
        fresh = {clip.clip_id for clip in refs if self.observed.get(clip.clip_id) == sha}
        left_out = self.catalog.record_verdicts(
            [verdict(clip, decision) for clip in refs], {clip.clip_id: sha for clip in refs}
        )
        assert left_out == {clip.clip_id for clip in refs} - fresh
        self.verdicts |= {clip.clip_id: verdict(clip, decision) for clip in refs if clip.clip_id in fresh}

    @rule(refs=some, frames=st.sampled_from([60, 61]))
    def shard(self, refs: list[ClipRef], frames: int) -> None:
        known, missing = self.held(refs)
        assert self.catalog.record_outputs([output(clip, self.digest, frames) for clip in refs]) == missing
        self.outputs |= {clip.clip_id: frames for clip in known}

    @rule(refs=some)
    def unshard(self, refs: list[ClipRef]) -> None:
        self.catalog.drop_outputs(refs, self.digest)
        for clip in refs:
            self.outputs.pop(clip.clip_id, None)

    @rule(clip=st.sampled_from(refs), how=st.sampled_from(["ref", "clip", "video"]))
    def forget(self, clip: ClipRef, how: str) -> None:
        named = how == "ref" or any(clip.video_key == other.video_key for other in self.clips.values())
        if how == "clip":
            named = clip.clip_id in self.clips
        target = clip if how == "ref" else clip.clip_id if how == "clip" else clip.video_key
        answer = self.catalog.forget([target])
        ids = {other.clip_id for other in self.refs if other.video_key == clip.video_key} & set(self.clips)
        if not named:
            assert answer.clip_ids == answer.files == answer.video_keys == ()
            return
        assert set(answer.clip_ids) == ids
        files = {f"observations/{id_}.parquet" for id_ in ids & set(self.observed)}
        files |= {f"videos/{key}/v.mp4" for key in self.videos & {clip.video_key}}
        assert set(answer.files) == files
        self.gone.add(clip.video_id)
        self.videos.discard(clip.video_key)
        for id_ in ids:
            for kept in (self.clips, self.observed, self.verdicts, self.outputs):
                kept.pop(id_, None)
        self.last = {key: code for key, code in self.last.items() if key[0] not in ids}

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "catalog"):
            return
        assert self.catalog.refs(self.refs) == self.clips
        assert {id_: file.sha256 for id_, file in self.catalog.observations(self.refs).items()} == self.observed
        assert self.catalog.verdicts(self.refs, POLICY) == self.verdicts
        assert {id_: it.frames for id_, it in self.catalog.outputs(self.refs, self.digest).items()} == self.outputs
        assert self.catalog.clips_of_dataset(self.digest) == self.outputs.keys()
        failing = {key: code for key, code in self.last.items() if code}
        assert {(it.clip_id, it.stage): it.code for it in self.catalog.failures()} == failing
        decisions = Counter(it.decision for it in self.verdicts.values())
        counts = self.catalog.funnel(None, POLICY)
        assert counts == self.catalog.funnel(self.refs, POLICY)
        assert counts == Funnel(
            clips=len(self.clips),
            downloaded=sum(clip.video_key in self.videos for clip in self.clips.values()),
            observed=len(self.observed),
            accepted=decisions["accept"],
            rejected=decisions["reject"],
            unknown=decisions["unknown"],
            sharded=len(self.outputs),
            failed=dict(Counter((stage, code.value) for (_, stage), code in failing.items() if code)),
            rejected_by={"one_person": decisions["reject"]} if decisions["reject"] else {},
            unknown_by={"one_person": decisions["unknown"]} if decisions["unknown"] else {},
            datasets={self.digest: len(self.outputs)} if self.outputs else {},
        )


@pytest.mark.many_examples
def test_the_catalog_agrees_with_plain_dictionaries(empty_catalog: Path) -> None:
    CatalogMachine.template = empty_catalog
    CatalogMachine.TestCase.settings = settings(
        max_examples=examples(12), stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
    )
    CatalogMachine.TestCase().runTest()


# ------------------------------------------------------------------------------------------------------------- docs


def test_the_documented_questions_are_answered(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "catalog.md").read_text()
    questions = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)[0].split(";")[:-1]
    assert len(questions) == 5
    path = tmp_path / "catalog.sqlite"
    fill(Catalog(f"sqlite:///{path}"), [ref(1), ref(2)])
    with sqlite3.connect(path) as database:
        answers = [database.execute(question).fetchall() for question in questions]
    assert answers[0] == [("paper", "reject", "one_person", 2)]
    assert len(answers[2]) == 2
