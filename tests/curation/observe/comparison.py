"""A file as the product reads it, against what the ffmpeg program shows of it, and against itself."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from curation.ffmpeg import ffmpeg_exe
from curation.ingest.container import container_format, strip
from curation.ingest.failures import StageError
from curation.observe.video import (
    VideoIndex,
    decode,
    decode_key_frames,
    frames_at,
    index_video,
    resize,
    to_rgb,
    verify,
)

MEAN, HIGH = 2.0, 8.0  # grey levels: the mean difference, and the 99.9th percentile
STRIPPED_S = 1.1e-3  # Matroska keeps milliseconds

RGB = NDArray[np.uint8]


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
    command = [ffmpeg_exe(), "-nostdin", "-hide_banner", "-loglevel", "level+info", *([] if turn else ["-noautorotate"])]
    # The scaler as PyAV sets it: only the decoders and the colours are compared.
    command += ["-i", str(path), "-an", "-sn", "-dn", "-fps_mode", "passthrough", "-vf", "showinfo"]
    command += ["-sws_flags", "bilinear", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
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
        errors=[line for line in text.splitlines() if "[error]" in line or "[fatal]" in line],
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

    of_the_library: the same aspects differ between a plain loop over PyAV and the ffmpeg program.
    """

    state: str
    detail: str = ""
    aspects: list[str] = field(default_factory=list)
    of_the_library: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def examine(path: Path, folder: Path, seed: int, held_s: float | None = None) -> Outcome:
    """Everything that this module compares, for one file; `folder`: for what strip() writes."""
    shown = reference(path)
    try:
        found = list(_differences(path, folder, random.Random(seed), shown, held_s))
    except StageError as error:
        return Outcome("refused", f"{error.code.name}: {error.message}", ["refused"], errors=shown.errors)
    except Exception as error:  # whatever is raised: that it is no StageError is the finding
        return Outcome("raised", f"{type(error).__name__}: {error}", ["raised"], errors=shown.errors)
    if not found:
        return Outcome("taken", errors=shown.errors)
    aspects = list(dict.fromkeys(aspect for aspect, _ in found))
    blamed = [aspect for aspect in _of_the_library(path) if aspect in aspects]
    return Outcome("differs", "; ".join(f"{a}: {how}" for a, how in found), aspects, blamed, shown.errors)


def _of_the_library(path: Path) -> list[str]:
    """What differs between PyAV alone and the ffmpeg program, the display matrix left out of both."""
    shown, (times, frames) = reference(path, turn=False), plain(path)
    if len(frames) != len(shown.frames):
        return ["count"]
    aspects = []
    if not np.allclose(times, shown.times_s, atol=float(shown.time_base) + 1e-6, rtol=0):
        aspects.append("times")
    if any(_apart(mine, theirs) for mine, theirs in zip(frames, shown.frames, strict=True)):
        aspects.append("pixels")
    return aspects


def _differences(
    path: Path, folder: Path, rng: random.Random, shown: Reference, held_s: float | None
) -> Iterator[tuple[str, str]]:
    index = index_video(path)
    stored = [(number, to_rgb(frame)) for number, frame in decode(index, 0, len(index.times_s))]
    numbers = [number for number, _ in stored]
    height, width = shown.frames.shape[1:3]
    count = len(index.times_s)
    yield from _size(index, shown)
    if count != len(shown.ticks) or len(stored) != count:
        yield "count", f"{count} frames in the index, {len(stored)} decoded, {len(shown.ticks)} shown by ffmpeg"
    else:
        apart = np.abs(index.times_s - shown.times_s)
        if apart.max() > float(index.time_base) + 1e-6:
            n = int(apart.argmax())
            yield (
                "times",
                f"{(apart > float(index.time_base) + 1e-6).sum()} of {count}, most at frame {n}: "
                f"{index.times_s[n]:.6f} for {shown.times_s[n]:.6f} s",
            )
        worst = [(_apart(resize(rgb, index, width, height), shown.frames[n]), n) for n, (_, rgb) in enumerate(stored)]
        if bad := [(how, n) for how, n in worst if how]:
            yield "pixels", f"{len(bad)} of {count} frames, the first is {bad[0][1]}: {bad[0][0]}"
    if numbers != list(range(len(numbers))):
        yield "numbers", f"{numbers[:50]}"
    if held_s is not None and abs(index.end_s - index.times_s[-1] - held_s) > 1e-3:
        yield "end", f"the last frame is held {index.end_s - index.times_s[-1]:.3f} s, made for {held_s} s"
    verify(path)
    if len(stored) == count:
        by_number = dict(stored)
        yield from _random_access(index, by_number, rng)
        yield from _key_frames(index, by_number)
        yield from _part(index, by_number, rng)
        yield from _stripped(index, path, folder, [rgb for _, rgb in stored])


def _size(index: VideoIndex, shown: Reference) -> Iterator[tuple[str, str]]:
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


def _same(pictures: list[tuple[str, RGB, RGB]], aspect: str) -> Iterator[tuple[str, str]]:
    wrong = [label for label, mine, theirs in pictures if not np.array_equal(mine, theirs)]
    if wrong:
        yield aspect, f"{len(wrong)} of {len(pictures)} pictures are not the one of the pass, as {wrong[0]}"


def _random_access(index: VideoIndex, stored: dict[int, RGB], rng: random.Random) -> Iterator[tuple[str, str]]:
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


def _key_frames(index: VideoIndex, stored: dict[int, RGB]) -> Iterator[tuple[str, str]]:
    found = [(number, to_rgb(frame)) for number, frame in decode_key_frames(index, 0, len(stored), limit=9)]
    if not found:
        yield "key frames", "none"
    yield from _same([(f"frame {number}", rgb, stored[number]) for number, rgb in found], "key frames")


def _part(index: VideoIndex, stored: dict[int, RGB], rng: random.Random) -> Iterator[tuple[str, str]]:
    for _ in range(2):
        first = rng.randrange(len(stored))
        last = min(len(stored), first + rng.randint(1, 20))
        found = [(number, to_rgb(frame)) for number, frame in decode(index, first, last)]
        if [number for number, _ in found] != list(range(first, last)):
            yield "part", f"{[number for number, _ in found]} for {first} to {last}"
        yield from _same([(f"frame {n} of {first} to {last}", rgb, stored[n]) for n, rgb in found], "part")


def _stripped(index: VideoIndex, path: Path, folder: Path, frames: list[RGB]) -> Iterator[tuple[str, str]]:
    clean = index_video(strip(index, container_format(path), folder / "clean"))
    if len(clean.times_s) != len(index.times_s):
        yield "strip", f"{len(clean.times_s)} of {len(index.times_s)} frames"
        return
    apart = np.abs(clean.times_s - index.times_s).max()
    if apart > STRIPPED_S:
        yield "strip", f"times up to {1000 * apart:.2f} ms apart"
    if (clean.width, clean.height) != (index.width, index.height):
        yield "strip", f"{clean.width}x{clean.height} for {index.width}x{index.height}"
    size = clean.width, clean.height
    copied = [resize(to_rgb(frame), clean, *size) for _, frame in decode(clean, 0, len(clean.times_s))]
    if len(copied) != len(frames):
        yield "strip", f"{len(copied)} of {len(frames)} frames decode"
        return
    upright: Callable[[RGB], RGB] = lambda rgb: resize(rgb, index, index.width, index.height)  # noqa: E731
    yield from _same([(f"frame {n}", got, upright(rgb)) for n, (got, rgb) in enumerate(zip(copied, frames))], "strip")
