"""Lists the frames of a video by presentation time, before any of them is decoded."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideData
from numpy.typing import NDArray

from curation.failures import ClipFailure, FailureCode
from curation.settings import VideoLimits
from curation.video.bounded import (
    UNDECODED,
    damaged,
    decode_alone,
    decode_packet,
    open_video,
    single_threaded,
    too_many_frames,
    too_many_pixels,
    too_many_tracks,
)
from curation.video.container import refuse_cut, refuse_kind, refuse_tables, stated_end
from curation.video.hdr import transfer_of
from curation.video.packets import NONE, Demuxer, Packets, film_candidates, film_stream, packet_of, steady_rate

# Requested times may be rounded to milliseconds, as some containers round theirs.
TIME_TOLERANCE_S = 1e-3
# Here the head of a packet tells whether it shows a frame, and each such packet has a presentation time. Anything else
# is decoded once, to learn which packets show a frame and in which order.
_TOLD_BY_PACKETS = frozenset({"h264", "hevc", "av1", "vp8", "vp9", "mjpeg", "prores"})
_TIMED = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv"})
_SOUGHT = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})  # where a seek finds the requested key frame
# What decord 0.6.0 opens, indexes and converts as PyAV does, and where the packets tell that the frame size never
# changes, because decord has no limit on it. Everything else goes through PyAV.
_DECORD_CODECS = frozenset({"h264", "hevc"})
_DECORD_MIN_WIDTH = 64  # in a narrower frame it reads the padding of rows as a fourth channel
_KEPT_INDICES = 4  # of up to 80 MB each; the clips of one video mostly come one after the other
_LOST_CLOCK = "its clock restarts and some frames have no times; convert the file to MP4"
_TILT = 0.0175  # tangent of one degree: a smaller tilt is upright, as in ffmpeg
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """Which frames a file shows, and when; made from its packets, or by decoding where they do not tell.

    times_s: (n,) float64, sorted presentation times of the shown frames, the first is 0.
    key: (n,) bool, frames that decode on their own.
    numbers: (p,) int64, number of the frame that each packet with data shows, -1 for none.
    places: (p,) int64, position of each packet in the file; empty where a seek would not be exact.
    end_s: when the last frame ends.
    width, height: as displayed, with display matrix and pixel aspect applied.
    coded_width, coded_height: as stored.
    rotation: degrees counter-clockwise that make a stored frame upright; a multiple of 90. mirrored: it must then be
    mirrored left to right.
    origin: presentation time of the first shown frame in units of time_base.
    edited: an edit list hides some frames.
    decoded: the frames were counted by decoding.
    plain: the file has no property that decord 0.6.0 reads differently from PyAV.
    limits: checked for the file already, and for its frames when they are decoded.
    """

    path: Path
    codec: str
    stream: int
    width: int
    height: int
    coded_width: int
    coded_height: int
    rotation: int
    mirrored: bool
    times_s: NDArray[np.float64]
    key: NDArray[np.bool_]
    numbers: NDArray[np.int64]
    places: NDArray[np.int64]
    end_s: float
    time_base: Fraction
    origin: int
    edited: bool
    decoded: bool
    plain: bool
    limits: VideoLimits

    @property
    def fps(self) -> float:
        """Mean rate; for tables only, never to compute a time."""
        return len(self.times_s) / self.end_s if self.end_s > 0 else 0.0

    def span(self, start_s: float, end_s: float | None) -> tuple[int, int]:
        """Indices [first, last) of the frames presented in [start_s, end_s).

        Raises ClipFailure(SPAN_OUT_OF_RANGE) if the span has no frame or ends over 0.1 s after the video.
        """
        stop = self.end_s if end_s is None else end_s
        if stop > self.end_s + 0.1 or start_s >= self.end_s:
            raise ClipFailure(
                FailureCode.SPAN_OUT_OF_RANGE, f"the clip ends at {stop:.3f} s, the video at {self.end_s:.3f} s"
            )
        first = int(np.searchsorted(self.times_s, start_s - TIME_TOLERANCE_S))
        last = int(np.searchsorted(self.times_s, stop - TIME_TOLERANCE_S))
        if first >= last:
            raise ClipFailure(
                FailureCode.SPAN_OUT_OF_RANGE,
                f"no frame begins between {start_s:.3f} s and {stop:.3f} s: a single frame is shown for longer",
            )
        return first, last

    def on_screen(self, times_s: NDArray[np.float64]) -> NDArray[np.intp]:
        """Index of the frame on screen at each time: the last one presented at or before it."""
        found = np.searchsorted(self.times_s, times_s + 1e-6, side="right") - 1
        return np.clip(found, 0, len(self.times_s) - 1)


class IndexDiffers(Exception):
    """The decoder shows other frames than the packets announce; an index made by decoding is right. See with_index."""


def index_video(path: Path, limits: VideoLimits = VideoLimits()) -> VideoIndex:
    """Read a file's packets and its first frame; a file whose packets do not tell its frames is decoded once.

    Raises ClipFailure NO_VIDEO (audio, or cover art only), WRONG_KIND (an animated image, a video rotated by an odd
    angle), TOO_LARGE (beyond `limits`) or CORRUPT (unreadable, or without the end of its data).
    """
    return _kept(path, limits).index


def with_index(path: Path, work: Callable[[VideoIndex], T], limits: VideoLimits = VideoLimits()) -> T:
    """work(index of the file); again with an index made by decoding if the decoder contradicts the packets."""
    kept = _kept(path, limits)
    try:
        return work(kept.index)
    except IndexDiffers:
        kept.index = _read_index(path, limits, by_decoding=True)
        return work(kept.index)


class _Kept:
    """The index of one state of a file; replaced when it proves wrong."""

    def __init__(self, index: VideoIndex) -> None:
        self.index = index


def _kept(path: Path, limits: VideoLimits) -> _Kept:
    stat = path.stat()
    return _kept_for(path, limits, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=_KEPT_INDICES)
def _kept_for(path: Path, limits: VideoLimits, mtime_ns: int, size: int) -> _Kept:
    if size == 0:
        raise ClipFailure(FailureCode.CORRUPT, "the file is empty")
    return _Kept(_read_index(path, limits, by_decoding=False))


def _read_index(path: Path, limits: VideoLimits, *, by_decoding: bool) -> VideoIndex:
    refuse_kind(path)
    refuse_tables(path, limits)
    try:
        _refuse_pictures(path, limits)
        with open_video(path, limits) as container:
            return _index(path, container, limits, by_decoding)
    except FFmpegError as error:
        raise ClipFailure(FailureCode.CORRUPT, f"the file cannot be read ({type(error).__name__})") from error


def _refuse_pictures(path: Path, limits: VideoLimits) -> None:
    """Raise ClipFailure(TOO_LARGE) for tracks and frames that even `open_video` must not open.

    Opening decodes a frame of every track, without a limit if the container does not begin with a list of its tracks
    (FLV, MPEG). Here only tracks whose size only a decoder knows are decoded, within the limit, and no cover art.
    """
    options = UNDECODED | {"max_streams": str(limits.max_tracks + 1)}
    try:
        container = av.open(str(path), mode="r", options=options, metadata_errors="ignore")
    except MemoryError as error:  # libavformat's error for one track too many
        raise too_many_tracks(limits) from error
    with container:
        streams = container.streams
        if len(streams) > limits.max_tracks or len(streams.video) > limits.max_pictures:
            raise too_many_tracks(limits)
        films = film_candidates(container)
        if any(stream.width * stream.height > limits.max_pixels for stream in films):
            raise too_many_pixels(limits)
        _decode_one(container, [stream for stream in films if not stream.width], limits)


def _decode_one(container: Any, streams: list[Any], limits: VideoLimits) -> None:
    """Decode one packet of each stream, only to learn its size."""
    left = {single_threaded(stream, limits).index for stream in streams}
    for packet in container.demux(streams) if streams else ():
        if packet.size and packet.stream_index in left:
            decode_packet(packet, limits)
            left.remove(packet.stream_index)
        if not left:
            return


class _Seen(NamedTuple):
    """The result of one pass over a stream.

    first: the first frame. shown, stamps: packet and time, or NONE, of every decoded frame, in order. second: the
    packet of the second key frame.
    """

    packets: Packets
    first: Any
    shown: array[int]
    stamps: array[int]
    second: Any


def _read(demuxer: Demuxer, codec: str, header: bytes | None, limits: VideoLimits, decoding: bool) -> _Seen:
    """Read every packet; decode up to the first frame, or everything. Raises ClipFailure CORRUPT or TOO_LARGE."""
    packets = Packets(codec, header or b"")
    shown, stamps = array("q"), array("q")
    first = second = None
    keys = 0
    for number, packet in demuxer:
        if number >= 0:
            # In a stream that may be joined from pieces, the flag means that packets before may be missing; the decoder
            # finds out.
            if packet.is_corrupt and not demuxer.may_restart:
                raise ClipFailure(FailureCode.CORRUPT, "the data of a frame is cut off")
            packets.add(packet)
            keys += packet.is_keyframe
            if keys == 2 and second is None:
                second = packet
        if max(len(packets), len(shown)) > limits.max_frames:
            raise too_many_frames(limits)
        if first is not None and not decoding:
            continue
        frames = decode_packet(packet, limits)
        # A stream may be cut anywhere, so parts of other frames may precede its first frame.
        if first is not None and (frames is None or any(frame.is_corrupt for frame in frames)):
            raise damaged(len(shown))
        for frame in frames or ():
            if not frame.is_corrupt:
                first = first or frame
                shown.append(packet_of(frame))
                stamp = frame.pts if frame.pts is not None else frame.dts
                stamps.append(NONE if stamp is None else stamp)
    return _Seen(packets, first, shown, stamps, second)


def _index(path: Path, container: Any, limits: VideoLimits, by_decoding: bool) -> VideoIndex:
    stream = single_threaded(film_stream(container, lambda: open_video(path, limits)), limits)
    if stream.time_base is None or stream.width == 0:
        raise ClipFailure(FailureCode.CORRUPT, "the video stream has no size or no clock")
    name, codec = container.format.name, stream.codec_context.codec.canonical_name
    by_decoding = by_decoding or codec not in _TOLD_BY_PACKETS or name not in _TIMED
    demuxer = Demuxer(container, stream)
    seen = _read(demuxer, codec, stream.codec_context.extradata, limits, by_decoding)
    packets, first = seen.packets, seen.first
    refuse_cut(path, container, stream, len(packets.stamps))
    if first is None:
        raise ClipFailure(FailureCode.CORRUPT, "no frame of the file can be decoded")
    if packets.untimed and not by_decoding:
        return _read_index(path, limits, by_decoding=True)
    base = Fraction(stream.time_base)
    shown, stamps = _decoded(seen, demuxer, stream) if by_decoding else _shown_packets(packets, name)
    if not len(stamps):
        raise ClipFailure(FailureCode.CORRUPT, "the video stream shows no frame")
    numbers = np.full(len(packets.stamps), -1, np.int64)
    numbers[shown[shown >= 0]] = np.flatnonzero(shown >= 0)
    keys = _flags(packets.key)[shown] & (shown >= 0)
    # With intra refresh the picture is renewed in parts: a frame marked as a key frame is not one.
    second = seen.second
    refreshed = second is not None and not second.is_discard and not decode_alone(stream.codec_context, second, limits)
    if refreshed:
        keys[1:] = False
    places, discarded = np.asarray(packets.places, np.int64), any(packets.discard)
    if by_decoding or discarded or name not in _SOUGHT or places.min() < 0:
        places = places[:0]
    rate = steady_rate(stamps, base, (stream.average_rate, stream.base_rate))
    times = np.arange(len(stamps)) / float(rate) if rate else (stamps - stamps[0]) * float(base)
    _refuse_rate(times, limits)
    try:
        first.reformat(width=16, height=16, format="rgb24")
    except (FFmpegError, OSError, ValueError) as error:
        raise ClipFailure(FailureCode.WRONG_KIND, "its colour format cannot be converted") from error
    rotation, mirrored = _orientation(first)
    width, height = _displayed(stream, rotation)
    return VideoIndex(
        path=path,
        codec=codec,
        stream=stream.index,
        width=width,
        height=height,
        coded_width=stream.width,
        coded_height=stream.height,
        rotation=rotation,
        mirrored=mirrored,
        times_s=times,
        key=keys,
        numbers=numbers,
        places=places,
        end_s=_end(stamps, rate, packets, shown, demuxer, container, stream),
        time_base=base,
        origin=int(stamps[0]),
        edited=discarded,
        decoded=by_decoding,
        plain=codec in _DECORD_CODECS
        and len(places) > 0
        and not packets.resized
        and len(container.streams.video) == 1
        and stream.width >= _DECORD_MIN_WIDTH
        and stream.width % 2 == stream.height % 2 == 0
        and all(component.bits == 8 for component in stream.codec_context.format.components)
        and transfer_of(first) == "sdr"
        and stamps[0] * base <= Fraction(1, 2)
        and bool((np.diff(times) > TIME_TOLERANCE_S).all())
        and not (rotation or mirrored or refreshed or first.interlaced_frame or _open_groups(packets)),
        limits=limits,
    )


def _refuse_rate(times_s: NDArray[np.float64], limits: VideoLimits) -> None:
    apart = times_s[limits.max_fps :] - times_s[: -limits.max_fps]
    if (apart < 1 - 2 * TIME_TOLERANCE_S).any():
        raise ClipFailure(FailureCode.TOO_LARGE, f"more than {limits.max_fps} frames are shown within one second")


def _flags(flags: bytearray) -> NDArray[np.bool_]:
    return np.frombuffer(flags, np.bool_)


def _displayed(stream: Any, rotation: int) -> tuple[int, int]:
    """Width and height with square pixels, upright; never smaller than stored."""
    square = float(stream.sample_aspect_ratio or 1)
    width, height = round(stream.width * square), stream.height
    if square < 1.0:
        width, height = stream.width, round(stream.height / square)
    return (height, width) if rotation % 180 else (width, height)


def _shown_packets(packets: Packets, container_name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packets that show a frame, in the order of their times, and these times."""
    stamps, key = np.asarray(packets.stamps, np.int64), _flags(packets.key)
    shows = _flags(packets.shows) & ~_flags(packets.discard)
    if not container_name.startswith("mov"):  # in MOV and MP4, an edit list says what is shown
        entry = int(np.argmax(key))  # nothing before the first key frame of a cut stream is shown
        shows &= stamps >= stamps[entry]
        shows[:entry] = False
    shown = np.flatnonzero(shows)
    shown = shown[np.argsort(stamps[shown], kind="stable")]
    return shown, stamps[shown]


