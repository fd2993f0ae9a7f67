"""Twenty kills at random moments over one job; at the end nothing is lost, doubled, half written or left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from curation import pipeline
from curation.catalog import Catalog
from curation.files import sha256_file
from curation.manifest import write_manifest
from curation.records import ClipRef
from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings
from curation.shards.reader import ShardReader
from curation.shards.verify import verify
from tests.support.prefect_place import Place, wait_until
from tests.support.servers import serve

pytestmark = pytest.mark.slow

CLIPS, KILLS, SEED = 60, 20, 20
ACTIVE = {"RUNNING", "PENDING", "CANCELLING", "SCHEDULED"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, small_clips: Path) -> Path:
    """Sixty files of five kinds: three that pass, one with a cut, one that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(CLIPS):
        source = ("bars", "cut", "set", "count", "broken")[number % 5]
        shutil.copyfile(small_clips / f"{source}.mp4", folder / f"{number:02}.mp4")
    return folder


def make_run(place: Place, parameters: dict[str, object]) -> None:
    with place.client() as client:
        deployment = client.read_deployment_by_name("curate/curate")
        client.create_flow_run_from_deployment(deployment.id, parameters=parameters)


def active(place: Place) -> list[str]:
    with place.client() as client:
        return [run.state_type for run in client.read_flow_runs() if run.state_type in ACTIVE]


def flow_processes(place: Place) -> list[psutil.Process]:
    """The processes that run flows: children of the serving process."""
    with suppress(psutil.Error):
        return psutil.Process(place.record["worker"]).children()
    return []


def test_twenty_kills_change_nothing(service: Place, videos: Path, seer: Path, tolerant: Path, tmp_path: Path):
    chance = random.Random(SEED)
    out = tmp_path / "out"
    with serve(videos) as server:
        refs = [ClipRef("http", server.url(f"/{number:02}.mp4")) for number in range(CLIPS)]
        refs.append(ClipRef("http", server.url("/gone.mp4")))
        write_manifest(refs, tmp_path / "m.csv")
        parameters: dict[str, object] = {
            "manifest": str(tmp_path / "m.csv"), "out": str(out), "policy": str(tolerant), "detector": str(seer),
            "teacher": "none", "http_hosts": [server.host], "allow_loopback": True, "batch_clips": 3, "workers": 1,
            "detector_long_side": 192, "frame_long_side": 126,
        }  # fmt: skip
        hits = {"worker": 0, "flow": 0, "server": 0}
        for _ in range(KILLS):
            assert service.service("start").returncode == 0
            if not active(service):
                make_run(service, parameters)
            wait_until(lambda: bool(flow_processes(service)), "a flow process", 240)
            time.sleep(chance.uniform(0.0, 14.0))
            whom = chance.choice(sorted(hits))
            flows = flow_processes(service)
            hits[whom] += bool(flows)  # a run that just ended was not hit
            record = service.record
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if whom == "flow":
                    for process in flows:
                        process.kill()
                elif whom == "worker":
                    os.killpg(record["worker"], signal.SIGKILL)
                else:
                    os.kill(record["server"], signal.SIGKILL)
        assert sum(hits.values()) >= KILLS // 2 and all(hits.values()), hits

        assert service.service("start").returncode == 0
        if not active(service):
            make_run(service, parameters)
        deadline = time.monotonic() + 400
        while active(service):
            assert time.monotonic() < deadline, "the last run does not end"
            time.sleep(0.5)

        settings = Settings(
            out=tmp_path / "undisturbed", policy=tolerant, batch_clips=3, workers=1,
            observe=ObserveSettings(detector=str(seer), detector_long_side=192, frame_long_side=126),
            teacher=TeacherSettings(kind="none"),
            download=DownloadSettings(http_hosts=(server.host,), allow_loopback=True),
        )  # fmt: skip
        expected = pipeline.run(settings, refs)
    found = pipeline.funnel(pipeline.preflight(settings.model_copy(update={"out": out})), refs)
    assert found.table() == expected.table() and expected.sharded == 36

    shards = {name: sha256_file(Path(found.folder) / name) for name in found.shards}
    assert shards == {name: sha256_file(Path(expected.folder) / name) for name in expected.shards}
    whole = verify(Path(found.folder))
    assert len(ShardReader(Path(found.folder)).clips) == sum(len(shard.clips) for shard in whole) == 36
    for path in (out / "videos").glob("*/video.*"):
        assert path.read_bytes() == (settings.out / path.relative_to(out)).read_bytes()
    assert not list((out / "frames").glob("*.parquet"))
    catalog = Catalog(f"sqlite:///{out / 'catalog.sqlite'}")
    assert catalog.leases() == []

    token = service.record["token"]
    with service.client() as client:
        assert {run.state_type for run in client.read_flow_runs()} <= {"COMPLETED", "CRASHED", "FAILED", "CANCELLED"}
    assert service.service("stop").returncode == 0
    assert service.processes(token) == []
