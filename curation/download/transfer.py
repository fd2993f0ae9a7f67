"""Fetches one file into a work folder, within limits, and resumes it where a connection broke.

yt-dlp resumes any part that it finds. Here a part is resumed only with If-Range, and only if the response is the rest
of the same content; after any other response the file starts again. Streams in fragments always start again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from yt_dlp.networking import Request
from yt_dlp.networking.exceptions import HTTPError
from yt_dlp.utils import parse_http_range

from curation.download.guard import Guard, GuardedYoutubeDL
from curation.download.headers import content_range, number
from curation.download.limits import Limits
from curation.download.resume import Validator, drop

Ask = Callable[[Request], Any]


class _Transfer:
    """The requests for one file. `resumed`: whether a part from an earlier connection was resumed."""

    def __init__(self, work: Path, format_id: str, limits: Limits) -> None:
        self._work, self._format_id, self._limits = work, format_id, limits
        self._known = Validator.read(work)
        if self._known is None or self._known.format_id != format_id:
            self._known = None
            drop(work)
        self._broken = self._known is not None
        self.resumed = False

    def open(self, request: Request, ask: Ask) -> Any:
        """Send a request of yt-dlp's downloader, which asks only for the rest if there is a part."""
        start = parse_http_range(request.headers.get("Range"))[0] or 0
        if start and self._known is not None:
            if self._broken:  # a later piece of an unbroken transfer needs no condition
                request.headers["If-Range"] = self._known.condition
            response = _rest(request, ask)
            if response is not None and self._known.continued_by(response, start):
                self.resumed |= self._broken
                self._broken = False
                self._limits.announced(self._known.total, start)
                return response
            if response is not None and response.status != 200:
                response.close()
                response = None
            if response is None:
                for header in ("Range", "If-Range"):
                    request.headers.pop(header, None)
                response = ask(request)
        else:
            response = ask(request)
            if start:
                return response
        self._begin(response)
        return response

    def _begin(self, response: Any) -> None:
        """Start the file again from this response."""
        drop(self._work)
        self.resumed = self._broken = False
        size = content_range(response.headers)[1] or number(response.headers.get("Content-Length"))
        self._limits.announced(size or 0)
        self._known = Validator.of(self._format_id, response)
        if self._known is not None:
            self._known.write(self._work)


def _rest(request: Request, ask: Ask) -> Any:
    """The response to a request for the rest; None if the server has no such range."""
    try:
        return ask(request)
    except HTTPError as error:
        if error.status not in (412, 416):
            raise
        error.close()
    return None


class FetchingYoutubeDL(GuardedYoutubeDL):
    """GuardedYoutubeDL that fetches into a work folder. `resumed`: whether the file was resumed."""

    def __init__(
        self, guard: Guard, options: dict[str, Any], work: Path, limits: Limits, retries: int, *, extractors: bool
    ) -> None:
        self._work, self._limits, self._retries = work, limits, retries
        self._transfer: _Transfer | None = None
        self.resumed = False
        super().__init__(guard, options, limits.pace, extractors=extractors)

    def urlopen(self, request: Any) -> Any:
        if self._transfer is None or not isinstance(request, Request):
            return super().urlopen(request)
        return self._transfer.open(request, super().urlopen)

    def dl(self, name: str, info: dict[str, Any], subtitle: bool = False, test: bool = False) -> Any:
        self._limits.announced(int(info.get("filesize") or 0))
        if info.get("protocol") in ("http", "https") and "Range" not in (info.get("http_headers") or {}):
            self._transfer = _Transfer(self._work, str(info.get("format_id")), self._limits)
        else:
            drop(self._work)
            self.params["retries"] = self._retries  # of one fragment: a long video does not start again for it
        try:
            return super().dl(name, info, subtitle, test)
        finally:
            if self._transfer is not None:
                self.resumed = self._transfer.resumed
            self._transfer = None
            self.params["retries"] = 0
