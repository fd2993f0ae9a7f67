"""A video to be made by ffmpeg: its codec, container, rate and length, and the commands that it was made by."""

from __future__ import annotations

import functools
import random
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from tests.support.boxes import Movie
from tests.support.numbered import ffmpeg, picture

RATES = ("12", "15", "24000/1001", "24", "25", "30000/1001", "30", "45", "50", "60000/1001", "60", "120")
_MPEG_RATES = ("24000/1001", "24", "25", "30000/1001", "30", "50", "60000/1001", "60")
MOV = ("mp4", "mov", "mp4 in fragments")
_MOST_PICTURES = 90


@dataclass(frozen=True)
class Codec:
    """How ffmpeg is asked for a codec, and what can hold it."""

    arguments: str
    containers: tuple[str, ...]
    formats: tuple[str, ...] = ("yuv420p",)
    rates: tuple[str, ...] = RATES
    b_frames: bool = False
    groups: bool = True  # takes -g
    odd: bool = False  # takes odd sizes with halved colour
    size: tuple[int, int] | None = None
    most: int = _MOST_PICTURES


_X264 = "-c:v libx264 -preset ultrafast -threads 1"
_X265 = "-c:v libx265 -preset ultrafast"
CODECS = {
    "h264": Codec(
        _X264,
        (*MOV, "mkv", "ts", "m2ts", "flv", "3gp", "avi"),
        ("yuv420p", "yuv420p", "yuvj420p", "yuv422p", "yuv444p"),
        b_frames=True,
    ),
    "hevc": Codec(_X265, (*MOV, "mkv", "ts", "m2ts"), ("yuv420p", "yuv420p", "yuv422p", "yuv444p"), b_frames=True),
    "hevc 10 bit": Codec(_X265, (*MOV, "mkv", "ts"), ("yuv420p10le", "yuv422p10le"), b_frames=True),
    "vp8": Codec("-c:v libvpx -deadline realtime -cpu-used -8 -b:v 1M", ("webm", "mkv", "avi"), odd=True),
    "vp9": Codec(
        "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 1M",
        ("webm", "mkv", "mp4"),
        ("yuv420p", "yuv420p", "yuv444p"),
        odd=True,
    ),
    "av1": Codec("-c:v libaom-av1 -usage realtime -cpu-used 8 -b:v 1M", ("mp4", "webm", "mkv"), odd=True, most=60),
    "mpeg4": Codec("-c:v mpeg4 -q:v 3", ("avi", "mp4", "mov", "mkv", "3gp", "ts"), b_frames=True, odd=True),
    "xvid": Codec("-c:v mpeg4 -vtag XVID -q:v 3", ("avi",), b_frames=True, odd=True),
    "mpeg2": Codec(
        "-c:v mpeg2video -q:v 3", ("ts", "m2ts", "mpg", "vob", "mkv"), rates=_MPEG_RATES, b_frames=True, odd=True
    ),
    "mpeg1": Codec("-c:v mpeg1video -q:v 3", ("mpg", "vob"), rates=_MPEG_RATES, b_frames=True, odd=True),
    "mjpeg": Codec("-c:v mjpeg -q:v 3", ("avi", "mov", "mkv", "mp4"), ("yuvj420p", "yuvj422p"), groups=False, odd=True),
    "prores": Codec("-c:v prores", ("mov", "mkv"), ("yuv422p10le",), groups=False, most=40),
    "ffv1": Codec("-c:v ffv1", ("mkv", "avi"), ("yuv420p", "yuv444p"), odd=True, most=40),
    "theora": Codec("-c:v libtheora -q:v 8", ("ogg", "mkv"), odd=True),
    "flv1": Codec("-c:v flv1 -q:v 3", ("flv", "avi"), odd=True),
    "wmv2": Codec("-c:v wmv2 -q:v 3", ("wmv", "avi")),
    "wmv1": Codec("-c:v wmv1 -q:v 3", ("wmv",)),
    "msmpeg4": Codec("-c:v msmpeg4 -q:v 3", ("avi", "wmv")),
    "h263": Codec("-c:v h263 -q:v 3", ("3gp", "mov", "flv"), rates=("30000/1001", "15", "25"), size=(128, 96)),
    "dv": Codec("-c:v dvvideo", ("avi", "mov", "mkv"), rates=("25",), groups=False, size=(720, 576), most=12),
    "huffyuv": Codec("-c:v huffyuv", ("avi",), ("yuv422p",), groups=False, most=40),
    "utvideo": Codec("-c:v utvideo", ("avi", "mkv"), groups=False, most=40),
    "png": Codec("-c:v png", ("mov", "mkv"), ("rgb24",), groups=False, odd=True, most=40),
    "qtrle": Codec("-c:v qtrle", ("mov",), ("rgb24",), odd=True, most=40),
    "cinepak": Codec("-c:v cinepak", ("avi", "mov"), ("rgb24",), most=20),
    "svq1": Codec("-c:v svq1", ("mov",), ("yuv410p",), most=30),
    "raw": Codec("-c:v rawvideo", ("avi", "mkv"), ("yuv420p",), groups=False, most=40),
}
USUAL = ("h264", "h264", "hevc", "hevc 10 bit", "vp9", "av1", "mpeg4")
# Kinds of file: the name that ffmpeg takes from the suffix, and what else it is told.
CONTAINERS: dict[str, tuple[str, str]] = {
    "mp4": (".mp4", ""),
    "mov": (".mov", ""),
    "mp4 in fragments": (".mp4", "-movflags +frag_keyframe+empty_moov+default_base_moof"),
    "mkv": (".mkv", ""),
    "webm": (".webm", ""),
    "avi": (".avi", ""),
    "ts": (".ts", ""),
    "m2ts": (".m2ts", ""),
    "flv": (".flv", ""),
    "wmv": (".wmv", ""),
    "ogg": (".ogv", ""),
    # A packet holds no two frames, however small: their times would be guessed. ffmpeg grumbles about the waste.
    "mpg": (".mpg", "-packetsize 200 -loglevel fatal"),
    "vob": (".vob", "-packetsize 200 -loglevel fatal"),
    "3gp": (".3gp", ""),
}
_SOUND = {"webm": "libopus", "avi": "libmp3lame", "wmv": "wmav2", "ogg": "libvorbis"}
_SOUND |= {"mpg": "mp2", "vob": "mp2", "m2ts": "ac3"}
EXACT = ("-fflags", "+bitexact")  # no random numbers in the file


