"""The format of each platform's video ids, and the URLs of its videos."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from curation.addresses import address_allowed, host_listed

# A segment of a local path: no leading dot, dash or space, no trailing dot or space: never ".." and never an option.
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.,+=@ -]{0,254}(?<![. ])"
# Per platform: the pattern of an id, and what to write instead of a wrong one.
_IDS = {
    "youtube": (r"[A-Za-z0-9_-]{11}", "write the 11 characters (A-Z a-z 0-9 - _) that follow watch?v="),
    "bilibili": (r"BV1[0-9A-Za-z]{9}", "write BV1 and the 9 letters or digits after it"),
    "tiktok": (r"[1-9][0-9]{0,24}", "write the digits after /video/, as text (a spreadsheet may have rounded them)"),
    "vimeo": (r"[1-9][0-9]{0,24}", "write the digits that follow vimeo.com/"),
    "http": (
        r"(?=.{1,2000}\Z)https?://(?P<host>[a-z0-9.-]{1,253})(?P<port>:[1-9][0-9]{0,4})?"
        r"(?:/(?!\.{1,2}(?:/|\Z))(?:[A-Za-z0-9_.~,+=@-]|%[2-9A-F][0-9A-F])+)+",
        "write http(s)://host/path of a file: lower-case host, no user, query or fragment, other characters as %XX",
    ),
    "local": (
        rf"(?=.{{1,1024}}\Z){_SEGMENT}(?:/{_SEGMENT})*",
        "write a path below the root such as folder/clip.mp4, of A-Z a-z 0-9 _ . , + = @ - and spaces",
    ),
}
PLATFORMS = tuple(_IDS)
_MATCH = {platform: re.compile(pattern).fullmatch for platform, (pattern, _) in _IDS.items()}
INTEGER_IDS = ("tiktok", "vimeo")
_HOST_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?").fullmatch
_PRIVATE_SUFFIXES = (".local", ".internal", ".localdomain", ".home.arpa")
_UNRESERVED_OR_SEPARATOR = re.compile(r"%(?:2[DEF]|3[0-9]|[46][1-9A-F]|[57][0-9A]|5[CF]|7[EF])")


def validate_video_id(platform: str, video_id: str, *, allow_loopback: bool = False) -> None:
    """Check that an id is safe to use in a URL or a path; raises ValueError with a text that says what to write.

    youtube, bilibili, tiktok, vimeo: the platform's own id. local: a POSIX path relative to a root given at run time.
    http: a link to a file in its one canonical spelling; private, link-local and metadata addresses are refused, and
    loopback unless `allow_loopback`. Which hosts may be used is decided at run time, not here.
    """
    if platform not in _MATCH:
        raise ValueError(f"write one of {', '.join(PLATFORMS)} as the platform")
    match = _MATCH[platform](video_id)
    if match is None:
        raise ValueError(_IDS[platform][1])
    if platform == "http":
        _validate_link(video_id, match, allow_loopback)


def _validate_link(link: str, match: re.Match[str], allow_loopback: bool) -> None:
    host, port = match["host"], match["port"]
    if port and (int(port[1:]) > 65535 or port == {"http": ":80", "https": ":443"}[link.partition(":")[0]]):
        raise ValueError("leave out the default port, or write one up to 65535")
    if _UNRESERVED_OR_SEPARATOR.search(link):
        raise ValueError("write letters, digits, dots, dashes and slashes as they are, not as %XX")
    labels = host.split(".")
    if not all(map(_HOST_LABEL, labels)):
        raise ValueError(_IDS["http"][1])
    if labels[-1].isdigit() or labels[-1].startswith("0x"):  # other programs read such hosts as numbers
        try:
            allowed = address_allowed(host, allow_loopback=allow_loopback)
        except ValueError:
            allowed = False
    elif labels[-1] == "localhost":
        allowed = allow_loopback
    else:
        allowed = len(labels) > 1 and not host.endswith(_PRIVATE_SUFFIXES)
    if not allowed:
        raise ValueError("give a public host: private, loopback and link-local addresses are refused")


def link_listed(link: str, hosts: tuple[str, ...]) -> bool:
    """True if `hosts` names the host of a valid http link, with or without its port."""
    parts = urlsplit(link)
    return host_listed(parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme], hosts)


# Platform -> URL of an id, and the one extractor of yt-dlp that may read it.
SITES = {
    "youtube": ("https://www.youtube.com/watch?v={}", "youtube"),
    "bilibili": ("https://www.bilibili.com/video/{}", "BiliBili"),
    "tiktok": ("https://www.tiktok.com/@_/video/{}", "TikTok"),
    "vimeo": ("https://vimeo.com/{}", "vimeo"),
}
