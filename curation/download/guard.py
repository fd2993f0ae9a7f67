"""yt-dlp with guarded connections: every request, redirect and segment goes to an allowed host and address.

yt-dlp follows redirects and playlists wherever they point. Here one request handler replaces all of yt-dlp's own. It
checks the URL of each hop and resolves names itself, so it connects to exactly the address that it has checked. A proxy
resolves names itself, so only the URL is checked there. Nothing here prints or keeps yt-dlp's messages.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import urllib3
import yt_dlp.globals
from yt_dlp import YoutubeDL
from yt_dlp.networking._helper import create_connection, make_ssl_context
from yt_dlp.networking._requests import RequestsHTTPAdapter, RequestsRH
from yt_dlp.networking.exceptions import HTTPError, RequestError

from curation.addresses import address_allowed, host_listed
from curation.download.headers import tame
from curation.download.min_rate import Pace, paced_response
from curation.failures import ClipFailure, FailureCode

# Plugins are code from the user's configuration folders; nobody reviewed them for this use.
yt_dlp.globals.plugin_dirs.value = []

PAGE_BYTES = 32 << 20  # of a page, a playlist or a key, which yt-dlp holds in memory; videos go to disk
TOO_LONG = f"A response is larger than the {PAGE_BYTES >> 20} MB allowed for a page or a playlist."
_BLOCK = 1 << 20


class AddressRefused(RequestError):
    """A request or a redirect leads to a host or address that is not allowed. yt-dlp passes this class on unchanged."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Where requests may go. `hosts`: only these ("host" or "host:port"); None for every public host."""

    hosts: tuple[str, ...] | None
    allow_loopback: bool

    def check_url(self, url: str) -> None:
        """Raise AddressRefused unless the URL is http(s) and its host is listed and not a refused IP address."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (KeyError, ValueError):
            raise AddressRefused("not an http address") from None
        if self.hosts is not None and not host_listed(host, port, self.hosts):
            raise AddressRefused("host not listed")
        try:
            allowed = address_allowed(host, allow_loopback=self.allow_loopback)
        except ValueError:  # a name; its addresses are checked when it is resolved
            return
        if not allowed:
            raise AddressRefused("address refused")

    def connect(self, resolved: tuple[Any, ...], timeout: float, source_address: Any) -> socket.socket:
        """Connect to one result of getaddrinfo if its address is allowed; AddressRefused if not."""
        family, kind, protocol, _, address = resolved
        if not address_allowed(address[0], allow_loopback=self.allow_loopback):
            raise AddressRefused("address refused")
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            if source_address:
                connection.bind(source_address)
            connection.connect(address)
        except OSError:
            connection.close()
            raise
        return connection


def _guarded_pools(guard: Guard) -> dict[str, type]:
    class Connection(urllib3.connection.HTTPConnection):
        def _new_conn(self) -> socket.socket:
            try:
                return create_connection(
                    (self.host, self.port), self.timeout, self.source_address, _create_socket_func=guard.connect
                )
            except TimeoutError as error:
                raise urllib3.exceptions.ConnectTimeoutError(self, "connection timed out") from error
            except OSError as error:
                raise urllib3.exceptions.NewConnectionError(self, "connection failed") from error

    class SecureConnection(Connection, urllib3.connection.HTTPSConnection):
        pass

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    return {"http": Pool, "https": SecurePool}


def _paced_pools(pools: dict[str, type], response: type[http.client.HTTPResponse]) -> dict[str, type]:
    """The same pools, with connections that create responses of this class."""

    def paced(pool: Any) -> type:
        connection = type("PacedConnection", (pool.ConnectionCls,), {"response_class": response})
        return type("PacedPool", (pool,), {"ConnectionCls": connection})

    return {scheme: paced(pool) for scheme, pool in pools.items()}


class _Adapter(RequestsHTTPAdapter):
    def __init__(self, guard: Guard, response: type[http.client.HTTPResponse], **options: Any) -> None:
        self._guard, self._response = guard, response
        super().__init__(**options)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = _paced_pools(_guarded_pools(self._guard), self._response)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **options)
        if not known:
            manager.pool_classes_by_scheme = _paced_pools(manager.pool_classes_by_scheme, self._response)
        return manager

    def send(self, request: Any, *args: Any, **options: Any) -> Any:
        self._guard.check_url(request.url)  # requests sends every hop of a redirect through here
        response = super().send(request, *args, **options)
        if response.is_redirect:  # requests would read the whole body to reuse the connection
            response._content, response._content_consumed = b"", True
            response.raw.close()
        return response


@functools.cache
def _ssl_context(**options: Any) -> ssl.SSLContext:
    """One context for all downloads of a process: loading the certificates takes longer than fetching a small file."""
    return make_ssl_context(**options)


class _GuardedRH(RequestsRH):
    def __init__(self, guard: Guard, pace: Pace | None, **options: Any) -> None:
        self._guard, self._pace = guard, pace
        super().__init__(**options)

    def _make_sslcontext(self, legacy_ssl_support: bool | None = None) -> ssl.SSLContext:
        legacy = self.legacy_ssl_support if legacy_ssl_support is None else legacy_ssl_support
        certificates = {"use_certifi": not self.prefer_system_certs, **self._client_cert}
        return _ssl_context(verify=self.verify, legacy_support=legacy, **certificates)

    def _create_instance(self, cookiejar: Any, legacy_ssl_support: bool | None = None) -> Any:
        session = super()._create_instance(cookiejar, legacy_ssl_support)
        adapter = _Adapter(
            self._guard,
            paced_response(self.timeout, self._pace),
            ssl_context=self._make_sslcontext(legacy_ssl_support=legacy_ssl_support),
            source_address=self.source_address,
            max_retries=urllib3.util.retry.Retry(False),
        )
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        return session


class _Silence:
    """Drops yt-dlp's messages, because they contain titles and names."""

    def debug(self, message: str) -> None:
        pass

    info = warning = error = debug


