"""Finds out what a fetched file really is, and refuses one that is not a video, too large or incomplete.

Only files are read, and only as one of a few video containers, because a playlist named .mp4 could make ffmpeg open
other files and URLs. Nothing is decoded here.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.failures import ClipFailure, FailureCode
from curation.settings import VideoLimits
from curation.video.bounded import UNDECODED, too_many_frames, too_many_tracks
from curation.video.scrub import boxes

_PICTURES = {
    b"GIF8": "GIF",
    b"\x89PNG": "PNG image",
    b"\xff\xd8\xff": "JPEG image",
    b"BM": "BMP image",
    b"II*\0": "TIFF image",
    b"MM\0*": "TIFF image",
    b"\0\0\0\x0cJXL ": "JPEG XL image",
}
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
_RIFF_UNKNOWN = 0xFFFFF000


def refuse_kind(path: Path) -> None:
    """Raise ClipFailure(WRONG_KIND) for an image, still or animated: intact, but not a video container."""
    with path.open("rb") as stream:
        head = stream.read(32)
    found = next((kind for begin, kind in _PICTURES.items() if head.startswith(begin)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        found = "WebP image"
    if head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS:
        found = "HEIF or AVIF image"
    if found:
        raise ClipFailure(FailureCode.WRONG_KIND, f"The file is a {found}; convert it to MP4.")


# Boxes inside which FFmpeg reads further boxes, wherever they appear.
_HOLDERS = frozenset(
    b"moov trak mdia minf stbl edts moof traf udta dinf sinf tref mvex wave hoov".split(),
)
MOST_BOXES = 4_000_000  # read in about ten seconds; enough for five hours with one fragment per frame
_ENTRY_BOXES = (78, 28, 44, 64)  # where boxes begin in a sample entry of video, or of sound by its version
_DEEPEST = 10  # levels of nested boxes, as in FFmpeg; the tables of a track are on the fifth
_ONE_PER_SAMPLE = 0xF00  # flags of a `trun` box for fields of every sample, four bytes each


@dataclass(slots=True)
class _Tables:
    """The counts in the tables of one MP4 track. ticks: each sample lasts one tick."""

    samples: int = 0
    edits: int = 0
    sound: bool = False
    ticks: bool = False


def refuse_tables(path: Path, limits: VideoLimits = VideoLimits()) -> None:
    """Raise ClipFailure(TOO_LARGE) if an MP4 states more samples or tracks than it may, or has more than MOST_BOXES.

    Opening such a file takes 24 bytes for each sample that its tables state, even if they do not list it, and for each
    time that an edit shows it. A compressed header is refused unread (WRONG_KIND); so are fragments that state more
    samples than they list, and boxes nested too deeply (CORRUPT). Anything else passes.
    """
    if not path.stat().st_size:
        return
    tracks, fragments, unlisted, owner = [_Tables()], Counter[int](), 0, 0
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, (kind, begin, end) in enumerate(_nested(data, 0, len(data))):
            if number >= MOST_BOXES:
                raise ClipFailure(FailureCode.TOO_LARGE, f"the file has more than {MOST_BOXES} boxes")
            if kind == b"cmov":
                raise ClipFailure(FailureCode.WRONG_KIND, "the header of the file is compressed; convert it to MP4")
            if kind == b"trak":
                tracks.append(_Tables())
                if len(tracks) > limits.max_tracks + 1:
                    raise too_many_tracks(limits)
            elif kind in (b"stsz", b"stz2"):
                tracks[-1].samples = max(tracks[-1].samples, _number(data, begin + 8, end))
            elif kind == b"elst":
                tracks[-1].edits = max(tracks[-1].edits, _number(data, begin + 4, end))
            elif kind == b"stts":
                tracks[-1].ticks = _number(data, begin + 4, end) == 1 == _number(data, begin + 12, end)
            elif kind == b"hdlr":
                tracks[-1].sound |= data[begin + 8 : begin + 12] == b"soun"
            elif kind == b"tfhd":
                owner = _number(data, begin + 4, end)
            elif kind == b"trun":
                samples, each = _run(data, begin, end)
                fragments[owner] += samples
                unlisted += 0 if each else samples
    listed = [track for track in tracks if not (track.sound and track.ticks)]  # FFmpeg makes no list for plain sound
    if max([unlisted, *fragments.values(), *(track.samples for track in listed)]) > limits.max_frames or any(
        track.edits * track.samples > 10 * limits.max_frames for track in listed
    ):
        raise too_many_frames(limits)


def _run(data: mmap.mmap, begin: int, end: int) -> tuple[int, bool]:
    """How many samples a `trun` box states, and whether it has fields for each."""
    flags, samples = _number(data, begin, end), _number(data, begin + 4, end)
    fields = (flags & _ONE_PER_SAMPLE).bit_count()
    first = begin + 8 + 4 * (flags & 0x5).bit_count()
    if fields and first + 4 * fields * samples > end:
        raise ClipFailure(FailureCode.CORRUPT, f"a fragment of {end - begin} bytes claims {samples} samples")
    return samples, bool(fields)


def _nested(data: mmap.mmap, place: int, end: int, depth: int = _DEEPEST) -> Iterator[tuple[bytes, int, int]]:
    for kind, begin, stop in boxes(data, place, end, strict=False, cut=True):
        yield kind, begin, stop
        for inner in _inside(data, kind, begin, stop):
            if not depth:
                raise ClipFailure(FailureCode.CORRUPT, f"the boxes of the file are nested deeper than {_DEEPEST}")
            if kind != b"stsd":
                yield from _nested(data, inner, stop, depth - 1)
                continue
            for entry, first, last in boxes(data, inner, stop, strict=False, cut=True):
                yield entry, first, last
                for offset in _ENTRY_BOXES:
                    yield from _nested(data, first + offset, last, depth - 1)


def _inside(data: mmap.mmap, kind: bytes, begin: int, stop: int) -> Iterator[int]:
    """Where FFmpeg reads further boxes inside a box."""
    if kind in _HOLDERS:
        yield begin
    elif kind == b"stsd":
        yield begin + 8
    elif kind == b"free" and data[begin + 4 : begin + 8] in (b"mvhd", b"cmov"):
        yield begin  # a header that was marked as deleted
    elif kind == b"meta":  # with or without four bytes before its boxes
        place = data.find(b"hdlr", begin + 4, stop)
        while place >= 0 and (place - begin) % 4:
            place = data.find(b"hdlr", place + 1, stop)
        if place >= 0:
            yield place - 4


def _number(data: mmap.mmap, place: int, end: int) -> int:
    return int.from_bytes(data[place : min(place + 4, end)], "big")


def refuse_cut(path: Path, container: Any, stream: Any, samples: int) -> None:
    """Raise ClipFailure(CORRUPT) if the container's own structure continues after the end of the file.

    samples: how many with data the demuxer delivered for the stream. A count or duration that a header declares is no
    evidence; the position of a frame's data and the length of an element are. Streams without structure may end
    anywhere.
    """
    name = container.format.name
    if name.startswith("mov"):
        listed = sum(entry.size > 0 for entry in stream.index_entries)
        if samples < listed:
            raise ClipFailure(FailureCode.CORRUPT, f"the file has the data of only {samples} of {listed} frames")
    size = path.stat().st_size
    if name == "avi" and (end := _riff_end(path)) > size:
        raise ClipFailure(FailureCode.CORRUPT, f"the file has only {size} of {end} bytes")
    walk = {"matroska,webm": _matroska_break, "avi": _avi_break, "flv": _flv_break}.get(name)
    walk = _fragments_break if name.startswith("mov") else walk
    if walk is not None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = walk(data)
        if place is not None:
            raise ClipFailure(FailureCode.CORRUPT, f"the file is cut off or damaged at byte {place} of {size}")


def _riff_end(path: Path) -> int:
    """Where an AVI file states that it ends; 0 if it does not, as in an unfinished recording."""
    with path.open("rb") as stream:
        head = stream.read(12)
    size = int.from_bytes(head[4:8], "little")
    return size + 8 if head[8:] == b"AVI " and size < _RIFF_UNKNOWN else 0


def _matroska_break(data: mmap.mmap) -> int | None:
    """Where the sequence of elements breaks before the end of the file; None if it does not.

    A demuxer silently skips what it cannot read. An element is an id, a size, and its data (RFC 8794); nested elements
    are checked only in segments and clusters.
    """
    place, end = 0, len(data)
    live = False  # written with an unknown size: it may end anywhere
    while place < end:
        name_length = 9 - data[place].bit_length()
        head = data[place : place + name_length + 8]
        size_length = 9 - head[name_length].bit_length() if len(head) > name_length else 9
        begin = place + name_length + size_length
        if begin > end and live:
            return None
        if name_length > 4 or size_length > 8 or begin > end:
            return place
        size = int.from_bytes(head[name_length:][:size_length], "big") & ~(1 << 7 * size_length)
        known = size != (1 << 7 * size_length) - 1
        name = head[:name_length]
        if name == _SEGMENT:
            live = not known
        if not known and name not in (_SEGMENT, _CLUSTER):
            return place
        if known and begin + size > end:
            return None if live else place
        if name == _SEGMENT and known:
            end = begin + size  # the bytes that follow are not part of the video
        place = begin if name in (_SEGMENT, _CLUSTER) else begin + size
    return None


def _fragments_break(data: mmap.mmap) -> int | None:
    """The same for the top-level boxes of a fragmented MP4; an MP4 with a sample table needs no other evidence."""
    place, fragmented = 0, False
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        elif size == 0 and kind == b"mdat":  # up to the end
            return None
        if size < 8 or not kind.isascii() or b"\0" in kind or place + size > len(data):
            return place if fragmented else None
        fragmented = fragmented or kind == b"moof"
        place += size
    return None


def _avi_break(data: mmap.mmap) -> int | None:
    """The same for the data chunks of an AVI file that states its length."""
    end = int.from_bytes(data[4:8], "little") + 8
    if end - 8 >= _RIFF_UNKNOWN or end == 8:
        return None
    place, inside = 12, 0  # the end of the list of data chunks
    while place + 8 <= min(end, len(data)):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if b"\0" in kind or place + 8 + size > len(data):
            return place if place < inside else None
        if kind == b"LIST" and data[place + 8 : place + 12] in (b"movi", b"rec "):
            inside = max(inside, place + 8 + size)
            place += 12
        else:
            place += 8 + size + size % 2
    return None


def _flv_break(data: mmap.mmap) -> int | None:
    """The same for the tags of an FLV file."""
    place = int.from_bytes(data[5:9], "big") + 4
    while place + 11 <= len(data):
        length = 11 + int.from_bytes(data[place + 1 : place + 4], "big")
        if data[place] & 0x1F not in (8, 9, 18) or place + length > len(data):
            return place
        place += length + 4
    return None


def stated_end(container: Any, stream: Any) -> float | None:
    """When the video ends as the container states, in seconds on its clock: the last frame may be held.

    Only for containers that store no duration for the last frame.
    """
    name = container.format.name
    if name == "avi" and stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if name == "matroska,webm":
        if found := re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)\0*", stream.metadata.get("DURATION", "")):
            return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])
        if len(container.streams) == 1 and container.duration is not None:
            return container.duration / 1e6
    return None


def container_format(path: Path, limits: VideoLimits = VideoLimits()) -> str:
    """FFmpeg's name for a file's container.

    Raises ClipFailure: WRONG_KIND for an image, TOO_LARGE as refuse_tables, CORRUPT for a file that is not a container,
    such as a page or a playlist.
    """
    import av
    from av.error import FFmpegError

    refuse_kind(path)
    refuse_tables(path, limits)
    try:
        with av.open(str(path), options=UNDECODED, metadata_errors="ignore") as container:
            return container.format.name
    except FFmpegError:
        pass
    raise ClipFailure(FailureCode.CORRUPT, "The file is not a readable video container.")
