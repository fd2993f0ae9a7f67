"""Frames of a video by presentation time, upright and with square pixels, whatever the container says.

Times are seconds relative to the first shown frame. Two decoders are hidden here: PyAV for the sequential pass and for
whatever decord misreads, decord for random access; both give the same frame, and the same pixels, for the same time.
This module never judges a video; it raises CORRUPT or NO_VIDEO for files that are not what they declare.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from curation.files import sha256_file
from curation.ingest.failures import FailureCode, StageError
from curation.records import VideoFile

# Presentation times of one file differ by rounding between containers (mkv keeps milliseconds); half of that is safe
# below 500 frames a second.
TIME_TOLERANCE_S = 1e-3
# Codecs whose packets may hold no shown frame, so that packets cannot be counted against frames.
_HIDDEN_FRAME_CODECS = frozenset({"vp8", "mpeg4", "msmpeg4v3"})
# Codecs that decord 0.6.0 opens and indexes correctly; everything else goes through PyAV.
_DECORD_CODECS = frozenset({"h264", "hevc", "vp9"})
_VERIFY_KEY_FRAMES = 24

RGB = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """What a file declares and what its packets say, without decoding.

    times_s: (n,) float64, sorted presentation times of the shown frames, the first is 0.
    key: (n,) bool, frames that decode on their own.
    width, height: as displayed, with rotation and pixel aspect applied.
    coded_width, coded_height: as stored.
    rotation: degrees counter-clockwise that bring a stored frame upright; a multiple of 90.
    origin: presentation time of the first shown frame in units of time_base.
    """

    path: Path
    codec: str
    stream: int
    width: int
    height: int
    coded_width: int
    coded_height: int
    rotation: int
    times_s: NDArray[np.float64]
    key: NDArray[np.bool_]
    end_s: float
    time_base: Fraction
    origin: int
    edited: bool

    @property
    def fps(self) -> float:
        """Mean rate; for tables only, never to compute a time."""
        return len(self.times_s) / self.end_s if self.end_s > 0 else 0.0

    def span(self, start_s: float, end_s: float | None) -> tuple[int, int]:
        """Indices [first, last) of the frames presented in [start_s, end_s).

        Raises StageError(SPAN_OUT_OF_RANGE) where the span holds no frame or reaches beyond the video by over 0.1 s.
        """
        stop = self.end_s if end_s is None else end_s
        if stop > self.end_s + 0.1 or start_s >= self.end_s:
            raise StageError(
                FailureCode.SPAN_OUT_OF_RANGE, f"the clip ends at {stop:.3f} s, the video at {self.end_s:.3f} s"
            )
        first = int(np.searchsorted(self.times_s, start_s - TIME_TOLERANCE_S))
        last = int(np.searchsorted(self.times_s, stop - TIME_TOLERANCE_S))
        if first >= last:
            raise StageError(FailureCode.SPAN_OUT_OF_RANGE, f"no frame between {start_s:.3f} s and {stop:.3f} s")
        return first, last

    def on_screen(self, times_s: NDArray[np.float64]) -> NDArray[np.intp]:
        """Index of the frame on screen at each time: the last one presented at or before it."""
        found = np.searchsorted(self.times_s, times_s + TIME_TOLERANCE_S, side="right") - 1
        return np.clip(found, 0, len(self.times_s) - 1)


def index_video(path: Path) -> VideoIndex:
    """Read a file's packets and declared geometry; nothing is decoded but the first frame.

    Raises StageError NO_VIDEO (audio, or cover art only) or CORRUPT (unreadable, or less data than declared).
    """
    stat = path.stat()
    return _index_cached(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=32)
def _index_cached(path: Path, mtime_ns: int, size: int) -> VideoIndex:
    if size == 0:
        raise StageError(FailureCode.CORRUPT, "the file is empty")
    try:
        with _open(path) as container:
            return _index(path, container)
    except FFmpegError as error:
        raise StageError(FailureCode.CORRUPT, f"the file cannot be read ({type(error).__name__})") from error


def _open(path: Path) -> Any:
    # metadata_errors: a title in a broken encoding is no reason to refuse a film.
    return av.open(str(path), mode="r", metadata_errors="ignore")


def _video_stream(container: Any) -> Any:
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise StageError(FailureCode.NO_VIDEO, "the file has no video stream")
    stream = max(streams, key=lambda s: s.width * s.height)
    # One process per core: threads inside a decoder cost the same processor time and only blur the accounting.
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "NONE"
    return stream


def _index(path: Path, container: Any) -> VideoIndex:
    stream = _video_stream(container)
    if stream.time_base is None or stream.width == 0:
        raise StageError(FailureCode.CORRUPT, "the video stream has no size or no clock")
    pts: list[int] = []
    key: list[bool] = []
    packets = discarded = 0
    last_end = 0.0  # of any stream: audio may last longer than the picture and still be a complete file
    for packet in container.demux():
        if packet.size == 0:
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None and packet.time_base is not None:
            last_end = max(last_end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        packets += 1
        if packet.is_discard:
            discarded += 1
        elif stamp is not None:
            pts.append(stamp)
            key.append(packet.is_keyframe)
            tail = packet.duration or 0
    if not pts:
        raise StageError(FailureCode.CORRUPT, "the video stream has no frames")
    order = np.argsort(np.asarray(pts), kind="stable")
    stamps = np.asarray(pts, np.int64)[order]
    declared = stream.frames
    if packets < declared:
        raise StageError(FailureCode.CORRUPT, f"{packets} of {declared} declared frames are in the file")
    start = 0.0 if container.start_time is None else container.start_time / 1e6
    whole = None if container.duration is None else container.duration / 1e6 + start
    # Containers that count no frames (Matroska, WebM) declare a duration instead.
    if not declared and whole is not None and container.duration > 0 and last_end < whole - max(0.5, 0.02 * whole):
        raise StageError(FailureCode.CORRUPT, f"the data ends at {last_end:.2f} of {whole:.2f} declared seconds")
    base = Fraction(stream.time_base)
    times = (stamps - stamps[0]) * float(base)
    step = float(np.median(np.diff(times))) if len(times) > 1 else tail * float(base)
    end = float(times[-1]) + (step or 1.0 / float(stream.average_rate or 25))
    rotation = _rotation(path, stream.index)
    aspect = stream.sample_aspect_ratio
    square = float(aspect) if aspect else 1.0
    width, height = round(stream.width * square), stream.height
    if square < 1.0:  # widen the other way: never throw resolution away
        width, height = stream.width, round(stream.height / square)
    if rotation % 180:
        width, height = height, width
    return VideoIndex(
        path=path,
        codec=stream.codec_context.codec.canonical_name,
        stream=stream.index,
        width=width,
        height=height,
        coded_width=stream.width,
        coded_height=stream.height,
        rotation=rotation,
        times_s=times,
        key=np.asarray(key)[order],
        end_s=end,
        time_base=base,
        origin=int(stamps[0]),
        edited=discarded > 0 or stamps[0] * base > Fraction(1, 2),
    )


def _rotation(path: Path, stream_index: int) -> int:
    """Degrees counter-clockwise by which a stored frame must be turned; read from the first decoded frame."""
    with _open(path) as container:
        for frame in container.decode(container.streams[stream_index]):
            return round(frame.rotation / 90) * 90 % 360
    raise StageError(FailureCode.CORRUPT, "no frame of the file can be decoded")


def decode(index: VideoIndex, first: int, last: int, *, only: Iterable[int] | None = None) -> Iterator[tuple[int, Any]]:
    """Decode frames [first, last) in one sequential pass; yields (frame index, av.VideoFrame).

    `only`: yield just these (a sorted sequence of indices), still in one pass. Raises StageError(CORRUPT) where fewer
    frames decode than the packets promise.
    """
    wanted = None if only is None else set(only)
    seen = -1
    missing_allowed = 0 if index.codec not in _HIDDEN_FRAME_CODECS else last - first
    delivered = 0
    try:
        with _open(index.path) as container:
            stream = container.streams[index.stream]
            stream.codec_context.thread_count = 1
            stream.codec_context.thread_type = "NONE"
            _seek(container, stream, index, first)
            for frame in _decode_stream(container, stream):
                if frame.pts is None and frame.dts is None:
                    continue
                stamp = frame.pts if frame.pts is not None else frame.dts
                time = (stamp - index.origin) * float(index.time_base)
                number = int(np.searchsorted(index.times_s, time - TIME_TOLERANCE_S))
                if number <= seen or number < first:
                    continue
                if number >= last:
                    break
                seen = number
                delivered += 1
                if wanted is None or number in wanted:
                    yield number, frame
    except FFmpegError as error:
        raise StageError(FailureCode.CORRUPT, f"the video cannot be decoded ({type(error).__name__})") from error
    if last - first - delivered > missing_allowed:
        raise StageError(FailureCode.CORRUPT, f"{delivered} of {last - first} frames can be decoded")


def _decode_stream(container: Any, stream: Any) -> Iterator[Any]:
    """Decode packet by packet: a damaged packet costs its own frames, which the caller counts, not the rest."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except FFmpegError:
            continue
        yield from (frame for frame in frames if not frame.is_corrupt)


