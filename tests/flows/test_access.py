"""Who may do what: without the string nobody creates a run, hears of one, or reads a file of the service."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prefect.plugins import HookContext
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from curation.failures import UsageError
from flows import access
from flows.plugin import setup_environment
from flows.service import Service, credentials
from tests.support.prefect_place import Place, command
from tests.support.servers import serve

PAGE = "http://page.example"
STREAMS = ("/events/in", "/events/out", "/logs/out", "/task_runs/subscriptions/scheduled")
SOCKETS = (*STREAMS, "/work_pools/unish/workers/connect")


def basic(string: str) -> str:
    return f"Basic {base64.b64encode(string.encode()).decode()}"


def ask(place: Place, method: str, path: str, headers: dict[str, str], body: str = "") -> tuple[int, dict[str, str]]:
    """One request with these headers and no other, as a browser may send it; its status and the answer's headers."""
    address = urlsplit(place.api_url)
    connection = HTTPConnection(address.hostname, address.port, timeout=30)
    connection.putrequest(method, address.path + path, skip_host=True, skip_accept_encoding=True)
    for name, value in ({"Host": address.netloc, "Content-Length": str(len(body))} | headers).items():
        connection.putheader(name, value)
    connection.endheaders(body.encode())
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": PAGE},  # a body without a type, which a page may send unasked, and which Prefect takes for JSON
        {"Origin": PAGE, "Content-Type": "text/plain"},
        {"Origin": PAGE, "Content-Type": "application/json"},
        {"Origin": PAGE, "Host": "page.example", "Content-Type": "application/json"},  # a name bent to this machine
        {"Content-Type": "application/json"},  # another user of this machine
        {"Content-Type": "application/json", "Authorization": basic("unish:guessed")},
        {"Content-Type": "application/json", "Authorization": "Bearer unish"},
    ],
)
def test_no_run_is_created_without_the_string(service: Place, headers: dict[str, str]):
    with service.client() as client:
        deployment = client.read_deployment_by_name("curate/curate")
        before = {run.id for run in client.read_flow_runs()}
        body = json.dumps({"parameters": {"manifest": "/nowhere.csv", "out": "/nowhere"}})
        status, answered = ask(service, "POST", f"/deployments/{deployment.id}/create_flow_run", headers, body)
        assert {run.id for run in client.read_flow_runs()} == before
    assert status == 401
    assert "access-control-allow-origin" not in answered
    assert "www-authenticate" not in answered  # else a browser would ask for the string and then send it by itself


@pytest.mark.parametrize(
    "path", ["/flow_runs/filter", "/deployments/filter", "/logs/filter", "/admin/settings", "/docs"]
)
def test_nothing_is_read_without_the_string(service: Place, path: str):
    method = "POST" if path.endswith("filter") else "GET"
    headers = {"Content-Type": "application/json"}
    body = "{}" if method == "POST" else ""
    assert ask(service, method, path, headers, body)[0] == 401
    assert ask(service, method, path, headers | {"Authorization": basic(service.string)}, body)[0] == 200


@pytest.mark.parametrize("origin", [PAGE, "null", "http://127.0.0.1:1"])
def test_no_other_page_may_send_the_string_or_read_an_answer(service: Place, origin: str):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    status, answered = ask(service, "OPTIONS", "/flow_runs/filter", {"Origin": origin} | asked)
    assert status == 400 and "access-control-allow-origin" not in answered
    headers = {"Origin": origin, "Content-Type": "application/json", "Authorization": basic(service.string)}
    assert "access-control-allow-origin" not in ask(service, "POST", "/flow_runs/filter", headers, "{}")[1]


def test_the_pages_of_the_server_are_let_in_with_the_string(service: Place):
    own = service.api_url.removesuffix("/api")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin in (own, own.replace("127.0.0.1", "localhost")):
        status, answered = ask(service, "OPTIONS", "/flow_runs/filter", {"Origin": origin} | asked)
        assert status == 200 and answered["access-control-allow-origin"] == origin
    connection = HTTPConnection(urlsplit(own).netloc, timeout=30)
    connection.request("GET", "/ui-settings")
    said = json.load(connection.getresponse())
    assert (said["auth"], said["api_url"], said["default_ui"]) == ("BASIC", service.api_url, "v2")
    for page in ("/v2/", "/v2/login"):
        connection.request("GET", page, headers={"Accept": "text/html"})
        answer = connection.getresponse()
        assert answer.status == 200 and b"<html" in answer.read()
    connection.close()


