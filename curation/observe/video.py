"""Frames of a video by presentation time, upright and with square pixels, whatever the container says.

A file is whole if its container ends where the data ends and every packet with data decodes; the timeline is what
ffmpeg shows, in seconds relative to the first shown frame. Declared counts and durations are hints. A frame is known by
its packet and its order, never by a time: two frames may have the same one.

Two decoders are hidden here: PyAV for the sequential pass and for whatever decord misreads, decord for random access;
both give the same frame, and the same pixels, for the same number. This module never judges a video.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import av
import cv2
import numpy as np
from av.codec.context import Flags as CodecFlags
from av.container import Flags
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideData
from numpy.typing import NDArray

from curation.failures import ClipFailure, FailureCode
from curation.files import sha256_file
from curation.ingest.container import (
    READ_ONLY,
    UNDECODED,
    decoder_pixels,
    refuse_cut,
    refuse_kind,
    refuse_tables,
    stated_end,
    too_many_frames,
    too_many_tracks,
)
from curation.observe.hdr import to_sdr, transfer_of
from curation.observe.packets import NONE, Demuxer, Packets, film_candidates, film_stream, packet_of, steady_rate
from curation.records import WHOLE, Part, VideoFile
from curation.settings import VideoLimits

# Asked times may be rounded to milliseconds, as some containers round theirs.
TIME_TOLERANCE_S = 1e-3
# Where every packet that shows a frame can be told from its head, and has its presentation time. Anything else is
# decoded once, to learn which packets show a frame and in which order.
_TOLD_BY_PACKETS = frozenset({"h264", "hevc", "av1", "vp8", "vp9", "mjpeg", "prores"})
_TIMED = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv"})
_SOUGHT = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})  # where a seek finds the key frame that is asked for
# What decord 0.6.0 opens, indexes and converts as PyAV does, and where the packets tell that the size of the picture
# never changes: decord knows no limit. Everything else goes through PyAV.
_DECORD_CODECS = frozenset({"h264", "hevc"})
_DECORD_MIN_WIDTH = 64  # it takes the padding of a narrower picture's rows for a fourth channel
_VERIFY_KEY_FRAMES = 24
_KEPT_INDICES = 4  # of up to 80 MB each; the clips of one video mostly follow one upon the other
_LOST_CLOCK = "its clock starts anew, and where it goes on cannot be told; convert the file to MP4"
_TILT = 0.0175  # tangent of one degree: less is upright, as for ffmpeg

RGB = NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """Which frames a file shows, and when; made from its packets where they tell, by decoding where they do not.

    times_s: (n,) float64, sorted presentation times of the shown frames, the first is 0.
    key: (n,) bool, frames that decode on their own.
    numbers: (p,) int64, number of the frame that each packet with data shows, -1 for none.
    places: (p,) int64, position of each packet in the file; empty where a seek would not be exact.
    end_s: when the last frame ends.
    width, height: as displayed, with display matrix and pixel aspect applied.
    coded_width, coded_height: as stored.
    rotation: degrees counter-clockwise that bring a stored frame upright; a multiple of 90. mirrored: it is then to be
    mirrored left to right.
    origin: presentation time of the first shown frame in units of time_base.
    edited: an edit list hides some frames.
    decoded: the frames were counted by decoding.
    plain: nothing about the file is of a kind that decord 0.6.0 reads differently from PyAV.
    limits: what the file was checked against, and its frames are when they are decoded.
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

        Raises ClipFailure(SPAN_OUT_OF_RANGE) where the span holds no frame or reaches beyond the video by over 0.1 s.
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
                f"no frame begins between {start_s:.3f} s and {stop:.3f} s: one picture stands still for longer",
            )
        return first, last

    def on_screen(self, times_s: NDArray[np.float64]) -> NDArray[np.intp]:
        """Index of the frame on screen at each time: the last one presented at or before it."""
        found = np.searchsorted(self.times_s, times_s + 1e-6, side="right") - 1
        return np.clip(found, 0, len(self.times_s) - 1)


class IndexDiffers(Exception):
    """The decoder shows other frames than the packets promised; an index made by decoding is right. See with_index."""


def index_video(path: Path, limits: VideoLimits = VideoLimits()) -> VideoIndex:
    """Read a file's packets and its first frame; a file whose packets do not tell its frames is decoded once.

    Raises ClipFailure NO_VIDEO (audio, or cover art only), WRONG_KIND (an animated picture, a picture turned by an odd
    angle), TOO_LARGE (beyond `limits`) or CORRUPT (unreadable, or without the end of its data).
    """
    return _kept(path, limits).index


