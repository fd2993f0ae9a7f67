"""Reads a video's packets before anything is decoded: selects its stream, and collects the times of its packets.

Packets with data are numbered in the order of the file; a decoded frame carries the number of its packet (packet_of).
Counts and durations that a container declares are hints: they only help to choose between streams.
Nothing here reads pixels.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from curation.failures import ClipFailure, FailureCode

NONE = np.iinfo(np.int64).min  # a time that is not stated
# A clock that may restart has restarted if it jumps back by over a tenth of a second, or ahead by over ten seconds: the
# limits of ffmpeg, whose timeline this is.
_BACK_S, _AHEAD_S = Fraction(1, 10), 10
_H264_SIZE, _HEVC_SIZE = 7, 33  # unit types of sequence parameter sets
_FILM = 0.5  # of the frames and the duration of the longest stream; cover art or a preview has less
_FINE = Fraction(1, 4)
_USUAL_RATES = tuple(Fraction(rate) for rate in (12, 15, 20, 24, 25, 30, 48, 50, 60, 100, 120)) + tuple(
    Fraction(rate * 1000, 1001) for rate in (12, 15, 24, 30, 48, 60, 120)
)


class Demuxer:
    """A stream's packets, numbered, on one clock that continues where the clock of the file restarts.

    A packet without data repeats the frame before it: `held` is the duration of such packets since the last packet with
    data. restarted: whether the clock of the file restarted.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        """Iterate it only once. It sets the stream's decoder to pass packet numbers on to frames."""
        self.held = 0
        self.restarted = False
        self.may_restart = bool(container.format.flags & av.format.Flags.ts_discont.value)
        self._container, self._stream = container, stream
        self._shift = 0
        self._last: int | None = None
        self._next = 0
        stream.codec_context.copy_opaque = True

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(number, packet) of every packet with data; at the end (-1, the empty packet that flushes the decoder)."""
        return self.since(None)

    def since(self, places: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """The same after a seek: `places` are the positions of all packets, which identify the first one."""
        number = None if places is not None else 0
        for packet in all_packets(self._container, self._stream):
            if not packet.size and packet.dts is None and packet.pts is None:
                yield -1, packet
                return
            if not packet.size:
                self.held += packet.duration or 0
                continue
            self.held = 0
            if number is None:
                found = np.flatnonzero(places == packet.pos)
                if len(found) != 1:
                    return
                number = int(found[0])
            if self.may_restart:
                self._run_on(packet)
            packet.opaque = [number]  # PyAV identifies this object by its address, and small integers share theirs
            yield number, packet
            number += 1

    def _run_on(self, packet: Any) -> None:
        if packet.dts is None:
            return
        base = packet.time_base
        dts = packet.dts + self._shift
        if self._last is not None and (dts < self._last - _BACK_S / base or abs(dts - self._next) > _AHEAD_S / base):
            self._shift += self._next - dts
            self.restarted = True
            dts = self._next
        self._last, self._next = dts, dts + (packet.duration or 0)
        if self._shift:
            packet.dts = dts
            packet.pts = None if packet.pts is None else packet.pts + self._shift


def all_packets(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of these streams, or of all; at the end an empty packet of each, which flushes its decoder.

    If a stream appears only later in the file, PyAV fails at the end: the empty packets are then made here.
    """
    left = {stream.index: stream for stream in streams}
    try:
        for packet in container.demux(*streams):
            if not packet.size and packet.dts is None and packet.pts is None:
                left.pop(packet.stream_index, None)
            yield packet
    except IndexError:
        for stream in left.values():
            packet = av.Packet()
            packet.stream = stream
            yield packet


def packet_of(frame: Any) -> int:
    """Number of the packet that a decoded frame came from; -1 for a frame that a decoder invented."""
    return -1 if frame.opaque is None else frame.opaque[0]


@dataclass(slots=True)
class Packets:
    """The properties of all p packets with data of one stream, in file order; times in ticks. 27 bytes a packet.

    stamps: presentation times, decoding times where a packet has no other, NONE where it has neither. durations: as
    stated, or 0. key: decodes on its own. shows: becomes a frame, and does not only serve others. discard: hidden by
    an edit list (each 0 or 1). places: position in the file, -1 if unknown. untimed: some packet has no presentation
    time. resized: the frame size may change; known only for H.264 and HEVC in MP4 and Matroska.
    codec, header: the stream's codec and its extradata.
    """

    codec: str
    header: bytes
    stamps: array[int] = field(default_factory=lambda: array("q"))
    durations: array[int] = field(default_factory=lambda: array("q"))
    key: bytearray = field(default_factory=bytearray)
    shows: bytearray = field(default_factory=bytearray)
    discard: bytearray = field(default_factory=bytearray)
    places: array[int] = field(default_factory=lambda: array("q"))
    untimed: bool = False
    resized: bool = field(init=False)
    _length: int = field(init=False)

    def __post_init__(self) -> None:
        self._length = _unit_length(self.codec, self.header)
        self.resized = self._length == 0

    def __len__(self) -> int:
        return len(self.stamps)

    def add(self, packet: Any) -> None:
        """Add the next packet, without keeping a reference to it."""
        stamp = packet.pts if packet.pts is not None else packet.dts
        self.untimed = self.untimed or packet.pts is None
        self.stamps.append(NONE if stamp is None else stamp)
        self.durations.append(packet.duration or 0)
        self.key.append(packet.is_keyframe)
        self.shows.append(_shows(self.codec, packet))
        self.resized = self.resized or _brings_size(self.codec, packet, self._length)
        self.discard.append(packet.is_discard)
        self.places.append(-1 if packet.pos is None else packet.pos)


