"""Gone is gone: a byte scan of the run's folder after clips were forgotten, at rest and while stages are at them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from curation import pipeline
from curation.catalog import Catalog, forgotten_clip_digest
from curation.failures import FailureCode, UsageError
from curation.last_resort import keep_text
from curation.records import ClipRef, ClipSample, Frames
from curation.run import stages
from curation.run.batches import read_batches
from curation.run.context import RunContext, context_of
from curation.run.dataset import shard_folder
from curation.run.derived import REGISTRY, Derived, register, registered
from curation.run.files import frames_name, observation_name
from curation.run.forget import remove_forgotten
from curation.settings import Settings
from curation.shards import writer
from curation.shards.codec import encode_jpeg
from curation.shards.index import Index, ShardFolder
from curation.shards.reader import ShardReader
from curation.shards.remote import RemoteShardFolder, add_shards
from curation.shards.schema import ShardError
from curation.shards.verify import verify
from curation.shards.writer import drop_clips, remove_clips, write_shards

GONE, KEPT = ClipRef("local", "bars.mp4"), ClipRef("local", "set.mp4", 0, 1_500_000)


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return pipeline.preflight(settings.model_copy(update={"debug_file": tmp_path / "debug.txt"}))


@pytest.fixture
def state(settings: Settings) -> RunContext:
    return context_of(settings)


def traces(root: Path, ref: ClipRef, pictures: list[bytes]) -> list[str]:
    """The files below a folder that hold a clip's id, its video's key or name, or one of these pictures."""
    words = [ref.clip_id.encode(), ref.video_key.encode(), ref.video_id.encode(), *pictures]
    found = []
    for path in filter(Path.is_file, root.rglob("*")):
        data = path.read_bytes().replace(forgotten_clip_digest(ref.clip_id).encode(), b"")
        if data[:4] == data[-4:] == b"PAR1":  # what is compressed in there, too
            table = pq.read_table(path)
            data += b"".join(str(column.to_pylist()).encode() for column in table.columns)
        # the video's key is how the digest of the video begins, and that is kept on purpose
        data = re.sub(re.escape(ref.video_key.encode()) + rb"[0-9a-f]{48}", b"", data)
        if any(word in data for word in words) or any(word.decode() in str(path) for word in words[:3]):
            found.append(str(path.relative_to(root)))
    return sorted(found)


def test_nothing_of_a_forgotten_clip_stays(settings: Settings, state: RunContext) -> None:
    funnel = pipeline.run(settings, [GONE, KEPT])
    folder = Path(funnel.folder)
    reader = ShardReader(folder)
    pictures = reader.table(GONE.clip_id)["jpeg"].to_pylist()
    # what a run can leave behind: kept frames, a copy that was not finished, a partial download, a damaged shard,
    # shards that were not sent, what an error said
    out = settings.out
    for name in (frames_name(GONE), f"frames/.{GONE.clip_id}.x7.parquet"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(pictures[0])
    parts = out / "videos" / ".parts" / GONE.video_key / "work"
    parts.mkdir(parents=True)
    (parts / "film.part").write_bytes(pictures[1])
    (folder / "shard-0.parquet.damaged").write_bytes(pictures[2])
    unfinished = out / "staging" / "0123456789abcdef"
    unfinished.mkdir(parents=True)
    for place in (folder, unfinished):
        (place / ".staged.killed.parquet").write_bytes(pictures[3])
    keep_text(settings.debug_file, [GONE], "observe", ValueError(GONE.video_id))
    keep_text(settings.debug_file, [KEPT], "observe", ValueError("of another clip"))
    window = reader.frames(KEPT.clip_id).rgb

    assert len(traces(out.parent, GONE, pictures)) > 10
    Catalog(settings.database).forget([GONE])
    remove_forgotten(state)

    assert traces(out.parent, GONE, pictures) == []
    verify(folder)
    assert (ShardReader(folder).frames(KEPT.clip_id).rgb == window).all()
    assert "of another clip" in settings.debug_file.read_text()
    assert pipeline.run(settings, [GONE, KEPT]).failed_by_code == {"forgotten": 1}
    assert traces(out.parent, GONE, pictures) == []


def test_every_folder_of_a_run_is_on_the_list(settings: Settings) -> None:
    pipeline.run(settings, [GONE, KEPT])
    kinds = registered(settings.out)
    assert {kind.kind for kind in kinds} == {
        "videos", "unfinished videos", "observations", "frames", "shards", "unfinished shards", "debug"
    }  # fmt: skip
    starts = tuple(kind.place.partition("{")[0].rstrip("*") for kind in kinds)
    own = {"catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", REGISTRY}
    found = {path.relative_to(settings.out).as_posix() for path in settings.out.rglob("*") if path.is_file()}
    assert [name for name in sorted(found - own) if not name.startswith((*starts, ".claims/"))] == []


def forget_during(monkeypatch: pytest.MonkeyPatch, settings: Settings, name: str) -> None:
    """Forget GONE when the pipeline next gets something from its function of this name, before it does more with it."""
    real = getattr(stages, name)

    def forgetting(*arguments):
        made = real(*arguments)
        if isinstance(made, Iterator):
            return after_each(made)
        Catalog(settings.database).forget([GONE])
        return made

    def after_each(results):
        for result in results:
            Catalog(settings.database).forget([GONE])
            yield result

    monkeypatch.setattr(stages, name, forgetting)


@pytest.mark.parametrize(
    ("stage", "step"), [("download", "_make_room"), ("observe", "run_all"), ("teach", "build_clip_sample")]
)
def test_what_is_forgotten_while_a_stage_is_at_it_leaves_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, stage: str, step: str
) -> None:
    (batch,) = read_batches([GONE, KEPT], settings)
    works = [stages.download, stages.observe, stages.judge, stages.teach]
    pictures: list[bytes] = []
    for work in works:
        if work.__name__ == "teach":
            frames = settings.out / frames_name(GONE)
            pictures = pq.read_table(frames)["jpeg"].to_pylist() if frames.exists() else []
        with monkeypatch.context() as patch:
            if work.__name__ == stage:
                forget_during(patch, settings, step)
            report = work(settings, batch)
        if work.__name__ == stage:
            assert report.failed == {"forgotten": 1} and report.done == 1
    remaining = traces(settings.out, GONE, pictures)
    if stage == "download":
        assert remaining == []
    else:  # the measurements and the video of before are for the command that forgets
        assert not [name for name in remaining if name.startswith(("frames/", "shards/", "observations/"))]
        remove_forgotten(context_of(settings))
        assert traces(settings.out, GONE, pictures) == []
    assert pipeline.funnel(settings, [GONE, KEPT]).sharded == 1


def test_what_a_dead_process_left_goes_with_the_next_run(settings: Settings, state: RunContext) -> None:
    Catalog(settings.database).forget([GONE])
    left = settings.out / observation_name(GONE)
    left.parent.mkdir(parents=True)
    pq.write_table(pa.table({"clip_id": [GONE.clip_id]}), left)
    (batch,) = read_batches([GONE, KEPT], settings)
    assert stages.download(settings, batch).failed == {FailureCode.FORGOTTEN.value: 1}
    assert not left.exists()


def test_a_list_cut_short_by_a_crash_is_still_a_list(tmp_path: Path) -> None:
    kinds = [Derived("frames", "frames/{clip_id}", "clip_id"), Derived("shards", "shards/a", "index")]
    for kind in kinds * 2:
        register(tmp_path, kind)
    with (tmp_path / REGISTRY).open("a") as stream:
        stream.write('{"kind": "fra')
    assert registered(tmp_path) == kinds
    register(tmp_path, Derived("debug", "/somewhere/debug.txt", "entries"))
    assert registered(tmp_path)[-1].kind == "debug", "the cut line ends before the next one begins"


# --- a data set alone, without the stages that make one

SET = "shards/set"


def bare(out: Path, storage: str | None = None) -> RunContext:
    """A run that knows both clips and has said that it writes a data set, but has no files yet."""
    state = RunContext(Settings(out=out, storage=storage))
    state.catalog.register([GONE, KEPT])
    register(out, Derived("shards", SET, "index"))
    return state


def sample(ref: ClipRef) -> ClipSample:
    """Two frames of noise."""
    noise = np.random.default_rng(int(ref.clip_id, 16))
    jpeg = tuple(encode_jpeg(noise.integers(0, 256, (28, 42, 3), np.uint8)) for _ in range(2))
    nowhere = np.full((2, 4), np.nan, np.float32)
    return ClipSample(ref.clip_id, None, Frames(42, 28, np.arange(2.0), jpeg), nowhere, nowhere[:, 0], None, {})


def test_a_damaged_shard_goes_the_first_time(tmp_path: Path) -> None:
    state = bare(tmp_path / "out")
    (shard,) = write_shards(map(sample, [GONE, KEPT]), state.settings.out / SET, max_bytes=2**30)
    path = state.settings.out / SET / shard.file
    path.write_bytes(path.read_bytes()[:-30])
    state.catalog.forget([GONE])
    remove_forgotten(state)
    assert traces(tmp_path, GONE, list(sample(GONE).frames.jpeg)) == []
    assert not list(path.parent.glob("*.damaged"))


@contextmanager
def kept_at(root: Path, owner: object, name: str) -> Iterator[None]:
    """Whenever this function begins, copy to root/killed what a kill -9 would leave there."""
    real = getattr(owner, name)

    def begins(*arguments):
        for each in ("out", "shared"):
            shutil.copytree(root / each, root / "killed" / each, dirs_exist_ok=True)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, begins)
        yield


def test_what_killed_senders_left_goes_too(tmp_path: Path) -> None:
    out, shared, killed, other = (
        tmp_path / "out",
        tmp_path / "shared",
        tmp_path / "killed",
        ClipRef("local", "count.mp4"),
    )
    state = bare(out, f"file://{shared}")
    register(out, Derived("unfinished shards", "staging/*", "index"))
    shared.mkdir()
    place = shard_folder(state, SET)
    assert isinstance(place, RemoteShardFolder)
    with kept_at(tmp_path, LocalFileSystem, "mv"):
        staging = out / "staging" / "batch"
        add_shards(place, staging, write_shards(map(sample, [GONE, KEPT, other]), staging, max_bytes=2**30))
    with kept_at(tmp_path, writer, "publish"):
        drop_clips(place, [other.clip_id])
    with kept_at(tmp_path, Index, "read"):
        place.index()
    shutil.rmtree(staging)
    left = [path.relative_to(killed) for path in killed.rglob("*") if path.is_file()]
    for name in left:
        if not (tmp_path / name).exists() and (name.parts[0] == "out" or name.name.startswith(".")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (killed / name).replace(tmp_path / name)
    shutil.rmtree(killed)
    here, there = out / SET, shared / SET
    for folder, name in (
        (there, ".shard-*"), (there, ".index.parquet.*"), (there, ".index/.0*"), (here, "shard-*"), (here, ".staged.*"),
        (here, "index.parquet"), (here, ".index/0*"), (out, ".index.*/**/0*.parquet"),
    ):  # fmt: skip
        assert list(folder.glob(name)), name

    state.catalog.forget([GONE])
    remove_forgotten(state)
    assert traces(tmp_path, GONE, list(sample(GONE).frames.jpeg)) == []
    assert [path for path in there.rglob(".*") if path.name != ".index"] == []
    assert [clip.clip_id for shard in verify(there) for clip in shard.clips] == [KEPT.clip_id]


def test_who_lives_sends_and_reads_again_what_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = bare(tmp_path / "out", f"file://{tmp_path / 'shared'}")
    place, staging = shard_folder(state, SET), tmp_path / "staging"
    assert isinstance(place, RemoteShardFolder)
    real = LocalFileSystem.mv

    def forgotten_meanwhile(*arguments):
        monkeypatch.setattr(LocalFileSystem, "mv", real)
        state.catalog.forget([GONE])
        remove_forgotten(state)
        return real(*arguments)

    monkeypatch.setattr(LocalFileSystem, "mv", forgotten_meanwhile)
    entries = write_shards(map(sample, [GONE, KEPT]), staging, max_bytes=2**30)
    add_shards(place, staging, entries, state.catalog.forgotten_clips)
    shutil.rmtree(staging)
    assert traces(tmp_path, GONE, list(sample(GONE).frames.jpeg)) == []
    for owner, name in ((Index, "read"), (Path, "read_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, after_a_sweep(state, getattr(owner, name)))
            place.published()
            assert place.index().table["clip_id"].to_pylist() == [KEPT.clip_id]


def after_a_sweep(state: RunContext, real: Callable[..., Any]) -> Callable[..., Any]:
    """This function, but the first time only after another process has taken forgotten clips away."""
    swept = []

    def function(*arguments):
        if not swept:
            swept.append(True)
            remove_forgotten(state)
        return real(*arguments)

    return function


def test_an_index_of_before_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that ended when its new version counted, and before it deleted the one of before."""
    state = bare(tmp_path)
    write_shards(map(sample, [GONE, KEPT]), tmp_path / SET, max_bytes=2**30)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardFolder, "delete", delete_no_version)
        remove_clips(tmp_path / SET, [GONE.clip_id])
    assert len(list((tmp_path / SET / ".index").iterdir())) == 2
    state.catalog.forget([GONE])
    remove_forgotten(state)
    assert traces(tmp_path, GONE, []) == []


