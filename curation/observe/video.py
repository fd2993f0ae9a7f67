"""Frames of a video by presentation time, upright and with square pixels, whatever the container says.

Times are seconds relative to the first shown frame. Two decoders are hidden here: PyAV for the sequential pass and for
whatever decord misreads, decord for random access; both give the same frame, and the same pixels, for the same time.
This module never judges a video; it raises CORRUPT or NO_VIDEO for files that are not what they declare.
"""

from __future__ import annotations

import contextlib
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
from curation.ingest.container import READ_ONLY
from curation.ingest.failures import FailureCode, StageError
from curation.observe.hdr import to_sdr, transfer_of
from curation.records import VideoFile

# Presentation times of one file differ by rounding between containers (mkv keeps milliseconds); half of that is safe
# below 500 frames a second.
TIME_TOLERANCE_S = 1e-3
# Codecs whose packets may hold no shown frame, so that packets cannot be counted against frames.
_HIDDEN_FRAME_CODECS = frozenset({"vp8", "mpeg4", "msmpeg4v3"})
# What decord 0.6.0 opens, indexes and converts as PyAV does; everything else goes through PyAV.
_DECORD_CODECS = frozenset({"h264", "hevc", "vp9"})
_DECORD_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
_DECORD_MIN_WIDTH = 64  # it takes the padding of a narrower picture's rows for a fourth channel
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
    edited: an edit list hides some frames.
    plain: nothing about the file is of a kind that decord 0.6.0 reads differently from PyAV.
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
    plain: bool

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
    return av.open(str(path), mode="r", options=READ_ONLY, metadata_errors="ignore")


def _video_stream(container: Any) -> Any:
    pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    streams = [s for s in pictures if s.codec_context is not None]
    if not streams:
        what = "no decoder for its video stream" if pictures else "no video stream"
        raise StageError(FailureCode.NO_VIDEO, f"the file has {what}")
    return _single_threaded(max(streams, key=lambda s: s.width * s.height))


