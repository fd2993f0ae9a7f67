"""The deployment's short name: completed where it is that name, and every other command line untouched."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.plugins import HookContext

from flows.plugin import DEPLOYMENTS, FLAGS, TAKES_VALUE, completed, setup_environment

COMPLETED = [
    "deployment run curate",
    "deployments run curate",
    "deployment run curate --watch",
    "deployment run --watch curate",
    "deployment run --param manifest=curate curate -p out=curate --watch",
    "deployment run -p a=1 --tag curate curate",
    "deployment run --param=a=1 curate",
    "deployment run --params {} curate --job-variable x=1 -jv y=2",
    "--profile local deployment run curate",
    "-p curate deployment run curate",
    "--no-prompt deployment run curate",
    "deployment run curate --start-in curate --flow-run-name curate",
    "deployment run -- curate",
]
UNTOUCHED = [
    "",
    "curate",
    "run curate",
    "deployment run",
    "deployment run curate/curate",
    "deployment run curat",
    "deployment run CURATE",
    "deployment run other --tag curate",
    "deployment run --id curate",
    "deployment run --name curate",
    "deployment inspect curate",
    "deployment delete curate",
    "flow run curate",
    "work-pool create curate",
    "deployment run --unknown curate",
    "deployment run --empty-tag curate",
    "deployment run curate curate",
    "--version deployment run curate",
]


@pytest.mark.parametrize("line", COMPLETED)
def test_the_one_positional_argument_is_completed(line):
    before = line.split()
    after = completed(before)
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [("curate", "curate/curate")]
    # it is the argument after `run`, not a value that happens to have the name
    place = after.index("curate/curate")
    assert "run" in after[:place] and after[place - 1] not in TAKES_VALUE


@pytest.mark.parametrize("line", UNTOUCHED)
def test_every_other_command_line_stays(line):
    assert completed(line.split()) == line.split()


@given(st.lists(st.sampled_from(["deployment", "run", "curate", "--watch", "--tag", "-p", "--odd", "x=1", "--", "ls"])))
def test_at_most_one_argument_changes_and_only_to_a_known_name(arguments):
    after = completed(arguments)
    changed = [(old, new) for old, new in zip(arguments, after, strict=True) if old != new]
    assert changed in ([], list(DEPLOYMENTS.items()))
    assert completed(after) == after


def test_the_options_are_those_of_the_installed_prefect():
    from prefect.cli._app import _app
    from prefect.cli.deployment import deployment_app

    with_value, flags = set(), {"--help"}
    for argument in [*deployment_app["run"].assemble_argument_collection(), *_app.meta.assemble_argument_collection()]:
        names = {name for name in argument.names if name.startswith("-") and not name.startswith("--empty-")}
        (flags if any(name.startswith("--no-") for name in names) else with_value).update(names)
    assert with_value | {"-jv"} == TAKES_VALUE  # Prefect rewrites -jv to --job-variable itself
    assert flags == FLAGS


def _context(api_url):
    return HookContext(prefect_version="3", api_url=api_url, logger_factory=logging.getLogger)


@pytest.mark.parametrize(
    ("argv", "original"),
    [
        (["/venv/bin/prefect", "deployment", "run", "curate"], ["/venv/bin/python", "/venv/bin/prefect"]),
        (
            ["-m", "deployment", "run", "curate"],
            ["python", "-X", "dev", "-m", "prefect", "deployment", "run", "curate"],
        ),
    ],
)
def test_the_command_of_prefect_is_recognised(monkeypatch, argv, original):
    monkeypatch.setattr(sys, "argv", list(argv))
    monkeypatch.setattr(sys, "orig_argv", original)
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:  # not Prefect, but it answers
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = setup_environment(ctx=_context(f"http://127.0.0.1:{server.server_port}/api"))
        server.shutdown()
    assert sys.argv == [*argv[:-1], "curate/curate"]
    assert result.env == {"DO_NOT_TRACK": "1"}


@pytest.mark.parametrize(
    ("argv", "original"),
    [
        (["other.py", "deployment", "run", "curate"], ["python", "other.py", "deployment", "run", "curate"]),
        (["-m", "deployment", "run", "curate"], ["python", "-m", "other", "deployment", "run", "curate"]),
        ([""], ["python"]),
    ],
)
def test_other_programs_that_import_prefect_keep_their_arguments(monkeypatch, argv, original):
    monkeypatch.setattr(sys, "argv", list(argv))
    monkeypatch.setattr(sys, "orig_argv", original)
    setup_environment(ctx=_context("http://127.0.0.1:9/api"))
    assert sys.argv == argv


def test_without_a_server_the_command_ends_with_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prefect", "deployment", "run", "curate"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SystemExit, match=r"No Prefect server runs at .*start it with: python -m flows.service start"):
        setup_environment(ctx=_context(f"http://127.0.0.1:{port}/api"))


def test_a_server_elsewhere_is_left_to_prefect(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prefect", "deployment", "run", "curate"])
    setup_environment(ctx=_context("https://prefect.example.org/api"))
    assert sys.argv[-1] == "curate/curate"