def with_index(path: Path, work: Callable[[VideoIndex], T], limits: VideoLimits = VideoLimits()) -> T:
    """work(index of the file), once more with an index made by decoding if the decoder contradicts the packets."""
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
        with _open(path, limits) as container:
            return _index(path, container, limits, by_decoding)
    except FFmpegError as error:
        raise ClipFailure(FailureCode.CORRUPT, f"the file cannot be read ({type(error).__name__})") from error


def _refuse_pictures(path: Path, limits: VideoLimits) -> None:
    """Raise ClipFailure(TOO_LARGE) for tracks and pictures that must not even be opened as `_open` does.

    Opening decodes a frame of every track; without a limit where the container does not begin with a list of its tracks
    (FLV, MPEG). Here only tracks whose size nothing but a decoder knows are decoded, within the limit, and no cover.
    """
    options = UNDECODED | {"max_streams": str(limits.max_tracks + 1)}
    try:
        container = av.open(str(path), mode="r", options=options, metadata_errors="ignore")
    except MemoryError as error:  # what libavformat says of one track more
        raise too_many_tracks(limits) from error
    with container:
        streams = container.streams
        if len(streams) > limits.max_tracks or len(streams.video) > limits.max_pictures:
            raise too_many_tracks(limits)
        films = film_candidates(container)
        if any(stream.width * stream.height > limits.max_pixels for stream in films):
            raise _too_many_pixels(limits)
        _decode_one(container, [stream for stream in films if not stream.width], limits)


def _decode_one(container: Any, streams: list[Any], limits: VideoLimits) -> None:
    """Decode one packet of each stream, for its size alone."""
    left = {_single_threaded(stream, limits).index for stream in streams}
    for packet in container.demux(streams) if streams else ():
        if packet.size and packet.stream_index in left:
            _decode_packet(packet, limits)
            left.remove(packet.stream_index)
        if not left:
            return


def _too_many_pixels(limits: VideoLimits) -> ClipFailure:
    return ClipFailure(FailureCode.TOO_LARGE, f"a picture of the film has more than {limits.max_pixels} pixels")


def _open(path: Path, limits: VideoLimits) -> Any:
    # metadata_errors: a title in a broken encoding is no reason to refuse a film.
    options = READ_ONLY | {"max_pixels": str(decoder_pixels(limits)), "max_streams": str(limits.max_tracks + 1)}
    container: Any = av.open(str(path), mode="r", options=options, metadata_errors="ignore")
    container.flags &= ~Flags.gen_pts.value  # PyAV asks for times to be made up; what ffmpeg shows has none of these
    return container


def _single_threaded(stream: Any, limits: VideoLimits) -> Any:
    """The stream, its decoder bound to one thread and, before it allocates a picture, to `limits`."""
    stream.codec_context.options = {"max_pixels": str(decoder_pixels(limits))}
    stream.codec_context.flags |= CodecFlags.unaligned.value  # a cropped picture begins where it says, as for ffmpeg
    # One process per core: threads inside a decoder cost the same processor time and only blur the accounting.
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "NONE"
    return stream


class _Seen(NamedTuple):
    """What one reading of a stream brought.

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
            # In a stream that may be joined, the mark means that packets may be missing before; the decoder knows.
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
        frames = _decode_packet(packet, limits)
        # Before its first picture a stream may hold parts of others: it was cut anywhere.
        if first is not None and (frames is None or any(frame.is_corrupt for frame in frames)):
            raise _damaged(len(shown))
        for frame in frames or ():
            if not frame.is_corrupt:
                first = first or frame
                shown.append(packet_of(frame))
                stamp = frame.pts if frame.pts is not None else frame.dts
                stamps.append(NONE if stamp is None else stamp)
    return _Seen(packets, first, shown, stamps, second)


def _index(path: Path, container: Any, limits: VideoLimits, by_decoding: bool) -> VideoIndex:
    stream = _single_threaded(film_stream(container, lambda: _open(path, limits)), limits)
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
    # With intra refresh the picture is renewed bit by bit: what is marked as a key frame is none.
    second = seen.second
    refreshed = second is not None and not second.is_discard and not _decode_alone(stream.codec_context, second, limits)
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
        raise ClipFailure(FailureCode.WRONG_KIND, "its colours are of a kind that cannot be converted") from error
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
    """Width and height with square pixels, upright; never less than is stored."""
    square = float(stream.sample_aspect_ratio or 1)
    width, height = round(stream.width * square), stream.height
    if square < 1.0:
        width, height = stream.width, round(stream.height / square)
    return (height, width) if rotation % 180 else (width, height)


def _shown_packets(packets: Packets, container_name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packets that show a frame, in the order of their times, and these times."""
    stamps, key = np.asarray(packets.stamps, np.int64), _flags(packets.key)
    shows = _flags(packets.shows) & ~_flags(packets.discard)
    if not container_name.startswith("mov"):  # where an edit list says what is shown
        entry = int(np.argmax(key))  # what a stream cut anywhere has before its first key frame is never shown
        shows &= stamps >= stamps[entry]
        shows[:entry] = False
    shown = np.flatnonzero(shows)
    shown = shown[np.argsort(stamps[shown], kind="stable")]
    return shown, stamps[shown]


