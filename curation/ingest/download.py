"""One video from its platform to a verified, clean file on this machine.

The whole file is fetched (a section cut from a stream hides frames that decoders disagree on), into a fresh folder,
checked, freed of tags and sound, and renamed into place. Titles, descriptions, thumbnails and yt-dlp's messages are
neither written nor logged.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.files import fsync, sha256_file
from curation.ingest.container import DISK_ERRORS, DISK_FULL, container_format, strip
from curation.ingest.failures import FailureCode, StageError
from curation.manifest import ClipRef, link_listed, validate_video_id
from curation.records import VideoFile
from curation.settings import DownloadSettings

if TYPE_CHECKING:  # yt-dlp is loaded by the first download, not by whoever imports this module
    from curation.ingest.causes import Cause

Progress = Callable[[int, int], None]

MAX_WAIT_S = 120.0
_SLOW_DOWN = 5.0  # a server that asks for fewer requests waits this much longer than one that failed

# Platform -> URL of an id, and the one extractor of yt-dlp that may read it.
_SITES = {
    "youtube": ("https://www.youtube.com/watch?v={}", "youtube"),
    "bilibili": ("https://www.bilibili.com/video/{}", "BiliBili"),
    "tiktok": ("https://www.tiktok.com/@_/video/{}", "TikTok"),
    "vimeo": ("https://vimeo.com/{}", "vimeo"),
}

_SAID = {
    FailureCode.REMOVED: "The video is no longer there.",
    FailureCode.PRIVATE: "The video is not open to the public.",
    FailureCode.GEO: "The video is not shown in this region.",
    FailureCode.AGE: "The video is shown to signed-in adults only.",
    FailureCode.MEMBERS: "The video is shown to paying members only.",
    FailureCode.DRM: "The video is protected by DRM.",
    FailureCode.LIVE: "The video is a live stream, running or announced.",
    FailureCode.NO_FORMAT: "The platform offers no suitable format.",
    FailureCode.UNSUPPORTED: "yt-dlp found no video at this address.",
    FailureCode.BOT_CHECK: "The platform takes this machine for a robot.",
    FailureCode.RATE_LIMITED: "The server asks for fewer requests.",
    FailureCode.HTTP_5XX: "The server had an error of its own.",
    FailureCode.NETWORK: "The connection failed or broke off.",
    FailureCode.TIMEOUT: "The server did not answer in time.",
    FailureCode.DISK_FULL: DISK_FULL,
    FailureCode.CORRUPT: "The server sent no data.",
    FailureCode.REFUSED: "The address, or one it redirects to, is not allowed.",
}


def download(
    ref: ClipRef,
    folder: Path,
    settings: DownloadSettings,
    progress: Progress | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> VideoFile:
    """Fetch the whole video of a clip to `folder`/<video_key>/video.<ext>, replacing what is there.

    folder: the run's videos folder. progress: called with (bytes so far, bytes in all or 0). The file holds the picture
    alone: no sound, tags or chapters. The height cap chooses among a platform's formats; a plain link or a local file
    has one and is taken as it is. Transient failures are tried again up to `settings.retries` times, after growing,
    jittered waits or as long as the server asks if that is not over MAX_WAIT_S. Raises StageError with a fixed text.
    """
    try:
        validate_video_id(ref.platform, ref.video_id, allow_loopback=settings.allow_loopback)
    except ValueError:
        raise StageError(FailureCode.REFUSED, _SAID[FailureCode.REFUSED]) from None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{ref.video_key}.", dir=folder) as scratch:
            if ref.platform == "local":
                fetched = _local(ref, settings)
            else:
                fetched = _fetch(ref, Path(scratch), settings, progress, sleep)
            return _settle(fetched, Path(scratch), folder / ref.video_key)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
    raise StageError(FailureCode.DISK_FULL, DISK_FULL)


def _settle(fetched: Path, scratch: Path, home: Path) -> VideoFile:
    """Verify a fetched file, strip it and rename the result into `home`."""
    from curation.observe.video import index_video, verify

    source_format = container_format(fetched)  # before anything else opens the file
    video = verify(fetched)
    clean = strip(index_video(fetched), source_format, scratch / "video")
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
        raise StageError(FailureCode.REFUSED, "No root folder is set for local files.")
    root = settings.local_root.resolve()
    if not root.is_dir():  # a disk that is not mounted: no reason to call every file of it gone
        raise StageError(FailureCode.REFUSED, "The root folder for local files does not exist.")
    path = Path(os.path.realpath(root / ref.video_id))  # where links really lead
    if not path.is_relative_to(root):
        raise StageError(FailureCode.REFUSED, "The file is a link that leaves the root folder.")
    if not os.path.lexists(path):
        raise StageError(FailureCode.REMOVED, "There is no such file below the root folder.")
    if not path.is_file():
        raise StageError(FailureCode.REFUSED, "The path is not a regular file.")
    return path


def _fetch(
    ref: ClipRef, scratch: Path, settings: DownloadSettings, progress: Progress | None, sleep: Callable[[float], None]
) -> Path:
    for attempt in itertools.count():
        fresh = scratch / f"try-{attempt}"
        fresh.mkdir()
        outcome = _try(ref, fresh, settings, progress)
        if isinstance(outcome, Path):
            return outcome
        shutil.rmtree(fresh)
        wait = random.uniform(0.5, 1.5) * 2.0**attempt
        if outcome.code is FailureCode.RATE_LIMITED:
            wait *= _SLOW_DOWN
        wait = min(wait, MAX_WAIT_S) if outcome.retry_after_s is None else max(wait, outcome.retry_after_s)
        if not outcome.again or attempt >= settings.retries or wait > MAX_WAIT_S:
            # Outside any handler: yt-dlp's own error, with a title in its text, must not travel along as context.
            raise StageError(outcome.code, _SAID[outcome.code])
        sleep(wait)
    raise AssertionError("unreachable")


def _try(ref: ClipRef, fresh: Path, settings: DownloadSettings, progress: Progress | None) -> Path | Cause:
    """One try: the file, or the Cause of the failure."""
    from yt_dlp.utils import YoutubeDLError

    from curation.ingest.causes import cause_of
    from curation.ingest.network import Guard, GuardedYoutubeDL

    direct = ref.platform == "http"
    options = _options(fresh, settings, progress)
    if direct:
        if not link_listed(ref.video_id, settings.http_hosts):
            raise StageError(FailureCode.REFUSED, "The host of this link is not on the list of allowed hosts.")
        guard = Guard(settings.http_hosts, settings.allow_loopback)
    else:
        guard = Guard(None, settings.allow_loopback)
        url, extractor = _SITES[ref.platform]
        options["allowed_extractors"] = [extractor]
    with GuardedYoutubeDL(guard, options, extractors=not direct) as ydl:
        try:
            if direct:
                ydl.process_ie_result(_direct(ref))
            else:
                ydl.extract_info(url.format(ref.video_id))
        except (YoutubeDLError, OSError) as error:
            return cause_of(error, ydl.last_error, direct=direct)
    files = [path for path in fresh.iterdir() if path.stem == "video" and path.suffix not in (".part", ".ytdl")]
    if len(files) != 1 or not files[0].is_file():
        raise StageError(FailureCode.UNSUPPORTED, "yt-dlp ended without an error and without a file.")
    return files[0]


def _direct(ref: ClipRef) -> dict[str, Any]:
    """What an extractor would say of a plain link: it is fetched as it is, and no page or playlist is ever read."""
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


def _options(fresh: Path, settings: DownloadSettings, progress: Progress | None) -> dict[str, Any]:
    def hook(state: dict[str, Any]) -> None:
        if progress is not None:
            total = state.get("total_bytes") or state.get("total_bytes_estimate") or 0
            progress(int(state.get("downloaded_bytes") or 0), int(total))

    plain = "[protocol~='^(https?|m3u8|m3u8_native|http_dash_segments)$']"
    h264 = "[vcodec~='^(avc|h264)']"
    low = f"[height<={settings.max_height}]"
    unknown = f"[height<=?{settings.max_height}][vcodec!=?none]"  # some platforms do not say what they have
    choices = (f"bv{h264}{low}", f"b{h264}{low}", f"bv{low}", f"b{unknown}")
    return {
        "format": "/".join(choice + plain for choice in choices),
        "outtmpl": {"default": "video.%(ext)s"},
        "paths": {"home": str(fresh)},
        "match_filter": _not_live,
        "progress_hooks": [hook],
        "socket_timeout": settings.timeout_s,
        # one place decides about trying again, except for single segments of long videos
        "retries": 0,
        "extractor_retries": 0,
        "file_access_retries": 0,
        "fragment_retries": settings.retries,
        "retry_sleep_functions": {"fragment": lambda n: min(MAX_WAIT_S, 2.0**n)},
        "skip_unavailable_fragments": False,  # a missing segment is a failure, not a shorter video
        "noplaylist": True,
        "playlist_items": "1",
        "geo_bypass": False,  # no invented origin
        "cachedir": False,
        "quiet": True,
        "noprogress": True,
        "color": "never",
        "updatetime": False,
        "check_formats": False,
        "fixup": "never",  # the container is rewritten anyway
        # ffmpeg would open addresses on its own, past the guard
        "external_downloader": {"default": "native"},
        "ffmpeg_location": str(fresh / "none"),
    }


def _not_live(info: dict[str, Any], *, incomplete: bool = False) -> None:
    if info.get("is_live") or info.get("live_status") in ("is_live", "is_upcoming"):
        raise StageError(FailureCode.LIVE, _SAID[FailureCode.LIVE])
