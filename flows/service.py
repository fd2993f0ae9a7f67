"""Starts the Prefect server, serves the deployments of this checkout, and stops both.

    python -m flows.service start | status | stop | watch

The server listens on loopback only, and requires the authentication string of flows.access. Its database, logs and the
list of started processes are in PREFECT_HOME (.state of the checkout), which no other user can read. Every process
started here carries a token of this service in its environment, and so do its children; only processes with that token
are ever signalled. After a killed server, worker or machine, the next `start` repairs the state. This module never runs
a flow and never talks to another machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import psutil
import typer

from curation.failures import UsageError
from flows import access

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.deployments.runner import RunnerDeployment

_CHECKOUT = Path(__file__).resolve().parents[1]
ROOT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path.cwd()  # no checkout: the current folder
TOKEN = "UNISH_SERVICE"  # environment variable, "<token>:<role>"
POLL_S = 0.25
_AGAIN = "run it again: finished work is kept."
GRACE_S = 20.0  # from SIGTERM to SIGKILL
Role = Literal["server", "worker"]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Service:
    """The processes that were started: only what is needed to find them again.

    home: absolute PREFECT_HOME; api_url: of the server; token: in the environment of every process of this service;
    server, worker: process ids, None if not started; fingerprint: of the server's authentication string.
    """

    home: Path
    api_url: str
    token: str
    server: int | None = None
    worker: int | None = None
    fingerprint: str = ""

    @property
    def ui_url(self) -> str:
        """The address of Prefect's pages."""
        return self.api_url.removesuffix("/api")

    def alive(self, role: Role) -> bool:
        """Whether the recorded process is alive and ours: a reused process id does not carry the token."""
        pid = self.server if role == "server" else self.worker
        try:
            return pid is not None and _role(psutil.Process(pid), self.token) == role
        except psutil.NoSuchProcess:
            return False

    def members(self, role: Role) -> list[psutil.Process]:
        """Every live process of the role: those with the token, and their children."""
        found = {process for process in psutil.process_iter() if _role(process, self.token) == role}
        for process in list(found):
            with suppress(psutil.Error):
                found.update(process.children(recursive=True))
        return list(found)

    def healthy(self) -> bool:
        """Whether a Prefect API answers at the address."""
        with suppress(OSError, urllib.error.URLError, ValueError), _open(f"{self.api_url}/health") as answer:
            return json.load(answer) is True
        return False

    def serves(self) -> bool:
        """Whether the recorded server itself answers at the address; no other program may get the string."""
        port = urlsplit(self.api_url).port or 80
        with suppress(psutil.Error):
            ends = psutil.Process(self.server).net_connections("tcp") if self.alive("server") else []
            return any(end.status == psutil.CONN_LISTEN and end.laddr.port == port for end in ends) and self.healthy()
        return False

    def admits(self) -> bool:
        """Whether the server was started with the current authentication string."""
        with suppress(UsageError):
            return self.fingerprint == access.fingerprint(access.auth_string(self.home)) != ""
        return False

    def save(self) -> None:
        """Write the service to its record."""
        access.write_private(_record(self.home), json.dumps(asdict(self) | {"home": str(self.home)}))

    def environment(self, role: Role) -> dict[str, str]:
        """The environment of a process of this service. It switches all usage reports off."""
        string = access.make_auth_string(self.home)
        extra = {
            TOKEN: f"{self.token}:{role}",
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.api_url,
            access.VARIABLE: string,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
            "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",  # both are needed for --watch to show a run's logs
            "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
            "DO_NOT_TRACK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for name in ("NO_PROXY", "no_proxy"):
            extra[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
        if role == "server":
            extra |= access.server_environment(string, self.api_url)
            # Prefect downloads its list of collections although it has a local copy, and has no setting against it. A
            # proxy that refuses every connection blocks this; the server needs nothing else from the web.
            extra |= dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")
        return os.environ | extra


def start(timeout_s: float = 180.0, given_up: threading.Event | None = None) -> Service:
    """Start the server and the worker if needed, repair the state after a crash, and wait until both are ready.

    Raises UsageError if the port is in use, if a process is not ready within `timeout_s` seconds, or if another thread
    gives up the start; `stop` then ends what was started.
    """
    given_up = given_up or threading.Event()
    deadline = time.monotonic() + timeout_s
    with _locked():
        service = _load() or Service(home=_home(), api_url=_api_url(), token=uuid.uuid4().hex)
        wanted = access.fingerprint(access.make_auth_string(service.home))
        if not service.alive("server"):
            _end(service, "worker")  # without its server a flow cannot report; the catalog keeps its work
            _end(service, "server")
            service = replace(service, api_url=_api_url(), server=None, worker=None, fingerprint=wanted)
            _refuse_taken_port(service)
            host, port = _address(service.api_url)
            command = ["prefect", "server", "start", "--host", host, "--port", str(port)]
            service = _spawn(service, "server", command)
        elif service.fingerprint != wanted:
            raise UsageError(
                f"The running Prefect server uses another authentication string than {access.VARIABLE} or"
                f" {service.home / access.FILE}, or none; stop it first: python -m flows.service stop"
            )
        if not service.alive("worker"):  # it imports its modules while the server starts
            _end(service, "worker")
            _ready(service).unlink(missing_ok=True)
            service = _spawn(service, "worker", ["flows.service", "serve"])
        _wait(service, "server", service.serves, deadline, given_up)
        _wait(service, "worker", lambda: _serving(service), deadline, given_up)
    return service


def running() -> bool:
    """Whether any process of an earlier `start` is still alive."""
    service = _load()
    return service is not None and bool(service.members("server") + service.members("worker"))


def stop() -> bool:
    """Stop exactly the processes that `start` started, and their children; False if there were none.

    The next start marks runs in progress as Crashed.
    """
    with _locked():
        service = _load()
        if service is None:
            return False
        found = running()
        _end(service, "worker")
        _end(service, "server")
        _record(service.home).unlink(missing_ok=True)
        _ready(service).unlink(missing_ok=True)
    return found


def credentials(api_url: str | None) -> dict[str, str]:
    """The authentication string of a live server that `start` started, as an environment.

    Empty for every other server, which must not learn the string, and if the environment already has one.
    """
    if os.environ.get(access.VARIABLE):
        return {}
    with suppress(UsageError):
        service = _load()
        ours = service is not None and service.api_url == (api_url or "").rstrip("/") and service.serves()
        if service is not None and ours and service.admits():
            return {access.VARIABLE: access.make_auth_string(service.home)}
    return {}


def watch(silence_s: float = 90.0) -> None:
    """Tell the server of PREFECT_API_URL to mark runs without a heartbeat as Crashed; safe to repeat.

    For workers of work pools, whose machines may vanish. They must run with PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30.
    silence_s: seconds since a run's last heartbeat.
    """
    os.environ |= credentials(_api_url())
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification
    from prefect.exceptions import PrefectHTTPStatusError

    beat, ends = "prefect.flow-run.heartbeat", ("Completed", "Failed", "Cancelled", "Crashed")
    automation = AutomationCore(
        name="unish-silent-runs",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            after={beat},
            expect={beat, *(f"prefect.flow-run.{end}" for end in ends)},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_s),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"No heartbeat for {silence_s:.0f} s; {_AGAIN}")],
    )
    try:
        with get_client(sync_client=True) as client:
            for known in client.read_automations_by_name(automation.name):
                client.delete_automation(known.id)
            client.create_automation(automation)
    except PrefectHTTPStatusError as error:
        if error.response.status_code == 401:
            raise UsageError(f"The server requires another authentication string: set {access.VARIABLE}.") from None
        raise


