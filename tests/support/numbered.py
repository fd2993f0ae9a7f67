"""Real videos whose every frame carries its number, and ffmpeg's own opinion of what they show when."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.video.ffmpeg import ffmpeg_exe

WIDTH, HEIGHT, RATE = 96, 64, 30
_ROWS, _COLUMNS = 3, 4  # one bit of the number in each field of the picture


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """(height, width, 3) RGB: the number in dark and light fields, under coloured texture that moves."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 256, (2 * height, 2 * width, 3), dtype=np.uint8), (0, 0), 3)
    shifted = np.roll(texture, (2 * number, 3 * number), (0, 1))[:height, :width].astype(np.int16)
    bits = np.array([number >> bit & 1 for bit in range(_ROWS * _COLUMNS)], np.uint8).reshape(_ROWS, _COLUMNS)
    fields = cv2.resize(40 + 160 * bits, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.clip(fields[..., None] + 2 * (shifted - 127), 0, 255).astype(np.uint8)


def number_of(rgb: NDArray[np.uint8]) -> int:
    """The number that an upright picture carries, whatever its size."""
    height, width = rgb.shape[:2]
    middle = [
        rgb[int(height * (row + 0.25) / _ROWS) : int(height * (row + 0.75) / _ROWS)][
            :, int(width * (column + 0.25) / _COLUMNS) : int(width * (column + 0.75) / _COLUMNS)
        ].mean()
        for row in range(_ROWS)
        for column in range(_COLUMNS)
    ]
    return sum(int(grey > 120) << bit for bit, grey in enumerate(middle))


def ffmpeg(*arguments: str | Path, feed: bytes | None = None) -> None:
    """Run ffmpeg with `feed` on its standard input."""
    command = [ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(command, input=feed, check=True, stdin=None if feed else subprocess.DEVNULL)


def encode(path: Path, pictures: Iterable[NDArray[np.uint8]], *arguments: str | Path, rate: object = RATE) -> Path:
    """Encode RGB pictures of one size; `arguments` are ffmpeg's, for the output."""
    frames = list(pictures)
    height, width = frames[0].shape[:2]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "-"]
    ffmpeg(*raw, *arguments, path, feed=b"".join(frame.tobytes() for frame in frames))
    return path


@dataclass(frozen=True)
class Shown:
    """What ffmpeg shows: times_s (n,) after the first frame, and frames (n, H, W, 3) RGB, upright."""

    times_s: NDArray[np.float64]
    frames: NDArray[np.uint8]

    @property
    def numbers(self) -> list[int]:
        return [number_of(frame) for frame in self.frames]

    def at(self, time_s: float) -> NDArray[np.uint8]:
        """The frame on screen: the last one presented at or before the time."""
        return self.frames[max(0, int(np.searchsorted(self.times_s, time_s + 1e-3, side="right")) - 1)]


def shown_by_ffmpeg(path: Path) -> Shown:
    """Decode a whole file with the ffmpeg program: every frame once, at its own time, display matrix applied."""
    command = [ffmpeg_exe(), "-nostdin", "-hide_banner", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    command += ["-vf", "showinfo", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    lines = re.findall(r"\bpts_time:\s*(\S+) .*?\bs:(\d+)x(\d+)", done.stderr.decode())
    times = np.array([float(time) for time, _, _ in lines])
    width, height = int(lines[0][1]), int(lines[0][2])
    return Shown(times - times[0], np.frombuffer(done.stdout, np.uint8).reshape(len(times), height, width, 3))
