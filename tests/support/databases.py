"""The catalog's benchmark as tests use it: a PostgreSQL server of our own, or a skip with the reason."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import sqlalchemy as sa

from curation.failures import UsageError


@cache
def catalog_benchmark() -> ModuleType:
    """benchmarks/catalog.py, which makes catalogs and servers."""
    from benchmarks import catalog

    return catalog


@contextmanager
def postgres_server() -> Iterator[str]:
    """The server's URL; skips the test where there are no server programs or no driver."""
    with ExitStack() as stack:
        try:
            url = stack.enter_context(catalog_benchmark().postgres_server("-c", "fsync=off"))
        except UsageError as error:
            pytest.skip(str(error))
        yield url


def execute(url: str, *statements: str) -> list[sa.Row]:
    """The rows of the last of these statements, past the catalog."""
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        results = [connection.exec_driver_sql(statement) for statement in statements]
        return list(results[-1]) if results[-1].returns_rows else []


@contextmanager
def restarting_server() -> Iterator[tuple[str, Callable[..., None]]]:
    """A server's URL and its `pg_ctl`, to be called as in control("restart", "-m", "immediate")."""
    with postgres_server() as url:
        data = Path(execute(url, "SHOW data_directory")[0][0])
        main = Path(f"/proc/{(data / 'postmaster.pid').read_text().split()[0]}/exe").resolve()

        def control(*words: str) -> None:
            if words[0] == "start":  # only a restart remembers port and folder by itself
                words = (*words, "-o", (data / "postmaster.opts").read_text().strip().partition(" ")[2])
            user = "nobody" if os.getuid() == 0 else None
            command = [str(main.with_name("pg_ctl")), "-D", str(data), "-l", str(data / "log"), "-s", *words]
            subprocess.run(command, user=user, cwd=data, check=True, stdout=subprocess.DEVNULL)

        try:
            yield url, control
        finally:
            with suppress(subprocess.CalledProcessError):  # it is down already
                control("stop", "-m", "immediate")


class Line:
    """A TCP line to a database that breaks when a commit is answered: done there, unknown here.

    lose: how often that is still to happen; pause_s: how long nobody gets through after it.
    """

    def __init__(self, url: str) -> None:
        parsed = sa.make_url(url)
        self._server = parsed.host, parsed.port
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = parsed.set(port=self._door.getsockname()[1]).render_as_string(hide_password=False)
        self.lose, self.pause_s, self._open_at = 0, 0.0, 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._door.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._door.accept()[0]
                time.sleep(max(0.0, self._open_at - time.monotonic()))
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server:
            committing = threading.Event()
            back = threading.Thread(target=self._answer, args=(server, client, committing), daemon=True)
            back.start()
            with suppress(OSError):
                commits = 0
                while data := client.recv(2**16):
                    commits += data.count(b"COMMIT")
                    if (
                        b"COMMIT" in data and commits > 1 and self.lose
                    ):  # the first one is that of the connection's settings
                        self.lose -= 1
                        self._open_at = time.monotonic() + self.pause_s
                        committing.set()
                    server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket, committing: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(2**16):
                if committing.is_set():
                    break
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
