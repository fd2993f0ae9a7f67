"""Parses a server's headers. Invalid values give None, because a server may send anything."""

from __future__ import annotations

import email.utils
import re
from typing import Any


def content_range(headers: Any) -> tuple[int | None, int | None]:
    """First byte and total of a Content-Range header."""
    match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", headers.get("Content-Range") or "")
    return (int(match[1]), int(match[2])) if match else (None, None)


def number(text: str | None) -> int | None:
    """The number of bytes in a header; None if it is not a number."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text) else None


def http_date(text: str | None) -> float | None:
    """The date in a header as Unix time; None if it is not a date."""
    date = email.utils.parsedate_tz(text or "")
    try:
        return None if date is None else float(email.utils.mktime_tz(date))
    except (ValueError, OverflowError):  # year 99999, a time zone of a million hours
        return None


def tame(headers: Any) -> None:
    """Remove an invalid Content-Length, because yt-dlp reads every one as a number."""
    if "Content-Length" in headers and number(headers.get("Content-Length")) is None:
        del headers["Content-Length"]
