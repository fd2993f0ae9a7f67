"""Reads the user's cookies and proxy without leaving a trace.

Neither file is ever written, copied, logged or quoted: errors name the setting and the line, never the content.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from curation.failures import UsageError
from curation.settings import DownloadSettings

_HEADER = "# Netscape HTTP Cookie File\n"
_COOKIE_FIELDS = 7
_EXPIRES = re.compile(r"(?:\d+(?:\.\d+)?)?").fullmatch
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_PROXY_ADVICE = "write one line such as http://host:8080 or socks5://user:password@host:1080 into it"


def check_settings(settings: DownloadSettings) -> None:
    """Raise UsageError for settings that would make every download fail."""
    least, most = settings.pause_s
    if not 0 <= least <= most:
        raise UsageError("The pause between videos (pause_s, --pause) is two numbers of seconds, the smaller first.")
    if settings.cookies is not None:
        cookie_text(settings.cookies)
    if settings.proxy_file is not None:
        proxy_address(settings.proxy_file)


def cookie_text(path: Path) -> str:
    """The text of a Netscape cookie file. Raises UsageError if it cannot be read or has another format.

    yt-dlp writes cookies back to the file or stream it reads, so it gets a copy in memory. It prints lines that it
    cannot parse, so such lines are refused here.
    """
    lines = _read(path, "cookies").splitlines()
    for number, line in enumerate(lines, 1):
        fields = line.removeprefix("#HttpOnly_").split("\t")
        if (line.startswith("#") and not line.startswith("#HttpOnly_")) or not line.strip():
            continue
        if len(fields) != _COOKIE_FIELDS or not _EXPIRES(fields[4]):
            raise UsageError(
                f"Line {number} of the file named by cookies is not a cookie in Netscape format; export the file again."
            )
    return _HEADER + "\n".join(lines) + "\n"


def proxy_address(path: Path) -> str:
    """The one line of a proxy file: an http, https or socks5 address. Raises UsageError if it is anything else."""
    lines = _read(path, "proxy_file").split("\n")
    address = lines[0].strip()
    try:
        parts = urlsplit(address)
        good = parts.scheme in _PROXY_SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if (
        not good
        or any(lines[1:])
        or re.search(r"\s", address)
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
    ):
        raise UsageError(f"The file named by proxy_file contains no valid proxy address; {_PROXY_ADVICE}.")
    return address


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    raise UsageError(f"The file named by {setting} cannot be read as text; correct the setting or the permissions.")
