"""What a fetched file really is, and the same pictures in a clean container of our own.

Only files are read, and only as one of a few video containers: a playlist that calls itself .mp4 could make ffmpeg open
other files and addresses. No picture is re-encoded here.
"""

from __future__ import annotations

import errno
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from curation.ffmpeg import ffmpeg_exe
from curation.files import fsync
from curation.ingest.failures import FailureCode, StageError

if TYPE_CHECKING:
    from curation.observe.video import VideoIndex

# Audio containers are here so that a song is found to have no picture, instead of being taken for damage.
READ_ONLY = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,mpegts,mpeg,avi,flv,asf,ogg,mp3,wav,flac,aac",
}
# By kind of source, the containers to try: the first that can hold the stream without touching its times.
_TARGETS = {
    "mov,mp4,m4a,3gp,3g2,mj2": (".mp4", ".mov"),
    "matroska,webm": (".webm", ".mp4", ".mkv"),
}
_OTHER_TARGETS = (".mp4", ".mkv")
_NO_TIMES = "avi"  # stores no presentation times: they are made up anew, correctly, when it is rewritten
_TIME_TOLERANCE_S = 1.1e-3  # Matroska keeps milliseconds
_TIMEOUT_S = 900

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
DISK_FULL = "There is no room for the file on the disk."
_DISK_FULL_EXITS = frozenset({256 - errno.ENOSPC, 256 - errno.EDQUOT, 256 - errno.EFBIG, -signal.SIGXFSZ})


def container_format(path: Path) -> str:
    """ffmpeg's name for a file's container. Raises StageError(CORRUPT) if it is none: a page, a playlist, a picture."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path), options=READ_ONLY, metadata_errors="ignore") as container:
            return container.format.name
    except FFmpegError:
        pass
    raise StageError(FailureCode.CORRUPT, "The file is no video container that can be read.")


def strip(index: VideoIndex, source_format: str, target: Path) -> Path:
    """Copy the video stream of `index` alone into a container without tags, chapters or other streams.

    Codec, presentation times, rotation, pixel aspect and edit list stay; title, artist, location, cover art and sound
    go. `target` is a path without suffix; returns the fsynced file. Raises StageError CORRUPT or DISK_FULL.
    """
    for suffix in _TARGETS.get(source_format, _OTHER_TARGETS):
        written = target.with_name(target.name + suffix)
        if _copy(index.path, index.stream, written) and (source_format == _NO_TIMES or _same_times(index, written)):
            fsync(written)
            return written
        written.unlink(missing_ok=True)
    raise StageError(FailureCode.CORRUPT, "The video stream cannot be copied into a container.")


def _copy(source: Path, stream: int, written: Path) -> bool:
    import ffmpeg

    command = (
        ffmpeg.input(f"file:{source}", fflags="+genpts", **READ_ONLY)
        .output(
            f"file:{written}",
            map=f"0:{stream}",
            c="copy",
            map_metadata=-1,
            map_chapters=-1,
            fflags="+bitexact",
            **{"flags:v": "+bitexact"},
        )
        .global_args("-nostdin", "-hide_banner", "-loglevel", "error")
        .overwrite_output()
        .compile(cmd=ffmpeg_exe())
    )
    try:
        code = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        code = None
    if code in _DISK_FULL_EXITS:
        raise StageError(FailureCode.DISK_FULL, DISK_FULL)
    return code == 0


def _same_times(index: VideoIndex, written: Path) -> bool:
    import numpy as np

    from curation.observe.video import index_video

    try:
        times = index_video(written).times_s
    except StageError:
        return False
    return len(times) == len(index.times_s) and bool(np.abs(times - index.times_s).max() <= _TIME_TOLERANCE_S)