def delete_no_version(place: ShardFolder, names: Iterable[str]) -> None:
    for name in names:
        if name.startswith(".index"):
            raise KeyboardInterrupt
        (place.folder / name).unlink()


def test_entries_of_a_debug_file_need_no_ids(tmp_path: Path) -> None:
    state, debug = bare(tmp_path / "out"), tmp_path / "debug.txt"
    register(state.settings.out, Derived("debug", str(debug), "entries"))
    unknown = ClipRef(GONE.platform, GONE.video_id, 0, 1_000_000)  # of the same video, and never registered
    for ref in (GONE, KEPT, unknown):
        keep_text(debug, [ref], "observe", ValueError(f"about {ref.video_id}"))
    keep_text(debug, [], "teach", ValueError("about no clip"))
    state.catalog.forget([GONE])
    remove_forgotten(state)
    assert traces(tmp_path, GONE, [unknown.clip_id.encode()]) == []
    assert debug.read_text().count("ValueError") == 2


@pytest.mark.parametrize("rotten", [False, True])
def test_a_kind_that_cannot_be_done_keeps_no_other(tmp_path: Path, rotten: bool) -> None:
    state, debug = bare(tmp_path / "out"), tmp_path / "debug.txt"
    out = state.settings.out
    register(out, Derived("debug", str(debug), "entries"))
    register(out, Derived("unfinished shards", "staging/*", "index"))
    register(out, Derived("frames", "frames/{clip_id}", "clip_id"))
    keep_text(debug, [GONE], "observe", ValueError())
    debug.chmod(0o644)
    for folder in (SET, "staging/a", "staging/b", "staging/c"):
        (shard,) = write_shards(map(sample, [GONE, KEPT]), out / folder, max_bytes=2**30)
    bad = out / "staging" / "b" / shard.file
    if rotten:
        data = bad.read_bytes()
        bad.write_bytes(bytes(len(data) // 2) + data[len(data) // 2 :])
    else:
        pq.write_table(pa.table({"clip_id": [KEPT.clip_id]}), bad)
    (out / frames_name(GONE)).parent.mkdir()
    (out / frames_name(GONE)).write_bytes(b"frames")
    state.catalog.forget([GONE])
    with pytest.raises(UsageError, match="debug file"):
        remove_forgotten(state)
    assert {name.rpartition("/")[0] for name in traces(tmp_path, GONE, [])} <= {
        "",
        "out/staging/b",
        "out/staging/b/.index",
    }
    debug.chmod(0o600)
    with pytest.raises(ShardError, match=shard.file):
        remove_forgotten(state)
    bad.unlink()
    remove_forgotten(state)
    assert traces(tmp_path, GONE, list(sample(GONE).frames.jpeg)) == []
