"""From yt-dlp's errors to failure codes.

No platform is asked here: the errors are yt-dlp's own objects, raised and reported by yt-dlp's own YoutubeDL, with the
texts that its extractors and the platforms' players use.
"""

from __future__ import annotations

import email.utils
import errno
import http.client
import io
import time
from pathlib import Path

import pytest
import yt_dlp
from yt_dlp.networking import Response
from yt_dlp.networking.exceptions import (
    CertificateVerifyError,
    HTTPError,
    IncompleteRead,
    NoSupportingHandlers,
    RequestError,
    TransportError,
)
from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError, UnsupportedError, UserNotLive

from curation.download.causes import Cause, cause_of
from curation.download.guard import AddressRefused
from curation.failures import FailureCode


class Quiet:
    def debug(self, message):
        pass

    warning = error = debug


def reported(error: Exception) -> DownloadError:
    """The DownloadError that YoutubeDL makes of an error in an extractor."""

    def fail(ydl):
        raise error

    ydl = yt_dlp.YoutubeDL({"logger": Quiet()}, auto_init=False)
    with pytest.raises(Exception) as caught:
        yt_dlp.YoutubeDL._handle_extraction_exceptions(fail)(ydl)
    return caught.value


def http_error(status: int, headers: dict[str, str] | None = None) -> HTTPError:
    message = http.client.HTTPMessage()
    for name, value in (headers or {}).items():
        message[name] = value
    return HTTPError(Response(io.BytesIO(), "https://example.org/x", message, status))


def during(cause: Exception, error: Exception) -> Exception:
    """`error` as it is when raised while `cause` is being handled."""
    try:
        try:
            raise cause
        except type(cause):
            raise error  # noqa: B904 - the implicit context is what is tested
    except type(error) as raised:
        return raised


SAYINGS = [
    # YouTube's player
    ("Private video. Sign in if you've been granted access to this video. Use --cookies", FailureCode.PRIVATE),
    ("Video unavailable. This video is private", FailureCode.PRIVATE),
    ("Video unavailable. This video has been removed by the uploader", FailureCode.REMOVED),
    (
        "Video unavailable. This video is no longer available because the account has been terminated.",
        FailureCode.REMOVED,
    ),
    ("This video has been removed for violating YouTube's Terms of Service", FailureCode.REMOVED),
    ("Video unavailable", FailureCode.REMOVED),
    ("This live stream recording is not available.", FailureCode.REMOVED),
    (
        "Video unavailable. It contains content from X, who has blocked it in your country on copyright grounds",
        FailureCode.GEO,
    ),
    ("Sign in to confirm your age. This video may be inappropriate for some users. Use --cookies", FailureCode.AGE),
    (
        "Sign in to confirm you’re not a bot. Use --cookies-from-browser or --cookies for the authentication",
        FailureCode.BOT_CHECK,
    ),
    ("Sign in to confirm you're not a bot. Use --cookies", FailureCode.BOT_CHECK),
    ("Video unavailable. YouTube is requiring a captcha challenge before playback", FailureCode.BOT_CHECK),
    (
        "Video unavailable. This content isn't available, try again later. It has been rate-limited by YouTube",
        FailureCode.RATE_LIMITED,
    ),
    (
        "This video is available to this channel's members on level: Gold (or any higher level).",
        FailureCode.MEMBERS,
    ),
    (
        "Join this channel to get access to members-only content like this video, and other exclusive perks.",
        FailureCode.MEMBERS,
    ),
    ("This video requires payment to watch", FailureCode.MEMBERS),
    ("This video is DRM protected", FailureCode.DRM),
    ("This live event will begin in 3 hours.", FailureCode.LIVE),
    ("Premieres in 20 minutes", FailureCode.LIVE),
    # Bilibili
    (
        "This video may be deleted or geo-restricted. You might want to try a VPN or a proxy server (with --proxy)",
        FailureCode.REMOVED,
    ),
    ("You have exceeded the rate limit. Try again later", FailureCode.RATE_LIMITED),
    ("Unable to download video info: 352, please wait and try later", FailureCode.RATE_LIMITED),
    ("Request is blocked by server (412), please wait and try later.", FailureCode.RATE_LIMITED),
    ("This video is for premium members only. Use --cookies", FailureCode.MEMBERS),
    ("This is a supporter-only video: some title", FailureCode.MEMBERS),
    ("This video is only available for registered users. Use --cookies", FailureCode.PRIVATE),
    # TikTok
    ("You do not have permission to view this post. Log into an account that has access", FailureCode.PRIVATE),
    ("This post may not be comfortable for some audiences. Log in for access", FailureCode.AGE),
    ("Your IP address is blocked from accessing this post", FailureCode.GEO),
    ("Video not available, status code 10204", FailureCode.REMOVED),
    ("Unable to solve JS challenge", FailureCode.BOT_CHECK),
    ("TikTok is requiring login for access to this content", FailureCode.PRIVATE),
    # Vimeo
    (
        "This request has been blocked due to its TLS fingerprint. Install a required impersonation dependency",
        FailureCode.BOT_CHECK,
    ),
    ("Cannot download embed-only video. Because of its privacy settings", FailureCode.PRIVATE),
    ("This video is protected by a password, use the --video-password option", FailureCode.PRIVATE),
    ("This live event is scheduled for tomorrow", FailureCode.LIVE),
    # yt-dlp itself
    ("Requested format is not available. Use --list-formats for a list of available formats", FailureCode.NO_FORMAT),
    ("No video formats found!", FailureCode.UNSUPPORTED),
    ("Unable to extract initial state", FailureCode.UNSUPPORTED),
]


