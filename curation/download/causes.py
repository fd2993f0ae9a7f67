"""Maps an exception of yt-dlp to a failure code.

The exception class and the HTTP status decide; where yt-dlp reports only text, fixed phrases of yt-dlp and of the
platforms do. The text itself is never kept: it contains titles, names and URLs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from urllib3.exceptions import InvalidHeader
from yt_dlp.networking.exceptions import HTTPError, RequestError, TransportError
from yt_dlp.utils import ExtractorError, GeoRestrictedError, UnsupportedError, UserNotLive

from curation.download.guard import AddressRefused
from curation.download.headers import http_date
from curation.failures import DISK_ERRORS, FailureCode

_STATUS = {
    401: FailureCode.PRIVATE,
    402: FailureCode.MEMBERS,
    403: FailureCode.PRIVATE,
    404: FailureCode.REMOVED,
    407: FailureCode.NETWORK,  # the proxy requires a login
    408: FailureCode.TIMEOUT,
    410: FailureCode.REMOVED,
    412: FailureCode.RATE_LIMITED,  # Bilibili's answer to too many requests
    425: FailureCode.RATE_LIMITED,
    429: FailureCode.RATE_LIMITED,
    451: FailureCode.GEO,
}

# The first match wins. On the left: fixed phrases of yt-dlp 2026.8 and of the platforms' own players.
_PHRASES = tuple(
    (re.compile(pattern, re.IGNORECASE), code)
    for pattern, code in (
        (r"DRM protected|requires DRM", FailureCode.DRM),
        (r"not a bot\b|captcha challenge|TLS fingerprint|data center IP|JS challenge", FailureCode.BOT_CHECK),
        (
            r"isn't available, try again later|exceeded the rate limit|rate-limited by|is blocked by server"
            r"|rejected by server|please wait and try later",
            FailureCode.RATE_LIMITED,
        ),
        (r"confirm your age|age.restricted|may be inappropriate|not be comfortable for some", FailureCode.AGE),
        (
            r"channel's members|members.only|join this channel|premium members|supporter-only|requires payment"
            r"|need to purchase",
            FailureCode.MEMBERS,
        ),
        (r"may be deleted or geo-restricted", FailureCode.REMOVED),
        (
            r"geo.?restrict|in your country|from your location|IP address is blocked"
            r"|not available in your region",
            FailureCode.GEO,
        ),
        (
            r"live event will begin|premieres in|premiere will begin|not currently live|live event is scheduled",
            FailureCode.LIVE,
        ),
        (
            r"private video|video is private|privacy settings|protected by a password|permission to view"
            r"|only available for registered users|requiring login|sign in to|login required|log in for access",
            FailureCode.PRIVATE,
        ),
        (
            r"video unavailable|video is unavailable|no longer available|has been removed|been terminated"
            r"|live event has ended|recording is not available|video is not available|video not available"
            r"|does not exist|violating YouTube",
            FailureCode.REMOVED,
        ),
        (r"requested format is not available", FailureCode.NO_FORMAT),
        (r"did not get any data blocks", FailureCode.CORRUPT),
    )
)
_TIMED_OUT = re.compile(r"timed out")
_TRANSPORT = re.compile(r"\[download\] Got error: |content too short")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an attempt failed. `again`: retry in the same call; `retry_after_s`: the wait the server asks for."""

    code: FailureCode
    again: bool = False
    retry_after_s: float | None = None


def cause_of(error: BaseException, last_request: RequestError | None = None, *, direct: bool = False) -> Cause:
    """The cause of an error that yt-dlp raised.

    last_request: the error of the latest request, for failures that yt-dlp reports only as text.
    direct: the video is a plain link, where 403 is the owner's decision; a platform sends 403 to a suspected bot.
    """
    chain = list(_chain(error))
    if not any(isinstance(link, RequestError) for link in chain) and last_request is not None:
        chain.extend(_chain(last_request))
    for link in chain:
        if isinstance(link, AddressRefused):
            return Cause(FailureCode.REFUSED)
        if isinstance(link, OSError) and link.errno in DISK_ERRORS:
            return Cause(FailureCode.DISK_FULL)
        if isinstance(link, GeoRestrictedError):
            return Cause(FailureCode.GEO)
        if isinstance(link, UserNotLive):
            return Cause(FailureCode.LIVE)
        if isinstance(link, UnsupportedError):
            return Cause(FailureCode.UNSUPPORTED)
    said = " ".join(link.orig_msg for link in chain if isinstance(link, ExtractorError)) or str(error)
    for phrase, code in _PHRASES:
        if phrase.search(said):
            return Cause(code)
    for link in chain:
        if isinstance(link, HTTPError):
            return _http_cause(link, direct)
    if any(isinstance(link, TimeoutError) or "Timeout" in type(link).__name__ for link in chain):
        return Cause(FailureCode.TIMEOUT, again=True)
    if any(isinstance(link, TransportError | InvalidHeader) for link in chain) or _TRANSPORT.search(said):
        code = FailureCode.TIMEOUT if _TIMED_OUT.search(said) else FailureCode.NETWORK
        return Cause(code, again=True)
    if any(isinstance(link, RequestError) for link in chain):
        return Cause(FailureCode.REFUSED)  # a redirect to something other than an http URL
    return Cause(FailureCode.UNSUPPORTED)


def _http_cause(error: HTTPError, direct: bool) -> Cause:
    if error.status >= 500:
        return Cause(FailureCode.HTTP_5XX, again=True, retry_after_s=_retry_after(error))
    code = _STATUS.get(error.status, FailureCode.UNSUPPORTED)
    if error.status == 403 and not direct:
        code = FailureCode.BOT_CHECK
    again = code in (FailureCode.RATE_LIMITED, FailureCode.TIMEOUT)
    return Cause(code, again=again, retry_after_s=_retry_after(error) if again else None)


def _retry_after(error: HTTPError) -> float | None:
    """The wait in seconds from a Retry-After header, a number or a date; None if it is neither."""
    value = error.response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    date = http_date(value)
    return None if date is None else max(0.0, date - time.time())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all its causes, nearest first; yt-dlp keeps some causes in its own attributes."""
    waiting, seen = [error], set[int]()
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        reported = getattr(link, "exc_info", None) or (None, None, None)
        waiting += [reported[1], getattr(link, "cause", None), link.__cause__, link.__context__]
