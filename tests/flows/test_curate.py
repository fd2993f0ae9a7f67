"""The flow and its tasks in this process beside a real server: what is refused, retried, given up and shown."""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from prefect import flow
from prefect.artifacts import Artifact, create_progress_artifact
from pydantic import BaseModel

from curation import pipeline
from curation.catalog import Catalog
from curation.failures import OutageError, UsageError
from curation.records import ClipRef
from curation.run import stages as real_stages
from curation.run.batches import Batch, StageReport
from curation.settings import Settings, VideoLimits
from flows import curate as curate_module
from flows import stages
from flows.curate import curate
from flows.runners import make_task_runner
from tests.support.servers import Fault, redirect, serve

# Parameters that go by another name than the setting; one device serves detector and teacher.
RENAMED = {
    "download.timeout_s": "download_timeout_s",
    "download.retries": "download_retries",
    "observe.device": "device",
    "teacher.kind": "teacher",
    "teacher.model": "teacher_model",
    "teacher.name": "teacher_name",
    "teacher.batch_size": "teacher_batch",
    "teacher.device": "device",
}
OF_THE_FLOW = {"manifest", "parallel_batches", "stage_timeout_hours", "task_runner", "cluster"}
REFS = tuple(ClipRef("local", f"clip{n}.mp4") for n in range(3))


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        if nested and field.annotation is not VideoLimits:  # one parameter
            found |= leaves(field.annotation, f"{name}.")
        else:
            found[prefix + name] = field.default
    return found


def parameter_of(setting: str) -> str:
    return RENAMED.get(setting, setting.rpartition(".")[2])


def test_every_setting_is_a_parameter_with_the_same_default():
    schema = curate.parameters.model_dump()["properties"]
    settings = leaves(Settings)
    assert {parameter_of(name) for name in settings} | OF_THE_FLOW == set(schema)
    for name, default in settings.items():
        shown = schema[parameter_of(name)].get("default")
        plain = default.model_dump() if isinstance(default, BaseModel) else default
        assert shown == (list(plain) if isinstance(plain, tuple) else plain) or name in ("out", "policy"), name
    assert all(entry.get("description") for entry in schema.values())


def test_every_parameter_reaches_the_settings(service, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(pipeline, "preflight", lambda settings: seen.append(settings) or refuse("enough"))
    manifest = tmp_path / "m.csv"
    manifest.write_text("platform,video_id,start_s,end_s\nlocal,a.mp4,,\n")
    given = {
        "policy": Path("paper"), "detector": "d.pt", "teacher": "folder", "teacher_model": "m",
        "teacher_name": "megasam", "num_tokens": 7, "teacher_batch": 3, "device": "cpu", "sample_fps": 5.0,
        "detector_long_side": 320, "detector_confidence": 0.3, "prescreen_key_frames": 5,
        "frame_long_side": 28, "max_height": 240,
        "download_timeout_s": 9.0, "download_retries": 1, "http_hosts": ["example.org"], "local_root": tmp_path,
        "allow_loopback": True, "catalog_url": "sqlite:///c", "batch_clips": 2, "workers": 4, "shard_mb": 9,
        "retry": ["corrupt"], "storage": "file:///shared", "lease_s": 30.0, "session": "lab", "videos_per_hour": 60,
        "patience_s": 60.0,
        "pause_s": [1.0, 2.0], "bytes_per_s": 10**6, "max_video_mb": 100, "min_free_mb": 10, "budget_mb": 1000,
        "cookies": tmp_path / "c", "proxy_file": tmp_path / "p", "clip_timeout_s": 60.0, "debug_file": tmp_path / "d",
        "limits": VideoLimits(max_fps=10).model_dump(),
    }  # fmt: skip
    curate(manifest=manifest, out=tmp_path, **given, return_state=True)
    (settings,) = seen
    got = settings.model_dump()
    for name in leaves(Settings):
        group, _, field = name.rpartition(".")
        value = (got[group] if group else got)[field]
        expected = given.get(parameter_of(name), tmp_path)  # the only other one is `out`
        assert value == (tuple(expected) if isinstance(expected, list) else expected), name


def refuse(sentence: str) -> None:
    raise UsageError(sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"manifest": Path("/nowhere/m.csv")}, "There is no file /nowhere/m.csv"),
        ({"manifest": "empty"}, "lists no clips"),
        ({"policy": "/nowhere/policy.yaml"}, "policy"),
        ({"cluster": "tcp://localhost:1"}, "needs the task runner dask or ray"),
    ],
)
def test_a_wrong_set_up_is_a_failed_run_with_one_sentence(service, tmp_path, change, sentence):
    manifest = tmp_path / "m.csv"
    manifest.write_text("platform,video_id,start_s,end_s\n")
    if change.get("manifest") == "empty":
        change = {}
    elif "manifest" not in change:
        manifest.write_text("platform,video_id,start_s,end_s\nlocal,a.mp4,,\n")
    state = curate(**{"manifest": manifest, "out": tmp_path / "out", "teacher": "none", **change}, return_state=True)
    assert state.is_failed() and sentence in state.message and "\n" not in state.message


