"""Decodes frames of a video by presentation time, upright and with square pixels, whatever the container says.

A file is complete if its container ends where the data ends and every packet with data decodes. The timeline is the one
that ffmpeg shows, in seconds after the first shown frame. Declared counts and durations are hints. A frame is
identified by its packet and its order, never by its time, because two frames may have the same time.

Two decoders are hidden here: PyAV for the sequential pass and for files that decord misreads, decord for random access.
Both give the same frame, with the same pixels, for the same number. This module never judges a video.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from curation.failures import ClipFailure, FailureCode
from curation.records import WHOLE, Part
from curation.video.bounded import damaged, decode_alone, decode_packet, open_video, single_threaded
from curation.video.hdr import to_sdr, transfer_of
from curation.video.index import TIME_TOLERANCE_S, IndexDiffers, VideoIndex
from curation.video.packets import Demuxer, packet_of

RGB = NDArray[np.uint8]


def decode(index: VideoIndex, first: int, last: int, *, only: Iterable[int] | None = None) -> Iterator[tuple[int, Any]]:
    """Decode frames [first, last) in one sequential pass; yields (frame number, av.VideoFrame) of each, in order.

    `only`: yield just these (a sorted sequence of numbers), still in one pass. Raises ClipFailure(CORRUPT) for a frame
    that does not decode, TOO_LARGE for one with too many pixels, and IndexDiffers if the decoder shows other frames
    than the packets announce.
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
    """Frames [first, last), decoded from the nearest position before them that gives clean frames."""
    keys = np.flatnonzero(index.key[: first + 1]).tolist()
    entries = keys[:-3:-1] if len(index.places) and len(keys) > 1 else []
    expected = first
    # A seek may find a later key frame or lose frames; the missing frames are then read from an earlier key frame.
    for entry in (*entries, None):
        with open_video(index.path, index.limits) as container:
            for number, frame in _numbered(container, index, entry, expected, last):
                if number != expected:
                    break
                yield number, frame
                expected += 1
                if expected == last < len(index.times_s):
                    return
            if expected == last:  # and no frame followed the last one of the video
                return
    raise _missing(index, expected)


def _missing(index: VideoIndex, number: int) -> Exception:
    return damaged(number) if index.decoded else IndexDiffers()


def _numbered(container: Any, index: VideoIndex, entry: int | None, first: int, last: int) -> Iterator[tuple[int, Any]]:
    """(number, frame) of decoded frames from `first` on, after a seek to the key frame `entry` if that is not None.

    Raises ClipFailure(CORRUPT) for data that does not decode and that frames [first, last) need.
    """
    stream = single_threaded(container.streams[index.stream], index.limits)
    if entry is not None:
        stamp = index.origin + round(float(index.times_s[entry]) / float(index.time_base))
        container.seek(stamp, stream=stream, backward=True, any_frame=False)
    keys = np.flatnonzero(index.key[: first + 1])
    needed = range(int(keys[-1]) if len(keys) else 0, last)
    count, reached = 0, -1
    for sent, packet in Demuxer(container, stream).since(None if entry is None else index.places):
        frames = decode_packet(packet, index.limits)
        if frames is None:
            number = int(index.numbers[sent])
            if (number if number >= 0 or reached < 0 else reached + 1) in needed:
                raise damaged(max(number, reached + 1))
        for frame in frames or ():
            packet_number = packet_of(frame)
            number = count if index.decoded else -1 if packet_number < 0 else int(index.numbers[packet_number])
            count += 1
            if frame.is_corrupt:
                if number >= first:
                    raise damaged(number)
            elif number < 0:
                if entry is None:  # after a seek, a decoder may invent a frame that it lacks
                    raise IndexDiffers
            else:
                reached = number
                if number >= first:
                    yield number, frame


def decode_key_frames(index: VideoIndex, keys: NDArray[np.intp], *, limit: int) -> Iterator[tuple[int, Any]]:
    """Decode only these key frames, at most `limit`, evenly spread; all of them take about 1/13 of a full decode.

    keys: (k,) numbers of frames that are key frames by `index.key`.
    """
    if len(keys) > limit:
        keys = keys[np.linspace(0, len(keys) - 1, limit).round().astype(int)]
    wanted = set(keys.tolist())
    try:
        with open_video(index.path, index.limits) as container:
            stream = single_threaded(container.streams[index.stream], index.limits)
            for packet_number, packet in Demuxer(container, stream):
                if packet_number >= 0 and (number := int(index.numbers[packet_number])) in wanted:
                    for frame in decode_alone(stream.codec_context, packet, index.limits):
                        yield number, frame
    except FFmpegError as error:
        raise ClipFailure(FailureCode.CORRUPT, f"a key frame cannot be decoded ({type(error).__name__})") from error


