"""The demonstration, small: every clip's fate is the true one, and a second run does only what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect_place import Place

from flows.demo import demo

pytestmark = pytest.mark.slow


def test_the_demonstration_agrees_with_geometry_and_is_incremental(service: Place, tmp_path: Path):
    assert demo(tmp_path / "demo", clips=6)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("shard-*.parquet")}
    assert shards
    assert demo(tmp_path / "demo", clips=6)  # the rate-limited clip is fetched now
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("shard-*.parquet")}
    assert shards.items() < again.items()