def serve() -> None:
    """Serve the deployments in this process until it is stopped. `start` runs this in the background.

    In that case it first waits for the server, and marks the runs of a killed worker as Crashed.
    """
    import asyncio

    service = _load()
    started = service is not None and _role(psutil.Process(), service.token) == "worker"
    if not started:
        access.make_private(_home())
        os.environ |= credentials(_api_url())

    from prefect.client.orchestration import get_client
    from prefect.runner import Runner
    from prefect.types.entrypoint import EntrypointType

    from flows.curate import curate

    if service is not None and started:
        while not service.serves():
            if not service.alive("server"):
                raise UsageError("The Prefect server ended before the deployments were served.")
            time.sleep(POLL_S)
        with get_client(sync_client=True) as client:
            _close_stale_runs(client, f"The process of this run was stopped or killed; {_AGAIN}")

    # one run at a time: each run uses every core of the machine
    runner = Runner(name="unish", limit=1, query_seconds=2, pause_on_shutdown=False)
    # by module, so that Dask and Ray workers, which get the flow with each task, can import it by the same name
    deployment = curate.to_deployment("curate", tags=["unish"], entrypoint_type=EntrypointType.MODULE_PATH)
    runner.add_deployment(cast("RunnerDeployment", deployment))
    access.write_private(_home() / "worker.ready", str(os.getpid()))
    asyncio.run(runner.start())


