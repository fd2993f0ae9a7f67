"""A file as the product reads it, against what the ffmpeg program shows of it, and against itself."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from curation.failures import ClipFailure
from curation.video.container import container_format
from curation.video.decode import decode, decode_key_frames, frames_at, resize, to_rgb
from curation.video.ffmpeg import ffmpeg_exe
from curation.video.index import VideoIndex, with_index
from curation.video.intake import strip, verify

MEAN, HIGH = 2.0, 8.0  # grey levels: the mean difference, and the 99.9th percentile
STRIPPED_S = 1.1e-3  # Matroska keeps milliseconds

RGB = NDArray[np.uint8]


def versions() -> dict[str, str]:
    """Of PyAV, of the libraries in it, and of the ffmpeg program."""
    text = subprocess.run([ffmpeg_exe(), "-version"], capture_output=True, text=True, check=True).stdout
    own = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    program = {
        f"{name} of ffmpeg": "".join(number.split())
        for name, number in re.findall(r"^(lib\w+) +([\d. ]+?) /", text, re.M)
    }
    return {"PyAV": av.__version__, **own, "ffmpeg": text.split()[2], **program}


@dataclass(frozen=True)
class Reference:
    """What ffmpeg shows: ticks (n,) of `time_base`, durations in ticks, upright frames (n, H, W, 3), pixel aspect."""

    ticks: list[int]
    durations: list[int]
    time_base: Fraction
    frames: NDArray[np.uint8]
    aspect: Fraction
    errors: list[str]

    @property
    def times_s(self) -> NDArray[np.float64]:
        return np.array([float((tick - self.ticks[0]) * self.time_base) for tick in self.ticks])


def reference(path: Path, *, turn: bool = True) -> Reference:
    """Decode the stream that ffmpeg chooses, every frame once; `turn`: with the display matrix applied."""
    command = [ffmpeg_exe(), "-nostdin", "-hide_banner", "-loglevel", "level+info", "-threads", "1"]
    command += [*([] if turn else ["-noautorotate"]), "-i", str(path)]
    command += ["-an", "-sn", "-dn", "-fps_mode", "passthrough"]
    command += ["-vf", "showinfo", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    text = done.stderr.decode(errors="replace")
    bases = re.findall(r"config in time_base: (\d+)/(\d+)", text)
    lines = re.findall(r"\] n:.*? pts:\s*(-?\d+) .*?\bduration:\s*(\d+) .*?sar:(\d+)/(\d+) s:(\d+)x(\d+)", text)
    if not lines:
        raise ValueError(f"ffmpeg shows nothing of this file\n{text[-1500:]}")
    width, height = int(lines[0][4]), int(lines[0][5])
    frames = np.frombuffer(done.stdout, np.uint8)
    if len(frames) != len(lines) * width * height * 3:
        raise ValueError(f"ffmpeg gives {len(frames)} bytes for {len(lines)} frames of {width}x{height}")
    return Reference(
        ticks=[int(line[0]) for line in lines],
        durations=[int(line[1]) for line in lines],
        time_base=Fraction(int(bases[0][0]), int(bases[0][1])),
        frames=frames.reshape(len(lines), height, width, 3),
        aspect=Fraction(int(lines[0][2]), int(lines[0][3]) or 1) or Fraction(1),
        # The writer of raw pictures minds equal times, and writes them all the same.
        errors=[
            line for line in text.splitlines() if re.search(r"\[(error|fatal)\]", line) and "[rawvideo" not in line
        ],
    )


def plain(path: Path) -> tuple[NDArray[np.float64], list[RGB]]:
    """Times after the first frame (NaN for none) and stored frames of a loop over PyAV, with nothing of the product."""
    times, frames = [], []
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        assert stream is not None and stream.type == "video"
        for packet in container.demux(stream):
            for frame in packet.decode():
                times.append(np.nan if frame.time is None else frame.time)
                frames.append(frame.to_ndarray(format="rgb24"))
    return np.array(times) - times[0] if times else np.zeros(0), frames


@dataclass
class Outcome:
    """What became of a file. state: taken, refused, raised or differs; `aspects` names what differs, `detail` says how.

    of_the_library: those aspects in which a plain loop over PyAV differs from the ffmpeg program, and not from us.
    errors: what the ffmpeg program complains of.
    """

    state: str
    detail: str = ""
    aspects: list[str] = field(default_factory=list)
    of_the_library: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def examine(path: Path, folder: Path, seed: int, held_s: float | None = None) -> Outcome:
    """Everything that this module compares, for one file.

    folder: for what strip() writes; held_s: how long the last frame stays, where that is known.
    """
    shown = reference(path)
    if min(np.diff(shown.ticks), default=0) < 0:
        raise ValueError("ffmpeg's own times go back: it is no judge of this file")
    try:
        index, stored = _whole(path)
        found = list(_against(shown, index, stored, held_s))
        blamed = _of_the_library(path, index, stored) if found else []
        found += _against_itself(path, folder, random.Random(seed), index, stored, held_s)
    except ClipFailure as error:
        return Outcome("refused", f"{error.code.name}: {error.message}", ["refused"], errors=shown.errors)
    except Exception as error:  # whatever is raised: that it is no ClipFailure is the finding
        return Outcome("raised", f"{type(error).__name__}: {error}", ["raised"], errors=shown.errors)
    aspects = list(dict.fromkeys(aspect for aspect, _ in found))
    detail = "; ".join(f"{aspect}: {how}" for aspect, how in found)
    blamed = [aspect for aspect in blamed if aspect in aspects]
    return Outcome("differs" if found else "taken", detail, aspects, blamed, shown.errors)


Stored = list[tuple[int, RGB]]  # numbers, and pictures as stored
Findings = Iterator[tuple[str, str]]  # aspect, and how it differs


def _whole(path: Path) -> tuple[VideoIndex, Stored]:
    """The index that a whole pass agrees with, and what that pass gave."""

    def read(index: VideoIndex) -> tuple[VideoIndex, Stored]:
        return index, [(number, to_rgb(frame)) for number, frame in decode(index, 0, len(index.times_s))]

    return with_index(path, read)


def _of_the_library(path: Path, index: VideoIndex, stored: Stored) -> list[str]:
    """Where PyAV alone differs from the ffmpeg program, and not from us; the display matrix left out of all."""
    try:
        shown, (times, frames) = reference(path, turn=False), plain(path)
    except FFmpegError:
        return []
    if len(frames) != len(stored):
        return []
    if len(frames) != len(shown.frames):
        return ["count"]
    aspects = []
    if _late(times, shown, index).any() and np.allclose(times, index.times_s, atol=_tick(index), rtol=0):
        aspects.append("times")
    differ = any(_apart(mine, theirs) for mine, theirs in zip(frames, shown.frames, strict=True))
    if differ and all(np.array_equal(mine, rgb) for mine, (_, rgb) in zip(frames, stored, strict=True)):
        aspects.append("pixels")
    return aspects


def _tick(index: VideoIndex) -> float:
    """A tick of the clock, or a millisecond where it ticks once a frame, as in AVI."""
    return min(float(index.time_base), 1e-3) + 1e-6


def _late(times_s: NDArray[np.float64], shown: Reference, index: VideoIndex) -> NDArray[np.bool_]:
    return ~(np.abs(times_s - shown.times_s) <= _tick(index))


def _against(shown: Reference, index: VideoIndex, stored: Stored, held_s: float | None) -> Findings:
    height, width = shown.frames.shape[1:3]
    count = len(index.times_s)
    yield from _size(index, shown)
    if held_s is not None and abs(index.end_s - index.times_s[-1] - held_s) > 1e-3:
        yield "end", f"the last frame is held {index.end_s - index.times_s[-1]:.3f} s, made for {held_s} s"
    if [number for number, _ in stored] != list(range(count)):
        yield "numbers", f"{[number for number, _ in stored][:50]}"
    if count != len(shown.ticks) or len(stored) != count:
        yield "count", f"{count} frames in the index, {len(stored)} decoded, {len(shown.ticks)} shown by ffmpeg"
        return
    late = np.flatnonzero(_late(index.times_s, shown, index))
    if len(late):
        n = late[0]
        yield (
            "times",
            f"{len(late)} of {count}, the first is frame {n}: {index.times_s[n]:.6f} for {shown.times_s[n]:.6f} s",
        )
    # At the stored size: the scaling is no part of this.
    worst = [(_apart(resize(rgb, index, width, height), shown.frames[n]), n) for n, (_, rgb) in enumerate(stored)]
    if bad := [(how, n) for how, n in worst if how]:
        yield "pixels", f"{len(bad)} of {count} frames, the first is {bad[0][1]}: {bad[0][0]}"


def _against_itself(
    path: Path, folder: Path, rng: random.Random, index: VideoIndex, stored: Stored, held_s: float | None
) -> Findings:
    verify(path)
    by_number = dict(stored)
    if sorted(by_number) == list(range(len(index.times_s))):
        yield from _random_access(index, by_number, rng)
        yield from _key_frames(index, by_number)
        yield from _part(index, by_number, rng)
        yield from _stripped(index, path, folder, [rgb for _, rgb in stored], held_s)


def _size(index: VideoIndex, shown: Reference) -> Findings:
    height, width = shown.frames.shape[1:3]
    aspect = float(shown.aspect)
    displayed = (width * aspect, height) if aspect >= 1 else (width, height / aspect)
    if abs(index.width - displayed[0]) > 1 or abs(index.height - displayed[1]) > 1:
        yield "size", f"{index.width}x{index.height} for {displayed[0]:.1f}x{displayed[1]:.1f}"


def _apart(mine: RGB, theirs: RGB) -> str:
    """How far two pictures are apart; empty where they are the same."""
    if mine.shape != theirs.shape:
        return f"{mine.shape[1]}x{mine.shape[0]} for {theirs.shape[1]}x{theirs.shape[0]}"
    difference = np.abs(mine.astype(np.int16) - theirs)
    mean, high = float(difference.mean()), float(np.percentile(difference, 99.9))
    return f"{mean:.2f} in the mean, {high:.0f} at the 99.9th percentile" if mean > MEAN or high > HIGH else ""


def _same(pictures: list[tuple[str, RGB, RGB]], aspect: str) -> Findings:
    wrong = [label for label, mine, theirs in pictures if not np.array_equal(mine, theirs)]
    if wrong:
        yield aspect, f"{len(wrong)} of {len(pictures)} pictures are not the one of the pass, as {wrong[0]}"


def _random_access(index: VideoIndex, stored: dict[int, RGB], rng: random.Random) -> Findings:
    """Times in the middle half of an interval, and the frames' own; of equal times, the last frame is on screen."""
    ends = [*index.times_s[1:].tolist(), index.end_s]
    asked: list[tuple[float, int]] = []
    for number in sorted(rng.sample(range(len(ends)), min(12, len(ends)))):
        begin, end = float(index.times_s[number]), ends[number]
        if end > begin:
            asked += [(begin, number), (begin + rng.uniform(0.25, 0.75) * (end - begin), number)]
    rng.shuffle(asked)
    size = index.width, index.height
    pictures = frames_at(index, [time for time, _ in asked], *size)
    named = zip(asked, pictures, strict=True)
    yield from _same(
        [(f"frame {n} at {t:.6f} s", got, resize(stored[n], index, *size)) for (t, n), got in named], "random access"
    )


