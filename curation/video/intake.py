"""Checks a downloaded file and copies its video stream, and nothing else, into a clean container."""

from __future__ import annotations

import errno
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from curation.failures import ClipFailure, FailureCode
from curation.files import fsync, sha256_file
from curation.records import VideoFile
from curation.settings import VideoLimits
from curation.video.bounded import READ_ONLY, UNDECODED, decoder_pixels
from curation.video.decode import decode, decode_key_frames
from curation.video.ffmpeg import ffmpeg_exe
from curation.video.index import VideoIndex, index_video, with_index
from curation.video.packets import all_packets
from curation.video.scrub import scrub

# The containers to try for each kind of source: the first that holds the stream without a change of its times is used.
_TARGETS = {
    "mov,mp4,m4a,3gp,3g2,mj2": (".mp4", ".mov"),
    "matroska,webm": (".webm", ".mp4", ".mkv"),
    "avi": (".mp4", ".mkv", ".avi"),
    "mpegts": (".mp4", ".mkv", ".ts"),
}
_OTHER_TARGETS = (".mp4", ".mkv")
_TIME_TOLERANCE_S = 1.1e-3  # Matroska keeps milliseconds
_HELD_TOLERANCE_S = 0.1  # containers round the duration of a last frame, or use a default
_TIMEOUT_S = 900
_DISK_FULL_EXITS = frozenset({256 - errno.ENOSPC, 256 - errno.EDQUOT, 256 - errno.EFBIG, -signal.SIGXFSZ})


def strip(index: VideoIndex, source_format: str, target: Path) -> Path:
    """Copy only the video stream of `index` into a container without tags, chapters or other streams.

    Codec, presentation times, display matrix, pixel aspect and edit list stay; title, artist, location, cover art and
    sound are removed. If no rewritten MP4 shows the same frames, a copy of the file is blanked in place (see scrub).
    `target` is a path without suffix; returns the fsynced file. Raises ClipFailure CORRUPT or DISK_FULL.
    """
    makers: list[tuple[str, Callable[[VideoIndex, Path], bool]]]
    makers = [(suffix, _copy) for suffix in _TARGETS.get(source_format, _OTHER_TARGETS)]
    if source_format.startswith("mov"):
        makers.append((".mp4", _scrub))
    for held in (True, False):  # prefer a copy that shows the last frame for as long; else the same frames are enough
        for suffix, make in makers:
            written = target.with_name(target.name + suffix)
            if make(index, written) and _same_frames(index, source_format, written, held=held):
                fsync(written)
                return written
            written.unlink(missing_ok=True)
    raise ClipFailure(FailureCode.CORRUPT, "The video stream cannot be copied into a container.")


def _scrub(index: VideoIndex, written: Path) -> bool:
    source, stream = index.path, index.stream
    try:
        with av.open(str(source), options=UNDECODED, metadata_errors="ignore") as container:
            for _ in all_packets(container, container.streams[stream]):  # fragments are known only after they are read
                pass
            track = container.streams[stream].id
            samples = [(entry.pos, entry.size) for entry in container.streams[stream].index_entries]
        scrub(source, track, samples, written)
    except (ValueError, FFmpegError):
        return False
    return True


def _copy(index: VideoIndex, written: Path) -> bool:
    import ffmpeg

    command = (
        ffmpeg.input(f"file:{index.path}", fflags="+genpts", max_pixels=decoder_pixels(index.limits), **READ_ONLY)
        .output(
            f"file:{written}",
            map=f"0:{index.stream}",
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
        raise ClipFailure(FailureCode.DISK_FULL)
    return code == 0


def _same_frames(index: VideoIndex, source_format: str, written: Path, *, held: bool) -> bool:
    """Whether a copy shows as many frames at the same times and, if `held`, the last one for as long.

    If the index of the source was made by decoding, the copy is decoded too. If the packets of a copy from AVI
    contradict its decoder, its times are in the wrong order.
    """

    def settle(copy: VideoIndex) -> None:
        if index.decoded:
            for _ in decode(copy, 0, len(copy.times_s)):
                pass

    try:
        promised = index_video(written, index.limits)
        with_index(written, settle, index.limits)
        copy = index_video(written, index.limits)
    except ClipFailure:
        return False
    if copy.decoded != promised.decoded and source_format == "avi":
        return False
    if held and abs(copy.end_s - index.end_s) > _HELD_TOLERANCE_S:
        return False
    return len(copy.times_s) == len(index.times_s) and bool(
        np.abs(copy.times_s - index.times_s).max() <= _TIME_TOLERANCE_S
    )


_VERIFY_KEY_FRAMES = 24


def verify(path: Path, limits: VideoLimits = VideoLimits()) -> VideoFile:
    """Check that a file is a complete, decodable video: no packet is missing, and a spread of key frames decodes.

    The full decode happens once, when the clip is observed; that pass checks every frame.
    Raises ClipFailure as index_video does.
    """
    index = index_video(path, limits)
    if not any(True for _ in decode_key_frames(index, np.flatnonzero(index.key), limit=_VERIFY_KEY_FRAMES)):
        raise ClipFailure(FailureCode.CORRUPT, "no key frame can be decoded")
    return VideoFile(
        path=path,
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        codec=index.codec,
        width=index.width,
        height=index.height,
        frames=len(index.times_s),
        duration_s=index.end_s,
    )
