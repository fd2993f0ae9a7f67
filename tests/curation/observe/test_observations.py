"""Measurements come back from disk as they were, or not at all."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from curation.failures import UsageError
from curation.observe.observations import SCHEMA, Observations, read_observations, write_observations
from tests.support.examples import examples

F32 = st.floats(width=32, allow_nan=False)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def observations(draw) -> Observations:
    frames, samples, boxes = draw(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 7)))

    def f32(count: int, *more: int) -> np.ndarray:
        return draw(arrays(np.float32, (count, *more), elements=F32))

    return Observations(
        clip_id=draw(st.text("0123456789abcdef", min_size=16, max_size=16)),
        kind=draw(st.sampled_from(["full", "keyframes"])),
        width=draw(st.integers(1, 10000)),
        height=draw(st.integers(1, 10000)),
        transfer=draw(st.sampled_from(["sdr", "pq", "hlg"])),
        start_s=draw(FINITE),
        end_s=draw(FINITE),
        surround=draw(st.sampled_from(["none", "bars", "copy"])),
        active=draw(st.tuples(FINITE, FINITE, FINITE, FINITE)),
        times_s=draw(arrays(np.float64, frames, elements=FINITE)),
        content=f32(frames),
        luma=f32(frames),
        contrast=f32(frames),
        gap=f32(frames),
        person_gap=f32(frames),
        dissolve=f32(frames),
        sample_times_s=draw(arrays(np.float64, samples, elements=FINITE)),
        box_sample=draw(arrays(np.int32, boxes)),
        box_xyxy=f32(boxes, 4),
        box_class=tuple(draw(st.lists(st.text(max_size=8), min_size=boxes, max_size=boxes))),
        box_confidence=f32(boxes),
        box_track=draw(arrays(np.int32, boxes)),
        provenance=draw(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), FINITE, st.text(max_size=5)))),
    )


@pytest.fixture(scope="module")
def example() -> Observations:
    none = np.zeros(0, np.float32)
    return Observations(
        "0" * 16, "full", 4, 3, "sdr", 0.0, 1.0, "none", (0.0, 0.0, 1.0, 1.0), np.zeros(0), none, none, none, none,
        none, none, np.zeros(0), np.zeros(0, np.int32), np.zeros((0, 4), np.float32), (), none, np.zeros(0, np.int32),
        {},
    )  # fmt: skip


@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(measured=observations())
def test_what_is_read_is_what_was_written(measured):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deeper" / "clip.parquet"
        path.parent.mkdir()
        write_observations(measured, path)
        read = read_observations(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    for field in dataclasses.fields(Observations):
        before, after = getattr(measured, field.name), getattr(read, field.name)
        assert type(after) is type(before), field.name
        if isinstance(before, np.ndarray):
            assert after.dtype == before.dtype and after.shape == before.shape, field.name
            assert np.array_equal(before, after), field.name
        else:
            assert before == after, field.name


def test_equal_measurements_are_equal_bytes(example, tmp_path):
    write_observations(example, tmp_path / "a.parquet")
    write_observations(example, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_another_version_is_refused(example, tmp_path):
    path = tmp_path / "clip.parquet"
    write_observations(example, path)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"unish.observations": "0"}), path)
    with pytest.raises(UsageError, match=r"clip\.parquet have version 0; delete the file"):
        read_observations(path)
    pq.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(UsageError, match="version"):
        read_observations(path)


@pytest.mark.parametrize("keep", [0, 10, -20])
def test_a_damaged_or_missing_file_is_refused(example, tmp_path, keep):
    path = tmp_path / "clip.parquet"
    write_observations(example, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="cannot be read"):
        read_observations(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_observations(tmp_path / "none.parquet")


def test_the_schema_names_every_field():
    assert SCHEMA.names == [field.name for field in dataclasses.fields(Observations)]
