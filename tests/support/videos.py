"""Videos of every kind that decoders read differently, and the frame numbers that each must show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curation.video.index import VideoIndex
from tests.support.numbered import HEIGHT, WIDTH, Shown, encode, ffmpeg, picture, shown_by_ffmpeg

_H264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p")
_BASE = (*_H264, "-g", "30", "-bf", "2")
_HEVC = ("-c:v", "libx265", "-preset", "ultrafast")
_VARIABLE = "select='not(mod(n,3))+between(n,40,60)',setpts='PTS+gt(N,25)*0.4/TB'"
_PAUSED = [n for n in range(90) if n % 3 == 0 or 40 <= n <= 60]


@dataclasses.dataclass(frozen=True)
class Video:
    """A file, the numbers of the frames it was made to show, and what ffmpeg shows of it."""

    path: Path
    numbers: list[int]
    shown: Shown

    @staticmethod
    def of(path: Path, numbers: list[int]) -> Video:
        """Read what ffmpeg shows of it."""
        return Video(path, numbers, shown_by_ffmpeg(path))


@lru_cache(maxsize=1)
def _pictures(count: int = 300) -> list[np.ndarray]:
    return [picture(number) for number in range(count)]


def _plain(path: Path) -> list[int]:
    encode(path, _pictures()[:90], *_BASE)
    return list(range(90))


def _edited(path: Path) -> list[int]:
    """A section cut out by stream copy: an edit list hides the frames from the key frame to the cut."""
    whole = path.with_name("whole.mp4")
    encode(whole, _pictures()[:90], *_BASE)
    ffmpeg("-ss", "1.4", "-i", whole, "-c", "copy", path)
    return list(range(42, 90))


def _rotated(degrees: int) -> Callable[[Path], list[int]]:
    def make(path: Path) -> list[int]:
        stored = [np.rot90(frame, -degrees // 90) for frame in _pictures()[:60]]
        encode(path.with_name("stored.mkv"), stored, *_BASE)
        ffmpeg("-display_rotation", str(degrees), "-i", path.with_name("stored.mkv"), "-c", "copy", path)
        return list(range(60))

    return make


def _coded(*arguments: str, count: int = 60) -> Callable[[Path], list[int]]:
    def make(path: Path) -> list[int]:
        encode(path, _pictures()[:count], *arguments)
        return list(range(count))

    return make


def _variable(path: Path) -> list[int]:
    encode(path, _pictures()[:90], "-vf", _VARIABLE, "-fps_mode", "vfr", *_BASE)
    return _PAUSED


def _odd(path: Path) -> list[int]:
    frames = [picture(number, WIDTH + 1, HEIGHT + 1) for number in range(60)]
    encode(path, frames, *_H264[:-1], "yuv444p")
    return list(range(60))


def _groups(options: str, count: int) -> Callable[[Path], list[int]]:
    return _coded("-c:v", "libx264", "-preset", "fast", "-pix_fmt", "yuv420p", "-x264-params", options, count=count)


def _many_groups_hevc(path: Path) -> list[int]:
    options = "open-gop=1:keyint=24:min-keyint=24:bframes=3:scenecut=0:log-level=error"
    encode(path, _pictures()[:150], *_HEVC, "-pix_fmt", "yuv420p", "-x265-params", options)
    return list(range(150))


def _cut_anywhere(make: Callable[[Path], list[int]], count: int) -> Callable[[Path], list[int]]:
    """The first key frame is one of an open group, whose frames before it cannot be decoded, nor shown."""

    def cut(path: Path) -> list[int]:
        whole = path.with_name("whole.mp4")
        make(whole)
        ffmpeg("-ss", "1.65", "-i", whole, "-c", "copy", path)
        return list(range(48, count))

    return cut


_AV1 = ("-c:v", "libaom-av1", "-usage", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p")
_FULL_RANGE = ("-vf", "scale=out_color_matrix=bt709:out_range=full", "-colorspace", "bt709", "-color_range", "pc")

# Files that decord reads as PyAV does,
BY_DECORD: dict[str, Callable[[Path], list[int]]] = {
    "plain.mp4": _plain,
    "plain.mkv": _coded(*_BASE),
    "colours.mp4": _coded(*_BASE, *_FULL_RANGE),
    "hevc.mp4": _coded(*_HEVC, "-pix_fmt", "yuv420p", "-x265-params", "log-level=error"),
    "variable.mp4": _variable,
    "anamorphic.mp4": _coded("-vf", "scale=64:64,setsar=3/2", *_BASE),
    "tall-pixels.mp4": _coded("-vf", "scale=96:32,setsar=1/2", *_BASE),
    "one-frame.mp4": _coded(*_BASE, count=1),
    "fragmented.mp4": _coded(*_BASE, "-movflags", "frag_keyframe+empty_moov"),
}
# and files that it would not open, or read differently. In open groups of pictures the frames shown before a key frame
# need the group before it; with intra refresh no frame stands alone.
_OPEN = "open-gop=1:keyint=24:min-keyint=24:bframes=3:b-pyramid=normal:scenecut=0"
_SHORT = "open-gop=1:keyint=2:min-keyint=1:bframes=3:scenecut=0"
_REFRESH = "intra-refresh=1:keyint=24:bframes=0:scenecut=0"

VIDEOS = BY_DECORD | {
    "vp9.webm": _coded("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p"),
    "edited.mp4": _edited,
    "rotated.mp4": _rotated(90),
    "rotated.mkv": _rotated(270),
    "upside-down.mp4": _rotated(180),
    "late.mkv": _coded(*_BASE, "-output_ts_offset", "5"),
    "late.mp4": _coded(*_BASE, "-output_ts_offset", "5"),
    "many-groups.mp4": _groups(_OPEN, 300),
    "short-groups.mp4": _groups(_SHORT, 60),
    "short-groups.ts": _groups(_SHORT, 60),
    "refreshed.mp4": _groups(_REFRESH, 150),
    "many-groups-hevc.mp4": _many_groups_hevc,
    "cut-anywhere.ts": _cut_anywhere(_many_groups_hevc, 150),
    "cut-anywhere-h264.ts": _cut_anywhere(_groups(f"{_OPEN}:repeat-headers=1", 150), 150),
    "ten-bit.mp4": _coded(*_HEVC, "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=error"),
    "odd.mp4": _odd,
    "narrow.mp4": _coded("-vf", "scale=48:32", *_BASE),
    "av1.mp4": _coded(*_AV1),
    "av1.webm": _coded(*_AV1),
    "vp8.webm": _coded("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "10", "-cpu-used", "5"),
    "old.avi": _coded("-c:v", "mpeg4", "-bf", "2", "-q:v", "3"),
    "stream.ts": _coded(*_BASE),
}


def geometry(rotation: int = 0, times_s: NDArray[np.float64] | None = None, **fields: int) -> VideoIndex:
    """An index without a file, good for nothing but its geometry and its times."""
    times_s = np.zeros(1) if times_s is None else times_s
    known = {"rotation": rotation, "times_s": times_s, "end_s": float(times_s[-1]) + 0.04} | fields
    return VideoIndex(**{field.name: 0 for field in dataclasses.fields(VideoIndex)} | known)
