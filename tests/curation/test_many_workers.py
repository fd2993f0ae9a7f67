"""Several workers on one manifest: a real PostgreSQL server, a real S3 server, processes that are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from curation import pipeline
from curation.catalog import Catalog
from curation.manifest import read_manifest, write_manifest
from curation.records import ClipRef
from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings
from curation.shards.reader import ShardReader
from curation.shards.remote import pull
from curation.shards.verify import verify
from curation.storage import Store
from tests.support.databases import postgres_server
from tests.support.objects import s3_server

PATIENCE_S = 300  # without progress, on a machine that has other work


@dataclass(frozen=True)
class Lab:
    """What the workers share, and a manifest of clips that each have a video of their own."""

    folder: Path
    manifest: Path
    settings: Settings

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        """`curation run` in a process group of its own, as on another machine: nothing but its own folder."""
        settings = self.settings
        command = [sys.executable, "-m", "curation.cli", "run", str(self.manifest), "--out", str(self.folder / name)]
        command += ["--policy", str(settings.policy), "--detector", str(settings.observe.detector), "--teacher", "none"]
        command += ["--local-root", str(settings.download.local_root), "--workers", "1"]
        command += ["--batch-clips", str(settings.batch_clips)]
        command += ["--catalog-url", settings.database, "--storage", str(settings.storage), "--lease-s", "4"]
        log = (self.folder / f"{name}.log").open("wb")
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def make_lab(folder: Path, clips: Path, count: int, settings: Settings) -> Lab:
    videos = folder / "videos"
    videos.mkdir()
    sources = [clips / name for name in ("bars.mp4", "cut.mp4", "set.mp4", "count.mp4", "broken.mp4")]
    refs = []
    for number in range(count):
        source = sources[number % len(sources)]
        shutil.copyfile(source, videos / f"{number:04}.mp4")
        refs.append(ClipRef("local", f"{number:04}.mp4"))
    refs.append(ClipRef("local", "gone.mp4"))
    manifest = folder / "manifest.csv"
    write_manifest(refs, manifest)
    download = DownloadSettings(local_root=videos)
    return Lab(folder, manifest, settings.model_copy(update={"download": download}))


def running(workers: list[subprocess.Popen[bytes]]) -> bool:
    return any(worker.poll() is None for worker in workers)


def wait_for(happened: Callable[[], bool], catalog: Catalog, refs: list[ClipRef]) -> None:
    """Until something has happened, however long, as long as clips are observed meanwhile."""
    done, since = -1, time.monotonic()
    while not happened():
        if (now := len(catalog.observations(refs))) > done:
            done, since = now, time.monotonic()
        assert time.monotonic() < since + PATIENCE_S, f"no progress after {done} clips"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as url:
        yield url


@pytest.mark.slow  # a minute of both cores for the shorter one: four programs that each load a detector
@pytest.mark.parametrize(("count", "batch"), [(9, 2), (200, 4)])
def test_a_killed_worker_s_share_goes_to_the_other_and_the_result_is_the_same(
    tmp_path: Path, clips: Path, seer: Path, tolerant: Path, postgres: str, s3: str, count: int, batch: int
):
    settings = Settings(
        out=tmp_path / "here",
        policy=tolerant,
        observe=ObserveSettings(detector=str(seer)),
        teacher=TeacherSettings(kind="none"),
        catalog_url=f"{postgres}?options=-csearch_path%3Drun{count}",
        storage=f"{s3}/run{count}",
        batch_clips=batch,
        lease_s=4,
    )
    import sqlalchemy as sa

    engine = sa.create_engine(postgres.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA run{count}")
    engine.dispose()
    lab = make_lab(tmp_path, clips, count, settings)
    workers = [lab.worker("a"), lab.worker("b")]
    try:
        catalog = Catalog(settings.database)
        refs = read_manifest(lab.manifest)
        wait_for(lambda: len(catalog.observations(refs)) >= 0.4 * count or not running(workers), catalog, refs)
        assert running(workers)
        os.killpg(workers[0].pid, signal.SIGKILL)
        assert workers[0].wait(timeout=10) == -signal.SIGKILL
        wait_for(lambda: not running(workers), catalog, refs)
        assert workers[1].returncode == 0, (tmp_path / "b.log").read_text()
    finally:
        for worker in workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait(timeout=10)

    undisturbed = settings.model_copy(update={"out": tmp_path / "alone", "catalog_url": None, "storage": None,
                                              "download": lab.settings.download, "workers": 1})  # fmt: skip
    expected = pipeline.run(undisturbed, refs)
    found = pipeline.funnel(lab.settings, refs)
    assert found.table() == expected.table() and found.sharded == expected.sharded > 0
    # the dead worker's may still stand there, lapsed, if it was killed between finishing a batch and giving it back
    assert not [lease for lease in catalog.leases() if lease.expires_in_s > 0]

    pulled = tmp_path / "pulled"
    shards = pull(found.folder, pulled)
    assert {s.file: s.sha256 for s in shards} == {s.file: s.sha256 for s in verify(Path(expected.folder))}
    assert len(ShardReader(pulled).clips) == sum(len(s.clips) for s in shards), "no clip twice"
    folder = found.folder.removeprefix(f"{settings.storage}/")
    assert set(Store(tmp_path / "x", settings.storage).sizes(folder)) == {"index.parquet", *(s.file for s in shards)}
    tries = [attempt for ref in refs for attempt in catalog.clip(ref.clip_id).attempts if attempt.stage == "observe"]
    assert len(tries) <= count, "what the dead worker had finished was not done again"