class Unmade(Exception):
    """A file that the generator failed to make as intended."""


@dataclass
class Clip:
    """A made file. kinds: what is odd about it, then codec and container. recipe: the commands, in order."""

    number: int
    folder: Path
    rng: random.Random
    kinds: list[str] = field(default_factory=list)
    recipe: list[str] = field(default_factory=list)
    path: Path = Path()
    codec: str = ""
    container: str = ""
    width: int = 96
    height: int = 64
    rate: str = "30"
    count: int = 30
    b_frames: int = 0
    held_s: float | None = None  # how long the last frame stays, where that is known

    @property
    def seconds(self) -> float:
        return self.count / float(Fraction(self.rate))

    @property
    def family(self) -> str:
        return self.kinds[0]

    def run(self, *arguments: str, feed: bytes | None = None) -> None:
        """ffmpeg, in the folder of the clip; noted in the recipe."""
        placed = [str(self.folder / word[1:]) if word.startswith("@") else word for word in arguments]
        self.note("ffmpeg " + shlex.join(word.removeprefix("@") for word in arguments))
        ffmpeg(*placed, feed=feed)

    def note(self, line: str) -> None:
        self.recipe.append(line)

    def choose(self, codecs: Sequence[str], containers: Sequence[str] = tuple(CONTAINERS)) -> None:
        """Draw codec, container, size, rate and length."""
        able = [name for name in codecs if set(CODECS[name].containers) & set(containers)]
        self.codec = self.rng.choice(able)
        codec = CODECS[self.codec]
        self.container = self.rng.choice([name for name in codec.containers if name in containers])
        self.rate = self.rng.choice(codec.rates)
        seconds = self.rng.uniform(1.0, 2.5)
        self.count = max(10, min(codec.most, round(seconds * float(Fraction(self.rate)))))
        self.width, self.height = codec.size or self.rng.choice(((96, 64), (96, 64), (64, 96), (80, 60)))
        self.b_frames = self.rng.randint(0, 3) if codec.b_frames else 0

    def lengthen(self) -> None:
        """Enough frames for several groups."""
        self.count = max(self.count, min(CODECS[self.codec].most, 60))

    def clock(self) -> list[str]:
        """An MP4 track whose clock is fine enough for what is done to its tables."""
        return ["-video_track_timescale", "90000"] if self.container in ("mp4", "mov") else []

    def name(self, stem: str) -> str:
        return "@" + stem + CONTAINERS[self.container][0]

    def coding(self, *, params: str = "", b_frames: int | None = None, group: int | None = None) -> list[str]:
        """ffmpeg's arguments for the drawn codec; `params`: for x264 or x265."""
        codec = CODECS[self.codec]
        words = codec.arguments.split()
        b_frames = self.b_frames if b_frames is None else b_frames
        if codec.groups:
            words += ["-g", str(group or self.rng.choice((5, 12, 12, 24, 250)))]
        if codec.b_frames:
            words += ["-bf", str(b_frames)]
        if "libx264" in words and params:
            words += ["-x264-params", params]
        if "libx265" in words:
            words += ["-x265-params", ":".join(["log-level=error:pools=1:frame-threads=1", *filter(None, [params])])]
        return [*words, "-pix_fmt", self.rng.choice(codec.formats)]

    def encode(
        self,
        stem: str,
        *,
        coding: Sequence[str] | None = None,
        filters: str = "",
        output: Sequence[str] = (),
        before: Sequence[str] = (),
        inputs: Sequence[str] = (),
        first: int = 0,
        count: int | None = None,
        fragments: bool = True,
    ) -> str:
        """Encode numbered pictures; returns the file's name, for `run`."""
        count = self.count if count is None else count
        feed = b"".join(_picture(n, self.width, self.height) for n in range(first, first + count))
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{self.width}x{self.height}", "-r", self.rate]
        name = self.name(stem)
        more = CONTAINERS[self.container][1].split() if fragments else []
        words = [*before, *raw, "-i", "-", *inputs]
        words += ["-vf", filters] if filters else []
        self.run(*words, *(coding or self.coding()), *output, *more, *EXACT, name, feed=feed)
        return name

    def finish(self, name: str) -> None:
        self.path = self.folder / name.removeprefix("@")

    def movie(self, name: str) -> Movie:
        return Movie(self.folder / name.removeprefix("@"))

    def sound(self, seconds: float) -> list[str]:
        """An input of sound."""
        return ["-f", "lavfi", "-i", f"sine=f=440:r=44100:d={seconds:.3f}"]

    def sound_coding(self) -> list[str]:
        return ["-c:a", _SOUND.get(self.container, "aac"), "-ar", "48000" if self.container == "webm" else "44100"]

    def maybe_sound(self) -> dict[str, list[str]]:
        """Now and then, sound as long as the picture, as arguments of `encode`."""
        if self.rng.random() < 0.7:
            return {}
        self.kinds.append("sound")
        return {"inputs": self.sound(self.seconds), "output": self.sound_coding()}

    def maybe_turned(self, name: str) -> str:
        """Now and then, a display matrix."""
        if self.container not in ("mp4", "mov", "mkv") or self.rng.random() < 0.7:
            return name
        return self.turned(name, self.rng.choice((90, 180, 270)), mirror=self.rng.choice(("", "", "h", "v")))

    def turned(self, name: str, degrees: int, mirror: str = "") -> str:
        self.kinds.append(f"turned by {degrees}" + (f", {mirror}flip" if mirror else ""))
        before = ["-display_rotation", str(degrees)] + (["-display_" + mirror + "flip"] if mirror else [])
        return self.copy(name, "turned", before=before)

    def copy(self, name: str, stem: str, *, before: Sequence[str] = (), output: Sequence[str] = ()) -> str:
        """Copy the streams of a file into another of its kind."""
        to = self.name(stem)
        more = CONTAINERS[self.container][1].split()
        self.run(*before, "-i", name, "-map", "0", "-c", "copy", *output, *more, *EXACT, to)
        return to


@functools.lru_cache(maxsize=4000)
def _picture(number: int, width: int, height: int) -> bytes:
    """A numbered picture of one strong colour with little change in it.

    So that a wrong matrix shows everywhere, and not where exactly halved colours are taken to lie: of that, and of how
    the colours of two fields are parted, ffmpeg's own versions differ.
    """
    rgb = picture(number, width, height).astype(np.float32)
    grey = rgb.mean(axis=2, keepdims=True)
    tinted = grey + 0.4 * (rgb - grey) + np.float32([35, -10, -35])
    return np.clip(tinted, 0, 255).astype(np.uint8).tobytes()
