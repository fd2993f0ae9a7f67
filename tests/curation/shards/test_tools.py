"""The tools that others will open shards with: each reads one frame of one clip and decodes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.records import ClipSample
from curation.shards.codec import DepthRange, decode_depth, decode_jpeg, unpack_mask
from curation.shards.writer import write_shards

FRAME = 3


@pytest.fixture(scope="module")
def sample(make_clip) -> ClipSample:
    return make_clip(1)


@pytest.fixture(scope="module")
def files(make_clip, sample: ClipSample, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    bare = make_clip(0, depth=None, split=None, boxes=np.full((5, 4), np.nan, np.float32))
    write_shards([bare, sample, make_clip(2)], folder, max_bytes=1)
    return sorted(str(path) for path in folder.glob("shard-*.parquet"))


def check(row: dict[str, Any], sample: ClipSample) -> None:
    height, width = row["height"], row["width"]
    assert row["split"] == sample.split
    assert row["time_s"] == sample.frames.times_s[FRAME]
    assert decode_jpeg(row["jpeg"]).shape == (height, width, 3)
    bounds = DepthRange(row["depth_log_min"], row["depth_log_max"])
    decoded = decode_depth(row["depth"], height, width, bounds)
    np.testing.assert_allclose(decoded, sample.depth.depth_m[FRAME], rtol=5e-4)
    assert np.array_equal(unpack_mask(row["depth_valid"], height, width), sample.depth.valid[FRAME])
    assert np.array_equal(np.array(row["box"], np.float32), sample.boxes[FRAME])
    assert np.array_equal(np.array(row["intrinsics"], np.float32).reshape(3, 3), sample.depth.intrinsics[FRAME])


def test_pandas(files: list[str], sample: ClipSample) -> None:
    import pandas

    frame = pandas.concat([pandas.read_parquet(file) for file in files])
    check(frame[(frame.clip_id == sample.clip_id) & (frame.frame_index == FRAME)].iloc[0].to_dict(), sample)


def test_pyarrow_dataset(files: list[str], sample: ClipSample) -> None:
    import pyarrow.dataset as ds

    chosen = (ds.field("clip_id") == sample.clip_id) & (ds.field("frame_index") == FRAME)
    (row,) = ds.dataset(files).to_table(filter=chosen).to_pylist()
    check(row, sample)


def test_duckdb(files: list[str], sample: ClipSample) -> None:
    duckdb = pytest.importorskip("duckdb")
    asked = duckdb.execute(
        "select * from read_parquet(?) where clip_id = ? and frame_index = ?", [files, sample.clip_id, FRAME]
    )
    names = [column[0] for column in asked.description]
    (row,) = asked.fetchall()
    check(dict(zip(names, row, strict=True)), sample)


def test_hugging_face_datasets(
    files: list[str], sample: ClipSample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    (row,) = loaded.filter(lambda r: r["clip_id"] == sample.clip_id and r["frame_index"] == FRAME)
    check(row, sample)


def test_the_benchmark_runs_and_names_the_hardware(tmp_path: Path) -> None:
    out = tmp_path / "shards.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.shards", "--frames=1", "--clip-lengths=16", "--repeats=1", "--out", out],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[3],
    )
    figures = json.loads(out.read_text())
    assert figures["hardware"]["processor"]
    assert figures["ratios"]["kb_per_frame fp16+zstd / ours"] > 2.3