def test_an_unknown_task_runner_and_a_missing_extra_say_what_to_do(monkeypatch):
    monkeypatch.setenv("UNISH_TASK_RUNNER", "spark")
    with pytest.raises(UsageError, match="choose threads, dask or ray"):
        make_task_runner(None, None, 1)
    monkeypatch.setattr("flows.runners.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'unish\[ray\]'"):
        make_task_runner("ray", None, 1)


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_the_cluster_runners_are_made_by_name(monkeypatch, name):
    pytest.importorskip(f"prefect_{name}")
    monkeypatch.setenv("UNISH_TASK_RUNNER", name)
    assert type(make_task_runner(None, None, 2)).__name__ == f"{name.capitalize()}TaskRunner"


class Stages:
    """Stands in for the pipeline: records when each stage of each batch ran, and does what the test asks."""

    def __init__(self, monkeypatch, **actions):
        self.events: list[tuple[str, str, int]] = []
        self.lock = threading.Lock()
        for stage in ("download", "observe", "judge", "teach"):
            monkeypatch.setattr(real_stages, stage, self.make(stage, actions.get(stage)))

    def make(self, stage, action):
        def run(settings, batch, progress=None, check=real_stages.nobody_else):
            self.note("begin", stage, batch.index)
            check()
            try:
                if action:
                    action(batch, progress)
            finally:
                self.note("end", stage, batch.index)
            return StageReport(stage, len(batch.refs), 0, {})

        return run

    def note(self, what, stage, index):
        with self.lock:
            self.events.append((what, stage, index))

    def wait_for(self, *event):
        deadline = time.monotonic() + 30
        while event not in self.events:
            assert time.monotonic() < deadline, f"{event} never came"
            time.sleep(0.05)

    def place(self, what, stage, index):
        return self.events.index((what, stage, index))


def work(out, batches, lanes=1, timeout_s=60.0):
    @flow
    def working():
        with make_task_runner("threads", None, lanes) as runner:
            return curate_module._work(runner, Settings(out=out), batches, lanes, timeout_s)

    return working()


def make_batches(count):
    return [Batch(index, (ClipRef("local", f"clip{index}.mp4"),), f"batch{index}") for index in range(count)]


def test_stages_overlap_between_batches_and_never_within_one(service, monkeypatch, tmp_path):
    ran = Stages(
        monkeypatch,
        observe=lambda batch, progress: batch.index == 2 or ran.wait_for("end", "download", batch.index + 1),
        teach=lambda batch, progress: batch.index == 2 or ran.wait_for("begin", "observe", batch.index + 1),
    )
    assert work(tmp_path, make_batches(3)) == []
    for index in range(3):
        order = [
            ran.place(what, stage, index)
            for stage in ("download", "observe", "judge", "teach")
            for what in ("begin", "end")
        ]
        assert order == sorted(order)
    for index in range(2):  # one batch is observed at a time
        assert ran.place("end", "observe", index) < ran.place("begin", "observe", index + 1)
        assert ran.place("end", "download", index) < ran.place("begin", "download", index + 1)


def test_a_stage_that_dies_is_tried_again(service, monkeypatch, tmp_path):
    tries = []

    def dies_once(batch, progress):
        tries.append(batch.index)
        if len(tries) == 1:
            raise RuntimeError("a worker was killed")

    Stages(monkeypatch, observe=dies_once)
    monkeypatch.setattr(stages, "observe", stages.observe.with_options(retry_delay_seconds=0))
    assert work(tmp_path, make_batches(1)) == []
    assert tries == [0, 0]


def test_a_batch_that_cannot_be_finished_does_not_stop_the_others(service, monkeypatch, tmp_path):
    def dies(batch, progress):
        if batch.index == 0:
            raise RuntimeError("always")

    ran = Stages(monkeypatch, observe=dies)
    monkeypatch.setattr(stages, "observe", stages.observe.with_options(retry_delay_seconds=0))
    (sentence,) = work(tmp_path, make_batches(2))
    assert sentence.startswith("batch 0, observe: ") and "always" in sentence
    assert ("end", "teach", 1) in ran.events and ("begin", "judge", 0) not in ran.events


def test_a_wrong_set_up_found_late_is_not_retried_and_ends_the_run(service, monkeypatch, tmp_path):
    tries = []
    Stages(monkeypatch, teach=lambda batch, progress: tries.append(1) or refuse("no weights"))
    with pytest.raises(UsageError, match="no weights"):
        work(tmp_path, make_batches(1))
    assert tries == [1]


def test_an_outage_ends_the_run_and_is_not_retried_again(service, monkeypatch, tmp_path):
    tries = []

    def away(batch, progress):
        tries.append(1)
        raise OutageError("The database was away.")

    Stages(monkeypatch, observe=away)
    with pytest.raises(OutageError, match="was away"):
        work(tmp_path, make_batches(1))
    assert tries == [1]