def _seek(container: Any, stream: Any, index: VideoIndex, first: int) -> None:
    """Go to the key frame at or before `first`; from the start where the file has edits, whose seeks are not exact."""
    keys = np.flatnonzero(index.key[: first + 1])
    # One key frame further back than needed: with open groups of pictures the frames after a key frame may need it.
    if index.edited or len(keys) < 2:
        return
    target = index.origin + round(float(index.times_s[keys[-2]]) / float(index.time_base))
    container.seek(target, stream=stream, backward=True, any_frame=False)


def decode_key_frames(index: VideoIndex, first: int, last: int, *, limit: int) -> Iterator[tuple[int, Any]]:
    """Decode key frames of [first, last) only (about a thirteenth of a full decode); at most `limit`, evenly spread."""
    keys = first + np.flatnonzero(index.key[first:last])
    if len(keys) > limit:
        keys = keys[np.linspace(0, len(keys) - 1, limit).round().astype(int)]
    wanted = set(keys.tolist())
    try:
        with _open(index.path) as container:
            stream = container.streams[index.stream]
            stream.codec_context.thread_count = 1
            stream.codec_context.skip_frame = "NONKEY"
            for packet in container.demux(stream):
                # Only the wanted packets reach the decoder.
                if packet.size and packet.pts is not None and _number(index, packet.pts) not in wanted:
                    continue
                for frame in packet.decode():
                    if frame.pts is not None and (number := _number(index, frame.pts)) in wanted:
                        wanted.discard(number)
                        yield number, frame
    except FFmpegError as error:
        raise StageError(FailureCode.CORRUPT, f"a key frame cannot be decoded ({type(error).__name__})") from error