def _decoded(seen: _Seen, demuxer: Demuxer, stream: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packets whose frames were decoded, in the order of decoding, and their times.

    In a container without presentation times, such as AVI, a frame is shown when it leaves the decoder. Raises
    ClipFailure(CORRUPT) if the clock restarts and frames have no times.
    """
    stamps = np.asarray(seen.stamps, np.int64)
    timed = np.flatnonzero(stamps != NONE)
    if demuxer.restarted and len(timed) < len(stamps):
        raise ClipFailure(FailureCode.CORRUPT, _LOST_CLOCK)
    step = round(1 / ((stream.average_rate or 25) * stream.time_base))
    # A frame without a time is shown one step after the frame before it, or, before any time, before the next one.
    if not len(timed):
        stamps, timed = np.zeros_like(stamps), np.zeros(1, np.int64)
    places = np.arange(len(stamps))
    known = timed[np.maximum(np.searchsorted(timed, places, side="right") - 1, 0)] if len(stamps) else places
    return np.asarray(seen.shown, np.int64), np.sort(stamps[known] + (places - known) * step)


def _open_groups(packets: Packets) -> bool:
    """Whether some frame is shown before a key frame but decoded after it, with references to frames before it."""
    stamps, key = np.asarray(packets.stamps, np.int64), _flags(packets.key)
    entry = np.maximum.accumulate(np.where(key, np.arange(len(key)), 0))
    return bool((stamps < stamps[entry])[int(np.argmax(key)) :].any())


def _end(
    stamps: NDArray[np.int64], rate: Fraction | None, packets: Packets, shown: NDArray[np.int64], demuxer: Demuxer,
    container: Any, stream: Any,
) -> float:  # fmt: skip
    """When the last frame ends, seconds after the first one begins: it may be held for long."""
    base = Fraction(stream.time_base)
    last = int(stamps[-1] - stamps[0])
    step = Fraction(float(np.median(np.diff(stamps)))) if last else 1 / (base * (stream.average_rate or 25))
    if container.format.name.startswith("mov") and stream.duration:
        own = (stream.start_time or 0) + stream.duration - int(stamps[-1])  # libavformat's sum of the sample table
    else:
        own = packets.durations[shown[-1]] + demuxer.held
    end = (last + (own if own > 0 else step)) * base
    if rate and abs(end - len(stamps) / rate) < max(base, Fraction(1, 2) / rate):
        end = len(stamps) / rate
    stated = (stated_end(container, stream) or 0.0) - float(stamps[0] * base)
    return stated if stated > float(end + 3 * step * base / 2) else float(end)


def _orientation(frame: Any) -> tuple[int, bool]:
    """Degrees counter-clockwise, then whether to mirror left to right, as the display matrix says.

    Raises ClipFailure(WRONG_KIND) for a matrix that rotates by anything but a multiple of 90 degrees.
    """
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return 0, False
    # A stored point (x, y) is shown at (a x + c y, b x + d y).
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).astype(np.float64)
    straight, swapped = max(abs(a), abs(d)), max(abs(b), abs(c))
    if straight == swapped == 0:
        return 0, False
    if min(straight, swapped) > _TILT * max(straight, swapped):
        raise ClipFailure(
            FailureCode.WRONG_KIND, "the video is rotated by an odd angle; convert the file to an upright MP4"
        )
    if straight > swapped:
        return (0 if d > 0 else 180), (a < 0) != (d < 0)
    return (90 if b < 0 else 270), (b > 0) == (c > 0)