@pytest.mark.parametrize(("saying", "code"), SAYINGS)
def test_what_a_platform_says(saying, code):
    assert cause_of(reported(ExtractorError(saying, expected=True, video_id="x", ie="Y"))) == Cause(code)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GeoRestrictedError("This video is not available", countries=["DE"]), FailureCode.GEO),
        (UserNotLive(), FailureCode.LIVE),
        (UnsupportedError("https://example.org/private-video"), FailureCode.UNSUPPORTED),
        (AddressRefused("address refused"), FailureCode.REFUSED),
        (NoSupportingHandlers([], []), FailureCode.REFUSED),
        (RequestError("Invalid URL"), FailureCode.REFUSED),
        (OSError(errno.ENOSPC, "No space left on device"), FailureCode.DISK_FULL),
        (OSError(errno.EDQUOT, "Quota exceeded"), FailureCode.DISK_FULL),
    ],
)
def test_what_the_class_of_an_error_says(error, code):
    assert cause_of(reported(error)) == Cause(code)


def test_an_error_that_wraps_another_is_judged_by_both():
    assert (
        cause_of(reported(during(http_error(404), ExtractorError("Unable to download webpage")))).code
        is FailureCode.REMOVED
    )
    assert cause_of(reported(ExtractorError("Unable to download", cause=http_error(410)))).code is FailureCode.REMOVED
    said = ExtractorError("Private video. Sign in if you've been granted access to this video")
    assert cause_of(reported(during(http_error(500), said))).code is FailureCode.PRIVATE


@pytest.mark.parametrize(
    ("status", "site", "direct"),
    [
        (401, FailureCode.PRIVATE, FailureCode.PRIVATE),
        (403, FailureCode.BOT_CHECK, FailureCode.PRIVATE),
        (404, FailureCode.REMOVED, FailureCode.REMOVED),
        (410, FailureCode.REMOVED, FailureCode.REMOVED),
        (418, FailureCode.UNSUPPORTED, FailureCode.UNSUPPORTED),
        (451, FailureCode.GEO, FailureCode.GEO),
    ],
)
def test_final_statuses(status, site, direct):
    error = reported(ExtractorError("Unable to download webpage", cause=http_error(status)))
    assert cause_of(error) == Cause(site)
    assert cause_of(error, direct=True) == Cause(direct)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (408, FailureCode.TIMEOUT),
        (412, FailureCode.RATE_LIMITED),
        (429, FailureCode.RATE_LIMITED),
        (500, FailureCode.HTTP_5XX),
        (503, FailureCode.HTTP_5XX),
    ],
)
def test_transient_statuses_are_tried_again_when_the_server_says(status, code):
    assert cause_of(http_error(status)) == Cause(code, again=True)
    assert cause_of(http_error(status, {"Retry-After": "17"})) == Cause(code, again=True, retry_after_s=17.0)


