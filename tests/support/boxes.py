"""Changes the tables of an MP4 file that ffmpeg wrote into what phones and editors write, and ffmpeg does not."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_NESTED = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"})


@dataclass
class Box:
    """A box with content, or with boxes inside."""

    kind: bytes
    content: bytes | list[Box]

    def bytes(self) -> bytes:
        body = self.content if isinstance(self.content, bytes) else b"".join(box.bytes() for box in self.content)
        return struct.pack(">I4s", 8 + len(body), self.kind) + body

    def find(self, *kinds: bytes) -> Box:
        """The first box along a path of kinds; KeyError where there is none."""
        box = self
        for kind in kinds:
            inside = [child for child in box.content if isinstance(child, Box) and child.kind == kind]
            if not inside:
                raise KeyError(kind.decode())
            box = inside[0]
        return box

    def put(self, kind: bytes, content: bytes | list[Box] | None) -> None:
        """Replace the box of this kind; None takes it away."""
        assert isinstance(self.content, list)
        kept = [box for box in self.content if box.kind != kind]
        self.content = kept if content is None else [*kept, Box(kind, content)]


@dataclass
class Sample:
    """A sample of the video track; duration and shift (presentation minus decoding time) in units of its clock."""

    size: int
    offset: int
    duration: int
    shift: int
    sync: bool


class Movie:
    """The tables of a file's first video track; `samples` and `edits` may be changed before `write`.

    edits: (duration in seconds, start in seconds of the media's presentation time), the start None for an empty edit;
    an empty list where the whole media is shown.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        top = _boxes(data)
        if top[-1].kind != b"moov":
            raise ValueError("the tables must stand at the end, where they can grow")
        self._moov = top[-1]
        self._rest = data[: len(data) - len(self._moov.bytes())]
        traks = [box for box in self._moov.content if isinstance(box, Box) and box.kind == b"trak"]
        self._trak = next(t for t in traks if _bytes(t.find(b"mdia", b"hdlr"))[8:12] == b"vide")
        self._table = self._trak.find(b"mdia", b"minf", b"stbl")
        self._movie_clock = struct.unpack(">I", _bytes(self._moov.find(b"mvhd"))[12:16])[0]
        self.clock: int = struct.unpack(">I", _bytes(self._trak.find(b"mdia", b"mdhd"))[12:16])[0]
        self.samples = self._read()
        self.edits = self._read_edits()

    @property
    def starts_s(self) -> list[float]:
        """Presentation times of the samples in decoding order, in seconds of the media."""
        times, time = [], 0
        for sample in self.samples:
            times.append((time + sample.shift) / self.clock)
            time += sample.duration
        return times

    def _read(self) -> list[Sample]:
        stsz = _bytes(self._table.find(b"stsz"))
        fixed, count = struct.unpack(">II", stsz[4:12])
        sizes = [fixed] * count if fixed else list(struct.unpack(f">{count}I", stsz[12 : 12 + 4 * count]))
        chunks = [place for (place,) in _rows(self._table, b"stco", ">I")]
        runs = [*_rows(self._table, b"stsc", ">III"), (len(chunks) + 1, 0, 0)]
        per_chunk = [n for (a, n, _), (b, _, _) in pairwise(runs) for _ in range(a, b)]
        durations = [value for n, value in _rows(self._table, b"stts", ">II") for _ in range(n)]
        try:
            shifts = [value for n, value in _rows(self._table, b"ctts", ">Ii") for _ in range(n)]
        except KeyError:
            shifts = [0] * count
        try:
            sync = {number - 1 for (number,) in _rows(self._table, b"stss", ">I")}
        except KeyError:
            sync = set(range(count))
        samples: list[Sample] = []
        for place, inside in zip(chunks, per_chunk, strict=True):
            for _ in range(inside):
                n = len(samples)
                samples.append(Sample(sizes[n], place, durations[n], shifts[n], n in sync))
                place += sizes[n]
        return samples

    def _read_edits(self) -> list[tuple[float, float | None]]:
        try:
            rows = _rows(self._trak.find(b"edts"), b"elst", ">Iihh")
        except KeyError:
            return []
        return [(d / self._movie_clock, None if start < 0 else start / self.clock) for d, start, _, _ in rows]

    def hold(self, seconds: float) -> None:
        """Let the last sample last so long, and be shown so long."""
        more = seconds - self.samples[-1].duration / self.clock
        self.samples[-1].duration = round(seconds * self.clock)
        if self.edits:
            duration, start = self.edits[-1]
            self.edits[-1] = (duration + more, start)

    def write(self, path: Path) -> None:
        """Write the file with the changed tables, a chunk for each sample."""
        n = len(self.samples)
        flat = ">" + "I" * n
        self._table.put(b"stsz", struct.pack(">III", 0, 0, n) + struct.pack(flat, *(s.size for s in self.samples)))
        self._table.put(b"stco", struct.pack(">II", 0, n) + struct.pack(flat, *(s.offset for s in self.samples)))
        self._table.put(b"stsc", struct.pack(">IIIII", 0, 1, 1, 1, 1))
        self._table.put(b"stts", _table([(1, s.duration) for s in self.samples], ">II"))
        shifted = any(s.shift for s in self.samples)
        # Version 1: a shift may be negative.
        ctts = b"\1\0\0\0" + _table([(1, s.shift) for s in self.samples], ">Ii")[4:]
        self._table.put(b"ctts", ctts if shifted else None)
        keys = [(i + 1,) for i, s in enumerate(self.samples) if s.sync]
        self._table.put(b"stss", _table(keys, ">I") if len(keys) < n else None)
        for kind in (b"sdtp", b"sgpd", b"sbgp"):
            self._table.put(kind, None)
        media = sum(s.duration for s in self.samples)
        shown = media / self.clock
        if self.edits:
            shown = sum(duration for duration, _ in self.edits)
            rows = [
                (round(duration * self._movie_clock), -1 if start is None else round(start * self.clock), 1, 0)
                for duration, start in self.edits
            ]
            self._trak.put(b"edts", [Box(b"elst", _table(rows, ">Iihh"))])
        _set(self._trak.find(b"mdia", b"mdhd"), 16, media)
        _set(self._trak.find(b"tkhd"), 20, round(shown * self._movie_clock))
        movie = self._moov.find(b"mvhd")
        _set(movie, 16, max(round(shown * self._movie_clock), 0))
        path.write_bytes(self._rest + self._moov.bytes())


def _boxes(data: bytes) -> list[Box]:
    boxes, place = [], 0
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        if size == 0:
            size = len(data) - place
        body = data[place + 8 : place + size]
        boxes.append(Box(kind, _boxes(body) if kind in _NESTED else body))
        place += size
    return boxes


def _bytes(box: Box) -> bytes:
    assert isinstance(box.content, bytes)
    return box.content


def _set(box: Box, place: int, value: int) -> None:
    content = _bytes(box)
    box.content = content[:place] + struct.pack(">I", value) + content[place + 4 :]


def _rows(table: Box, kind: bytes, row: str) -> list[tuple[int, ...]]:
    content = _bytes(table.find(kind))
    (count,) = struct.unpack(">I", content[4:8])
    return list(struct.iter_unpack(row, content[8 : 8 + count * struct.calcsize(row)]))


def _table(rows: list[tuple[int, ...]], row: str) -> bytes:
    return struct.pack(">II", 0, len(rows)) + b"".join(struct.pack(row, *values) for values in rows)
