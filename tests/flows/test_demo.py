"""The demonstration, small: every clip's fate is the true one, and a second run does only what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prefect_place import Place

from curation.shards.schema import PROVENANCE_KEY
from flows.demo import demo

pytestmark = pytest.mark.slow


def test_the_demonstration_agrees_with_geometry_and_is_incremental(service: Place, tmp_path: Path):
    assert demo(tmp_path / "demo", clips=6)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("shard-*.parquet")}
    assert shards
    assert demo(tmp_path / "demo", clips=6)  # the rate-limited clip is fetched now
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("shard-*.parquet")}
    assert shards.items() < again.items()


@pytest.mark.parametrize(
    ("teacher", "kind", "name"), [("small", "moge", "synthetic-moge"), ("oracle", "folder", "oracle")]
)
def test_shards_say_which_teacher_it_was(service: Place, tmp_path: Path, teacher: str, kind: str, name: str):
    assert demo(tmp_path / "demo", clips=1, teacher=teacher)
    [shard] = (tmp_path / "demo").rglob("shard-*.parquet")
    [made] = json.loads(pq.read_metadata(shard).metadata[PROVENANCE_KEY]).values()
    assert (made["teacher"]["kind"], made["teacher"]["name"]) == (kind, name)