def test_a_batch_that_another_worker_took_is_left_to_it(service, monkeypatch, tmp_path):
    taken = []

    def steal(batch, progress):
        if not taken:  # this worker stood still, and another one came
            catalog = Catalog(Settings(out=tmp_path).database)
            catalog.release(catalog.leases()[0].owner)
            taken.append(catalog.claim([batch.batch_id], "another", 2.0))

    ran = Stages(monkeypatch, download=steal)
    monkeypatch.setattr(pipeline, "finished", lambda *_: False)  # by the catalog, in which these stages write nothing
    assert work(tmp_path, make_batches(1)) == []
    begun = [event for event in ran.events if event[:2] == ("begin", "observe")]
    assert taken and len(begun) >= 2, "refused, and done when the other one was gone"
    assert ran.events.count(("end", "teach", 0)) == 1


def test_a_stage_that_takes_too_long_is_given_up_and_ends_at_its_next_clip(service, monkeypatch, tmp_path):
    ended = threading.Event()

    def endless(batch, progress):
        try:
            while True:
                time.sleep(0.05)
                progress(0, 1)
        finally:
            ended.set()

    Stages(monkeypatch, observe=endless)
    monkeypatch.setattr(stages, "observe", stages.observe.with_options(retries=0))
    begin = time.monotonic()
    (sentence,) = work(tmp_path, make_batches(1), timeout_s=0.5)
    assert "timeout" in sentence and time.monotonic() - begin < 20
    assert ended.wait(5)


@pytest.mark.slow
def test_nothing_that_a_server_said_is_in_prefects_database(service, clips, detector, tmp_path):
    """Every kind of faulty answer, full of one word; then all that Prefect keeps is searched for it."""
    word = "ZqSaidByServerVx"
    body, ended = f"{word} {word}".encode(), 10**9
    faults = {
        "gone": Fault(404, {"X-A": word}, body),
        "closed": Fault(403, {"WWW-Authenticate": word}, body),
        "busy": Fault(503, {"Retry-After": "300", "Server": word}, body),
        "away": redirect(f"http://{word}.invalid/{word}.mp4"),
        "nowhere": redirect(f"{word}://[{word}"),
        "chunked": Fault(headers={"Transfer-Encoding": "chunked"}, body=body, cut=ended),
        "zipped": Fault(headers={"Content-Encoding": "gzip"}, body=body, cut=ended),
        "odd": Fault(headers={"Content-Length": word, "Last-Modified": word, "ETag": word}, body=body, cut=ended),
        "page": Fault(headers={"Content-Type": "text/html"}, body=b"<title>" + body),
        "list": Fault(body=b"#EXTM3U\n" + body),
        "slower": Fault(429, {"Retry-After": "300"}, body),
    }
    with serve(clips, {f"/{name}.mp4": fault for name, fault in faults.items()}) as server:
        manifest = tmp_path / "m.csv"
        links = [f"http,{server.url(f'/{name}.mp4')}" for name in ("bars", *faults)]
        manifest.write_text("\n".join(["platform,video_id", *links, ""]))
        state = curate(
            manifest=manifest, out=tmp_path / "out", detector=str(detector), teacher="none", workers=1,
            http_hosts=[server.host], allow_loopback=True, download_retries=0, min_free_mb=0, videos_per_hour=0,
            return_state=True,
        )  # fmt: skip
    assert state.is_completed() and f"{len(faults)} failed" in state.message
    time.sleep(5)  # logs are sent in portions
    with closing(sqlite3.connect(f"file:{service.home}/prefect.db?mode=ro", uri=True)) as database:
        kept = "\n".join(database.iterdump()).lower()
    assert "gone.mp4" not in kept and state.message.lower() in kept and word.lower() not in kept
    for folder in (service.home, tmp_path / "out"):
        for path in folder.rglob("*"):
            assert not path.is_file() or word.lower().encode() not in path.read_bytes().lower(), path


def shown_progress() -> float:
    return Artifact.get("curate-test", _sync=True).data


def test_progress_is_shown_while_a_stage_runs(service, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "REFRESH_S", 0.05)
    seen = []

    def slow(settings, batch, progress, check):
        progress(1, 3)
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            time.sleep(0.1)
            seen.extend([shown] if (shown := shown_progress()) else [])
        return StageReport("observe", 3, 0, {"corrupt": 1})

    monkeypatch.setattr(real_stages, "observe", slow)

    @flow
    def showing():
        bar = stages.Bar(create_progress_artifact(0.0, "curate-test"), before=1, clips=3, total=4)
        stages.observe.with_options(retries=0).submit(Settings(out=tmp_path), Batch(0, REFS, "batch"), bar).result()

    showing()
    assert seen == [50.0]  # one of this batch's three clips, after one of the batch before
    assert shown_progress() == 100.0


def test_the_deployment_for_work_pools_is_the_same_flow():
    from prefect.flows import load_flow_from_entrypoint

    project = yaml.safe_load(Path(__file__).parents[2].joinpath("prefect.yaml").read_text())
    (deployment,) = project["deployments"]
    assert load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False) is curate
    assert (deployment["name"], deployment["work_pool"]["name"], deployment["pull"]) == ("curate", "unish", [])


def test_importing_the_library_does_not_import_prefect():
    import subprocess

    code = "import sys, curation.pipeline; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