def _key_frames(index: VideoIndex, stored: dict[int, RGB]) -> Findings:
    found = [(number, to_rgb(frame)) for number, frame in decode_key_frames(index, np.flatnonzero(index.key), limit=9)]
    if not found:
        yield "key frames", "none"
    yield from _same([(f"frame {number}", rgb, stored[number]) for number, rgb in found], "key frames")


def _part(index: VideoIndex, stored: dict[int, RGB], rng: random.Random) -> Findings:
    for _ in range(2):
        first = rng.randrange(len(stored))
        last = min(len(stored), first + rng.randint(1, 20))
        found = [(number, to_rgb(frame)) for number, frame in decode(index, first, last)]
        if [number for number, _ in found] != list(range(first, last)):
            yield "part", f"{[number for number, _ in found]} for {first} to {last}"
        yield from _same([(f"frame {n} of {first} to {last}", rgb, stored[n]) for n, rgb in found], "part")


def _stripped(index: VideoIndex, path: Path, folder: Path, frames: list[RGB], held_s: float | None) -> Findings:
    clean, copy = _whole(strip(index, container_format(path), folder / "clean"))
    if len(clean.times_s) != len(index.times_s):
        yield "strip", f"{len(clean.times_s)} of {len(index.times_s)} frames"
        return
    apart = np.abs(clean.times_s - index.times_s).max()
    if apart > STRIPPED_S:
        yield "strip", f"times up to {1000 * apart:.2f} ms apart"
    if held_s is not None and abs(clean.end_s - index.end_s) > 0.01:
        yield "strip", f"ends at {clean.end_s:.3f} s, and not at {index.end_s:.3f} s"
    size = index.width, index.height
    if (clean.width, clean.height) != size:
        yield "strip", f"{clean.width}x{clean.height} for {index.width}x{index.height}"
        return
    copied = [resize(rgb, clean, *size) for _, rgb in copy]
    if len(copied) != len(frames):
        yield "strip", f"{len(copied)} of {len(frames)} frames decode"
        return
    pairs = enumerate(zip(copied, frames, strict=True))
    yield from _same([(f"frame {n}", got, resize(rgb, index, *size)) for n, (got, rgb) in pairs], "strip")