def to_rgb(frame: Any) -> RGB:
    """The stored frame as (coded height, coded width, 3) RGB, not yet upright; HDR is converted to SDR."""
    if transfer_of(frame) != "sdr":
        return to_sdr(frame)
    return frame.to_ndarray(format="rgb24", threads=1)


def upright(stored: NDArray[np.uint8], index: VideoIndex) -> NDArray[np.uint8]:
    """Rotate and mirror a stored frame, scaled or not, as the display matrix says."""
    turned = np.rot90(stored, index.rotation // 90)
    return np.ascontiguousarray(turned[:, ::-1] if index.mirrored else turned)


def halved(stored: RGB, index: VideoIndex, width: int, height: int) -> RGB:
    """A stored frame, halved as often as it stays at least as large as an upright (height, width) frame.

    `resize` does this itself; if it is done before, several sizes share the work, with the same result.
    """
    size = (height, width) if index.rotation % 180 else (width, height)
    while stored.shape[1] // 2 >= size[0] and stored.shape[0] // 2 >= size[1]:
        half = (stored.shape[1] // 2, stored.shape[0] // 2)
        stored = np.asarray(cv2.resize(stored, half, interpolation=cv2.INTER_AREA), np.uint8)
    return stored


def resize(stored: RGB, index: VideoIndex, width: int, height: int, part: Part = WHOLE) -> RGB:
    """An upright (height, width, 3) frame from a stored one; applies pixel aspect and display matrix with the scaling.

    Halving and then interpolating takes a third of the time of OpenCV's area filter, which is slow for odd factors. For
    a part, only its own pixels are read, rounded to whole stored pixels.
    """
    if part != WHOLE:
        turned = upright(stored, index)
        x1, y1, x2, y2 = (round(at * side) for at, side in zip(part, turned.shape[1::-1] * 2, strict=True))
        stored, index = turned[y1:y2, x1:x2], replace(index, rotation=0, mirrored=False)
    size = (height, width) if index.rotation % 180 else (width, height)
    scaled = cv2.resize(halved(stored, index, width, height), size, interpolation=cv2.INTER_LINEAR)
    return upright(np.asarray(scaled, np.uint8), index)


def thumbnail(frame: Any, index: VideoIndex, width: int, height: int) -> RGB:
    """A small upright (height, width, 3) BGR frame, scaled by the decoder's own scaler; for per-frame measures."""
    if index.rotation % 180:
        width, height = height, width
    if transfer_of(frame) != "sdr":
        small = cv2.cvtColor(to_sdr(frame, width=width, height=height, interpolation="AREA"), cv2.COLOR_RGB2BGR)
    else:
        small = frame.to_ndarray(width=width, height=height, format="bgr24", interpolation="AREA", threads=1)
    return upright(np.asarray(small, np.uint8), index)


def frames_at(index: VideoIndex, times_s: Sequence[float], width: int, height: int) -> list[RGB]:
    """The frames on screen at these times, as upright (height, width, 3) RGB; random access, as in `pictures`."""
    return pictures(index, index.on_screen(np.asarray(times_s, np.float64)).tolist(), width, height)


def pictures(index: VideoIndex, numbers: Sequence[int], width: int, height: int, part: Part = WHOLE) -> list[RGB]:
    """The frames of these numbers, or a part of each, as upright (height, width, 3) RGB; random access.

    Uses decord if it reads the file as PyAV does, PyAV otherwise. Holds one full-size frame at a time. Raises
    ClipFailure(CORRUPT), and IndexDiffers as `decode` does.
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
    """None if decord reads the file differently from PyAV.

    decord ignores edit lists, rotates frames itself, cannot open AV1, converts 10 bits differently, and loses count
    after a seek into open groups of pictures. For other files, its frame times and its pixels at both ends must agree.
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
