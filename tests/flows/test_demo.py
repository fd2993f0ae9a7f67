"""The demonstration, small: every clip's fate is the true one, a second run does only what is missing, a failed one
leaves no service behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prefect_place import ROOT, Place, free_port, wait_until

from curation.shards.schema import PROVENANCE_KEY
from flows.demo import demo


def test_a_demonstration_that_is_stopped_stops_the_service_it_started(tmp_path: Path):
    place = Place(tmp_path / "state", f"http://127.0.0.1:{free_port()}/api")
    place.home.mkdir()
    environment = os.environ | {"PREFECT_HOME": str(place.home), "PREFECT_API_URL": place.api_url}
    command = [sys.executable, "-m", "flows.demo", str(tmp_path / "demo")]
    output = (tmp_path / "output").open("wb")
    demonstration = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(
            lambda: (place.home / "service.json").exists() and place.record["server"], "the server to be started"
        )
        token = place.record["token"]
        assert place.processes(token)
        demonstration.send_signal(signal.SIGINT)
        assert demonstration.wait(timeout=60) == 130
    finally:
        demonstration.kill()
    said = (tmp_path / "output").read_text()
    assert "Stopping the Prefect service" in said and "Traceback" not in said, said
    assert place.processes(token) == [] and not place.running()


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
