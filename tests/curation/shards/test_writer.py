from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from curation.files import sha256_file
from curation.records import ClipSample
from curation.shards import index, writer
from curation.shards.index import INDEX_NAME, VERSIONS, read_index, scan_shard, shard_paths
from curation.shards.reader import ShardReader
from curation.shards.schema import FIELDS, ShardError
from curation.shards.verify import verify
from curation.shards.writer import encode_clip, rebuild_index, remove_clips, update_index, write_shards, write_tables

PLENTY = 2**30


def clips_in(folder: Path) -> set[str]:
    """What a user who globs the files sees, index or not; a clip held twice is an error."""
    found = [clip.clip_id for path in shard_paths(folder) for clip in scan_shard(path).clips]
    assert len(found) == len(set(found))
    return set(found)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".") and path.name not in (".lock", VERSIONS)]


def test_a_clip_is_a_row_group_and_a_long_one_several(make_clip, tmp_path: Path) -> None:
    samples = [make_clip(0), make_clip(1, frames=200), make_clip(2, frames=180)]
    (entry,) = write_shards(samples, tmp_path, max_bytes=PLENTY)
    assert [(c.row_group, c.row_groups, c.frames) for c in entry.clips] == [(0, 1, 5), (1, 2, 200), (3, 1, 180)]
    metadata = pq.read_metadata(tmp_path / entry.file)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [5, 180, 20, 180]
    assert (entry,) == read_index(tmp_path) == verify(tmp_path)
    assert entry.sha256 == sha256_file(tmp_path / entry.file)
    assert entry.size_bytes == (tmp_path / entry.file).stat().st_size


def test_packed_pixels_are_not_compressed_again_and_the_rest_is(make_clip, tmp_path: Path) -> None:
    (entry,) = write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    group = pq.read_metadata(tmp_path / entry.file).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    compression = {column.path_in_schema.split(".")[0]: column.compression for column in columns}
    assert compression == {f.name: "UNCOMPRESSED" if f.name in {"jpeg", "depth"} else "ZSTD" for f in FIELDS}


def test_the_same_clips_give_the_same_bytes_in_another_process(make_clip, tmp_path: Path) -> None:
    samples = [make_clip(0), make_clip(1, frames=190)]
    (tmp_path / "samples.pickle").write_bytes(pickle.dumps(samples))
    script = (
        "import pathlib, pickle, sys; from curation.shards.writer import write_shards;"
        "write_shards(pickle.load(open(sys.argv[1], 'rb')), pathlib.Path(sys.argv[2]), max_bytes=2**30)"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "samples.pickle", tmp_path / "theirs"],
        check=True,
        env=os.environ | {"BLOSC_NTHREADS": "4", "PYTHONHASHSEED": "7"},
    )
    write_shards(samples, tmp_path / "ours", max_bytes=PLENTY)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / who).glob("*.parquet")} for who in ("ours", "theirs"))
    assert len(ours) == 2
    assert ours == theirs


def test_names_follow_the_content(make_clip, tmp_path: Path) -> None:
    one, other = make_clip(0), make_clip(0, provenance={"teacher": "another"})
    names = [write_shards([clip], tmp_path / str(i), max_bytes=PLENTY)[0].file for i, clip in enumerate([one, other])]
    assert names[0] != names[1]
    assert all(len(name) == len("shard-.parquet") + 16 for name in names)


@pytest.mark.parametrize("max_bytes", [1, 100_000, 200_000, 400_000])
def test_files_stay_below_the_cap_unless_one_clip_is_larger(make_clip, tmp_path: Path, max_bytes: int) -> None:
    samples = [make_clip(seed, frames=3 + 4 * (seed % 3)) for seed in range(12)]
    entries = write_shards(samples, tmp_path, max_bytes=max_bytes)
    assert all(entry.size_bytes <= max_bytes for entry in entries if len(entry.clips) > 1)
    assert [clip.clip_id for entry in entries for clip in entry.clips] == [sample.clip_id for sample in samples]
    assert (len(entries) == 12) == (max_bytes == 1)
    assert max_bytes < 400_000 or len(entries) < 4
    verify(tmp_path)


