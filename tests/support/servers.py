"""Servers on loopback for tests: real sockets, real HTTP, scripted faults. Nothing here reaches another machine."""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MODIFIED = "Wed, 01 Jan 2025 00:00:00 GMT"
_TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".mkv": "video/x-matroska", ".html": "text/html"}


@dataclass(frozen=True)
class Fault:
    """One scripted answer. Without a status and body, the file itself is sent, changed by the other fields.

    headers: added, or put in place of the usual ones; None as a value leaves the header out.
    cut: the body ends after this many bytes, while Content-Length promises all of it.
    hang: no answer until the server closes; with `cut`, no more of the body.
    drip_s: the body comes in pieces of `drip` bytes, with this many seconds before each.
    ignore_range: the whole file, whatever part is asked for.
    ignore_condition: the part that is asked for, whatever If-Range says.
    """

    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    body: bytes | None = None
    cut: int | None = None
    hang: bool = False
    drip_s: float | None = None
    drip: int = 1
    ignore_range: bool = False
    ignore_condition: bool = False


def redirect(location: str, status: int = 302) -> Fault:
    """An answer that sends the client elsewhere."""
    return Fault(status=status, headers={"Location": location}, body=b"")


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up early are part of the tests


class FileServer:
    """A running server: `host` as host:port, `hits` per path, `requests` as (method, path, Range header).

    headers: those of each request. validators: files have an ETag and a Last-Modified, and If-Range is heeded. A
    request for a full address, as a client sends it to a proxy, is answered with the file of that path.
    """

    def __init__(
        self,
        folder: Path,
        faults: dict[str, Fault | list[Fault]],
        validators: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.folder = folder
        self._validators = validators
        self._scheme = "http" if tls is None else "https"
        self.headers: list[dict[str, str]] = []
        self.hits: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str | None]] = []
        self._faults = {path: [fault] if isinstance(fault, Fault) else list(fault) for path, fault in faults.items()}
        self._once = {path for path, fault in faults.items() if isinstance(fault, list)}
        self._lock = threading.Lock()
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self.host = f"127.0.0.1:{self._http.server_port}"

    def url(self, path: str) -> str:
        """The http address of a path that begins with a slash."""
        return f"{self._scheme}://{self.host}{path}"

    def script(self, path: str, fault: Fault | list[Fault]) -> None:
        """Answer a path with a fault: one for ever, or a list for the next requests and the file after them."""
        with self._lock:
            self._faults[path] = [fault] if isinstance(fault, Fault) else list(fault)
            (self._once.discard if isinstance(fault, Fault) else self._once.add)(path)

    def _next_fault(self, path: str) -> Fault:
        with self._lock:
            waiting = self._faults.get(path, [])
            if not waiting:
                return Fault()
            return waiting.pop(0) if path in self._once else waiting[0]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        wanted = request.headers.get("Range")
        with self._lock:
            self.headers.append(dict(request.headers))
            self.hits[path] += 1
            self.requests.append((request.command, path, wanted))
        fault = self._next_fault(path)
        if fault.hang and fault.cut is None:
            self.closing.wait()
            request.close_connection = True
            return
        file = self.folder / path.lstrip("/")
        status, body = fault.status or 200, fault.body
        headers: dict[str, str | None] = {"Content-Type": _TYPES.get(file.suffix, "application/octet-stream")}
        if body is None and fault.status is None:
            if not file.is_file():
                status, body = 404, b"not found"
            else:
                body = file.read_bytes()
                headers["Accept-Ranges"] = "bytes"
                if self._validators:
                    headers |= {"ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"', "Last-Modified": MODIFIED}
                condition = request.headers.get("If-Range")
                changed = condition not in (None, headers.get("ETag"), headers.get("Last-Modified"))
                if fault.ignore_range or (changed and not fault.ignore_condition):
                    wanted = None
                if span := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or ""):
                    first, last = int(span[1]), min(int(span[2] or len(body)), len(body) - 1)
                    if first >= len(body):
                        status, headers["Content-Range"], body = 416, f"bytes */{len(body)}", b""
                    else:
                        status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(body)}"
                        body = body[first : last + 1]
        body = body or b""
        headers = {**headers, "Content-Length": str(len(body)), **fault.headers}
        if headers["Content-Length"] is None or fault.cut is not None:
            request.close_connection = True
            headers["Connection"] = "close"
        headers = {"Date": request.date_time_string(), **headers}
        request.send_response_only(status)
        for name, value in headers.items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        body = body if fault.cut is None else body[: fault.cut]
        if fault.drip_s is None:
            request.wfile.write(body)
        else:
            for first in range(0, len(body), fault.drip):
                if self.closing.wait(fault.drip_s):
                    break
                request.wfile.write(body[first : first + fault.drip])
        request.wfile.flush()
        if fault.hang:
            self.closing.wait()


@contextmanager
def serve(
    folder: Path,
    faults: dict[str, Fault | list[Fault]] | None = None,
    *,
    validators: bool = False,
    tls: ssl.SSLContext | None = None,
) -> Iterator[FileServer]:
    """Serve a folder on 127.0.0.1, on a free port, with byte ranges; it ends with the block."""
    server = FileServer(folder, faults or {}, validators, tls)
    thread = threading.Thread(target=server._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server._http.shutdown()
        server._http.server_close()
        thread.join()