def film_candidates(container: Any) -> list[Any]:
    """The video streams that have a decoder and are not cover art."""
    pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    return [stream for stream in pictures if stream.codec_context is not None]


def film_stream(container: Any, reopen: Callable[[], Any]) -> Any:
    """The main video stream: not cover art, a preview or a track that is switched off.

    It has at least half of the frames and of the duration of the longest stream; among several, the default one comes
    first, then the one with more frames, then the larger. reopen: opens the file again to count packets; called only if
    there is a choice. Raises ClipFailure(NO_VIDEO).
    """
    streams = film_candidates(container)
    if not streams:
        covers = av.stream.Disposition.attached_pic
        pictures = any(not stream.disposition & covers for stream in container.streams.video)
        what = "no decoder for its video stream" if pictures else "no video stream"
        raise ClipFailure(FailureCode.NO_VIDEO, f"the file has {what}")
    if len(streams) == 1:
        return streams[0]
    frames, seconds = _lengths(reopen, {stream.index for stream in streams})
    most, longest = _FILM * max(frames.values()), _FILM * max(seconds.values())
    films = [s for s in streams if frames[s.index] >= most and seconds[s.index] >= longest]
    if not films:  # a slide show that is longer than the video
        films = [s for s in streams if frames[s.index] >= most]
    default = av.stream.Disposition.default
    return max(films, key=lambda s: (bool(s.disposition & default), frames[s.index], s.width * s.height))


def _lengths(reopen: Callable[[], Any], streams: set[int]) -> tuple[dict[int, int], dict[int, float]]:
    """Packets with data and seconds of each stream."""
    frames, seconds = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0.0)
    first: dict[int, float] = {}
    with reopen() as container:
        for packet in all_packets(container):
            number = packet.stream_index
            if number in streams and packet.size:
                frames[number] += 1
                if packet.dts is not None:
                    time = float(packet.dts * packet.time_base)
                    seconds[number] = max(seconds[number], time - first.setdefault(number, time))
    return frames, seconds


def steady_rate(stamps: NDArray[np.int64], base: Fraction, declared: Iterable[Fraction | None]) -> Fraction | None:
    """The constant rate whose rounded times are these sorted stamps; None if there is none.

    Containers round times, Matroska to milliseconds. A declared or usual rate is accepted only if every stamp agrees
    with it within the rounding.
    """
    if len(stamps) < 3 or stamps[-1] == stamps[0]:
        return None
    ticks = (stamps - stamps[0]).astype(np.float64)
    steps = np.arange(len(ticks))
    for rate in (*(rate for rate in declared if rate), *_USUAL_RATES):
        # If a tick were a large part of a frame, any stamps would fit.
        if rate * base <= _FINE and abs(ticks[-1] - steps[-1] / (rate * base)) <= 1:
            away = ticks - steps / float(rate * base)
            if np.ptp(away) <= 1.0 + 1e-6:  # one tick, wherever the first stamp lies within its tick
                return rate
    return None


def _unit_length(codec: str, header: bytes) -> int:
    """Bytes of the length field before each unit of a packet; 0 unless the header states it and a single frame size.

    ISO/IEC 14496-15, sections 5.3.3 and 8.3.3.
    """
    if len(header) < 23 or header[0] != 1:
        return 0
    if codec == "h264":
        return (header[4] & 3) + 1 if header[5] & 0x1F == 1 else 0
    sets, place = 0, 23
    for _ in range(header[22] if codec == "hevc" else 0):
        kind, count = header[place : place + 1], int.from_bytes(header[place + 1 : place + 3], "big")
        sets += count if kind and kind[0] & 0x3F == _HEVC_SIZE else 0
        place += 3
        for _ in range(count):
            place += 2 + int.from_bytes(header[place : place + 2], "big")
            if place > len(header):
                return 0
    return (header[21] & 3) + 1 if sets == 1 else 0


def _brings_size(codec: str, packet: Any, length: int) -> bool:
    """Whether this packet may change the size: it has a sequence parameter set, or is not a sequence of units."""
    if packet.has_sidedata("new_extradata"):
        return True
    data, place = memoryview(packet), 0
    while place + length < len(data):
        head = data[place + length]
        if (head & 0x1F == _H264_SIZE) if codec == "h264" else (head >> 1 & 0x3F == _HEVC_SIZE):
            return True
        place += length + int.from_bytes(data[place : place + length], "big")
    return place != len(data)


def _shows(codec: str, packet: Any) -> bool:
    """False for a packet of VP8 or VP9 that only serves other frames (their specifications, sections 9.1 and 6.2)."""
    if codec not in ("vp8", "vp9"):
        return True
    data = memoryview(packet)
    if codec == "vp8":
        return bool(data[0] & 0x10)
    return any(_vp9_shows(data[start]) for start in _vp9_frames(data))


def _vp9_frames(data: memoryview) -> list[int]:
    """Where the frames of a superframe begin (annex B of the specification); [0] for a packet of one frame."""
    marker = data[-1]
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = len(data) - 2 - count * width
    if marker >> 5 != 0b110 or index < 0 or data[index] != marker:
        return [0]
    sizes = [int.from_bytes(data[index + 1 + n * width : index + 1 + (n + 1) * width], "little") for n in range(count)]
    starts = [sum(sizes[:n]) for n in range(count)]
    return [start for start, size in zip(starts, sizes, strict=True) if size and start < index]


def _vp9_shows(head: int) -> bool:
    """Whether a frame, by its first byte, shows itself or an existing frame."""
    if head >> 6 != 0b10:  # not a frame at all; a decoder will report it
        return True
    if head >> 4 & 3 == 3:  # profile 3 has one more bit here
        head <<= 1
    return bool(head & 0x08) or bool(head & 0x02)