def test_one_clip_in_memory_at_a_time(make_clip, tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def samples() -> Iterator[ClipSample]:
        for seed in range(6):
            assert sum(ref() is not None for ref in alive) <= 1
            sample = make_clip(seed)
            alive.append(weakref.ref(sample.depth.depth_m))
            yield sample
            del sample

    write_shards(samples(), tmp_path, max_bytes=PLENTY)
    assert len(alive) == 6


def test_no_clips_no_files(tmp_path: Path) -> None:
    assert write_shards([], tmp_path, max_bytes=PLENTY) == []
    assert not list(tmp_path.iterdir())


def test_samples_that_contradict_themselves_are_refused_and_leave_nothing(make_clip, tmp_path: Path) -> None:
    good = make_clip(0)
    frames = good.frames
    for bad, reason in [
        (dataclasses.replace(good, boxes=good.boxes[1:]), r"boxes has shape \(4, 4\), not \(5, 4\)"),
        (dataclasses.replace(good, frames=dataclasses.replace(frames, width=99)), "depth_m has shape"),
        (dataclasses.replace(good, depth=None, frames=dataclasses.replace(frames, width=99)), "first JPEG has shape"),
        (dataclasses.replace(good, frames=dataclasses.replace(frames, times_s=frames.times_s * 0)), "do not increase"),
        (dataclasses.replace(good, frames=dataclasses.replace(frames, times_s=frames.times_s * np.nan)), "increase"),
        (dataclasses.replace(good, frames=dataclasses.replace(frames, stretch=0.0)), "not a positive number"),
        (dataclasses.replace(good, frames=dataclasses.replace(frames, stretch=np.nan)), "not a positive number"),
    ]:
        with pytest.raises(ShardError, match=f"Clip {good.clip_id} cannot go into a shard: .*{reason}"):
            write_shards([make_clip(1), bad], tmp_path, max_bytes=PLENTY)
    with pytest.raises(ShardError, match="given twice"):
        write_shards([good, good], tmp_path, max_bytes=PLENTY)
    assert not list(tmp_path.iterdir())


def test_a_crash_between_file_and_index_is_put_right_by_the_next_write(
    make_clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "update_index", crash)
        with pytest.raises(KeyboardInterrupt):
            write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    assert not (tmp_path / INDEX_NAME).exists()
    write_shards([make_clip(1)], tmp_path, max_bytes=PLENTY)
    assert set(ShardReader(tmp_path).clips) == {make_clip(0).clip_id, make_clip(1).clip_id}
    verify(tmp_path)


def test_a_crash_before_the_old_copy_went_leaves_the_new_one(
    make_clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=PLENTY)
    newer = make_clip(0, provenance={"teacher": "newer"})
    with monkeypatch.context() as patch:
        patch.setattr(writer, "update_index", lambda *_, **__: None)
        (entry,) = write_shards([newer], tmp_path, max_bytes=PLENTY)
    later = (tmp_path / entry.file).stat().st_mtime_ns + 10**9
    os.utime(tmp_path / entry.file, ns=(later, later))
    rebuild_index(tmp_path)
    assert clips_in(tmp_path) == {newer.clip_id, make_clip(1).clip_id}
    assert ShardReader(tmp_path).frames(newer.clip_id).provenance == {"teacher": "newer"}


def test_a_rewritten_clip_replaces_the_old_one(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=PLENTY)
    write_shards([make_clip(1, provenance={"teacher": "newer"}), make_clip(2)], tmp_path, max_bytes=PLENTY)
    assert clips_in(tmp_path) == {make_clip(seed).clip_id for seed in range(3)}
    assert ShardReader(tmp_path).frames(make_clip(1).clip_id).provenance == {"teacher": "newer"}
    verify(tmp_path)


def test_writing_again_changes_nothing(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=PLENTY)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    entries = write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=PLENTY)
    update_index(tmp_path, entries)
    rebuild_index(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == before


def test_what_a_killed_writer_left_is_swept_up(make_clip, tmp_path: Path) -> None:
    (tmp_path / "sample.pickle").write_bytes(pickle.dumps(make_clip(0)))
    script = (
        "import os, pathlib, pickle, signal, sys; from curation.shards.writer import write_shards\n"
        "def samples():\n"
        "    yield pickle.load(open(sys.argv[1], 'rb'))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_shards(samples(), pathlib.Path(sys.argv[2]), max_bytes=2**30)"
    )
    folder = tmp_path / "shards"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "sample.pickle", folder], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(hidden(folder)) == 1 and not shard_paths(folder)
    write_shards([make_clip(1)], folder, max_bytes=PLENTY)
    assert not hidden(folder)


