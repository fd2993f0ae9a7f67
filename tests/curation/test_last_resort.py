"""One clip never ends a run, whatever happens to it; and what errors say is kept nowhere but in the debug file."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation import pipeline
from curation.catalog import Attempt, Catalog, ObservationFile
from curation.cli import main
from curation.failures import TRIES, ClipFailure, FailureCode, OutageError, UsageError
from curation.files import sha256_file
from curation.last_resort import check_debug_file, failure_of, keep_text, remove_entries
from curation.observe.frames import read_frames, write_frames
from curation.observe.observations import read_observations, write_observations
from curation.records import ClipRef
from curation.run import stages
from curation.run.batches import read_batches
from curation.run.context import context_of
from curation.run.files import frames_name, observation_name
from curation.settings import DownloadSettings, Settings
from tests.curation.test_pipeline import REFS, local, shard_bytes
from tests.support.builders import observations

GOOD, BAD = local("bars"), local("count")


def last_attempt(settings: Settings, ref: ClipRef) -> Attempt:
    return Catalog(settings.database).clip(ref.clip_id).attempts[-1]


# --- each stage


def in_the_way(path: Path) -> None:
    """A folder where a file, or a file where a folder, is to be written."""
    if path.suffix:
        (path / "in the way").mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_an_unexpected_error_costs_one_clip_in_one_stage(settings: Settings, tmp_path: Path):
    debug = tmp_path / "debug.txt"
    bad = {"download": local("cut"), "observe": local("set"), "judge": local("count", 0, 1), "teach": local("count", 1)}
    ready = pipeline.preflight(settings.model_copy(update={"debug_file": debug, "batch_clips": 9}))
    (batch,) = read_batches([*bad.values(), GOOD], ready)
    in_the_way(ready.out / "videos" / bad["download"].video_key)
    assert stages.download(ready, batch).failed == {"internal": 1}
    in_the_way(ready.out / frames_name(bad["observe"]))
    assert stages.observe(ready, batch).failed == {"internal": 1}
    path = ready.out / observation_name(bad["judge"])  # measurements that contradict themselves
    write_observations(replace(read_observations(path), box_sample=np.full(999, 999, np.int32)), path)
    catalog = Catalog(ready.database)
    file = catalog.observations([bad["judge"]])[bad["judge"].clip_id]
    catalog.record_observations([replace(file, sha256=sha256_file(path))])
    assert stages.judge(ready, batch).failed == {"internal": 1}
    frames = read_frames(ready.out / frames_name(bad["teach"]))
    assert frames is not None
    junk = (b"no picture",) * len(frames.jpeg)
    write_frames(replace(frames, jpeg=junk), ready.out / frames_name(bad["teach"]))
    report = stages.teach(ready, batch)
    assert (report.done, report.failed) == (1, {"internal": 1}), "the other clip is done"

    kept = debug.read_text()
    assert stat.S_IMODE(debug.stat().st_mode) == 0o600 and kept.count("Traceback") >= 4
    for stage, ref in bad.items():
        attempt = last_attempt(ready, ref)
        assert (attempt.stage, attempt.code) == (stage, FailureCode.INTERNAL)
        assert attempt.message.startswith("an unexpected error") and "--debug-file" in attempt.message
        assert str(tmp_path) not in attempt.message and ref.video_id not in attempt.message
        assert f'{{"clips": ["{ref.clip_id}"], "video": "{ref.video_key}", "stage": "{stage}"' in kept


def test_a_judgement_that_failed_and_then_succeeds_is_resolved(settings: Settings):
    ready = pipeline.preflight(settings)
    catalog = Catalog(ready.database)
    catalog.register([GOOD])
    path = ready.out / observation_name(GOOD)
    digest = catalog.put_provenance({})
    for good in (False, True):
        value = observations() if good else observations(box_sample=np.full(999, 999, np.int32))
        write_observations(replace(value, clip_id=GOOD.clip_id), path)
        name = observation_name(GOOD)
        catalog.record_observations([ObservationFile(GOOD.clip_id, "full", name, sha256_file(path), digest)])
        assert stages.judge_all(ready) == good
        assert [attempt.stage for attempt in catalog.failures()] == ([] if good else ["judge"])


def test_the_third_internal_error_in_a_row_is_for_good(settings: Settings):
    in_the_way(settings.out / "videos" / BAD.video_key)
    catalog = Catalog(settings.database)
    for number in range(1, TRIES + 2):
        assert pipeline.run(settings, [BAD, GOOD]).failed_by_code == {"internal": 1}
        tries = catalog.clip(BAD.clip_id).attempts
        assert len(tries) == min(number, TRIES) and tries[-1].transient == (number < TRIES)
    again = settings.model_copy(update={"retry": ("internal",)})
    assert pipeline.run(again, [BAD]).failed_by_code == {"internal": 1}
    assert last_attempt(settings, BAD).transient, "the count begins anew"
    (settings.out / "videos" / BAD.video_key).unlink()
    assert pipeline.run(settings, [BAD]).failed_by_code == {}


@pytest.mark.parametrize(
    ("history", "transient"),
    [
        (["internal", "internal"], True),
        (["internal", "internal", "internal"], False),
        (["internal", None, "internal", "internal"], True),
        (["internal", "network", "internal", "internal"], False),
        (["internal", "too_slow", "internal"], True),
        (["internal", "internal", "internal", "internal"], True),
        (["network"] * 5, True),
        (["corrupt"], False),
        (["internal", "internal", "corrupt", "internal"], True),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_only_so_many_of_the_same_in_a_row_count(tmp_path: Path, history: list, transient: bool, together: bool):
    catalog = Catalog(f"sqlite:///{tmp_path}/c.sqlite")
    catalog.register([GOOD])
    tries = [Attempt(GOOD.clip_id, "observe", code and FailureCode(code)) for code in history]
    tries = [each for one in tries for each in (Attempt(GOOD.clip_id, "teach", FailureCode.INTERNAL), one)][-9:]
    for portion in [tries] if together else [[each] for each in tries]:
        catalog.record_attempts(portion)
    (found,) = [attempt for attempt in catalog.failures() if attempt.stage == "observe"]
    assert found.transient == transient


# --- types


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (ValueError("Zq"), "internal", True),
        (subprocess.TimeoutExpired("Zq", 1), "internal", False),
        (OSError(28, "Zq"), "disk_full", False),
        (OSError(122, "Zq"), "disk_full", False),
        (pa.ArrowInvalid("Zq Detail: [errno 28] No space left on device"), "disk_full", False),
        (RuntimeError("PytorchStreamWriter failed Zq: No space left on device"), "disk_full", False),
        (MemoryError("Zq"), "out_of_memory", False),
        (PermissionError(13, "Zq"), "internal", True),
        (SystemExit("Zq"), "internal", True),
        (ClipFailure(FailureCode.CORRUPT, "words of ours"), "corrupt", False),
    ],
)
def test_any_exception_has_a_type_and_fixed_words(error: BaseException, code: str, named: bool):
    failure = failure_of(error)
    assert failure.code.value == code and "Zq" not in failure.message
    assert (type(error).__name__ in failure.message) == named
    outer = RuntimeError("outer")
    outer.__cause__ = error
    assert failure_of(outer).code.value in (code, "internal")
    if code in ("disk_full", "out_of_memory"):
        assert failure_of(outer).code.value == code


# --- the debug file


def test_entries_of_a_clip_can_be_removed(tmp_path: Path):
    path = tmp_path / "debug.txt"
    assert remove_entries(path, {GOOD.clip_id}.intersection) == 0 and not path.exists()
    for refs in ([GOOD], [BAD], [GOOD, BAD], [local("set")]):
        try:
            raise ValueError(f'about {refs[0].video_id}\n{{"clips": []}}\r\n\x85é\ud800')
        except ValueError as error:
            keep_text(path, refs, "observe", error)
    assert path.read_text().count("Traceback") == 4
    assert remove_entries(path, {GOOD.clip_id}.intersection) == 2
    kept = path.read_text()
    assert GOOD.clip_id not in kept and GOOD.video_id not in kept and kept.count("Traceback") == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [path]
    keep_text(path, [GOOD], "teach", ValueError("more"))
    assert remove_entries(path, {"0" * 16}.intersection) == 0 and path.read_text().startswith(kept)


@pytest.fixture
def full_after() -> Iterator[Callable[[Path, int], None]]:
    """Let this process write no file beyond the present size of this one and so many bytes."""
    before, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda path, more: resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, action)


@pytest.mark.parametrize("written", [5, 20, 130])  # before the first id, within it, and within the text
def test_an_entry_cut_short_by_a_full_disk_hides_no_other(
    tmp_path: Path, full_after: Callable[[Path, int], None], written: int
):
    path = tmp_path / "debug.txt"
    keep_text(path, [local("set")], "observe", ValueError("of another clip"))
    before = path.read_bytes()
    with pytest.raises(OSError, match="too large"):
        full_after(path, written)
        keep_text(path, [BAD], "observe", ValueError("secret title"))
    assert path.stat().st_size == len(before) + written
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    keep_text(path, [GOOD], "observe", ValueError("secret title"))
    assert remove_entries(path, {GOOD.clip_id, BAD.clip_id}.intersection) == (1 if written == 5 else 2)
    rest = path.read_bytes()
    assert rest.startswith(before) and b"secret" not in rest and BAD.clip_id[:5].encode() not in rest


def test_a_killed_removal_leaves_nothing_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, killed = tmp_path / "debug.txt", tmp_path / "killed"
    for ref in (GOOD, BAD):
        keep_text(path, [ref], "observe", ValueError())
    real, left = Path.rename, []

    def rename(beside: Path, target: Path) -> Path:
        killed.write_bytes(beside.read_bytes())
        left.append(beside)
        return real(beside, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert remove_entries(path, {GOOD.clip_id}.intersection) == 1
    monkeypatch.undo()
    for before in (True, False):
        left[0].write_bytes(killed.read_bytes())
        if not before:
            path.unlink()
        assert remove_entries(path, {BAD.clip_id}.intersection) == before
        assert not left[0].exists()


@pytest.mark.parametrize("what", ["link", "readable", "folder", "fifo", "no folder"])
def test_a_debug_file_that_others_could_read_is_refused(settings: Settings, tmp_path: Path, what: str):
    path = tmp_path / "debug.txt"
    if what == "link":
        (tmp_path / "other").touch(0o600)
        path.symlink_to(tmp_path / "other")
    elif what == "readable":
        path.touch()
        path.chmod(0o644)
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path = tmp_path / "none" / "debug.txt"
    with pytest.raises(UsageError, match="debug file"):
        check_debug_file(path)
    with pytest.raises(UsageError, match="debug file"):
        pipeline.run(settings.model_copy(update={"debug_file": path}), REFS)


def test_evaluate_says_nothing_of_what_an_error_said(
    clips: Path, seer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The file's name is the user's own; what a library said of it is not shown."""
    folder, debug = tmp_path / "cases", tmp_path / "debug.txt"
    folder.mkdir()
    (folder / "good.mp4").hardlink_to(clips / "bars.mp4")
    (folder / "cases.csv").write_text("file,expected,first_reason\n" + "x" * 300 + ".mp4,accept,\ngood.mp4,accept,\n")
    words = ["curation", "evaluate", "--cases", str(folder / "cases.csv"), "--detector", str(seer), "--workers", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--debug-file", str(debug), "--json", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "File name too long" not in said.out + said.err + (tmp_path / "r.json").read_text()
    assert "File name too long" in debug.read_text()


# --- time


def test_a_clip_that_takes_too_long_to_measure_is_too_slow(settings: Settings):
    ready = pipeline.preflight(settings)
    (batch,) = read_batches([GOOD], ready)
    stages.download(ready, batch)
    assert stages.observe(ready.model_copy(update={"clip_timeout_s": 0.01}), batch).failed == {"too_slow": 1}
    assert last_attempt(ready, GOOD).transient and stages.observe(ready, batch).done == 1


def test_a_teacher_that_takes_too_long_costs_one_clip(settings: Settings):
    from curation.deadlines import check_time

    ready = pipeline.preflight(settings.model_copy(update={"clip_timeout_s": 1.0}))
    (batch,) = read_batches([BAD, GOOD], ready)
    for stage in (stages.download, stages.observe):
        stage(ready.model_copy(update={"clip_timeout_s": None}), batch)
    stages.judge(ready, batch)

    class Slow:
        provenance = {"kind": "none", "name": "none"}  # noqa: RUF012

        def __call__(self, frames: object, clip_id: str) -> None:
            while clip_id == BAD.clip_id:
                check_time()

    context_of(ready)._teacher = Slow()
    report = stages.teach(ready, batch)
    assert (report.done, report.failed) == (1, {"too_slow": 1})


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a file system can be mounted here by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, spare: int = 0) -> Path:
    """Take all but `spare` bytes of the disk."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        file.truncate(max(0, path.stat().st_size - spare))
    return path


def test_a_full_disk_is_recorded_in_every_stage_and_nothing_is_lost(
    settings: Settings,
    small_disk: Path,
    tmp_path: Path,
):
    refs = [GOOD, BAD]
    whole = shard_bytes(pipeline.run(settings, refs))
    place = DownloadSettings(local_root=settings.download.local_root, min_free_mb=0)
    other = settings.model_copy(
        update={"out": small_disk / "out", "catalog_url": f"sqlite:///{tmp_path}/other.sqlite", "download": place}
    )
    ready = pipeline.preflight(other)
    (batch,) = read_batches(refs, ready)
    for stage, spare in (("download", 8_000), ("observe", 0), ("judge", None), ("teach", 8_000)):
        work = getattr(stages, stage)
        if spare is not None:
            filler = fill(small_disk, spare)
            report = work(ready, batch)
            assert (report.done, report.failed) == (0, {"disk_full": 2}), stage
            attempt = last_attempt(ready, BAD)
            assert (attempt.stage, attempt.code) == (stage, FailureCode.DISK_FULL) and attempt.transient
            filler.unlink()
        assert work(ready, batch).done == 2
    assert shard_bytes(pipeline.funnel(ready, refs)) == whole
    assert not [path for path in small_disk.rglob(".*") if path.is_file() and path.name != ".lock"]


def test_a_full_disk_under_the_catalog_ends_in_one_sentence(settings: Settings, small_disk: Path):
    whole = shard_bytes(pipeline.run(settings, REFS[:1]))
    place = DownloadSettings(local_root=settings.download.local_root, min_free_mb=0)
    other = settings.model_copy(update={"out": small_disk / "out", "download": place})
    ready = pipeline.preflight(other)
    batch = read_batches(REFS[:1], ready)[0]
    stages.download(ready, batch)
    filler = fill(small_disk)
    with pytest.raises(OutageError, match="free some space and run again"):
        stages.observe(ready, batch)
    filler.unlink()
    funnel = pipeline.run(other, REFS[:1])
    assert shard_bytes(funnel) == whole and funnel.failed_by_code == {}
