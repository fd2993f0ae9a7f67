"""Makes `prefect deployment run curate` mean `prefect deployment run curate/curate` in a checkout, with calm progress.

Prefect's own client requires FLOW/DEPLOYMENT. This `prefect.plugins` hook runs before the command line is parsed and
completes exactly that one positional argument. With `--watch`, flows.watch shows the run instead of a line for every
event. Every other command line stays unchanged. The hook is active only where `[tool.prefect.plugins]` of
pyproject.toml allows it.
"""

from __future__ import annotations

import os
import sys
from base64 import b64encode
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from prefect.plugins import HookContext, SetupResult, register_hook

from flows.access import VARIABLE

DEPLOYMENTS = {"curate": "curate/curate"}

# The options of `prefect deployment run`, and the global ones, by whether a value follows. An unlisted option may or
# may not take a value, so what follows it is ambiguous and the arguments stay unchanged.
TAKES_VALUE = {"--profile", "--name", "--id", "--job-variable", "-jv", "--param", "-p", "--params", "--tag"}
TAKES_VALUE |= {"--start-in", "--start-at", "--watch-interval", "--watch-timeout", "--flow-run-name"}
FLAGS = {"--watch", "--no-watch", "--prompt", "--no-prompt", "--help"}


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult:
    """Complete the deployment's name in `sys.argv`, replace `--watch`, and switch the client's usage reports off.

    Every program in the checkout that uses Prefect gets the authentication string of the server that runs there. If
    the name was completed and no local server would accept the command, it exits with a sentence.
    """
    from flows.service import credentials

    environment = credentials(ctx.api_url)
    if _is_prefect_cli(sys.argv, sys.orig_argv):
        arguments = completed(sys.argv[1:])
        if arguments != sys.argv[1:]:
            sys.argv[1:] = arguments
            _need_server(ctx.api_url, os.environ | environment)
        if watched(arguments):
            _watch_calmly()
    return SetupResult(env={"DO_NOT_TRACK": "1"} | environment)


def completed(arguments: Sequence[str]) -> list[str]:
    """The arguments of the `prefect` command, with the name of a known deployment completed."""
    result = list(arguments)
    words = _positional(result)
    if len(words) == 3 and result[words[0]] in ("deployment", "deployments") and result[words[1]] == "run":
        result[words[2]] = DEPLOYMENTS.get(result[words[2]], result[words[2]])
    return result


def watched(arguments: Sequence[str]) -> bool:
    """Whether the `prefect` command runs a deployment of ours and watches it."""
    words = [arguments[index] for index in _positional(arguments)]
    return words[1:2] == ["run"] and words[2:] in [[name] for name in DEPLOYMENTS.values()] and "--watch" in arguments


def _watch_calmly() -> None:
    from prefect.cli import flow_runs_watching  # the command imports the function from this module

    from flows.watch import watch_flow_run

    flow_runs_watching.watch_flow_run = watch_flow_run


def _positional(arguments: Sequence[str]) -> list[int]:
    """The indices of the positional arguments; empty if an unknown option makes them ambiguous."""
    found: list[int] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument == "--":
            return found + list(range(index + 1, len(arguments)))
        if not argument.startswith("-"):
            found.append(index)
        elif argument in TAKES_VALUE:
            index += 1
        elif argument not in FLAGS and argument.partition("=")[0] not in TAKES_VALUE | FLAGS:
            return []
        index += 1
    return found


def _is_prefect_cli(argv: Sequence[str], original: Sequence[str]) -> bool:
    """True for `prefect ...` and for `python -m prefect ...`, which has argv[0] == "-m" while prefect is imported."""
    if argv[:1] == ["-m"]:
        return original[len(original) - len(argv)] == "prefect"
    return bool(argv) and Path(argv[0]).stem == "prefect"


def _need_server(api_url: str | None, environment: Mapping[str, str]) -> None:
    address = urlsplit(api_url or "")
    if address.hostname not in ("127.0.0.1", "localhost"):
        return  # a server on another machine: Prefect itself reports its errors
    request = Request(f"{api_url}/admin/version")
    if string := environment.get(VARIABLE):
        request.add_header("Authorization", f"Basic {b64encode(string.encode()).decode()}")
    try:
        build_opener(ProxyHandler({})).open(request, timeout=5).close()
    except HTTPError as error:
        if error.code == 401:
            sys.exit(
                f"Error: The Prefect server at {api_url} requires another authentication string; set {VARIABLE} to it."
            )
    except URLError:
        sys.exit(f"Error: No Prefect server runs at {api_url}; start it with: python -m flows.service start")
    except (OSError, HTTPException):
        return  # the server is only slow: Prefect waits longer