def _home() -> Path:
    return Path(os.environ.get("PREFECT_HOME") or ROOT / _prefect_table().get("home", ".state")).resolve()


def _api_url() -> str:
    return (
        os.environ.get("PREFECT_API_URL") or _prefect_table().get("api", {}).get("url") or "http://127.0.0.1:4210/api"
    )


def _prefect_table() -> dict[str, Any]:
    """[tool.prefect] in pyproject.toml of the checkout; the `prefect` command reads it too."""
    path = ROOT / "pyproject.toml"
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return table.get("tool", {}).get("prefect", {})


def _record(home: Path) -> Path:
    return home / "service.json"


def _ready(service: Service) -> Path:
    return service.home / "worker.ready"


def _load() -> Service | None:
    try:
        values = json.loads(_record(_home()).read_text())
    except FileNotFoundError:
        return None
    except PermissionError:
        raise UsageError(access.not_yours(_home())) from None
    return Service(**values | {"home": Path(values["home"])})


@contextmanager
def _locked() -> Iterator[None]:
    """One start or stop at a time."""
    home = _home()
    access.make_private(home)
    with open(home / "service.lock", "w", opener=_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _private(path: str, flags: int) -> int:
    """Open a file that no other user can read."""
    return os.open(path, flags, 0o600)


def _address(api_url: str) -> tuple[str, int]:
    parts = urlsplit(api_url)
    if parts.hostname not in ("127.0.0.1", "localhost") or parts.scheme != "http" or parts.path != "/api":
        raise UsageError(
            f"PREFECT_API_URL is {api_url}, where this command cannot start a server; unset it,"
            " or set it to http://127.0.0.1:PORT/api."
        )
    return "127.0.0.1", parts.port or 80


def _refuse_taken_port(service: Service) -> None:
    host, port = _address(service.api_url)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            other = "another Prefect server" if service.healthy() else "another program"
            raise UsageError(
                f"Port {port} is used by {other}; stop it, or choose another port for this command and for every"
                f" prefect command with: export PREFECT_API_URL=http://127.0.0.1:{port + 1}/api"
            ) from None


def _open(url: str) -> Any:  # an HTTPResponse, but typeshed does not say so
    # never through a proxy: the address is this machine
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5)


def _spawn(service: Service, role: Role, module: list[str]) -> Service:
    service.save()  # save the token first, so that the process can be found whatever happens next
    log = _log(service, role)
    with suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.1"))
    with open(log, "wb", opener=_private) as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=ROOT,
            env=service.environment(role),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # the server writes only to PREFECT_HOME; the worker's runs write user data, with the user's permissions
            umask=0o077 if role == "server" else -1,
        )
    service = replace(service, server=process.pid) if role == "server" else replace(service, worker=process.pid)
    service.save()
    return service


def _log(service: Service, role: Role) -> Path:
    return service.home / f"{role}.log"


def _wait(service: Service, role: Role, ready: Callable[[], bool], deadline: float, given_up: threading.Event) -> None:
    while not ready():
        if given_up.is_set():
            raise UsageError(f"The start of the Prefect {role} was cancelled.")
        if not service.alive(role):
            tail = "\n".join(_log(service, role).read_text(errors="replace").splitlines()[-5:])
            raise UsageError(f"The Prefect {role} ended while starting; see {_log(service, role)}:\n{tail}")
        if time.monotonic() > deadline:
            raise UsageError(f"The Prefect {role} was not ready in time; see {_log(service, role)}, and start again.")
        time.sleep(POLL_S)