def test_a_living_writer_is_not_swept_up(make_clip, tmp_path: Path) -> None:
    def samples() -> Iterator[ClipSample]:
        yield make_clip(0)
        write_shards([make_clip(1)], tmp_path, max_bytes=PLENTY)
        rebuild_index(tmp_path)
        assert len(hidden(tmp_path)) == 1
        yield make_clip(2)

    write_shards(samples(), tmp_path, max_bytes=PLENTY)
    assert set(ShardReader(tmp_path).clips) == {make_clip(seed).clip_id for seed in range(3)}


def test_writers_take_turns(make_clip, tmp_path: Path) -> None:
    clips = [make_clip(seed, frames=2) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda clip: write_shards([clip], tmp_path, max_bytes=PLENTY), clips))
    assert set(ShardReader(tmp_path).clips) == {clip.clip_id for clip in clips}
    verify(tmp_path)


def test_removal_leaves_no_trace_and_touches_nothing_else(make_clip, tmp_path: Path) -> None:
    gone = make_clip(1, provenance={"teacher": "only of the removed"})
    write_shards([make_clip(0), gone, make_clip(2, frames=190)], tmp_path, max_bytes=PLENTY)
    (other,) = write_shards([make_clip(3)], tmp_path, max_bytes=PLENTY)
    kept = {seed: ShardReader(tmp_path).frames(make_clip(seed).clip_id).depth_m for seed in (0, 2, 3)}

    assert remove_clips(tmp_path, [gone.clip_id, "f" * 16]) == {gone.clip_id}

    for path in filter(Path.is_file, tmp_path.rglob("*")):
        data = path.read_bytes()
        for trace in (gone.clip_id.encode(), b"only of the removed", *gone.frames.jpeg):
            assert trace not in data
    assert gone.clip_id not in pq.read_table(tmp_path / VERSIONS)["clip_id"].to_pylist()
    assert len(shard_paths(tmp_path)) == 2 and other in verify(tmp_path)
    reader = ShardReader(tmp_path)
    assert set(reader.clips) == {make_clip(seed).clip_id for seed in kept}
    assert all(np.array_equal(reader.frames(make_clip(seed).clip_id).depth_m, kept[seed]) for seed in kept)
    assert remove_clips(tmp_path, [gone.clip_id]) == frozenset()


