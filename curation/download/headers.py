"""What a server's headers say, or None where that is nonsense: they may hold anything."""

from __future__ import annotations

import email.utils
import re
from typing import Any


def content_range(headers: Any) -> tuple[int | None, int | None]:
    """First byte and total of a Content-Range header."""
    match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", headers.get("Content-Range") or "")
    return (int(match[1]), int(match[2])) if match else (None, None)


def number(text: str | None) -> int | None:
    """A header's count of bytes; None if it is none."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text) else None


def http_date(text: str | None) -> float | None:
    """A header's date as Unix time; None if it is none."""
    date = email.utils.parsedate_tz(text or "")
    try:
        return None if date is None else float(email.utils.mktime_tz(date))
    except (ValueError, OverflowError):  # year 99999, a zone of a million hours
        return None


def tame(headers: Any) -> None:
    """Take out what yt-dlp would trip over: it reads every Content-Length as a number."""
    if "Content-Length" in headers and number(headers.get("Content-Length")) is None:
        del headers["Content-Length"]
