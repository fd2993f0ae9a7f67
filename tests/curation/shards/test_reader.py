from __future__ import annotations

import dataclasses
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.files import sha256_json
from curation.shards.codec import decode_jpeg
from curation.shards.index import INDEX_NAME, VERSIONS, read_index, scan_shard
from curation.shards.reader import ShardReader
from curation.shards.schema import SCHEMA, VERSION_KEY, ShardError
from curation.shards.verify import verify
from curation.shards.writer import encode_clip, rebuild_index, remove_clips, rewrite, write_shards, write_tables

PLENTY = 2**30


def test_a_window_is_what_went_in(make_clip, tmp_path: Path) -> None:
    sample = make_clip(1, frames=8)
    boxes, confidence = sample.boxes.copy(), sample.box_confidence.copy()
    boxes[3], confidence[3] = np.nan, np.nan
    camera = sample.depth.intrinsics.copy()
    camera[4] = np.nan
    sample = dataclasses.replace(
        sample,
        boxes=boxes,
        box_confidence=confidence,
        split=None,
        frames=dataclasses.replace(sample.frames, stretch=0.991),
        depth=dataclasses.replace(sample.depth, intrinsics=camera),
    )
    write_shards([make_clip(0), sample, make_clip(2)], tmp_path, max_bytes=PLENTY)
    window = ShardReader(tmp_path).frames(sample.clip_id, 2, 7)
    assert window.split is None
    assert window.frame_index.tolist() == [2, 3, 4, 5, 6]
    assert np.array_equal(window.times_s, sample.frames.times_s[2:7])
    assert window.stretch == 0.991
    assert np.array_equal(window.rgb, np.stack([decode_jpeg(data) for data in sample.frames.jpeg[2:7]]))
    assert np.array_equal(window.boxes, boxes[2:7], equal_nan=True)
    assert np.array_equal(window.box_confidence, confidence[2:7], equal_nan=True)
    assert np.array_equal(window.intrinsics, camera[2:7], equal_nan=True)
    assert np.array_equal(window.depth_valid, sample.depth.valid[2:7])
    np.testing.assert_allclose(window.depth_m, sample.depth.depth_m[2:7], rtol=5e-4)
    assert window.human_mask is None
    assert window.provenance == sample.provenance


def test_windows_across_row_groups(make_clip, tmp_path: Path) -> None:
    sample = make_clip(1, frames=400)
    write_shards([make_clip(0), sample], tmp_path, max_bytes=PLENTY)
    reader = ShardReader(tmp_path)
    for start, stop in [(0, 400), (0, 180), (179, 181), (180, 360), (170, 370), (399, 400)]:
        window = reader.frames(sample.clip_id, start, stop, rgb=False)
        assert window.frame_index.tolist() == list(range(start, stop))
        np.testing.assert_allclose(window.depth_m, sample.depth.depth_m[start:stop], rtol=5e-4)


def test_what_is_absent_or_not_asked_for_is_none(make_clip, tmp_path: Path) -> None:
    bare = make_clip(0, depth=None, provenance={"teacher": None})
    full = make_clip(1)
    write_shards([bare, full], tmp_path, max_bytes=PLENTY)
    reader = ShardReader(tmp_path)
    window = reader.frames(bare.clip_id)
    assert window.rgb is not None
    assert (window.depth_m, window.depth_valid, window.intrinsics) == (None, None, None)
    window = reader.frames(full.clip_id, depth=False)
    assert window.depth_m is None and window.intrinsics is not None
    window = reader.frames(full.clip_id, rgb=False)
    assert window.rgb is None and window.depth_m is not None
    verify(tmp_path)