def test_removing_the_last_clip_removes_the_file(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    remove_clips(tmp_path, [make_clip(0).clip_id])
    assert not shard_paths(tmp_path)
    assert not ShardReader(tmp_path).clips


@pytest.mark.parametrize("step", ["publish_shard", "create", "delete", "publish"])
def test_a_removal_cut_short_is_finished_by_calling_it_again(
    make_clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    write_shards([make_clip(0), make_clip(1)], tmp_path, max_bytes=PLENTY)
    with monkeypatch.context() as patch:
        patch.setattr(index.ShardFolder, step, crash)
        with pytest.raises(KeyboardInterrupt):
            remove_clips(tmp_path, [make_clip(0).clip_id])
    assert make_clip(1).clip_id in ShardReader(tmp_path).clips, "a reader finds a whole folder at any moment"
    remove_clips(tmp_path, [make_clip(0).clip_id])
    assert set(ShardReader(tmp_path).clips) == clips_in(tmp_path) == {make_clip(1).clip_id}
    assert len(shard_paths(tmp_path)) == 1
    verify(tmp_path)


def test_a_damaged_index_only_costs_time(make_clip, tmp_path: Path) -> None:
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    newest = max((tmp_path / VERSIONS).iterdir())
    (tmp_path / INDEX_NAME).write_bytes(b"not Parquet")
    assert len(ShardReader(tmp_path).clips) == 1, "index.parquet is only a copy"
    with pytest.raises(ShardError, match="is not the newest index; rebuild the index"):
        verify(tmp_path)
    newest.write_bytes(b"neither")
    with pytest.raises(ShardError, match="rebuild the index"):
        ShardReader(tmp_path)
    write_shards([make_clip(1)], tmp_path, max_bytes=PLENTY)
    assert len(ShardReader(tmp_path).clips) == 2
    verify(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="is not a folder of shards"):
        remove_clips(tmp_path / "nowhere", ["f" * 16])


def test_further_columns_and_a_filled_mask_go_through_removal_too(make_clip, tmp_path: Path) -> None:
    import pyarrow as pa

    from curation.shards.codec import pack_mask

    tables = []
    mask = np.random.default_rng(0).random((5, 42, 56)) < 0.5
    for seed in range(2):
        table = encode_clip(make_clip(seed))
        at = table.schema.get_field_index("human_mask")
        table = table.set_column(at, table.schema.field(at), pa.array([pack_mask(frame) for frame in mask]))
        pose = pa.array(np.full((5, 72), seed).tolist(), pa.list_(pa.float32(), 72))
        tables.append(table.append_column("smpl_pose", pose))
    write_tables(tables, tmp_path, max_bytes=PLENTY)
    remove_clips(tmp_path, [make_clip(0).clip_id])
    reader = ShardReader(tmp_path)
    assert np.array_equal(reader.frames(make_clip(1).clip_id).human_mask, mask)
    assert reader.table(make_clip(1).clip_id)["smpl_pose"][4].as_py() == [1.0] * 72
    verify(tmp_path)
    with pytest.raises(ShardError, match="no column jpeg"):
        write_tables([tables[0].drop_columns("jpeg")], tmp_path, max_bytes=PLENTY)


@given(data=st.data())
@hypothesis_settings(max_examples=6, deadline=None, derandomize=True)
def test_a_shard_written_anew_without_some_clips_has_the_bytes_of_one_written_without_them(
    make_clip, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    import pyarrow as pa

    tmp_path = tmp_path_factory.mktemp("same")
    lengths = data.draw(st.permutations([1, 2, 181]))  # the last one in two row groups
    teachers = data.draw(st.lists(st.sampled_from("ab"), min_size=3, max_size=3))
    poses = data.draw(st.sampled_from([None, pa.list_(pa.float32()), pa.list_(pa.list_(pa.float32(), 2), 3)]))
    tables = []
    for seed, (frames, teacher) in enumerate(zip(lengths, teachers, strict=True)):
        changes = {} if data.draw(st.booleans()) else {"depth": None, "split": None}
        table = encode_clip(make_clip(seed, frames=frames, provenance={"teacher": teacher}, **changes))
        if poses is not None:
            column = pa.field("pose", poses, metadata={"unit": "rad", "doc": "Of another tool."})
            table = table.append_column(column, pa.array([None] * frames, poses))
        tables.append(table)
    keep = data.draw(st.sets(st.sampled_from(range(len(tables))), min_size=1))
    ids = [table["clip_id"][0].as_py() for table in tables]
    write_tables(tables, tmp_path / "a", max_bytes=PLENTY)
    remove_clips(tmp_path / "a", [clip_id for number, clip_id in enumerate(ids) if number not in keep])
    write_tables([tables[number] for number in sorted(keep)], tmp_path / "b", max_bytes=PLENTY)
    anew, afresh = ({path.name: path.read_bytes() for path in shard_paths(tmp_path / name)} for name in "ab")
    assert anew == afresh


def test_a_mistyped_folder_is_not_made_an_empty_data_set(make_clip, tmp_path: Path) -> None:
    for change in (rebuild_index, lambda folder: remove_clips(folder, ["f" * 16])):
        with pytest.raises(ShardError, match="has no shard and no index; check the path"):
            change(tmp_path)
    assert not list(tmp_path.iterdir())
    write_shards([make_clip(0)], tmp_path, max_bytes=PLENTY)
    remove_clips(tmp_path, [make_clip(0).clip_id])
    rebuild_index(tmp_path)
    assert verify(tmp_path) == (), "a data set of no clips has an index"