def _single_threaded(stream: Any) -> Any:
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
    rotation: int | None = None
    packets = discarded = 0
    entry: int | None = None  # time of the latest key frame: where decoding may begin
    begin = 0
    second: Any = None  # key frame
    open_groups = False
    last_end = 0.0  # of any stream: audio may last longer than the picture and still be a complete file
    for packet in container.demux():
        if rotation is None and packet.stream_index == stream.index:
            rotation = next((round(frame.rotation / 90) * 90 % 360 for frame in _decode_packet(packet)), None)
        if packet.size == 0:
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None and packet.time_base is not None:
            last_end = max(last_end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        packets += 1
        if stamp is None:
            continue
        if packet.is_keyframe:
            begin = stamp if entry is None else begin
            second = packet if entry is not None and second is None else second
            entry = stamp
        elif entry is not None and stamp < entry:
            open_groups = True  # shown before the key frame, but decoded after it and with the help of frames before it
        if packet.is_discard:
            discarded += 1
        # What a stream that was cut anywhere has before its first key frame cannot be decoded, and is never shown.
        elif entry is not None and stamp >= begin:
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
    if rotation is None:
        raise StageError(FailureCode.CORRUPT, "no frame of the file can be decoded")
    keys = np.asarray(key)[order]
    # With intra refresh the picture is renewed bit by bit: what is marked as a key frame is none.
    refreshed = second is not None and not second.is_discard and not _decode_alone(stream.codec_context, second)
    if refreshed:
        keys[1:] = False
    whole = (container.duration or 0) / 1e6
    # Containers that count no frames (Matroska, WebM) declare where the last one ends, also if the first is late.
    if not declared and last_end < whole - max(0.5, 0.02 * whole):
        raise StageError(FailureCode.CORRUPT, f"the data ends at {last_end:.2f} of {whole:.2f} declared seconds")
    base = Fraction(stream.time_base)
    times = (stamps - stamps[0]) * float(base)
    step = float(np.median(np.diff(times))) if len(times) > 1 else tail * float(base)
    end = float(times[-1]) + (step or 1.0 / float(stream.average_rate or 25))
    aspect = stream.sample_aspect_ratio
    square = float(aspect) if aspect else 1.0
    width, height = round(stream.width * square), stream.height
    if square < 1.0:  # widen the other way: never throw resolution away
        width, height = stream.width, round(stream.height / square)
    if rotation % 180:
        width, height = height, width
    codec = stream.codec_context.codec.canonical_name
    late = stamps[0] * base > Fraction(1, 2)
    eight_bits = all(component.bits == 8 for component in stream.codec_context.format.components)
    known = codec in _DECORD_CODECS and container.format.name in _DECORD_CONTAINERS and eight_bits
    return VideoIndex(
        path=path,
        codec=codec,
        stream=stream.index,
        width=width,
        height=height,
        coded_width=stream.width,
        coded_height=stream.height,
        rotation=rotation,
        times_s=times,
        key=keys,
        end_s=end,
        time_base=base,
        origin=int(stamps[0]),
        edited=discarded > 0,
        plain=known
        and stream.width >= _DECORD_MIN_WIDTH
        and not (discarded or late or rotation or open_groups or refreshed),
    )


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
            stream = _single_threaded(container.streams[index.stream])
            for number, frame in _frames_from(container, stream, index, first):
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


def _frames_from(container: Any, stream: Any, index: VideoIndex, first: int) -> Iterator[tuple[int, Any]]:
    """Decode from the nearest place before `first` on where that gives clean pictures; numbers may begin earlier."""
    keys = np.flatnonzero(index.key[: first + 1])
    # Seeks in files with edits are not exact.
    places = [] if index.edited or len(keys) < 2 else [keys[-1], keys[-2], keys[0]]
    for place in places:
        stamp = index.origin + round(float(index.times_s[place]) / float(index.time_base))
        container.seek(stamp, stream=stream, backward=True, any_frame=False)
        frames = _numbered(container, stream, index)
        head = next(frames, None)
        # Some formats find the next key frame instead, where it is a few frames away.
        if head is not None and (head[0] <= keys[-1] or place == keys[0]):
            yield head
            yield from frames
            return
    yield from _numbered(container, stream, index)


def _numbered(container: Any, stream: Any, index: VideoIndex) -> Iterator[tuple[int, Any]]:
    for packet in container.demux(stream):
        for frame in _decode_packet(packet):
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is not None:
                yield _number(index, stamp), frame


def _decode_packet(packet: Any) -> list[Any]:
    """Frames that a packet completes; a damaged one costs its own frames, which the caller counts, not the rest."""
    try:
        return [frame for frame in packet.decode() if not frame.is_corrupt]
    except FFmpegError:
        return []


def decode_key_frames(index: VideoIndex, first: int, last: int, *, limit: int) -> Iterator[tuple[int, Any]]:
    """Decode key frames of [first, last) only (about a thirteenth of a full decode); at most `limit`, evenly spread."""
    keys = first + np.flatnonzero(index.key[first:last])
    if len(keys) > limit:
        keys = keys[np.linspace(0, len(keys) - 1, limit).round().astype(int)]
    wanted = set(keys.tolist())
    try:
        with _open(index.path) as container:
            stream = _single_threaded(container.streams[index.stream])
            for packet in container.demux(stream):
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is not None and (number := _number(index, stamp)) in wanted:
                    for frame in _decode_alone(stream.codec_context, packet):
                        yield number, frame
    except FFmpegError as error:
        raise StageError(FailureCode.CORRUPT, f"a key frame cannot be decoded ({type(error).__name__})") from error


def _decode_alone(codec: Any, packet: Any) -> list[Any]:
    """The frame of one packet; the decoder is emptied, or it would wait for packets that never come."""
    codec.flush_buffers()
    frames = _decode_packet(packet)
    with contextlib.suppress(FFmpegError):
        frames += codec.decode(None)
    codec.flush_buffers()
    return frames[:1]


def _number(index: VideoIndex, stamp: int) -> int:
    """Number of the frame with this time stamp; -1 for one before the first shown frame."""
    time = (stamp - index.origin) * float(index.time_base)
    return int(np.searchsorted(index.times_s, time - TIME_TOLERANCE_S)) if time > -TIME_TOLERANCE_S else -1


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
    """The stored picture as (coded height, coded width, 3) RGB, not yet upright; HDR as SDR."""
    if transfer_of(frame) != "sdr":
        return to_sdr(frame)
    return frame.to_ndarray(format="rgb24", threads=1)


def upright(stored: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
    """Turn a stored (or scaled stored) picture by `rotation` degrees counter-clockwise."""
    return np.ascontiguousarray(np.rot90(stored, rotation // 90)) if rotation else stored


def halved(stored: RGB, index: VideoIndex, width: int, height: int) -> RGB:
    """A stored picture, halved as often as it stays at least as large as an upright (height, width) one.

    `resize` does this itself; done before, several sizes share the work and come out no different.
    """
    size = (height, width) if index.rotation % 180 else (width, height)
    while stored.shape[1] // 2 >= size[0] and stored.shape[0] // 2 >= size[1]:
        half = (stored.shape[1] // 2, stored.shape[0] // 2)
        stored = cv2.resize(stored, half, interpolation=cv2.INTER_AREA)
    return stored


def resize(stored: RGB, index: VideoIndex, width: int, height: int) -> RGB:
    """Upright (height, width, 3) picture from a stored one; applies pixel aspect and rotation with the scaling.

    Halved and then interpolated: a third of the time of an area filter, which OpenCV does slowly for odd factors.
    """
    size = (height, width) if index.rotation % 180 else (width, height)
    small = cv2.resize(halved(stored, index, width, height), size, interpolation=cv2.INTER_LINEAR)
    return upright(small, index.rotation)


def thumbnail(frame: Any, index: VideoIndex, width: int, height: int) -> RGB:
    """Small upright (height, width, 3) BGR picture scaled inside the decoder's own scaler; for per-frame measures."""
    if index.rotation % 180:
        width, height = height, width
    if transfer_of(frame) != "sdr":
        small = cv2.cvtColor(to_sdr(frame, width=width, height=height, interpolation="AREA"), cv2.COLOR_RGB2BGR)
    else:
        small = frame.to_ndarray(width=width, height=height, format="bgr24", interpolation="AREA", threads=1)
    return upright(small, index.rotation)


def frames_at(index: VideoIndex, times_s: Sequence[float], width: int, height: int) -> list[RGB]:
    """The frames on screen at these times, as upright (height, width, 3) RGB; random access.

    Uses decord where it reads the file as PyAV does, PyAV otherwise. Holds one frame of full size at a time.
    """
    numbers = index.on_screen(np.asarray(times_s, np.float64)).tolist()
    wanted = sorted(set(numbers))
    pictures = _by_decord(index, wanted, width, height)
    if pictures is None:
        pictures = _by_pyav(index, wanted, width, height)
    return [pictures[number] for number in numbers]


def _by_pyav(index: VideoIndex, wanted: list[int], width: int, height: int) -> dict[int, RGB]:
    pictures = {}
    # One pass per group of neighbouring frames; each starts at the key frame before it.
    for group in np.split(np.asarray(wanted, np.intp), np.flatnonzero(np.diff(wanted) > 300) + 1):
        for number, frame in decode(index, int(group[0]), int(group[-1]) + 1, only=group.tolist()):
            pictures[number] = resize(to_rgb(frame), index, width, height)
    return pictures


def _by_decord(index: VideoIndex, wanted: list[int], width: int, height: int) -> dict[int, RGB] | None:
    """None where decord's idea of the file differs from PyAV's.

    decord ignores edit lists, rotates by itself, cannot open AV1, converts 10 bits differently, and loses count after
    a seek into open groups of pictures. For all else its own frame times tell whether it agrees.
    """
    if not index.plain:
        return None
    try:
        import decord
    except ImportError:  # not built for every system
        return None
    try:
        reader = decord.VideoReader(str(index.path), num_threads=1)
        if len(reader) != len(index.times_s):
            return None
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
        if not np.allclose(starts - starts[0], index.times_s, atol=2 * TIME_TOLERANCE_S):
            return None
        return {number: resize(reader[number].asnumpy(), index, width, height) for number in wanted}
    except decord.DECORDError:
        return None