@pytest.mark.parametrize("path", SOCKETS)
def test_no_stream_is_opened_without_the_string(service: Place, path: str):
    address = service.api_url.replace("http:", "ws:") + path
    with pytest.raises(InvalidStatus) as refused, connect(address, origin=PAGE, proxy=None):
        pass
    assert refused.value.response.status_code == 403
    for token in (None, "unish:guessed"):
        with connect(address, origin=PAGE, subprotocols=["prefect"], proxy=None) as socket:
            socket.send(json.dumps({"type": "auth", "token": token}))
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(timeout=30)
        assert closed.value.rcvd.code == 1008
    with connect(address, subprotocols=["prefect"], proxy=None) as socket:
        socket.send(json.dumps({"type": "auth", "token": service.string}))
        assert json.loads(socket.recv(timeout=30)) == {"type": "auth_success"}


def test_prefect_in_the_checkout_has_the_string_and_says_when_it_is_another(
    service: Place, monkeypatch: pytest.MonkeyPatch
):
    context = HookContext(prefect_version="3", api_url=service.api_url, logger_factory=logging.getLogger)
    monkeypatch.setattr(sys, "argv", ["prefect", "deployment", "run", "curate"])
    monkeypatch.setenv(access.VARIABLE, "unish:guessed")
    with pytest.raises(SystemExit, match="requires another authentication string; set PREFECT_API_AUTH_STRING"):
        setup_environment(ctx=context)
    monkeypatch.delenv(access.VARIABLE)
    assert setup_environment(ctx=context).env[access.VARIABLE] == service.string


def test_a_running_server_is_not_ended_for_another_string(service: Place):
    before = service.record
    again = command("python", "-m", "flows.service", "start", PREFECT_API_AUTH_STRING="unish:mine")
    assert again.returncode == 1 and "uses another authentication string" in again.stderr
    assert service.record == before and service.running()


def test_the_string_goes_to_our_own_living_server_alone(service: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(access.VARIABLE)
    assert credentials(service.api_url) == {access.VARIABLE: service.string}
    assert credentials("https://prefect.example.org/api") == credentials(None) == {}
    monkeypatch.setenv(access.VARIABLE, "mine:own")
    assert credentials(service.api_url) == {}  # the user's own comes first


def test_whoever_has_taken_the_port_of_a_server_is_given_no_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(access.VARIABLE, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    made = access.fingerprint(access.make_auth_string(tmp_path))
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "health").write_text("true")
    with serve(tmp_path, {}) as other:  # it says that it is well, as Prefect does
        service = Service(tmp_path, f"http://{other.host}/api", "token", fingerprint=made)
        ours = subprocess.Popen(["sleep", "60"], env=os.environ | {"UNISH_SERVICE": "token:server"})
        for server in (os.getpid(), ours.pid):  # the number of a server that ended; one that lives and has no port yet
            replace(service, server=server).save()
            assert service.healthy() and credentials(service.api_url) == {}
        ours.kill()
        ours.wait()


def test_the_users_own_string_is_the_servers_and_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(access.VARIABLE, "mine:own")
    environment = Service(tmp_path, "http://127.0.0.1:4210/api", "token").environment("server")
    assert environment["PREFECT_SERVER_API_AUTH_STRING"] == environment[access.VARIABLE] == "mine:own"
    assert list(tmp_path.iterdir()) == []


def test_a_string_is_made_once_and_anew_when_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(access.VARIABLE, raising=False)
    assert access.auth_string(tmp_path) is None
    first = access.make_auth_string(tmp_path)
    assert access.make_auth_string(tmp_path) == access.auth_string(tmp_path) == first
    (tmp_path / access.FILE).unlink()
    assert access.make_auth_string(tmp_path) != first and len(first) > 40


@pytest.mark.parametrize("string", ["no-colon", "name:p\u00e4ss", "name:a\nb"])
def test_a_string_that_no_header_carries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, string: str):
    monkeypatch.delenv(access.VARIABLE, raising=False)
    (tmp_path / access.FILE).write_text(string, encoding="utf-8")
    with pytest.raises(UsageError, match="delete it"):
        access.make_auth_string(tmp_path)
    monkeypatch.setenv(access.VARIABLE, string)
    with pytest.raises(UsageError, match=access.VARIABLE):
        access.make_auth_string(tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "folder", "unreadable"])
def test_a_string_that_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.delenv(access.VARIABLE, raising=False)
    path = tmp_path / access.FILE
    if kind == "bytes":
        path.write_bytes(b"unish:\xff\xfe")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(UsageError, match="then create a new one with") as raised:
        access.auth_string(tmp_path)
    assert str(path) in str(raised.value) and raised.value.__suppress_context__


def test_a_home_of_an_earlier_version_is_closed_to_others(tmp_path: Path):
    home = tmp_path / "state"
    home.mkdir(mode=0o755)
    (home / "prefect.db").write_bytes(b"")
    (home / "prefect.db").chmod(0o644)
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "elsewhere").chmod(0o644)
    (home / "link").symlink_to(tmp_path / "elsewhere")
    access.make_private(home)
    assert home.stat().st_mode & 0o777 == 0o700 and (home / "prefect.db").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o644
