"""Downloads one video from its platform and leaves a verified, clean file on this machine.

The whole file is fetched, because a section cut from a stream has hidden frames that decoders treat differently. It is
fetched into its own folder, checked, stripped of tags and sound, and renamed into place. Titles, descriptions,
thumbnails and yt-dlp's messages are neither written nor logged.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.download.credentials import cookie_text, proxy_address
from curation.download.limits import Limits
from curation.download.resume import FETCHED, drop, sweep_now_and_then, tidy, workspace
from curation.failures import DISK_ERRORS, ClipFailure, FailureCode, Trait
from curation.files import fsync, sha256_file
from curation.platforms import SITES, link_listed, validate_video_id
from curation.records import ClipRef, VideoFile
from curation.settings import DownloadSettings, VideoLimits
from curation.video.container import container_format
from curation.video.intake import strip

if TYPE_CHECKING:  # the first download loads yt-dlp, not the import of this module
    from curation.download.causes import Cause

Progress = Callable[[int, int], None]

MAX_WAIT_S = 120.0
_SLOW_DOWN = 5.0  # a wait after a rate limit is this many times longer than after another failure


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A file as the server sent it; `resumed`: it came over more than one connection."""

    path: Path
    resumed: bool = False


def download(
    ref: ClipRef,
    folder: Path,
    settings: DownloadSettings,
    progress: Progress | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> VideoFile:
    """Fetch the whole video of a clip to `folder`/<video_key>/video.<ext>, replacing what is there.

    folder: the run's videos folder. progress: called with (bytes so far, total bytes or 0). The file contains only the
    video stream: no sound, tags or chapters. The limit on the short side selects among a platform's formats; a plain
    link or a local file has only one, which is taken as it is. Transient failures are retried up to `settings.retries`
    times, after growing, jittered waits, or after the wait the server asks for if that is at most MAX_WAIT_S. The part
    received before a connection broke stays below `folder`/.parts; this call or a later one resumes it if the server
    confirms that the content is unchanged. A download that stays below an average of min_rate.LEAST_BYTES_PER_S is
    stopped, whatever its size. Raises ClipFailure with a fixed text, and UsageError for unusable settings (see
    check_settings).
    """
    try:
        validate_video_id(ref.platform, ref.video_id, allow_loopback=settings.allow_loopback)
    except ValueError:
        raise ClipFailure(FailureCode.REFUSED) from None
    folder.mkdir(parents=True, exist_ok=True)
    sweep_now_and_then(folder)
    limits = Limits(settings, folder, progress)
    limits.room()
    try:
        with workspace(folder, ref.video_key) as work:
            home = folder / ref.video_key
            if ref.platform == "local":
                return _settle(_local(ref, settings), work, home, limits, settings.limits)
            options = _options(work, settings, limits, sleep)
            fetched = _fetch(ref, work, settings, options, limits, sleep)
            try:
                return _settle(fetched.path, work, home, limits, settings.limits)
            except ClipFailure as error:
                if not fetched.resumed or Trait.REFETCH not in error.code.traits:
                    raise
            # The resumed parts did not belong to the same file after all: fetch it again from the beginning.
            fetched = _fetch(ref, work, settings, options, limits, sleep)
            return _settle(fetched.path, work, home, limits, settings.limits)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
    raise ClipFailure(FailureCode.DISK_FULL)


def _settle(fetched: Path, work: Path, home: Path, limits: Limits, video_limits: VideoLimits) -> VideoFile:
    """Verify a fetched file, strip it and rename the result into `home`."""
    from curation.video.index import index_video
    from curation.video.intake import verify

    limits.room(fetched.stat().st_size)
    source_format = container_format(fetched, video_limits)  # before anything else opens the file
    video = verify(fetched, video_limits)
    clean = strip(index_video(fetched, video_limits), source_format, work / "video")
    final = home / clean.name
    video = replace(video, path=final, sha256=sha256_file(clean), size_bytes=clean.stat().st_size)
    home.mkdir(exist_ok=True)
    clean.replace(final)
    for other in home.glob("video.*"):
        if other != final:
            other.unlink()
    fsync(home)
    return video


def _local(ref: ClipRef, settings: DownloadSettings) -> Path:
    if settings.local_root is None:
        raise ClipFailure(FailureCode.REFUSED, "No root folder is set for local files.")
    root = settings.local_root.resolve()
    if not root.is_dir():  # the disk may be unmounted, which does not mean that its files are gone
        raise ClipFailure(FailureCode.REFUSED, "The root folder for local files does not exist.")
    path = Path(os.path.realpath(root / ref.video_id))  # where links really lead
    if not path.is_relative_to(root):
        raise ClipFailure(FailureCode.REFUSED, "The path leads outside the root folder through a link.")
    if not os.path.lexists(path):
        raise ClipFailure(FailureCode.REMOVED, "There is no such file below the root folder.")
    if not path.is_file():
        raise ClipFailure(FailureCode.REFUSED, "The path is not a regular file.")
    return path


def _fetch(
    ref: ClipRef,
    work: Path,
    settings: DownloadSettings,
    options: dict[str, Any],
    limits: Limits,
    sleep: Callable[[float], None],
) -> _Fetched:
    for attempt in itertools.count():
        tidy(work)
        outcome = _try(ref, work, settings, options, limits)
        if isinstance(outcome, _Fetched):
            return outcome
        wait = random.uniform(0.5, 1.5) * 2.0**attempt
        if outcome.code is FailureCode.RATE_LIMITED:
            wait *= _SLOW_DOWN
        wait = min(wait, MAX_WAIT_S) if outcome.retry_after_s is None else max(wait, outcome.retry_after_s)
        if not outcome.again or attempt >= settings.retries or wait > MAX_WAIT_S:
            # Raised outside any handler: yt-dlp's error, with a title in its text, must not become the context.
            said = "The server sent no data." if outcome.code is FailureCode.CORRUPT else ""
            raise ClipFailure(outcome.code, said, outcome.retry_after_s)
        sleep(wait)
    raise AssertionError("unreachable")


def _try(
    ref: ClipRef, work: Path, settings: DownloadSettings, options: dict[str, Any], limits: Limits
) -> _Fetched | Cause:
    """One attempt: the file, or the Cause of the failure."""
    from yt_dlp.utils import YoutubeDLError

    from curation.download.causes import cause_of
    from curation.download.guard import Guard
    from curation.download.transfer import FetchingYoutubeDL

    direct = ref.platform == "http"
    if direct:
        if not link_listed(ref.video_id, settings.http_hosts):
            raise ClipFailure(FailureCode.REFUSED, "The host of this link is not on the list of allowed hosts.")
        guard = Guard(settings.http_hosts, settings.allow_loopback)
    else:
        guard = Guard(None, settings.allow_loopback)
        url, extractor = SITES[ref.platform]
        options = {**options, "allowed_extractors": [extractor]}
    if settings.cookies is not None:  # yt-dlp writes cookies back to their source, which is memory here
        options = {**options, "cookiefile": io.StringIO(cookie_text(settings.cookies))}
    if settings.proxy_file is not None:
        options = {**options, "proxy": proxy_address(settings.proxy_file)}
    with FetchingYoutubeDL(guard, options, work, limits, settings.retries, extractors=not direct) as ydl:
        try:
            if direct:
                ydl.process_ie_result(_direct(ref))
            else:
                ydl.extract_info(url.format(ref.video_id))
            stopped = None
        except (YoutubeDLError, OSError) as error:
            return cause_of(error, ydl.last_error, direct=direct)
        except ClipFailure as error:
            stopped = ClipFailure(error.code, error.message)
    if stopped is not None:  # by one of our limits; raised here, without yt-dlp's stack frames and errors
        raise stopped
    fetched = work / FETCHED
    if not fetched.is_file():
        raise ClipFailure(FailureCode.UNSUPPORTED, "yt-dlp ended without an error and without a file.")
    drop(work)
    return _Fetched(fetched, ydl.resumed)


def _direct(ref: ClipRef) -> dict[str, Any]:
    """What an extractor would return for a plain link, which is fetched as it is: no page or playlist is ever read."""
    return {
        "id": ref.video_key,
        "title": ref.video_key,
        "url": ref.video_id,
        "webpage_url": ref.video_id,
        "protocol": ref.video_id.partition(":")[0],
        "ext": "mp4",
        "extractor": "generic",
        "extractor_key": "Generic",
    }


def _options(work: Path, settings: DownloadSettings, limits: Limits, sleep: Callable[[float], None]) -> dict[str, Any]:
    def wait_for_fragment(n: int) -> float:
        wait = min(MAX_WAIT_S, random.uniform(0.5, 1.5) * 2.0**n)
        sleep(wait)
        limits.pace.add(wait)  # otherwise a server that fails every second request could delay the download forever
        return 0.0  # the wait left for yt-dlp itself

    plain = "[protocol~='^(https?|m3u8|m3u8_native|http_dash_segments)$']"
    h264 = "[vcodec~='^(avc|h264)']"
    # The limit is on the short side, as platforms label quality: 1080x1920 is 1080p. For each kind of format, portrait
    # formats are tried by width, then all formats by height; the formats of one video have one orientation.
    cap = settings.max_height
    portrait, landscape = f"[aspect_ratio<=1][width<={cap}]", f"[height<={cap}]"
    unknown = f"[height<=?{cap}]"  # some platforms do not report the height
    kinds = ((f"bv{h264}", landscape), (f"b{h264}", landscape), ("bv", landscape), ("bv*", unknown))
    choices = [kind + size for kind, otherwise in kinds for size in (portrait, otherwise)]
    return {
        "format": "/".join(choice + plain for choice in choices),
        "outtmpl": {"default": FETCHED},  # a suffix from the platform never becomes part of a file name
        "paths": {"home": str(work)},
        "match_filter": _not_live,
        "progress_hooks": [limits.hook],
        "socket_timeout": settings.timeout_s,
        "ratelimit": settings.bytes_per_s,
        # only _fetch decides about retries, except for single segments of long videos
        "retries": 0,
        "extractor_retries": 0,
        "file_access_retries": 0,
        "fragment_retries": 0,
        "retry_sleep_functions": {"http": wait_for_fragment},
        "skip_unavailable_fragments": False,  # a missing segment is a failure, not a shorter video
        "noplaylist": True,
        "playlist_items": "1",
        "geo_bypass": False,  # no faked country
        "cachedir": False,
        "quiet": True,
        "noprogress": True,
        "color": "never",
        "updatetime": False,
        "check_formats": False,
        "fixup": "never",  # the container is rewritten anyway
        # ffmpeg would open URLs itself and bypass the guard
        "external_downloader": {"default": "native"},
        "ffmpeg_location": str(work / "none"),
    }


def _not_live(info: dict[str, Any], *, incomplete: bool = False) -> None:
    if info.get("is_live") or info.get("live_status") in ("is_live", "is_upcoming"):
        raise ClipFailure(FailureCode.LIVE)
