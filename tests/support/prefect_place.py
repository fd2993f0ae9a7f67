"""Where a test's Prefect service lives, and commands as a user types them."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def command(*arguments: str | Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the checkout's environment in the checkout, as a user would, who knows no string."""
    program, *rest = map(str, arguments)
    own = {name: value for name, value in os.environ.items() if name != "PREFECT_API_AUTH_STRING"}
    return subprocess.run(
        [Path(sys.executable).with_name(program), *rest],
        cwd=ROOT,
        env=own | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@dataclass(frozen=True)
class Place:
    """Where the session's service lives."""

    home: Path
    api_url: str

    def service(self, action: str) -> subprocess.CompletedProcess[str]:
        """`python -m flows.service ACTION`."""
        return command("python", "-m", "flows.service", action)

    @property
    def record(self) -> dict:
        """What the service wrote down about itself."""
        return json.loads((self.home / "service.json").read_text())

    @property
    def string(self) -> str:
        """The authentication string that the service made."""
        return (self.home / "auth-string").read_text().strip()

    def telling(self, folder: Path) -> list[str]:
        """The files below a folder that have the string's secret part in them, or what goes into a header."""
        secrets = (self.string.partition(":")[2].encode(), base64.b64encode(self.string.encode()))
        files = [path for path in folder.rglob("*") if path.is_file()]
        return [path.name for path in files if any(secret in path.read_bytes() for secret in secrets)]

    @contextmanager
    def known(self) -> Iterator[None]:
        """Prefect in this process, and what it starts, knows the string."""
        from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

        with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_AUTH_STRING: self.string}):
            patch.setenv("PREFECT_API_AUTH_STRING", self.string)
            yield

    def processes(self, token: str) -> list[psutil.Process]:
        """Living processes that the service started, directly or not."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("UNISH_SERVICE", "").startswith(token)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def running(self) -> bool:
        """Whether server and worker live."""
        if not (self.home / "service.json").exists():
            return False
        record = self.record
        return {record["server"], record["worker"]} <= {process.pid for process in self.processes(record["token"])}

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        """A client of the server."""
        from prefect.client.orchestration import get_client

        with self.known(), get_client(sync_client=True) as client:
            yield client


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Poll until the condition holds; fails with `what` after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)