class GuardedYoutubeDL(YoutubeDL):
    """A silent YoutubeDL that checks every connection with a Guard.

    last_error: the error of the latest request, None if it succeeded; yt-dlp reports some failures only as text.
    pace: the minimum rate over all its responses together.
    """

    def __init__(self, guard: Guard, options: dict[str, Any], pace: Pace | None = None, *, extractors: bool) -> None:
        self._guard, self._pace = guard, pace
        self.last_error: RequestError | None = None
        super().__init__({**options, "logger": _Silence()}, auto_init=extractors)

    def build_request_director(self, handlers: Iterable[Any], preferences: Any = None) -> Any:
        return super().build_request_director([functools.partial(_GuardedRH, self._guard, self._pace)])

    def urlopen(self, request: Any) -> Any:
        self.last_error = None
        try:
            with contextlib.nullcontext() if self._pace is None else self._pace.asking():
                response = super().urlopen(request)
        except RequestError as error:
            self.last_error = error
            if self._pace is not None:
                self._pace.check()
            if isinstance(error, HTTPError):
                _bound(error.response)
            raise
        if self._pace is not None:
            self._pace.check()
        tame(response.headers)
        _bound(response)
        return response


def _bound(response: Any) -> None:
    """Limit a read of the whole response to PAGE_BYTES after decompression; more raises ClipFailure(UNSUPPORTED)."""
    some = response.read

    def read(amt: int | None = None) -> bytes:
        if amt is not None:
            return some(amt)
        blocks, size = [], 0
        while block := some(_BLOCK):
            blocks.append(block)
            size += len(block)
            if size > PAGE_BYTES:
                response.close()
                raise ClipFailure(FailureCode.UNSUPPORTED, TOO_LONG)
        return b"".join(blocks)

    response.read = read