def _serving(service: Service) -> bool:
    """Whether this worker has registered its deployments; the server may still know those of an earlier worker."""
    with suppress(FileNotFoundError):
        return _ready(service).read_text() == str(service.worker)
    return False


def _role(process: psutil.Process, token: str) -> str | None:
    """The role of a live process of this service, None for every other process."""
    try:
        value = process.environ().get(TOKEN, "")
        alive = process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return None
    owner, _, role = value.partition(":")
    return role if owner == token and alive else None


def _end(service: Service, role: Role) -> None:
    """End every process of the role: the recorded one first, so that it can end its children in order."""
    if service.alive(role):
        members = service.members(role)
        for process in members:
            if process.pid in (service.server, service.worker):
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
        psutil.wait_procs(members, timeout=GRACE_S)
    for stop_signal, timeout_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        left = service.members(role)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(stop_signal)
        psutil.wait_procs(left, timeout=timeout_s)


def _close_stale_runs(client: SyncPrefectClient, message: str) -> None:
    """Mark served runs that have lost their process as Crashed, with their tasks.

    Runs of a work pool belong to workers that may be alive elsewhere; runs called from Python have no deployment.
    """
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    active = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    runs = client.read_flow_runs(
        flow_run_filter=filters.FlowRunFilter(
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=active)),
        )
    )
    for run in runs:
        if run.deployment_id is None or run.work_pool_name is not None:
            continue
        tasks = client.read_task_runs(
            flow_run_filter=filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[run.id])),
            task_run_filter=filters.TaskRunFilter(
                state=filters.TaskRunFilterState(type=filters.TaskRunFilterStateType(any_=active))
            ),
        )
        for task in tasks:
            client.set_task_run_state(task.id, Crashed(message=message), force=True)
        client.set_flow_run_state(run.id, Crashed(message=message), force=True)


def login(service: Service) -> str:
    """How to log in to Prefect's pages, in one sentence without the string itself."""
    path = service.home / access.FILE
    kept = path.is_file() and path.read_text(encoding="utf-8").strip() == access.auth_string(service.home)
    return f"Log in once with {f'the line in {os.path.relpath(path)}' if kept else f'your {access.VARIABLE}'}"


@app.command("start")
def _start(
    timeout: Annotated[float, typer.Option(help="Seconds to wait until the service is ready.")] = 180.0,
) -> None:
    """Start the server and serve the deployments, in the background; does nothing if they already run."""
    typer.echo("Starting the Prefect server and the deployments (about 20 seconds) ...")
    service = start(timeout)
    typer.echo(f"Running. UI: {service.ui_url}   logs: {service.home}/server.log, worker.log")
    typer.echo(login(service))
    if service.api_url != _prefect_table().get("api", {}).get("url"):
        typer.echo(f"Prefect commands need: export PREFECT_API_URL={service.api_url}")
    typer.echo("Next: prefect deployment run curate --watch --param manifest=MANIFEST --param out=OUT")


@app.command("stop")
def _stop() -> None:
    """Stop what `start` started, including running flows; the catalog keeps their finished work."""
    typer.echo("Stopped." if stop() else "Nothing is running.")


@app.command("status")
def _status() -> None:
    """Show what is running; exit code 1 unless everything is."""
    service = _load()
    server = service is not None and service.alive("server") and service.healthy()
    worker = service is not None and service.alive("worker") and _serving(service)
    typer.echo(f"server: {'running' if server else 'not running'}\nworker: {'running' if worker else 'not running'}")
    if service is not None and server:
        typer.echo(f"UI: {service.ui_url}\n{login(service)}")
    raise typer.Exit(0 if server and worker else 1)


@app.command("watch")
def _watch() -> None:
    """Tell the server of PREFECT_API_URL to end silent runs of work pools; call it once, before the first run."""
    watch()
    typer.echo(
        "A run becomes Crashed after 90 s without a heartbeat. Start workers with PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30."
    )


@app.command("serve", hidden=True)
def _serve() -> None:
    serve()


def main() -> None:
    """The console command; an error that the user can fix is one sentence, without a traceback."""
    try:
        app()
    except UsageError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
