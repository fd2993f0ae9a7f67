"""The demonstration, small: every clip's fate is the true one, a second run does only what is missing, a failed one
leaves no service behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.shards.schema import PROVENANCE_KEY
from flows.demo import demo
from tests.support.prefect_place import ROOT, Place, free_port, wait_until


def test_a_demonstration_that_is_stopped_stops_the_service_it_started(tmp_path: Path):
    place = Place(tmp_path / "state", f"http://127.0.0.1:{free_port()}/api")
    place.home.mkdir()
    environment = os.environ | {"PREFECT_HOME": str(place.home), "PREFECT_API_URL": place.api_url}
    command = [sys.executable, "-m", "flows.demo", str(tmp_path / "demo")]
    token = "not started"
    with (tmp_path / "said").open("wb") as said:
        demonstration = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
    try:
        record = place.home / "service.json"
        wait_until(lambda: record.exists() and place.record["server"] is not None, "the server to be started")
        token = place.record["token"]
        demonstration.terminate()  # Ctrl-C does the same, but may be ignored where tests run in the background
        assert demonstration.wait(timeout=60) == 143
    finally:
        demonstration.kill()
        left = place.processes(token)
        for process in left:
            process.kill()
    assert left == [] and not place.running()
    text = (tmp_path / "said").read_text()
    assert "Stopping the Prefect service" in text and "Traceback" not in text


def test_a_demonstration_that_fails_leaves_a_service_that_was_running(service: Place, tmp_path: Path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        demo(tmp_path / "demo")
    assert service.running()


@pytest.mark.slow
def test_the_demonstration_agrees_with_geometry_and_is_incremental(service: Place, tmp_path: Path):
    assert demo(tmp_path / "demo", clips=6)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("shard-*.parquet")}
    assert shards
    assert demo(tmp_path / "demo", clips=6)  # the rate-limited clip is fetched now
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("shard-*.parquet")}
    assert shards.items() < again.items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "kind", "name"), [("small", "moge", "synthetic-moge"), ("oracle", "folder", "oracle")]
)
def test_shards_say_which_teacher_it_was(service: Place, tmp_path: Path, teacher: str, kind: str, name: str):
    assert demo(tmp_path / "demo", clips=1, teacher=teacher)
    [shard] = (tmp_path / "demo").rglob("shard-*.parquet")
    [made] = json.loads(pq.read_metadata(shard).metadata[PROVENANCE_KEY]).values()
    assert (made["teacher"]["kind"], made["teacher"]["name"]) == (kind, name)