def _number(index: VideoIndex, stamp: int) -> int:
    time = (stamp - index.origin) * float(index.time_base)
    return int(np.searchsorted(index.times_s, time - TIME_TOLERANCE_S))


def verify(path: Path) -> VideoFile:
    """Check that a file is a whole, decodable video: every packet is there and a spread of key frames decodes.

    The full decode happens once, when the clip is observed; that pass counts every frame.
    Raises StageError CORRUPT or NO_VIDEO.
    """
    index = index_video(path)
    if not any(True for _ in decode_key_frames(index, 0, len(index.times_s), limit=_VERIFY_KEY_FRAMES)):
        raise StageError(FailureCode.CORRUPT, "no key frame can be decoded")
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


def to_rgb(frame: Any) -> RGB:
    """The stored picture as (coded height, coded width, 3) RGB, not yet upright."""
    return frame.to_ndarray(format="rgb24")


def upright(stored: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
    """Turn a stored (or scaled stored) picture by `rotation` degrees counter-clockwise."""
    return np.ascontiguousarray(np.rot90(stored, rotation // 90)) if rotation else stored


def resize(stored: RGB, index: VideoIndex, width: int, height: int) -> RGB:
    """Upright (height, width, 3) picture from a stored one; applies pixel aspect and rotation in one resampling."""
    size = (height, width) if index.rotation % 180 else (width, height)
    shrinking = size[0] <= stored.shape[1] and size[1] <= stored.shape[0]
    method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    return upright(cv2.resize(stored, size, interpolation=method), index.rotation)


def thumbnail(frame: Any, index: VideoIndex, width: int, height: int) -> RGB:
    """Small upright (height, width, 3) BGR picture scaled inside the decoder's own scaler; for per-frame measures."""
    if index.rotation % 180:
        width, height = height, width
    return upright(frame.to_ndarray(width=width, height=height, format="bgr24", interpolation="AREA"), index.rotation)


def frames_at(index: VideoIndex, times_s: Sequence[float], width: int, height: int) -> list[RGB]:
    """The frames on screen at these times, as upright (height, width, 3) RGB; random access.

    Uses decord where it reads the file as PyAV does, PyAV otherwise.
    """
    numbers = index.on_screen(np.asarray(times_s, np.float64))
    unique = np.unique(numbers)
    stored = _decord_frames(index, unique)
    if stored is None:
        stored = {}
        # One pass per group of neighbouring frames; each starts at the key frame before it.
        for group in np.split(unique, np.flatnonzero(np.diff(unique) > 300) + 1):
            for number, frame in decode(index, int(group[0]), int(group[-1]) + 1, only=group.tolist()):
                stored[number] = to_rgb(frame)
    return [resize(stored[int(number)], index, width, height) for number in numbers]


def _decord_frames(index: VideoIndex, numbers: NDArray[np.intp]) -> dict[int, RGB] | None:
    """Frames by decord, or None where decord's idea of the file differs from PyAV's.

    decord ignores edit lists, rotates by itself and cannot open AV1; its own frame times tell whether it agrees.
    """
    if index.codec not in _DECORD_CODECS or index.edited or index.rotation:
        return None
    import decord

    try:
        reader = decord.VideoReader(str(index.path), num_threads=1)
        if len(reader) != len(index.times_s):
            return None
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
        if not np.allclose(starts - starts[0], index.times_s, atol=2 * TIME_TOLERANCE_S):
            return None
        batch = reader.get_batch(numbers.tolist()).asnumpy()
    except decord.DECORDError:
        return None
    return dict(zip(numbers.tolist(), batch, strict=True))
