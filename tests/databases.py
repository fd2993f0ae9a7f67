"""A PostgreSQL server for tests: our own, on a free loopback port, in a temporary folder, ended with the test."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from curation.catalog import Catalog
from curation.ingest.failures import UsageError


@contextmanager
def postgres_server() -> Iterator[str]:
    """The server's URL; skips the test where there are no server programs."""
    if find_spec("psycopg") is None:
        pytest.skip("no psycopg: install the `postgres` extra")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("postgres") or "/none").parent]
    programs = found[-1]
    if not (programs / "initdb").exists():
        pytest.skip("no PostgreSQL server programs on this machine")
    folder = Path(tempfile.mkdtemp(prefix="unish-postgres-"))
    user = None
    if os.getuid() == 0:  # the server refuses to run as root
        user = "nobody"
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    try:
        make = [str(programs / "initdb"), "-D", str(data), "-U", "unish", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(make, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        serve = [str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
        server = subprocess.Popen([*serve, "-c", "fsync=off"], user=user, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            url = f"postgresql://unish@127.0.0.1:{port}/postgres"
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and server.poll() is None:
                try:
                    Catalog(url)
                    break
                except UsageError:
                    time.sleep(0.1)
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # "fast": ends without waiting for clients
            server.wait(timeout=60)
    finally:
        shutil.rmtree(folder)