@pytest.mark.parametrize("value", ["soon", "-5", "1.5", "٣", "9" * 40, "", "Fri, 99 Xxx 2026"])
def test_a_senseless_retry_after_is_ignored(value):
    assert cause_of(http_error(429, {"Retry-After": value})).retry_after_s is None


def test_retry_after_as_a_date():
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    assert 25 < cause_of(http_error(503, {"Retry-After": soon})).retry_after_s <= 31
    assert cause_of(http_error(503, {"Retry-After": past})).retry_after_s == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TransportError("Connection refused"), FailureCode.NETWORK),
        (TransportError(cause=TimeoutError("x")), FailureCode.TIMEOUT),
        (IncompleteRead(10, 20), FailureCode.NETWORK),
        (CertificateVerifyError("bad certificate"), FailureCode.NETWORK),
    ],
)
def test_a_broken_connection_is_tried_again(error, code):
    assert cause_of(reported(ExtractorError("Unable to download webpage", cause=error))) == Cause(code, again=True)
    assert cause_of(error) == Cause(code, again=True)


def test_what_yt_dlp_reports_as_text_alone_is_judged_with_the_last_request():
    text = DownloadError(
        "ERROR: \r[download] Got error: HTTP Error 503: whatever the server calls it", (None, None, None)
    )
    assert cause_of(text, http_error(503)).code is FailureCode.HTTP_5XX
    cut = DownloadError("ERROR: \r[download] Got error: 1000 bytes read, 5000 more expected", (None, None, None))
    assert cause_of(cut) == Cause(FailureCode.NETWORK, again=True)
    slow = DownloadError(
        "ERROR: \r[download] Got error: HTTPConnectionPool(host='h', port=1): Read timed out.", (None,) * 3
    )
    assert cause_of(slow) == Cause(FailureCode.TIMEOUT, again=True)
    empty = DownloadError("ERROR: Did not get any data blocks", (None, None, None))
    assert cause_of(empty) == Cause(FailureCode.CORRUPT)


def test_the_phrases_of_yt_dlp_are_still_the_ones_that_it_uses():
    """An update of yt-dlp that changes a text must fail here, not turn a failure into another one in silence."""
    root = Path(yt_dlp.__file__).parent
    expected = {
        "extractor/common.py": ["This video is DRM protected", "This video is only available for registered users"],
        "YoutubeDL.py": ["Requested format is not available"],
        "downloader/http.py": ["Did not get any data blocks"],
        "downloader/common.py": ["[download] Got error: "],
        "extractor/youtube/_video.py": ["isn't available, try again later", "rate-limited by", "captcha challenge"],
        "extractor/bilibili.py": [
            "may be deleted or geo-restricted",
            "exceeded the rate limit",
            "please wait and try later",
            "premium members",
            "supporter-only",
            "is blocked by server",
            "is rejected by server",
        ],
        "extractor/tiktok.py": [
            "permission to view",
            "not be comfortable for some",
            "IP address is blocked",
            "Video not available",
            "JS challenge",
            "requiring login",
        ],
        "extractor/vimeo.py": [
            "TLS fingerprint",
            "data center IP",
            "protected by a password",
            "live event is scheduled",
        ],
    }
    for name, phrases in expected.items():
        source = (root / name).read_text(encoding="utf-8")
        assert [phrase for phrase in phrases if phrase not in source] == [], name
