"""Copies an MP4 or MOV file and blanks everything except one track, byte by byte; nothing moves.

For files whose edit list no muxer can rewrite: several edits, or one that ends among frames that others need. Boxes
without video become empty `free` boxes; names, dates and all media data of other tracks become zeros.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

# The boxes that stay, by parent box; everything else is blanked (ISO/IEC 14496-12 and -15).
_KEPT: dict[bytes, frozenset[bytes]] = {
    holder: frozenset(kinds.split())
    for holder, kinds in {
        b"": b"ftyp moov moof mdat sidx",
        b"moov": b"mvhd trak mvex",
        b"mvex": b"mehd trex",
        b"trak": b"tkhd edts mdia",
        b"edts": b"elst",
        b"mdia": b"mdhd hdlr minf",
        b"minf": b"vmhd dinf stbl",
        b"dinf": b"dref",
        b"stbl": b"stsd stts ctts cslg stsc stsz stz2 stco co64 stss stps sdtp sbgp sgpd",
        b"moof": b"mfhd traf",
        b"traf": b"tfhd tfdt trun sdtp sbgp sgpd",
    }.items()
}
_OF_A_SAMPLE_ENTRY = frozenset(
    b"avcC hvcC lhvC vpcC av1C esds d263 glbl pasp colr clap btrt fiel gama mdcv clli SmDm CoLL dvcC dvvC".split()
)
_DATED = (b"mvhd", b"tkhd", b"mdhd")
_TRACKS = {b"trak": b"tkhd", b"traf": b"tfhd"}
_ENTRY_NAME, _ENTRY_BOXES = slice(42, 74), 78  # the compressor's name, and the boxes after it, in an entry
Box = tuple[bytes, int, int]
_UNDETERMINED = (0x55C4).to_bytes(2, "big")  # language `und`


def scrub(source: Path, track: int, samples: Iterable[tuple[int, int]], written: Path) -> None:
    """Copy `source` to `written`, keeping only the track with this id and its samples (position, bytes).

    Raises ValueError for a file whose boxes do not nest, or are shorter than their required content.
    """
    shutil.copyfile(source, written)
    kept = sorted(samples)
    with written.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as data:
        outer = list(boxes(data, 0, len(data), strict=False))
        _blank(data, 0, outer[-1][2] if outer else 0, b"", track)
        _zero(data, outer[-1][2] if outer else 0, len(data))  # the data after the last box is not a box
        number = 0
        for kind, place, end in sorted(outer, key=lambda box: box[1]):
            if kind != b"mdat":
                continue
            while number < len(kept) and kept[number][0] < end:
                start, size = kept[number]
                if start >= place:
                    _zero(data, place, start)
                place, number = max(place, start + size), number + 1
            _zero(data, min(place, end), end)
        data.flush()


def boxes(data: mmap.mmap, place: int, end: int, *, strict: bool = True, cut: bool = False) -> Iterator[Box]:
    """(kind, start of the content, end) of the boxes between two places; up to a bad one if not `strict`.

    cut: a box that continues after the end is not bad but ends there, as FFmpeg reads it.
    """
    while place + 8 <= end:
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        begin = place + 8
        if size == 1:
            size, begin = int.from_bytes(data[begin : begin + 8], "big"), begin + 8
        stop = place + size if size else end
        if stop < begin or stop > end:
            if strict:
                raise ValueError(f"a box ends at {stop}, outside {begin} to {end}")
            if stop < begin or not cut:
                return
            stop = end
        yield kind, begin, stop
        place = stop


def _blank(data: mmap.mmap, place: int, end: int, holder: bytes, track: int) -> None:
    for kind, begin, stop in list(boxes(data, place, end)):
        other = kind in _TRACKS and _track_id(data, begin, stop, _TRACKS[kind]) != track
        if kind not in _KEPT[holder] or other:
            _free(data, kind, begin, stop)
        elif kind in _KEPT:
            _blank(data, begin, stop, kind, track)
        elif kind in _DATED:
            long = 8 if _bytes(data, begin, 1, stop)[0] else 0
            _zero(data, begin + 4, _within(begin + 12 + long, stop))  # created, modified
            if kind == b"mdhd":
                language = _within(begin + 22 + 3 * long // 2, stop)
                data[language - 2 : language] = _UNDETERMINED
        elif kind == b"hdlr":
            _zero(data, _within(begin + 24, stop), stop)
        elif kind == b"stsd":
            for _, entry, entry_end in list(boxes(data, _within(begin + 8, stop), stop)):
                _zero(data, entry + _ENTRY_NAME.start, _within(entry + _ENTRY_NAME.stop, entry_end))
                for inner, start, inner_end in list(boxes(data, _within(entry + _ENTRY_BOXES, entry_end), entry_end)):
                    if inner not in _OF_A_SAMPLE_ENTRY:
                        _free(data, inner, start, inner_end)


def _free(data: mmap.mmap, kind: bytes, begin: int, stop: int) -> None:
    head = begin - 12 if data[begin - 12 : begin - 8] == kind else begin - 4
    data[head : head + 4] = b"free"
    _zero(data, begin, stop)


def _track_id(data: mmap.mmap, place: int, end: int, header: bytes) -> int | None:
    for kind, begin, stop in boxes(data, place, end):
        if kind == header:
            skipped = 4 if kind == b"tfhd" else 20 if _bytes(data, begin, 1, stop)[0] else 12
            return int.from_bytes(_bytes(data, begin + skipped, 4, stop), "big")
    return None


def _bytes(data: mmap.mmap, place: int, count: int, end: int) -> bytes:
    return data[place : _within(place + count, end)]


def _within(place: int, end: int) -> int:
    if place > end:
        raise ValueError(f"a box ends at {end}, before its required content")
    return place


def _zero(data: mmap.mmap, begin: int, end: int) -> None:
    for place in range(begin, end, 1 << 20):
        stop = min(end, place + (1 << 20))
        data[place:stop] = bytes(stop - place)