def _decoded(seen: _Seen, demuxer: Demuxer, stream: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packets whose frames were decoded, in the order in which they were, and their times.

    Where a container has no presentation times, as AVI, a frame is shown when it leaves the decoder. Raises
    ClipFailure(CORRUPT) where the clock starts anew and frames have no times.
    """
    stamps = np.asarray(seen.stamps, np.int64)
    timed = np.flatnonzero(stamps != NONE)
    if demuxer.restarted and len(timed) < len(stamps):
        raise ClipFailure(FailureCode.CORRUPT, _LOST_CLOCK)
    step = round(1 / ((stream.average_rate or 25) * stream.time_base))
    # A frame without a time is shown a step after the one before it, or, before any time, before the one after it.
    if not len(timed):
        stamps, timed = np.zeros_like(stamps), np.zeros(1, np.int64)
    places = np.arange(len(stamps))
    known = timed[np.maximum(np.searchsorted(timed, places, side="right") - 1, 0)] if len(stamps) else places
    return np.asarray(seen.shown, np.int64), np.sort(stamps[known] + (places - known) * step)


def _open_groups(packets: Packets) -> bool:
    """Some frame is shown before a key frame, but decoded after it and with the help of frames before it."""
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
        own = (stream.start_time or 0) + stream.duration - int(stamps[-1])  # libavformat sums the sample table up
    else:
        own = packets.durations[shown[-1]] + demuxer.held
    end = (last + (own if own > 0 else step)) * base
    if rate and abs(end - len(stamps) / rate) < max(base, Fraction(1, 2) / rate):
        end = len(stamps) / rate
    stated = (stated_end(container, stream) or 0.0) - float(stamps[0] * base)
    return stated if stated > float(end + 3 * step * base / 2) else float(end)


def _orientation(frame: Any) -> tuple[int, bool]:
    """Degrees counter-clockwise, then whether to mirror left to right: what the display matrix asks for.

    Raises ClipFailure(WRONG_KIND) for a matrix that turns by anything but quarters.
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
            FailureCode.WRONG_KIND, "the picture is to be shown at an angle; convert the file to an upright MP4"
        )
    if straight > swapped:
        return (0 if d > 0 else 180), (a < 0) != (d < 0)
    return (90 if b < 0 else 270), (b > 0) == (c > 0)


def decode(index: VideoIndex, first: int, last: int, *, only: Iterable[int] | None = None) -> Iterator[tuple[int, Any]]:
    """Decode frames [first, last) in one sequential pass; yields (frame number, av.VideoFrame) of each, in order.

    `only`: yield just these (a sorted sequence of numbers), still in one pass. Raises ClipFailure(CORRUPT) for a frame
    that does not decode, TOO_LARGE for one with too many pixels, and IndexDiffers where the decoder shows other frames
    than the packets promised.
    """
    wanted = None if only is None else set(only)
    last = min(last, len(index.times_s))
    try:
        for number, frame in _frames_from(index, first, last):
            if wanted is None or number in wanted:
                yield number, frame
    except FFmpegError as error:
        raise ClipFailure(FailureCode.CORRUPT, f"the video cannot be decoded ({type(error).__name__})") from error


def _frames_from(index: VideoIndex, first: int, last: int) -> Iterator[tuple[int, Any]]:
    """Frames [first, last), decoded from the nearest place before them that gives clean pictures."""
    keys = np.flatnonzero(index.key[: first + 1]).tolist()
    entries = keys[:-3:-1] if len(index.places) and len(keys) > 1 else []
    expected = first
    # A seek may find a later key frame, or lose frames: what is then still missing is sought from further before.
    for entry in (*entries, None):
        with _open(index.path, index.limits) as container:
            for number, frame in _numbered(container, index, entry, expected, last):
                if number != expected:
                    break
                yield number, frame
                expected += 1
                if expected == last < len(index.times_s):
                    return
            if expected == last:  # and no frame came after the last one of all
                return
    raise _missing(index, expected)