def test_tensors_share_the_arrays(make_clip, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    window = ShardReader(tmp_path).frames(make_clip(0).clip_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about memory it must not write to
        tensors = window.tensors()
    assert set(tensors) == {
        *("frame_index", "times_s", "rgb", "depth_m", "depth_valid", "boxes", "box_confidence", "intrinsics")
    }
    assert tensors["rgb"].dtype == torch.uint8
    tensors["depth_m"][0, 0, 0] = 7
    assert window.depth_m[0, 0, 0] == 7


def test_reading_a_clip_touches_no_other(make_clip, tmp_path: Path) -> None:
    """The other clip's pixels are overwritten with zeros; this one does not notice."""
    mine, other = make_clip(0, frames=20), make_clip(1, frames=20)
    (entry,) = write_shards([mine, other], tmp_path, max_bytes=PLENTY)
    before = ShardReader(tmp_path).frames(mine.clip_id)
    path = tmp_path / entry.file
    data = path.read_bytes()
    for jpeg in other.frames.jpeg:
        assert jpeg in data
        data = data.replace(jpeg, bytes(len(jpeg)))
    path.write_bytes(data)
    reader = ShardReader(tmp_path)
    assert np.array_equal(reader.frames(mine.clip_id).rgb, before.rgb)
    with pytest.raises(ShardError, match="readable JPEG"):
        reader.frames(other.clip_id)


def test_a_reader_travels_to_another_process(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    reader = ShardReader(tmp_path)
    first = reader.frames(make_clip(0).clip_id)
    assert np.array_equal(pickle.loads(pickle.dumps(reader)).frames(make_clip(0).clip_id).rgb, first.rgb)


def test_wrong_questions_are_answered_in_a_sentence(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    reader = ShardReader(tmp_path)
    with pytest.raises(ShardError, match="Clip ffff is not in"):
        reader.frames("ffff")
    for start, stop in [(0, 6), (3, 3), (-1, 2), (5, None)]:
        with pytest.raises(ShardError, match="has frames 0 to 5"):
            reader.frames(make_clip(0).clip_id, start, stop)


def test_a_shard_rewritten_under_an_open_reader_never_gives_another_clip(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=PLENTY)
    mapped, idle = ShardReader(tmp_path), ShardReader(tmp_path)
    before = mapped.frames(make_clip(1).clip_id)
    remove_clips(tmp_path, [make_clip(0).clip_id])
    assert np.array_equal(mapped.frames(make_clip(1).clip_id).rgb, before.rgb)
    with pytest.raises(ShardError, match="open the folder again"):
        idle.frames(make_clip(0).clip_id)


def test_disagreement_between_index_and_files_is_named(make_clip, tmp_path: Path) -> None:
    (entry,) = write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    path = tmp_path / entry.file
    data = path.read_bytes()

    path.write_bytes(data[:-1])
    with pytest.raises(ShardError, match="is not the file its index describes"):
        ShardReader(tmp_path)
    with pytest.raises(ShardError, match="is not a readable Parquet file"):
        rebuild_index(tmp_path)
    with pytest.raises(ShardError, match="is not a readable Parquet file"):
        verify(tmp_path)

    path.unlink()
    for check in (ShardReader, verify):
        with pytest.raises(ShardError, match=r"is missing; .* restore it, or rebuild the index"):
            check(tmp_path)

    (tmp_path / INDEX_NAME).unlink()
    shutil.rmtree(tmp_path / VERSIONS)
    with pytest.raises(ShardError, match=r"index\.parquet is missing"):
        ShardReader(tmp_path)

    stranger = pa.table({"clip_id": ["x"]})
    pq.write_table(stranger, tmp_path / INDEX_NAME)
    with pytest.raises(ShardError, match="not an index of schema version 2"):
        ShardReader(tmp_path)
    pq.write_table(stranger, tmp_path / "shard-0.parquet")
    with pytest.raises(ShardError, match="is not a shard"):
        rebuild_index(tmp_path)
    older = encode_clip(make_clip(0)).replace_schema_metadata({VERSION_KEY: b"1"})
    pq.write_table(older, tmp_path / "shard-0.parquet")
    with pytest.raises(ShardError, match="version 1, this program reads version 2"):
        rebuild_index(tmp_path)


def test_verify_finds_a_flipped_bit_and_a_stray_file(make_clip, tmp_path: Path) -> None:
    one, _ = write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=1)
    path = tmp_path / one.file
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    (tmp_path / "shard-stray.parquet").write_bytes(data)
    with pytest.raises(ShardError) as caught:
        verify(tmp_path, decode=False)
    stray, flipped = str(caught.value).splitlines()
    assert "shard-stray.parquet is not in the index" in stray
    assert f"{path} has SHA-256" in flipped


def _with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


@pytest.mark.parametrize(
    ("column", "values", "fault"),
    [
        ("frame_index", [0, 1, 3, 4, 5], "frame_index has gaps"),
        ("time_s", [0.0, 0.1, 0.1, 0.2, 0.3], "time_s does not increase"),
        ("width", [57] * 5, "a frame is not 57x42"),
        ("width", [56, 56, 56, 56, 57], "width differs between frames"),
        ("stretch", [1.0, 1.0, 1.1, 1.0, 1.0], "stretch differs between frames"),
        ("depth", [None] * 5, "some frames have depth and some do not"),
        ("depth_log_max", [-5.0] * 5, "is beyond the clip's"),
        ("depth_valid", [bytes(294)] * 5, "depth_valid does not match depth"),
        ("depth_valid", [b"short"] * 5, "is not one of 56x42"),
        ("human_mask", [bytes(294), *[None] * 4], "some frames have a human mask"),
        ("provenance", ["0" * 64] * 5, "provenance is missing or altered"),
    ],
)
def test_verify_finds_what_a_hash_cannot(make_clip, tmp_path: Path, column: str, values: list, fault: str) -> None:
    """A file may be exactly as it was written and still have been written wrong."""
    table = _with_column(encode_clip(make_clip(0)), column, values)
    if column == "provenance":
        table = table.replace_schema_metadata(table.schema.metadata | {b"unish:provenance": b'{"%s":{}}' % (b"0" * 64)})
    write_tables([encode_clip(make_clip(1)), table], tmp_path, max_bytes=PLENTY)
    verify(tmp_path, decode=False)
    with pytest.raises(ShardError, match=f"clip {make_clip(0).clip_id}: .*{fault}"):
        verify(tmp_path)


def test_mixed_row_groups_are_refused(make_clip, tmp_path: Path) -> None:
    tables = [encode_clip(make_clip(seed)).cast(SCHEMA) for seed in range(2)]
    pq.write_table(pa.concat_tables(tables), tmp_path / "shard-0.parquet")
    with pytest.raises(ShardError, match="mixes clips in its row groups"):
        rebuild_index(tmp_path)


def test_the_index_holds_every_clip_of_every_file(make_clip, tmp_path: Path) -> None:
    entries = write_shards([make_clip(seed, frames=seed + 1) for seed in range(6)], tmp_path, max_bytes=60_000)
    assert len(entries) > 1
    assert read_index(tmp_path) == tuple(sorted(entries, key=lambda entry: entry.file))
    table = pq.read_table(tmp_path / INDEX_NAME)
    assert table.column_names == [
        *("clip_id", "split", "file", "row_group", "row_groups", "frames", "sha256", "size_bytes")
    ]


def _flipped(data: bytes, times: int, start: int = 0) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for at, bit in zip(random.integers(start, len(data), times), random.integers(0, 8, times), strict=True):
        changed = bytearray(data)
        changed[at] ^= 1 << bit
        yield bytes(changed)


def test_a_damaged_index_is_an_error_or_tells_the_truth(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(seed, frames=1) for seed in range(3)], tmp_path, max_bytes=1)
    remove_clips(tmp_path, [make_clip(0).clip_id])
    whole, wrong = read_index(tmp_path), 0
    (tmp_path / INDEX_NAME).unlink()
    (newest,) = (tmp_path / VERSIONS).iterdir()
    for changed in _flipped(newest.read_bytes(), 300):
        newest.write_bytes(changed)
        try:
            assert read_index(tmp_path) == whole
        except ShardError:
            wrong += 1
    assert wrong > 100


def test_a_damaged_shard_is_an_error_wherever_it_is_read(make_clip, tmp_path: Path) -> None:
    """Pixels may differ where nobody compares the hash; `verify` does."""
    (entry,) = write_shards([make_clip(0, frames=2)], tmp_path, max_bytes=1)
    path, clip_id, wrong = tmp_path / entry.file, make_clip(0).clip_id, 0
    data = path.read_bytes()
    for changed in (*_flipped(data, 60), *_flipped(data, 90, len(data) - 7000)):  # the footer is about half of it
        path.unlink(missing_ok=True)  # pages of an open reader stay as they were
        path.write_bytes(changed)
        with pytest.raises(ShardError):
            verify(tmp_path)
        try:
            assert len(ShardReader(tmp_path).frames(clip_id).times_s) == 2
            (copy,) = scan_shard(path).clips
            (tmp_path / rewrite(path, frozenset({copy.clip_id})).file).unlink()  # mostly the same name
        except ShardError:
            wrong += 1
    assert wrong > 50


def test_verify_names_what_cannot_be_decoded(make_clip, tmp_path: Path) -> None:
    table = encode_clip(make_clip(0))
    table = table.cast(pa.schema([field.with_nullable(True) for field in table.schema], table.schema.metadata))
    write_tables([_with_column(table, "height", [None] * 5)], tmp_path, max_bytes=PLENTY)
    with pytest.raises(ShardError, match=f"clip {make_clip(0).clip_id}: "):
        verify(tmp_path)
    with pytest.raises(ShardError):
        ShardReader(tmp_path).frames(make_clip(0).clip_id)


def test_provenance_that_is_no_json_is_an_error(make_clip, tmp_path: Path) -> None:
    (entry,) = write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    path = tmp_path / entry.file
    record = b'{"%s"' % sha256_json(make_clip(0).provenance).encode()
    data = path.read_bytes()
    assert record in data
    path.write_bytes(data.replace(record, b"[" + record[1:]))
    rebuild_index(tmp_path)
    for check in (lambda: verify(tmp_path), lambda: ShardReader(tmp_path).frames(make_clip(0).clip_id)):
        with pytest.raises(ShardError, match="is not a readable Parquet file"):
            check()
