"""The service's life: started once, watched through the literal command, killed, put right, stopped without a trace."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.prefect_place import Place, command, free_port, wait_until
from tests.support.servers import Fault, serve

ACTIVE = {"RUNNING", "PENDING", "CANCELLING"}


def write_manifest(path, rows):
    path.write_text("\n".join(["platform,video_id,start_s,end_s", *rows]) + "\n")
    return path


def parameters(**values):
    return [part for name, value in values.items() for part in ("--param", f"{name}={value}")]


def make_run(place: Place, settings):
    with place.client() as client:
        deployment = client.read_deployment_by_name("curate/curate")
        values = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        return client.create_flow_run_from_deployment(deployment.id, parameters=values).id


def active_runs(place: Place):
    with place.client() as client:
        return [run for run in client.read_flow_runs() if run.state_type in ACTIVE]


def artifacts(place: Place, flow_run_id):
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with place.client() as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    return {artifact.key: artifact for artifact in found}


def last_run(place: Place):
    from prefect.client.schemas.sorting import FlowRunSort

    with place.client() as client:
        return client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)[0]


def test_starting_twice_is_harmless(service):
    before = service.record
    again = service.service("start")
    assert again.returncode == 0 and service.api_url.removesuffix("/api") in again.stdout
    assert service.record == before
    assert service.service("status").returncode == 0


def test_the_server_listens_on_loopback_and_reports_nothing(service):
    for role in ("server", "worker"):
        process = psutil.Process(service.record[role])
        environment = process.environ()
        assert (environment["DO_NOT_TRACK"], environment["PREFECT_SERVER_ANALYTICS_ENABLED"]) == ("1", "false")
        addresses = [
            end.ip for socket in process.net_connections("inet") for end in (socket.laddr, socket.raddr) if end
        ]
        assert addresses and set(addresses) == {"127.0.0.1"}
    from prefect.settings import get_current_settings

    assert get_current_settings().server.analytics_enabled is False  # [tool.prefect] of the checkout


def test_the_literal_command_curates_a_manifest(service, clips, detector, tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", ["local,bars.mp4,0,1.5", "local,noise.mp4,,", "local,broken.mp4,,"])
    out = tmp_path / "out"
    settings = parameters(manifest=manifest, out=out, local_root=clips, detector=detector, teacher="none", workers=1)
    done = command("prefect", "deployment", "run", "curate", "--watch", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Creating flow run for deployment 'curate/curate'" in done.stdout
    shown = done.stdout[done.stdout.index("URL:") :].splitlines()[1:]  # a line a stage, no line an event
    assert [line for line in shown if line.endswith("3 of 3 clips")] == [
        f"{stage}: 3 of 3 clips" for stage in ("download", "observe", "teach")
    ]
    assert "0 of 3 clips accepted" in done.stdout and len(shown) < 15 and "\r" not in done.stdout

    run = last_run(service)
    assert run.state_name == "Completed" and run.state.message.startswith("0 of 3 clips accepted")
    made = artifacts(service, run.id)
    assert {key: made[key].type for key in made} == {
        "curate-download": "progress",
        "curate-observe": "progress",
        "curate-teach": "progress",
        "curate-funnel": "table",
        "curate-failures": "markdown",
    }
    assert [made[f"curate-{stage}"].data for stage in ("download", "observe", "teach")] == [100.0] * 3
    assert "| 1 |" in made["curate-failures"].data and "corrupt" in made["curate-failures"].data
    assert (out / "catalog.sqlite").is_file()
    assert service.telling(out) == []


def test_no_other_user_sees_a_file_or_the_string(service):
    paths = [service.home, *(path for path in service.home.iterdir() if path.is_file())]  # nobody passes the first
    assert {path.name for path in paths} >= {"auth-string", "prefect.db", "server.log", "worker.log", "service.json"}
    assert [path.name for path in paths if path.stat().st_mode & 0o077] == []
    assert service.telling(service.home) == ["auth-string"]
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert [line for line in lines if service.string.partition(":")[2] in line] == []
    for action in ("start", "status"):
        said = service.service(action)
        assert said.returncode == 0 and "auth-string" in said.stdout
        assert service.string.partition(":")[2] not in said.stdout + said.stderr


@pytest.mark.slow
def test_a_wrong_set_up_fails_with_its_sentence_and_no_traceback(service, tmp_path):
    settings = parameters(manifest=tmp_path / "none.csv", out=tmp_path)
    done = command("prefect", "deployment", "run", "curate", "--watch", *settings)
    assert done.returncode == 1
    assert "There is no file" in done.stdout and "Traceback" not in done.stdout
    assert last_run(service).state.message == f"There is no file {tmp_path}/none.csv; give the path of a manifest."


def test_an_unknown_parameter_is_refused_before_a_run_is_made(service):
    done = command("prefect", "deployment", "run", "curate", *parameters(manifest="m.csv", out="o", polcy="paper"))
    assert done.returncode == 1 and "polcy" in done.stdout and "Created flow run" not in done.stdout


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"manifest": "m.csv", "out": "o", "teacher": "oracle"}, "teacher"),
        ({"manifest": "m.csv", "out": "o", "batch_clips": 0}, "batch_clips"),
        ({"manifest": "m.csv", "out": "o", "retry": ["sometimes"]}, "retry"),
        ({"manifest": "m.csv"}, "'out' is a required"),
    ],
)
def test_wrong_parameters_are_refused_before_a_run_is_made(service, settings, sentence):
    from prefect.exceptions import PrefectHTTPStatusError

    with service.client() as client:
        deployment = client.read_deployment_by_name("curate/curate")
        with pytest.raises(PrefectHTTPStatusError) as refused:
            client.create_flow_run_from_deployment(deployment.id, parameters=settings)
    assert sentence in refused.value.response.json()["detail"]


class Begin:
    """Makes runs of one manifest, whose only download does not end before `files` is told so."""

    def __init__(self, place: Place, files, settings):
        self.place, self.files, self.settings = place, files, settings

    def __call__(self):
        """A new run, in the middle of its download."""
        before = self.files.hits["/bars.mp4"]
        run = make_run(self.place, self.settings)
        wait_until(lambda: self.files.hits["/bars.mp4"] > before, "the download to begin", 120)
        return run


@pytest.fixture
def begin(service, clips, detector, tmp_path):
    with serve(clips, {"/bars.mp4": Fault(hang=True)}) as files:
        manifest = write_manifest(tmp_path / "m.csv", [f"http,{files.url('/bars.mp4')},,"])
        settings = {
            "manifest": manifest,
            "out": tmp_path / "out",
            "detector": detector,
            "teacher": "none",
            "workers": 1,
        }
        yield Begin(service, files, settings | {"http_hosts": [files.host], "allow_loopback": True})


@pytest.mark.slow
def test_a_killed_server_is_put_right_by_the_next_start_and_stop_leaves_nothing(service, begin):
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.objects import StateType

    run, before, string = begin(), service.record, service.string
    os.kill(before["server"], signal.SIGKILL)
    (service.home / "auth-string").unlink()  # as somebody does whom another has looked over the shoulder
    wait_until(lambda: service.service("status").returncode == 1, "the server to be missed")
    assert service.service("start").returncode == 0
    after = service.record
    assert after["server"] != before["server"] and after["worker"] != before["worker"]
    assert service.string != string  # and the client below is let in with the new one
    # the flow of before is gone, its run is known and closed, with its tasks
    assert {process.pid for process in service.processes(after["token"])} == {after["server"], after["worker"]}
    assert active_runs(service) == []
    with service.client() as client:
        killed = client.read_flow_run(run)
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
    assert killed.state_type == StateType.CRASHED and "run it again" in killed.state.message
    assert {task.state_type for task in tasks} == {StateType.CRASHED}

    stopped = service.service("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "Stopped.\n")
    assert service.processes(after["token"]) == []
    assert service.service("status").returncode == 1
    assert service.service("stop").stdout == "Nothing is running.\n"


@pytest.mark.slow
def test_a_killed_flow_and_a_killed_worker_do_not_hold_up_the_next_run(service, begin):
    from prefect.client.schemas.objects import StateType

    first, before = begin(), service.record
    (flow,) = psutil.Process(before["worker"]).children()
    flow.kill()
    wait_until(lambda: active_runs(service) == [], "the killed run to be noticed")
    second = begin()

    os.killpg(before["worker"], signal.SIGKILL)  # the serving process and the flow it runs
    wait_until(lambda: len(service.processes(before["token"])) == 1, "all but the server to be gone")
    assert [(run.id, run.state_type) for run in active_runs(service)] == [(second, StateType.RUNNING)]
    assert service.service("start").returncode == 0
    after = service.record
    assert after["server"] == before["server"] and after["worker"] != before["worker"]
    assert active_runs(service) == []
    with service.client() as client:
        ended = [client.read_flow_run(run) for run in (first, second)]
    assert [run.state_type for run in ended] == [StateType.CRASHED] * 2
    assert "run it again" in ended[1].state.message

    begin.files.script("/bars.mp4", [])
    third = make_run(service, begin.settings)
    wait_until(lambda: last_run(service).state.is_final(), "the new run to end")
    assert last_run(service).id == third and last_run(service).state_name == "Completed"


def test_a_taken_port_is_said_and_nothing_is_left(tmp_path):
    with serve(tmp_path, {}) as other:
        port = int(other.host.partition(":")[2])
        environment = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        started = command("python", "-m", "flows.service", "start", **environment)
    assert started.returncode == 1
    assert f"Port {port} is used by another program" in started.stderr and "Traceback" not in started.stderr
    assert command("python", "-m", "flows.service", "stop", **environment).stdout == "Nothing is running.\n"


def test_a_server_elsewhere_is_never_started_here(tmp_path):
    environment = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "https://prefect.example.org/api"}
    started = command("python", "-m", "flows.service", "start", **environment)
    assert started.returncode == 1 and "where this command cannot start a server" in started.stderr


def test_nothing_runs_before_the_first_start(tmp_path):
    environment = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    status = command("python", "-m", "flows.service", "status", **environment)
    assert (status.returncode, status.stdout) == (1, "server: not running\nworker: not running\n")


@pytest.mark.slow
def test_a_run_whose_machine_vanished_is_ended_by_the_server_alone(place, clips, detector, tmp_path, monkeypatch):
    from prefect.client.schemas.objects import StateType

    place.service("stop")
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    assert place.service("start").returncode == 0
    for _ in range(2):
        watched = place.service("watch")
        assert watched.returncode == 0, watched.stderr
    with place.client() as client:
        assert len(client.read_automations_by_name("unish-silent-runs")) == 1
    with serve(clips, {"/bars.mp4": Fault(hang=True)}) as files:
        manifest = write_manifest(tmp_path / "m.csv", [f"http,{files.url('/bars.mp4')},,"])
        settings = {"manifest": manifest, "out": tmp_path / "out", "detector": detector, "teacher": "none"}
        make_run(place, settings | {"http_hosts": [files.host], "allow_loopback": True})
        wait_until(lambda: files.hits["/bars.mp4"] > 0, "the download to begin", 120)
        time.sleep(45)  # the first heartbeat comes after 30 s
        os.killpg(place.record["worker"], signal.SIGKILL)
        wait_until(lambda: last_run(place).state_type == StateType.CRASHED, "the server to notice", 240)
    assert "No heartbeat" in last_run(place).state.message
    place.service("stop")
