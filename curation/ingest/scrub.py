"""A copy of an MP4 or MOV file in which all but one track is blanked, byte by byte, and nothing moves.

For files whose edit list no muxer writes again: several edits, or one that ends among frames that others need. Boxes
that hold no picture become empty `free` boxes; names, dates and all media data of other tracks become zeros.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

# What stays, by the box that holds it; everything else is blanked (ISO/IEC 14496-12).
_KEPT = {
    b"": (b"ftyp", b"moov", b"moof", b"mdat", b"sidx"),
    b"moov": (b"mvhd", b"trak", b"mvex"),
    b"trak": (b"tkhd", b"edts", b"mdia"),
    b"mdia": (b"mdhd", b"hdlr", b"minf"),
    b"moof": (b"mfhd", b"traf"),
}
_DATED = (b"mvhd", b"tkhd", b"mdhd")
_TRACKS = {b"trak": b"tkhd", b"traf": b"tfhd"}
_ENTRY_NAME = slice(50, 82)  # of the compressor, within an entry of `stsd`


def scrub(source: Path, track: int, samples: Iterable[tuple[int, int]], written: Path) -> None:
    """Copy `source` to `written`, keeping of it the track with this id and its samples (position, bytes).

    Raises ValueError for a file whose boxes do not nest.
    """
    shutil.copyfile(source, written)
    with written.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as data:
        _blank(data, 0, len(data), b"", track)
        for kind, begin, end in list(_boxes(data, 0, len(data))):
            if kind != b"mdat":
                continue
            place = begin
            for start, size in sorted(samples):
                if begin <= start < end:
                    _zero(data, place, start)
                    place = max(place, start + size)
            _zero(data, place, end)
        data.flush()


def _boxes(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin of the content, end) of the boxes between two places."""
    while place + 8 <= end:
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        begin = place + 8
        if size == 1:
            size, begin = int.from_bytes(data[begin : begin + 8], "big"), begin + 8
        stop = place + size if size else end
        if stop < begin or stop > end:
            raise ValueError(f"a box ends at {stop}, outside {begin} to {end}")
        yield kind, begin, stop
        place = stop


def _blank(data: mmap.mmap, place: int, end: int, holder: bytes, track: int) -> None:
    for kind, begin, stop in list(_boxes(data, place, end)):
        other = kind in _TRACKS and _track_id(data, begin, stop, _TRACKS[kind]) != track
        if kind not in _KEPT[holder] or other:
            head = begin - 12 if data[begin - 12 : begin - 8] == kind else begin - 4
            data[head : head + 4] = b"free"
            _zero(data, begin, stop)
        elif kind in _KEPT:
            _blank(data, begin, stop, kind, track)
        elif kind in _DATED:
            _zero(data, begin + 4, begin + (20 if data[begin] else 12))  # created, modified
        elif kind == b"hdlr":
            _zero(data, begin + 24, stop)
        elif kind == b"minf":
            for entry in _sample_entries(data, begin, stop):
                _zero(data, entry + _ENTRY_NAME.start, entry + _ENTRY_NAME.stop)


def _track_id(data: mmap.mmap, place: int, end: int, header: bytes) -> int | None:
    for kind, begin, _ in _boxes(data, place, end):
        if kind == header:
            begin += 4 if kind == b"tfhd" else 20 if data[begin] else 12
            return int.from_bytes(data[begin : begin + 4], "big")
    return None


def _sample_entries(data: mmap.mmap, place: int, end: int) -> Iterator[int]:
    """Where the sample entries of a track begin."""
    for kind, begin, stop in list(_boxes(data, place, end)):
        if kind == b"stbl":
            yield from _sample_entries(data, begin, stop)
        elif kind == b"stsd":
            yield from (entry - 8 for _, entry, _ in _boxes(data, begin + 8, stop))


def _zero(data: mmap.mmap, begin: int, end: int) -> None:
    for place in range(begin, end, 1 << 20):
        stop = min(end, place + (1 << 20))
        data[place:stop] = bytes(stop - place)
