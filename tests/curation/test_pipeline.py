"""Whole runs on small real clips: every stage, again, after changes, and after being killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from curation import pipeline
from curation.catalog import Catalog, Funnel
from curation.failures import FailureCode, LostError, UsageError
from curation.files import sha256_file
from curation.manifest import write_manifest
from curation.observe.frames import sample_frames, write_frames
from curation.observe.sampling import SAMPLER
from curation.records import ClipRef, Verdict
from curation.run import stages
from curation.run.batches import read_batches
from curation.run.context import context_of
from curation.run.files import FOLDERS, frames_name
from curation.run.todo import clips_before, finished
from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings
from curation.shards.codec import decode_jpeg
from curation.shards.reader import ShardReader
from curation.shards.remote import pull
from curation.shards.verify import verify
from curation.video.ffmpeg import ffmpeg_exe
from curation.video.hdr import OPERATOR
from tests.support.servers import Fault, serve


def local(name: str, start_s: float | None = None, end_s: float | None = None) -> ClipRef:
    def micro(value: float | None) -> int | None:
        return None if value is None else round(value * 1e6)

    return ClipRef("local", f"{name}.mp4", micro(start_s), micro(end_s))


REFS = [
    local("bars"),
    local("broken"),
    local("cut"),
    local("set", 0.0, 1.5),
    local("set", 5.0, 6.0),
    local("count"),
    local("nowhere"),
]


def shard_bytes(funnel: Funnel) -> dict[str, str]:
    return {name: sha256_file(Path(funnel.folder) / name) for name in funnel.shards}


def test_a_run_gives_verdicts_typed_failures_and_shards(settings: Settings):
    seen: list[tuple[str, int, int]] = []
    funnel = pipeline.run(settings.model_copy(update={"workers": 2}), REFS, lambda *state: seen.append(state))
    assert (funnel.clips, funnel.observed, funnel.accepted, funnel.sharded) == (7, 4, 3, 3)
    assert funnel.rejected_by == {"shot": 1}
    assert funnel.failed_by_code == {"corrupt": 1, "span_out_of_range": 1, "removed": 1}
    assert max(done for stage, done, _ in seen if stage == "teach") == 7
    verify(Path(funnel.folder))
    reader = ShardReader(Path(funnel.folder))
    window = reader.frames(local("set", 0.0, 1.5).clip_id)
    np.testing.assert_allclose(window.times_s, np.arange(9) / 6, atol=1e-6)
    assert window.rgb.shape == (9, 126, 70, 3) and window.depth_m is None
    assert window.provenance["observe"]["hdr"] == OPERATOR
    assert not list((settings.out / "frames").glob("*")), "frames are kept only until the shard is written"


def test_the_second_run_does_only_what_is_missing(settings: Settings):
    first = pipeline.run(settings, REFS[:4])
    catalog = Catalog(settings.database)
    tries = {ref.clip_id: catalog.clip(ref.clip_id).attempts for ref in REFS[:4]}
    before = {
        path: path.stat().st_mtime_ns for path in settings.out.rglob("[!0]*.parquet") if path.name != "index.parquet"
    }
    again = pipeline.run(settings, REFS)
    assert {ref.clip_id: catalog.clip(ref.clip_id).attempts for ref in REFS[:4]} == tries
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert set(first.shards) < set(again.shards) and again.sharded == 3


def test_a_permanent_failure_is_tried_again_only_on_request(settings: Settings, clips: Path, tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "bars.mp4").write_bytes(b"half a video")
    settings = settings.model_copy(update={"download": DownloadSettings(local_root=root)})
    refs = [local("bars")]
    assert pipeline.run(settings, refs).failed_by_code == {"corrupt": 1}
    shutil.copy(clips / "bars.mp4", root)
    assert pipeline.run(settings, refs).failed_by_code == {"corrupt": 1}
    funnel = pipeline.run(settings.model_copy(update={"retry": ("corrupt",)}), refs)
    assert funnel.failed_by_code == {} and funnel.sharded == 1


def test_judging_again_needs_no_video(settings: Settings, tolerant: Path, tmp_path: Path):
    funnel = pipeline.run(settings, REFS)
    (settings.out / "videos").rename(tmp_path / "videos-moved-away")
    values = yaml.safe_load(tolerant.read_text())
    values["shot"] |= {"edits": [], "cut_gap": 2.0, "fade_s": 100, "dissolve": 1.0}
    blind = tmp_path / "blind.yaml"
    blind.write_text(yaml.safe_dump(values))
    changed = settings.model_copy(update={"policy": blind})
    assert stages.judge_all(changed) == 4
    assert stages.judge_all(changed) == 0
    counts = pipeline.funnel(pipeline.preflight(changed), REFS)
    assert (funnel.accepted, counts.accepted, counts.rejected) == (3, 4, 0)


def test_frames_decoded_later_are_the_same_bytes(settings: Settings):
    """A clip whose kept frames are gone is decoded again by random access: the shard is the same."""
    ready = pipeline.preflight(settings)
    once = pipeline.run(settings, REFS[:1])
    first = shard_bytes(once)
    shutil.rmtree(Path(once.folder))
    (batch,) = read_batches(REFS[:1], ready)
    assert stages.download(ready, batch).done == 0
    assert stages.teach(ready, batch).done == 1
    assert shard_bytes(pipeline.funnel(ready, REFS[:1])) == first


def test_a_worker_whose_batch_was_taken_over_writes_nothing_more(settings: Settings):
    ready = pipeline.preflight(settings)
    (batch,) = read_batches(REFS[:1], ready)
    catalog = Catalog(ready.database)

    def lost() -> None:
        raise LostError("taken over")

    stages.download(ready, batch)
    with pytest.raises(LostError):
        stages.observe(ready, batch, None, lost)
    assert catalog.observations(batch.refs) == {}
    stages.observe(ready, batch)
    stages.judge(ready, batch)
    with pytest.raises(LostError):
        stages.teach(ready, batch, None, lost)
    assert catalog.clip(REFS[0].clip_id).outputs == () and not list(ready.out.rglob("shard-*.parquet"))
    assert pipeline.run(settings, REFS[:1]).sharded == 1


def test_a_batch_that_is_lost_is_left_to_its_new_owner_and_taken_when_that_one_is_gone(settings: Settings, monkeypatch):
    whole, stolen = stages.observe, []

    def observe(settings_: Settings, batch, *rest):
        if not stolen:
            catalog = Catalog(settings_.database)
            catalog.release(catalog.leases()[0].owner)
            stolen.append(catalog.claim([batch.batch_id], "another", 2.0))
        return whole(settings_, batch, *rest)

    monkeypatch.setattr(stages, "observe", observe)
    # a heartbeat is overdue after half of this, as it is when a stopped worker wakes
    funnel = pipeline.run(settings.model_copy(update={"lease_s": 0.1}), REFS[:1])
    assert stolen and funnel.sharded == 1


def test_frames_kept_by_a_run_with_other_settings_are_not_taken(settings: Settings):
    """The clip was sampled anew, but not accepted, so what an earlier run had kept of it stayed."""
    ready = pipeline.preflight(settings)
    once = pipeline.run(settings, REFS[:1])
    first = shard_bytes(once)
    frames = sample_frames(REFS[0], next((ready.out / "videos").rglob("video.*")), ready.observe)
    write_frames(replace(frames, times_s=frames.times_s + 1 / 30), ready.out / frames_name(REFS[0]))
    shutil.rmtree(Path(once.folder))
    (batch,) = read_batches(REFS[:1], ready)
    assert stages.teach(ready, batch).done == 1
    assert shard_bytes(pipeline.funnel(ready, REFS[:1])) == first


def test_a_clip_over_a_blurred_copy_of_itself_trains_with_the_inner_picture_alone(settings: Settings, tmp_path: Path):
    """Also where an earlier run under another policy had kept frames of the whole picture, and its video is gone."""
    made = tmp_path / "made"
    made.mkdir()

    def make(name: str, *source: str | Path) -> Path:
        fine = ["-c:v", "libx264", "-preset", "ultrafast", "-qp", "4"]
        subprocess.run([ffmpeg_exe(), "-v", "error", *source, *fine, made / name], check=True)
        return made / name

    pattern = "testsrc2=s=640x360:r=12,crop=384:360:200:0,format=yuv420p"
    inner = make("inner.mp4", "-f", "lavfi", "-i", pattern, "-t", "2")
    graph = "split[a][b];[a]scale=640:600,crop=640:360,gblur=sigma=12[back];[back][b]overlay=128:0"
    make("reposted.mp4", "-i", inner, "-filter_complex", graph)
    refs, runs = [local("reposted")], {}
    for copies in ("keep", "crop"):
        policy = tmp_path / f"{copies}.yaml"
        values = yaml.safe_load(settings.policy.read_text())
        values["border"]["copies"] = copies
        policy.write_text(yaml.safe_dump(values))
        changes = {"policy": policy, "download": DownloadSettings(local_root=made)}
        runs[copies] = settings.model_copy(update=changes)

    ready = pipeline.preflight(runs["keep"])
    (batch,) = read_batches(refs, ready)
    stages.download(ready, batch)
    stages.observe(ready, batch)
    assert (ready.out / frames_name(refs[0])).exists()
    shutil.rmtree(ready.out / "videos")
    assert stages.judge_all(runs["crop"]) == 1
    funnel = pipeline.run(runs["crop"], refs)
    assert funnel.sharded == 1 and funnel.folder != pipeline.funnel(ready, refs).folder
    assert not list((ready.out / "frames").glob("*"))

    verify(Path(funnel.folder))
    window = ShardReader(Path(funnel.folder)).frames(refs[0].clip_id)
    x1, y1, x2, y2 = np.array(window.provenance["crop"]) * [640, 360, 640, 360]
    assert (y1, y2) == (0, 360) and 128 < x1 <= 134 and 506 <= x2 < 512 and {x1 % 1, x2 % 1} == {0}
    height, width = window.rgb.shape[1:3]
    assert (height, width) == (126, 126) and window.stretch == pytest.approx(360 / (x2 - x1))
    alone = make("alone.mp4", "-i", inner, "-vf", f"format=gbrp,crop={x2 - x1}:360:{x1 - 128}:0,format=yuv444p")
    expected = [decode_jpeg(jpeg) for jpeg in sample_frames(local("alone"), alone, ready.observe).jpeg]
    difference = np.abs(window.rgb.astype(int) - expected).mean((0, 3))
    assert difference.mean() < 2
    for outermost in (difference[0], difference[-1], difference[:, 0], difference[:, -1]):
        assert outermost.mean() < 2
    np.testing.assert_allclose(window.boxes, [[0, 0, width, height]] * 12)  # what this detector sees is all of it


def test_what_another_sampler_measured_is_measured_anew_and_never_mixed(settings: Settings, monkeypatch):
    funnel = pipeline.run(settings, REFS[:1])
    window = ShardReader(Path(funnel.folder)).frames(REFS[0].clip_id)
    assert window.provenance["observe"]["sampler"] == SAMPLER
    monkeypatch.setattr("curation.run.context.SAMPLER", "newer/1")
    ready = pipeline.preflight(settings)
    (batch,) = read_batches(REFS[:1], ready)
    context = context_of(ready)
    assert [clip.step for clip in clips_before(context, batch.refs, "observe")] == ["observe"]
    assert not finished(context, batch.refs)
    steps = [clip.step for clip in clips_before(context, batch.refs, "teach")]
    assert steps == ["observe"], "the old samples would go under the new name"


def test_a_file_that_a_crash_left_ahead_of_its_row_is_measured_again(settings: Settings):
    pipeline.run(settings, REFS[:1])
    ready = pipeline.preflight(settings)
    context, (batch,) = context_of(ready), read_batches(REFS[:1], ready)
    file = context.catalog.observations(REFS[:1])[REFS[0].clip_id]
    context.catalog.record_observations([replace(file, kind="keyframes")])  # the file is full: its row was not written
    undecided = Verdict(file.clip_id, context.policy.name, context.policy.hash, "unknown", ())
    context.catalog.record_verdicts([undecided], {file.clip_id: file.sha256})
    assert not finished(context, batch.refs)
    assert [clip.step for clip in clips_before(context, batch.refs, "observe")] == ["observe"]


def test_a_depth_folder_is_another_teacher_in_a_data_set_of_its_own(settings: Settings, tmp_path: Path):
    plain = pipeline.run(settings, REFS[:1])
    frames = ShardReader(Path(plain.folder)).frames(REFS[0].clip_id)
    depths = tmp_path / "depths"
    depths.mkdir()
    shape = frames.rgb.shape[:3]
    depth = np.linspace(1, 9, num=int(np.prod(shape)), dtype=np.float32).reshape(shape)
    camera = np.broadcast_to(np.array([[100, 0, 63], [0, 100, 35], [0, 0, 1]], np.float32), (shape[0], 3, 3))
    np.savez(depths / f"{REFS[0].clip_id}.npz", depth=depth, intrinsics=camera)
    taught = settings.model_copy(update={"teacher": TeacherSettings(kind="folder", model=str(depths), name="megasam")})
    funnel = pipeline.run(taught, REFS[:1])
    assert funnel.folder != plain.folder and "megasam" in funnel.folder
    stored = ShardReader(Path(funnel.folder)).frames(REFS[0].clip_id)
    np.testing.assert_allclose(stored.depth_m, depth, rtol=5e-4)
    missing = pipeline.run(taught, REFS[:3])
    assert missing.failed_by_code["corrupt"] == 1 and missing.sharded == 1
    missing = pipeline.run(taught, [local("count")])
    assert missing.failed_by_code == {"missing_depth": 1}


def test_a_forgotten_clip_stays_out(settings: Settings):
    pipeline.run(settings, REFS[:1])
    Catalog(settings.database).forget([REFS[0]])
    funnel = pipeline.run(settings, REFS[:1])
    assert funnel.failed_by_code == {"forgotten": 1} and funnel.sharded == 0


def test_batches_keep_videos_together_and_do_not_depend_on_what_follows(settings: Settings):
    refs = [local("a", n, n + 1) for n in range(3)] + [local("b"), local("c", 0, 1), local("d"), local("c", 1, 2)]
    batches = read_batches(refs, settings)
    assert [len(batch.refs) for batch in batches] == [4, 3]
    assert {ref.video_id for ref in batches[1].refs} == {"c.mp4", "d.mp4"}
    assert read_batches([*refs, local("e")], settings)[0] == batches[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": Path("nothing.yaml")}, "cannot be read"),
        ({"observe": ObserveSettings(detector="nothing.pt")}, "--detector"),
        ({"teacher": TeacherSettings(model="nothing.pt")}, "nothing.pt"),
        ({"download": DownloadSettings(local_root=Path("nowhere"))}, "--local-root"),
        ({"out": Path("/proc/nothing")}, "cannot be written"),
        ({"download": DownloadSettings(cookies=Path("nowhere"))}, "cookies"),
        ({"observe": ObserveSettings(detector="/")}, "are a folder"),
        ({"storage": "nonsense://x"}, "cannot be used"),
    ],
)
def test_a_wrong_set_up_is_one_sentence_before_any_work(settings: Settings, change: dict, said: str):
    with pytest.raises(UsageError, match=said):
        pipeline.run(settings.model_copy(update=change), REFS)
    assert not (settings.out / "videos").exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_in_a_folder_s_place_is_named(settings: Settings, name: str):
    settings.out.mkdir()
    (settings.out / name).touch()
    with pytest.raises(UsageError, match=f"{name} is a file"):
        pipeline.run(settings, REFS)


def test_judging_where_no_measurement_is_says_so(settings: Settings, tmp_path: Path):
    pipeline.run(settings, REFS[:1])
    elsewhere = settings.model_copy(
        update={"out": tmp_path / "x", "catalog_url": settings.database, "policy": Path("paper")}
    )
    with pytest.raises(UsageError, match="give the --out and --storage"):
        stages.judge_all(elsewhere)


def test_a_storage_given_later_takes_over_and_nothing_is_lost(settings: Settings, tmp_path: Path):
    first = pipeline.run(settings, REFS)
    before, shards = set((settings.out / "observations").rglob("*.parquet")), shard_bytes(first)
    shared = settings.model_copy(update={"storage": f"file://{tmp_path / 'shared'}", "policy": Path("paper")})
    stages.judge_all(shared)
    assert set((settings.out / "observations").rglob("*.parquet")) == before
    again = pipeline.run(settings, REFS)
    assert again == first and shard_bytes(again) == shards
    moved = pipeline.run(settings.model_copy(update={"storage": f"file://{tmp_path / 'shared'}"}), REFS)
    assert moved.sharded == first.sharded
    assert {shard.file: shard.sha256 for shard in pull(moved.folder, tmp_path / "pulled")} == shards


@pytest.mark.parametrize("waits_s", [(3.0,), pytest.param((1.5, 3.0, 5.0, 8.0), marks=pytest.mark.slow)])
def test_killed_anywhere_and_run_again_gives_the_same_shards(
    settings: Settings, tmp_path: Path, waits_s: tuple[float, ...]
):
    """kill -9 of the whole run at growing moments; what the last run leaves equals an undisturbed run's."""
    undisturbed = shard_bytes(pipeline.run(settings, REFS))
    manifest = tmp_path / "manifest.csv"
    write_manifest(REFS, manifest)
    out = tmp_path / "killed"
    code = (
        "import sys, pickle; from pathlib import Path; from curation import pipeline; "
        "from curation.manifest import read_manifest; settings, path = pickle.loads(sys.stdin.buffer.read());\n"
        "if __name__ == '__main__': pipeline.run(settings, read_manifest(path))"
    )
    import pickle

    killed = settings.model_copy(update={"out": out})
    script = tmp_path / "run.py"
    script.write_text(code)
    moments = 0
    for wait_s in waits_s:
        process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, start_new_session=True)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((killed, manifest)))
        process.stdin.close()
        try:
            process.wait(timeout=wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # the parent alone: its workers must notice by themselves
            process.wait()
            moments += 1
    assert moments, "the machine is too fast for these moments; make them earlier"
    _wait_until_gone(process.pid)
    funnel = pipeline.run(killed, REFS)
    assert shard_bytes(funnel) == undisturbed
    assert funnel.failed_by_code == {"corrupt": 1, "span_out_of_range": 1, "removed": 1}
    assert not list(out.rglob(".*.parquet")), "no half-written file stays in the data set"


def _wait_until_gone(group: int) -> None:
    """No process of the killed run's group may stay behind."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("workers of a killed run are still there")


def test_every_failure_code_has_advice():
    for code in FailureCode:
        assert code.advice.endswith(".") and isinstance(code.transient, bool)


def test_what_was_damaged_is_made_again(settings: Settings):
    """Cut files of every kind, one after the other: each is noticed and mended by the next run."""
    whole = shard_bytes(pipeline.run(settings, REFS[:1]))
    (observation,) = (settings.out / "observations").rglob("*.parquet")
    (video,) = (settings.out / "videos").rglob("video.*")
    (shard,) = (settings.out / "shards").rglob("shard-*.parquet")
    for path in (observation, shard, video):
        os.truncate(path, path.stat().st_size // 2)
        if path == video:
            observation.unlink()
        funnel = pipeline.run(settings, REFS[:1])
        assert (funnel.sharded, funnel.failed_by_code) == (1, {})
        assert shard_bytes(funnel) == whole
    observation.unlink()
    assert stages.judge_all(settings.model_copy(update={"policy": Path("paper")})) == 0


@pytest.mark.parametrize("older", ["of another HDR operator", "of another version"])
def test_what_an_older_version_measured_is_measured_anew(settings: Settings, older: str):
    pipeline.run(settings, REFS[:1])
    catalog, clip = Catalog(settings.database), REFS[0].clip_id
    file = catalog.observations([clip])[clip]
    made_with = catalog.provenance(file.provenance_hash)
    path = settings.out / file.path
    if older == "of another version":
        del made_with["hdr"]
        table = pq.read_table(path).drop_columns(["transfer"])
        pq.write_table(table.replace_schema_metadata({"unish.observations": "1"}), path)
    else:
        made_with["hdr"] = "an older one"
    old = replace(file, sha256=sha256_file(path), provenance_hash=catalog.put_provenance(made_with))
    catalog.record_observations([old])
    funnel = pipeline.run(settings, REFS[:1])
    assert (funnel.accepted, funnel.sharded, funnel.failed_by_code) == (1, 1, {})
    new = catalog.observations([clip])[clip]
    assert (new.sha256, new.provenance_hash) == (file.sha256, file.provenance_hash)


def test_other_settings_mend_what_they_caused(settings: Settings, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "empty" / "0000000000000000.npz", depth=np.ones((1, 2, 2)))
    nothing = TeacherSettings(kind="folder", model=str(tmp_path / "empty"), name="sam")
    with pytest.raises(UsageError, match="--local-root"):
        pipeline.run(settings.model_copy(update={"download": DownloadSettings()}), REFS[:1])
    assert pipeline.run(settings.model_copy(update={"teacher": nothing}), REFS[:1]).failed_by_code == {
        "missing_depth": 1
    }
    assert pipeline.run(settings, REFS[:1]).sharded == 1


def test_a_changed_policy_file_is_read_again(settings: Settings, tolerant: Path, tmp_path: Path):
    policy = tmp_path / "p.yaml"
    policy.write_text(tolerant.read_text())
    mine = settings.model_copy(update={"policy": policy})
    assert pipeline.run(mine, REFS[:1]).accepted == 1
    policy.write_text(tolerant.read_text().replace("min_duration_s: 1.0", "min_duration_s: 99.0"))
    assert pipeline.run(mine, REFS[:1]).accepted == 0


def test_a_platform_that_says_no_is_left_alone_and_others_go_on(settings: Settings, clips: Path):
    with serve(clips, {"/bars.mp4": Fault(status=429, headers={"Retry-After": "7200"})}) as no, serve(clips) as yes:
        links = [ClipRef("http", no.url("/bars.mp4")), ClipRef("http", no.url("/set.mp4"))]
        links += [ClipRef("http", no.url("/count.mp4")), ClipRef("http", yes.url("/set.mp4"))]
        allowed = DownloadSettings(http_hosts=(no.host, yes.host), allow_loopback=True)
        settings = settings.model_copy(update={"download": allowed, "batch_clips": 2, "patience_s": 0.0})
        funnel = pipeline.run(settings, links)
        assert no.hits == {"/bars.mp4": 1}, "one no is enough"
        assert yes.hits["/set.mp4"] and (funnel.observed, funnel.pending) == (1, 2)
        assert funnel.failed_by_code == {"rate_limited": 1}
        ((platform, left_s),) = funnel.postponed.items()
        assert platform == "http" and 7000 < left_s < 7300
        again = pipeline.run(settings, links)
        assert replace(again, postponed=funnel.postponed) == funnel and again.postponed, "also after a restart"
        assert no.hits == {"/bars.mp4": 1}

        (block,) = Catalog(settings.database).blocks()
        Catalog(settings.database).unblock(block.service, block.session, force=True)  # two hours later
        no.script("/bars.mp4", [])
        funnel = pipeline.run(settings, links)
        assert funnel.observed == 4 and not funnel.postponed and not funnel.pending and not funnel.failed_by_code


def test_a_short_no_is_waited_for_within_the_run(settings: Settings, clips: Path):
    answers = [Fault(status=429, headers={"Retry-After": "1"})] * 4
    with serve(clips, {"/bars.mp4": answers}) as server:
        links = [ClipRef("http", server.url(f"/{name}.mp4")) for name in ("bars", "set")]
        allowed = DownloadSettings(http_hosts=(server.host,), allow_loopback=True, retries=0)
        funnel = pipeline.run(settings.model_copy(update={"download": allowed}), links)
        assert funnel.failed_by_code == {"rate_limited": 1} and funnel.observed == 1 and not funnel.postponed


# over while other clips are measured, and after
@pytest.mark.parametrize("seconds", ["1", pytest.param("6", marks=pytest.mark.slow)])
def test_postponed_clips_are_come_back_to_within_the_run(
    settings: Settings, clips: Path, monkeypatch: pytest.MonkeyPatch, seconds: str
):
    monkeypatch.setattr("curation.download.politeness.NAP_S", -1.0)  # every block postpones
    with serve(clips, {"/bars.mp4": [Fault(status=429, headers={"Retry-After": seconds})]}) as server:
        links = [ClipRef("http", server.url(f"/{name}.mp4")) for name in ("bars", "set", "count")]
        allowed = DownloadSettings(http_hosts=(server.host,), allow_loopback=True, retries=0)
        funnel = pipeline.run(settings.model_copy(update={"download": allowed, "batch_clips": 1}), links)
        assert funnel.failed_by_code == {"rate_limited": 1} and (funnel.observed, funnel.pending) == (2, 0)
        assert server.hits == {"/bars.mp4": 1, "/set.mp4": 1, "/count.mp4": 1}


def test_finished_videos_make_room_and_are_not_fetched_again(settings: Settings, tmp_path: Path):
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(4):
        noise = f"testsrc2=s=640x360:r=12:d=2,noise=alls=40:allf=t:all_seed={number}"
        command = [ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "lavfi", "-i", noise]
        command += ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", str(folder / f"{number}.mp4")]
        subprocess.run(command, check=True)
    size = min(path.stat().st_size for path in folder.iterdir())
    refs = [ClipRef("local", f"{number}.mp4") for number in range(4)]
    budget = DownloadSettings(local_root=folder, budget_mb=size * 2 // 2**20)
    settings = settings.model_copy(update={"download": budget, "batch_clips": 1})
    funnel = pipeline.run(settings, refs)
    assert funnel.sharded == 4 and not funnel.failed_by_code
    kept = sorted(path.parent.name for path in (settings.out / "videos").glob("*/video.*"))
    assert 1 <= len(kept) <= 3 and refs[3].video_key in kept and refs[0].video_key not in kept
    shards = shard_bytes(funnel)
    assert pipeline.run(settings, refs) == funnel and shard_bytes(funnel) == shards
    assert kept == sorted(path.parent.name for path in (settings.out / "videos").glob("*/video.*"))