def _missing(index: VideoIndex, number: int) -> Exception:
    return _damaged(number) if index.decoded else IndexDiffers()


def _numbered(container: Any, index: VideoIndex, entry: int | None, first: int, last: int) -> Iterator[tuple[int, Any]]:
    """(number, frame) of decoded frames from `first` on, after a seek to the key frame `entry` if that is not None.

    Raises ClipFailure(CORRUPT) for data that does not decode and that frames [first, last) need.
    """
    stream = _single_threaded(container.streams[index.stream], index.limits)
    if entry is not None:
        stamp = index.origin + round(float(index.times_s[entry]) / float(index.time_base))
        container.seek(stamp, stream=stream, backward=True, any_frame=False)
    keys = np.flatnonzero(index.key[: first + 1])
    needed = range(int(keys[-1]) if len(keys) else 0, last)
    count, reached = 0, -1
    for sent, packet in Demuxer(container, stream).since(None if entry is None else index.places):
        frames = _decode_packet(packet, index.limits)
        if frames is None:
            number = int(index.numbers[sent])
            if (number if number >= 0 or reached < 0 else reached + 1) in needed:
                raise _damaged(max(number, reached + 1))
        for frame in frames or ():
            packet_number = packet_of(frame)
            number = count if index.decoded else -1 if packet_number < 0 else int(index.numbers[packet_number])
            count += 1
            if frame.is_corrupt:
                if number >= first:
                    raise _damaged(number)
            elif number < 0:
                if entry is None:  # after a seek, a decoder may make up a frame that it misses
                    raise IndexDiffers
            else:
                reached = number
                if number >= first:
                    yield number, frame


def _damaged(number: int) -> ClipFailure:
    return ClipFailure(FailureCode.CORRUPT, f"frame {number} cannot be decoded")


def _decode_packet(packet: Any, limits: VideoLimits) -> list[Any] | None:
    """Frames that a packet completes, None for one that cannot be decoded. Raises ClipFailure(TOO_LARGE)."""
    try:
        frames = packet.decode()
    except FFmpegError as error:
        # Decoders say it in several ways: they keep the size, or none with an error of their own; dav1d only the error.
        codec = packet.stream.codec_context
        refused = (codec.width == 0 and error.errno == errno.EINVAL) or error.errno == errno.ERANGE
        if refused or codec.width * codec.height > limits.max_pixels:
            raise _too_many_pixels(limits) from error
        return None
    if any(frame.width * frame.height > limits.max_pixels for frame in frames):
        raise _too_many_pixels(limits)
    return frames


def decode_key_frames(index: VideoIndex, keys: NDArray[np.intp], *, limit: int) -> Iterator[tuple[int, Any]]:
    """Decode these key frames only (all of them: about a thirteenth of a full decode); at most `limit`, evenly spread.

    keys: (k,) numbers of frames, each of which `index.key` calls a key frame.
    """
    if len(keys) > limit:
        keys = keys[np.linspace(0, len(keys) - 1, limit).round().astype(int)]
    wanted = set(keys.tolist())
    try:
        with _open(index.path, index.limits) as container:
            stream = _single_threaded(container.streams[index.stream], index.limits)
            for packet_number, packet in Demuxer(container, stream):
                if packet_number >= 0 and (number := int(index.numbers[packet_number])) in wanted:
                    for frame in _decode_alone(stream.codec_context, packet, index.limits):
                        yield number, frame
    except FFmpegError as error:
        raise ClipFailure(FailureCode.CORRUPT, f"a key frame cannot be decoded ({type(error).__name__})") from error


def _decode_alone(codec: Any, packet: Any, limits: VideoLimits) -> list[Any]:
    """The frame of one packet; the decoder is emptied, or it would wait for packets that never come."""
    codec.flush_buffers()
    frames = _decode_packet(packet, limits) or []
    with contextlib.suppress(FFmpegError):
        frames += codec.decode(None)
    codec.flush_buffers()
    return [frame for frame in frames if not frame.is_corrupt][:1]


def verify(path: Path, limits: VideoLimits = VideoLimits()) -> VideoFile:
    """Check that a file is a whole, decodable video: every packet is there and a spread of key frames decodes.

    The full decode happens once, when the clip is observed; that pass checks every frame.
    Raises ClipFailure as index_video.
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


def to_rgb(frame: Any) -> RGB:
    """The stored picture as (coded height, coded width, 3) RGB, not yet upright; HDR as SDR."""
    if transfer_of(frame) != "sdr":
        return to_sdr(frame)
    return frame.to_ndarray(format="rgb24", threads=1)


def upright(stored: NDArray[np.uint8], index: VideoIndex) -> NDArray[np.uint8]:
    """Turn and mirror a stored (or scaled stored) picture as the display matrix asks."""
    turned = np.rot90(stored, index.rotation // 90)
    return np.ascontiguousarray(turned[:, ::-1] if index.mirrored else turned)


def halved(stored: RGB, index: VideoIndex, width: int, height: int) -> RGB:
    """A stored picture, halved as often as it stays at least as large as an upright (height, width) one.

    `resize` does this itself; done before, several sizes share the work and come out no different.
    """
    size = (height, width) if index.rotation % 180 else (width, height)
    while stored.shape[1] // 2 >= size[0] and stored.shape[0] // 2 >= size[1]:
        half = (stored.shape[1] // 2, stored.shape[0] // 2)
        stored = cv2.resize(stored, half, interpolation=cv2.INTER_AREA)
    return stored


def resize(stored: RGB, index: VideoIndex, width: int, height: int, part: Part = WHOLE) -> RGB:
    """Upright (height, width, 3) picture from a stored one; applies pixel aspect and display matrix with the scaling.

    Halved and then interpolated: a third of the time of an area filter, which OpenCV does slowly for odd factors. Of a
    part only its own pixels are read, the nearest whole ones as stored.
    """
    if part != WHOLE:
        turned = upright(stored, index)
        x1, y1, x2, y2 = (round(at * side) for at, side in zip(part, turned.shape[1::-1] * 2, strict=True))
        stored, index = turned[y1:y2, x1:x2], replace(index, rotation=0, mirrored=False)
    size = (height, width) if index.rotation % 180 else (width, height)
    return upright(cv2.resize(halved(stored, index, width, height), size, interpolation=cv2.INTER_LINEAR), index)


def thumbnail(frame: Any, index: VideoIndex, width: int, height: int) -> RGB:
    """Small upright (height, width, 3) BGR picture scaled inside the decoder's own scaler; for per-frame measures."""
    if index.rotation % 180:
        width, height = height, width
    if transfer_of(frame) != "sdr":
        small = cv2.cvtColor(to_sdr(frame, width=width, height=height, interpolation="AREA"), cv2.COLOR_RGB2BGR)
    else:
        small = frame.to_ndarray(width=width, height=height, format="bgr24", interpolation="AREA", threads=1)
    return upright(small, index)


def frames_at(index: VideoIndex, times_s: Sequence[float], width: int, height: int) -> list[RGB]:
    """The frames on screen at these times, as upright (height, width, 3) RGB; random access, as `pictures`."""
    return pictures(index, index.on_screen(np.asarray(times_s, np.float64)).tolist(), width, height)


def pictures(index: VideoIndex, numbers: Sequence[int], width: int, height: int, part: Part = WHOLE) -> list[RGB]:
    """The frames of these numbers, or a part of each, as upright (height, width, 3) RGB; random access.

    Uses decord where it reads the file as PyAV does, PyAV otherwise. Holds one frame of full size at a time. Raises
    ClipFailure(CORRUPT), and IndexDiffers as `decode`.
    """
    wanted = sorted(set(numbers))
    found = _by_decord(index, wanted, width, height, part)
    if found is None:
        found = _by_pyav(index, wanted, width, height, part)
    return [found[number] for number in numbers]


def _by_pyav(index: VideoIndex, wanted: list[int], width: int, height: int, part: Part = WHOLE) -> dict[int, RGB]:
    pictures = {}
    # One pass per group of neighbouring frames; each starts at the key frame before it.
    for group in np.split(np.asarray(wanted, np.intp), np.flatnonzero(np.diff(wanted) > 300) + 1):
        for number, frame in decode(index, int(group[0]), int(group[-1]) + 1, only=group.tolist()):
            pictures[number] = resize(to_rgb(frame), index, width, height, part)
    return pictures


def _by_decord(
    index: VideoIndex, wanted: list[int], width: int, height: int, part: Part = WHOLE
) -> dict[int, RGB] | None:
    """None where decord's idea of the file differs from PyAV's.

    decord ignores edit lists, rotates by itself, cannot open AV1, converts 10 bits differently, and loses count after
    a seek into open groups of pictures. For all else its own frame times, and its pixels at both ends, must agree.
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
        found = {number: resize(reader[number].asnumpy(), index, width, height, part) for number in wanted}
    except decord.DECORDError:
        return None
    ends = sorted({wanted[0], wanted[-1]})
    same = all(np.array_equal(found[n], _by_pyav(index, [n], width, height, part)[n]) for n in ends)
    return found if same else None
