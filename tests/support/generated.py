"""Videos of random kinds: file k is a function of the number k alone, and says by which commands it was made.

    python -m tests.support.generated results.json [count]
    python -m tests.support.generated --table old.json new.json [page.md]
    python -m tests.support.generated --make number folder

The first writes what becomes of each file (see comparison.py), the second says in Markdown what two such runs differ
in, or writes it into a page between the marks for it, the third makes one file again.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from tests.support.boxes import Movie, Sample
from tests.support.recipes import CODECS, CONTAINERS, EXACT, MOV, USUAL, Clip, Unmade

COUNT = 300
BEGIN, END = "<!-- generated files: begin -->", "<!-- generated files: end -->"

Result = dict[str, Any]

# -- the kinds --------------------------------------------------------------------------------------------------------

Maker = Callable[[Clip], None]
KINDS: dict[str, Maker] = {}


def kind(name: str) -> Callable[[Maker], Maker]:
    def add(make: Maker) -> Maker:
        KINDS[name] = make
        return make

    return add


def _old(clip: Clip, containers: Sequence[str]) -> None:
    """One after the other, what is not usual."""
    pairs = [
        (name, container)
        for name, codec in CODECS.items()
        for container in codec.containers
        if container in containers and name not in USUAL
    ]
    codec, container = pairs[clip.number // len(KINDS) % len(pairs)]
    clip.choose((codec,), (container,))
    clip.finish(clip.encode("old", **clip.maybe_sound()))


@kind("old codec in AVI")
def _old_avi(clip: Clip) -> None:
    _old(clip, ("avi",))


@kind("old codec in QuickTime or Matroska")
def _old_mov(clip: Clip) -> None:
    _old(clip, ("mov", "mkv"))


@kind("FLV, Ogg, ASF, 3GP, MPEG program stream")
def _old_other(clip: Clip) -> None:
    _old(clip, ("flv", "ogg", "wmv", "3gp", "mpg", "vob"))


@kind("usual codec")
def _usual(clip: Clip) -> None:
    clip.choose(USUAL)
    more = clip.maybe_sound()
    if clip.container in ("mp4", "mov") and clip.rng.random() < 0.3:
        more["output"] = [*more.get("output", []), "-video_track_timescale", clip.rng.choice(("600", "1000", "90000"))]
        more["output"] += clip.rng.choice(([], ["-movflags", "+faststart"]))
    clip.finish(clip.maybe_turned(clip.encode("usual", **more)))


@kind("colours")
def _colours(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc", "vp9", "av1", "mpeg2", "mpeg4"))
    matrix, name = clip.rng.choice((("bt709", "bt709"), ("bt601", "smpte170m"), ("bt601", "bt470bg")))
    reach = clip.rng.choice(("tv", "tv", "pc")) if clip.codec in ("h264", "hevc", "vp9", "av1") else "tv"
    clip.kinds.append(f"{name} {reach}")
    filters = f"scale=out_color_matrix={matrix}:out_range={reach}"
    output = ["-colorspace", name, "-color_range", reach]
    if clip.rng.random() < 0.5:
        output += ["-color_primaries", name, "-color_trc", "bt709" if name == "bt709" else "smpte170m"]
    coding = [word if word != "yuvj420p" else "yuv420p" for word in clip.coding()]
    clip.finish(clip.maybe_turned(clip.encode("colours", coding=coding, filters=filters, output=output)))


def _paused(clip: Clip) -> str:
    """A filter for a variable rate: frames left out, and a gap of up to a second."""
    every, at = clip.rng.randint(2, 4), clip.rng.randint(3, clip.count // 2)
    gap = clip.rng.choice((0.2, 0.5, 1.0))
    return f"select='not(mod(n,{every}))+between(n,{at},{at + 8})',settb=1/90000,setpts='PTS+gt(N,{at})*{gap}/TB'"


def _jittering(clip: Clip) -> str:
    """A filter for what a phone writes: no two steps alike."""
    amount = clip.rng.choice((0.2, 0.4))
    return f"settb=1/90000,setpts='(N+{amount}*sin(N*12.9898)*cos(N*78.233))/({clip.rate})/TB'"


def _nearly_equal(clip: Clip) -> str:
    """A filter for pairs of frames a fraction of a millisecond apart."""
    near, every = clip.rng.choice((0.00006, 0.00024, 0.0006)), clip.rng.randint(4, 9)
    clip.kinds.append(f"{1000 * near:.2f} ms")
    return f"settb=1/90000,setpts='(N+eq(mod(N,{every}),2)*(1-{near}*({clip.rate})))/({clip.rate})/TB'"


_OWN_TIMES = ("-fps_mode", "passthrough", "-enc_time_base", "1/90000")


@kind("pauses")
def _pauses(clip: Clip) -> None:
    clip.choose(("h264", "hevc", "vp9", "av1", "mpeg4"), (*MOV, "mkv", "webm", "ts", "flv"))
    output = ["-fps_mode", "passthrough"] if clip.codec == "mpeg4" else _OWN_TIMES  # its clock is 16 bits
    clip.finish(clip.maybe_turned(clip.encode("pauses", filters=_paused(clip), output=output)))


@kind("jittering times")
def _jitter(clip: Clip) -> None:
    clip.choose(("h264", "hevc", "vp9", "av1"), (*MOV, "mkv", "webm", "ts"))
    clip.finish(clip.maybe_turned(clip.encode("jitter", filters=_jittering(clip), output=_OWN_TIMES)))


@kind("near-equal times")
def _near(clip: Clip) -> None:
    """In Matroska they fall on the same millisecond, or on the next."""
    clip.choose(("h264", "h264", "hevc", "vp9"), (*MOV, "mkv", "webm", "ts"))
    clip.finish(clip.maybe_turned(clip.encode("near", filters=_nearly_equal(clip), output=_OWN_TIMES)))


@kind("equal times")
def _equal(clip: Clip) -> None:
    """Frames of the same time, by samples without a duration (MP4), or by two blocks of one time (Matroska)."""
    clip.choose(("h264", "h264", "hevc", "av1", "mpeg4"), ("mp4", "mov", "mkv"))
    group = clip.rng.choice((6, 24))
    name = clip.encode("whole", coding=clip.coding(b_frames=0, group=group), output=clip.clock())
    twice = sorted(clip.rng.sample(range(1, clip.count - 1), clip.rng.randint(1, 4)))
    if clip.container == "mkv":
        same = "+".join(f"eq(N,{n + 1})" for n in twice)
        step = f"({same})*{round(1000 / float(Fraction(clip.rate)))}"
        clip.finish(clip.copy(name, "equal", output=["-bsf:v", f"setts=ts='TS-({step})':time_base=1/1000:prescale=1"]))
        return
    movie = clip.movie(name)
    _equalise(clip, movie, twice)
    _write(clip, movie, "equal")


@kind("dropped frames (AVI)")
def _dropped(clip: Clip) -> None:
    clip.choose(("mpeg4", "xvid", "h264", "mjpeg", "huffyuv", "msmpeg4"), ("avi",))
    filters = f"select='mod(n*{clip.rng.choice((7, 11))},{clip.rng.choice((5, 9))})'"
    # Among B-frames ffmpeg's own times depend on how many frames its decoder waits.
    coding = clip.coding(b_frames=0)
    clip.finish(clip.encode("dropped", coding=coding, filters=filters, output=["-fps_mode", "passthrough"]))


@kind("B-frames in AVI")
def _avi(clip: Clip) -> None:
    clip.choose(("h264", "h264", "mpeg4", "xvid"), ("avi",))
    clip.b_frames = clip.rng.randint(1, 3)
    clip.finish(clip.encode("bframes", **clip.maybe_sound()))


@kind("packed B-frames (Xvid)")
def _packed(clip: Clip) -> None:
    clip.choose(("xvid",))
    coding = ["-c:v", "libxvid", "-vtag", "xvid", "-bf", str(clip.rng.randint(1, 2)), "-q:v", "3"]
    clip.finish(clip.encode("packed", coding=[*coding, "-g", clip.rng.choice(("12", "100"))]))


@kind("empty samples (MP4)")
def _empty(clip: Clip) -> None:
    """A sample without data where a frame was dropped."""
    clip.choose(("h264", "h264", "hevc", "mpeg4", "av1"), ("mp4", "mov"))
    movie = clip.movie(clip.maybe_turned(clip.encode("whole", coding=clip.coding(group=12), output=clip.clock())))
    _empty_out(clip, movie)
    _write(clip, movie, "empty")


@kind("cut by stream copy")
def _cut(clip: Clip) -> None:
    """A lossless trim: a late start, an early end, or both."""
    clip.choose(("h264", "h264", "hevc", "vp9", "av1", "mpeg4"), ("mp4", "mov", "mkv", "webm", "flv"))
    clip.lengthen()
    name = clip.maybe_turned(clip.encode("whole", coding=clip.coding(group=12), fragments=False, **clip.maybe_sound()))
    which = clip.rng.choice(("start", "end", "both"))
    before = ["-ss", f"{clip.rng.uniform(0.2, 0.6) * clip.seconds:.3f}"] if which != "end" else []
    output = ["-t", f"{clip.rng.uniform(0.3, 0.6) * clip.seconds:.3f}"] if which != "start" else []
    clip.kinds.append(which)
    clip.finish(clip.copy(name, "cut", before=before, output=output))


@kind("cut anywhere (TS)")
def _cut_ts(clip: Clip) -> None:
    """Joined in at any packet, as recordings of a broadcast are."""
    clip.choose(("h264", "hevc", "mpeg2"), ("ts", "m2ts"))
    clip.lengthen()
    params = clip.rng.choice(("open-gop=1", "open-gop=0")) + ":repeat-headers=1:scenecut=0"
    clip.kinds.append("open groups" if "open-gop=1" in params else "closed groups")
    name = clip.encode("whole", coding=clip.coding(group=12, params=params))
    whole = clip.folder / name.removeprefix("@")
    size = 192 if clip.container == "m2ts" else 188
    data = whole.read_bytes()
    skipped = clip.rng.randint(len(data) // 10, len(data) // 3) // size * size
    clip.note(f"the first {skipped} bytes cut off, but for the two tables at the start")
    clip.finish("cut" + whole.suffix)
    clip.path.write_bytes(data[: 3 * size] + data[skipped:])


@kind("edit list: late start")
def _edit_late(clip: Clip) -> None:
    movie, times, start = _edited(clip)
    begin = clip.rng.uniform(0.3, 0.7) * clip.seconds
    if clip.rng.random() < 0.5:  # at a key frame but the first
        keys = [time for time, sample in zip(times, movie.samples, strict=True) if sample.sync]
        begin = clip.rng.choice(keys[1:-1] or keys[1:]) - start
    _edit(clip, movie, [(clip.seconds - begin, start + begin)])


@kind("edit list: early end")
def _edit_early(clip: Clip) -> None:
    movie, _, start = _edited(clip)
    late = clip.rng.choice((0.0, 0.0, clip.rng.uniform(0.1, 0.3) * clip.seconds))
    _edit(clip, movie, [(clip.rng.uniform(0.3, 0.6) * clip.seconds, start + late)])


@kind("edit list: delay")
def _edit_delay(clip: Clip) -> None:
    movie, _, start = _edited(clip)
    late = clip.rng.choice((0.0, clip.rng.uniform(0.2, 0.5) * clip.seconds))
    _edit(clip, movie, [(clip.rng.choice((0.04, 0.5, 2.0)), None), (clip.seconds - late, start + late)])


@kind("edit list: several edits")
def _edits(clip: Clip) -> None:
    """Parts in order with holes between, with nothing shown between, or one shown twice."""
    parts = clip.rng.choice(
        (
            [(0.8, 0.0), (1.0, 1.5)],
            [(0.6, 0.0), (0.5, 1.0), (0.7, 2.1)],
            [(1.0, 0.5), (0.3, None), (1.0, 1.8)],
            [(1.5, 0.0), (1.5, 0.5)],
        )
    )
    movie, times, start = _edited(clip)
    third = clip.seconds / 3
    edits = [(third * length, None if at is None else start + third * at) for length, at in parts]
    if clip.b_frames:
        # ffmpeg's own times go back where a part begins or ends between B-frames: whole groups, then.
        keys = [time for time, sample in zip(times, movie.samples, strict=True) if sample.sync] + [start + clip.seconds]

        def nearest(time: float) -> float:
            return min(keys, key=lambda key: abs(key - time))

        snapped = [(nearest(at), nearest(at + length)) for length, at in edits if at is not None]
        edits = [(end - begin, begin) for begin, end in snapped if end > begin]
    _edit(clip, movie, edits)


@kind("turned")
def _turned(clip: Clip) -> None:
    clip.choose(USUAL, ("mp4", "mov", "mkv"))
    name = clip.encode("upright", coding=clip.coding())
    clip.finish(clip.turned(name, clip.rng.choice((0, 90, 180, 270)), clip.rng.choice(("", "h", "v"))))


@kind("mirrored")
def _mirrored(clip: Clip) -> None:
    clip.choose(USUAL, ("mp4", "mov", "mkv"))
    clip.b_frames = min(clip.b_frames, 1)
    degrees = (0, 90, 180, 270)[clip.number // len(KINDS) % 4]
    name = clip.encode("upright", coding=clip.coding())
    clip.finish(clip.turned(name, degrees, clip.rng.choice(("h", "v"))))


@kind("open groups")
def _open(clip: Clip) -> None:
    clip.choose(("h264", "hevc", "hevc", "mpeg2"), (*MOV, "mkv", "ts", "m2ts", "mpg", "vob"))
    clip.b_frames = clip.rng.randint(1, 3)
    group = clip.rng.choice((4, 8, 15))
    params = f"open-gop=1:scenecut=0:min-keyint={group}:b-pyramid={clip.rng.choice((0, 1))}"
    params = params.replace("b-pyramid=1", "b-pyramid=normal") if clip.codec == "h264" else params
    clip.finish(clip.maybe_turned(clip.encode("open", coding=clip.coding(group=group, params=params))))


@kind("intra refresh")
def _refresh(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc"), (*MOV, "mkv", "ts", "flv"))
    coding = clip.coding(group=clip.rng.choice((12, 24)), b_frames=0, params="intra-refresh=1:scenecut=0")
    clip.finish(clip.encode("refresh", coding=coding, **clip.maybe_sound()))


@kind("odd sizes")
def _odd(clip: Clip) -> None:
    clip.choose([name for name, codec in CODECS.items() if codec.odd or "yuv444p" in codec.formats])
    clip.width, clip.height = clip.rng.choice(((97, 65), (97, 64), (96, 65), (33, 51), (50, 98), (130, 18)))
    coding = clip.coding()
    if not CODECS[clip.codec].odd:
        coding[coding.index("-pix_fmt") + 1] = "yuv444p"
    clip.finish(clip.maybe_turned(clip.encode("odd", coding=coding)))


@kind("odd start")
def _start(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc", "vp9", "mpeg2"), ("mp4", "mov", "mkv", "webm", "ts", "m2ts", "flv", "mpg"))
    ways = [["-output_ts_offset", clip.rng.choice(("0.4", "5", "3600.1"))]]
    if clip.container in ("mp4", "mov"):
        ways += [["-use_editlist", "0"], ["-movflags", "+negative_cts_offsets"]]
    if clip.container in ("mkv", "webm"):
        ways += [["-output_ts_offset", "0.3", "-avoid_negative_ts", "disabled"]]
    if clip.container in ("ts", "m2ts", "mpg"):
        ways += [["-muxdelay", "0", "-muxpreload", "0"]]
    way = clip.rng.choice(ways)
    clip.kinds.append(" ".join(way))
    clip.finish(clip.encode("start", output=way))


@kind("clock of a TS wraps")
def _wrap(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc", "mpeg2"), ("ts", "m2ts"))
    # 33 bits of a clock of 90 kHz, less the 1.4 s at which ffmpeg begins.
    offset = 2**33 / 90000 - 1.4 - clip.rng.uniform(0.1, 0.9) * clip.seconds
    more = clip.maybe_sound()
    clip.finish(
        clip.encode("wrap", **(more | {"output": [*more.get("output", []), "-output_ts_offset", f"{offset:.3f}"]}))
    )


@kind("joined files (TS, VOB)")
def _joined(clip: Clip) -> None:
    """Two files, one after the other: the clock starts anew."""
    clip.choose(("h264", "h264", "hevc", "mpeg2"), ("ts", "m2ts", "vob"))
    coding = clip.coding(group=12)
    other = clip.rng.choice((clip.count, clip.count, max(8, clip.count // 2), clip.count + 15))
    far = clip.rng.choice(((), (), ("-output_ts_offset", "20")))
    first = clip.encode("first", coding=coding, output=far)
    second = clip.encode("second", coding=coding, first=clip.count, count=other)
    _join(clip, (first, second))


@kind("held last frame")
def _held(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc", "av1", "mpeg4"), ("mp4", "mov"))
    movie = clip.movie(clip.maybe_turned(clip.encode("whole", coding=clip.coding(b_frames=0), output=clip.clock())))
    _hold(clip, movie)
    _write(clip, movie, "held")


@kind("cover as a stream")
def _cover(clip: Clip) -> None:
    """A picture of one frame, larger than the film, muxed as an ordinary stream."""
    clip.choose(("h264", "h264", "hevc", "mpeg4"), ("mp4", "mov", "mkv"))
    name = clip.encode("film", coding=clip.coding())
    to = clip.name("cover")
    cover = ["-f", "lavfi", "-i", "testsrc2=s=320x180:d=1:r=1"]
    film, still = clip.rng.choice((("0", "1"), ("1", "0")))
    maps = ["-map", "0:v", "-map", "1:v"] if film == "0" else ["-map", "1:v", "-map", "0:v"]
    output = [
        *maps,
        f"-c:v:{film}",
        "copy",
        f"-c:v:{still}",
        clip.rng.choice(("mjpeg", "png")),
        "-frames:v:" + still,
        "1",
    ]
    output += [f"-disposition:v:{film}", "default", f"-disposition:v:{still}", "0"]
    clip.run("-i", name, *cover, *output, *EXACT, to)
    clip.finish(to)


@kind("second film, not the default")
def _second(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc", "vp9"), ("mp4", "mov", "mkv"))
    name = clip.encode("film", coding=clip.coding())
    to = clip.name("two")
    other = ["-f", "lavfi", "-i", f"testsrc2=s=192x128:d={clip.seconds:.2f}:r={clip.rate}"]
    film = clip.rng.choice(("0", "1"))
    other_place = "1" if film == "0" else "0"
    maps = ["-map", "0:v", "-map", "1:v"] if film == "0" else ["-map", "1:v", "-map", "0:v"]
    output = [*maps, f"-c:v:{film}", "copy", f"-c:v:{other_place}", "mpeg4", "-q:v", "5"]
    output += [f"-disposition:v:{film}", "default", f"-disposition:v:{other_place}", "0"]
    clip.run("-i", name, *other, *output, *EXACT, to)
    clip.finish(to)


@kind("preview of 1 frame a second")
def _preview(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc", "mpeg2"), ("mp4", "mov", "mkv", "ts"))
    name = clip.encode("film", coding=clip.coding())
    to = clip.name("preview")
    coding = ["-c:v:0", "copy", "-c:v:1", "mpeg4" if clip.container == "ts" else "mjpeg"]
    small = ["-f", "lavfi", "-i", f"testsrc2=s=48x32:d={clip.seconds:.2f}:r=1"]
    clip.run("-i", name, *small, "-map", "0:v", "-map", "1:v", *coding, "-q:v:1", "5", *EXACT, to)
    clip.finish(to)


@kind("sound longer or earlier")
def _sound(clip: Clip) -> None:
    names = [n for n in CONTAINERS if n not in ("mp4 in fragments",)]
    clip.choose((*USUAL, "mpeg2", "theora", "wmv2", "flv1", "vp8"), names)
    longer = clip.rng.choice((0.0, 0.6, 2.0))
    late = clip.rng.choice((0.0, 0.3, 0.9))
    first = clip.rng.random() < 0.5
    clip.kinds.append(f"{longer} s longer, {late} s earlier" + (", sound first" if first else ""))
    before = ["-itsoffset", str(late)] if late else []
    maps = ["-map", "1:a", "-map", "0:v"] if first else ["-map", "0:v", "-map", "1:a"]
    name = clip.encode(
        "sound", before=before, inputs=clip.sound(clip.seconds + late + longer), output=[*maps, *clip.sound_coding()]
    )
    clip.finish(name)


@kind("fragments")
def _fragments(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc", "av1", "vp9"), ("mp4", "mp4 in fragments"))
    clip.container = "mp4"
    flags = clip.rng.choice(("frag_keyframe+empty_moov", "frag_every_frame+empty_moov", "frag_keyframe+delay_moov"))
    # With a fragment for each frame, ffmpeg's writer gives wrong times to B-frames, and to frames beside sound.
    more = clip.maybe_sound() if "every" not in flags else {}
    output = [*more.pop("output", []), "-movflags", f"+{flags}+default_base_moof"]
    coding = clip.coding(b_frames=0 if "every" in flags else None)
    clip.finish(clip.encode("fragments", coding=coding, output=output, **more))


@kind("interlaced")
def _interlaced(clip: Clip) -> None:
    clip.choose(("h264", "mpeg2", "mpeg2"), ("mp4", "mkv", "ts", "m2ts", "mpg", "vob"))
    clip.height = 64
    coding = clip.coding(params="tff=1" if clip.codec == "h264" else "")
    coding[coding.index("-pix_fmt") + 1] = "yuv420p"
    repeated = clip.codec == "mpeg2" and clip.rng.random() < 0.7
    name = clip.encode("fields", coding=[*coding, "-flags", "+ilme+ildct"], filters="setfield=tff")
    if repeated:
        clip.kinds.append("repeated fields")
        clip.note("repeat_first_field set in every second picture coding extension")
        path = clip.folder / name[1:]
        path.write_bytes(_repeated(path.read_bytes()))
    clip.finish(name)


@kind("frames that are never shown")
def _hidden(clip: Clip) -> None:
    """Alternate reference frames of VP8, VP9 and AV1."""
    clip.choose(("vp8", "vp8", "vp9", "av1"))
    clip.count = min(clip.count, 48)
    coding = {
        "vp8": ["-c:v", "libvpx", "-deadline", "good", "-cpu-used", "5", "-auto-alt-ref", "1", "-lag-in-frames", "10"],
        "vp9": [
            "-c:v",
            "libvpx-vp9",
            "-deadline",
            "good",
            "-cpu-used",
            "5",
            "-auto-alt-ref",
            "1",
            "-lag-in-frames",
            "12",
        ],
        "av1": ["-c:v", "libaom-av1", "-cpu-used", "8", "-auto-alt-ref", "1", "-lag-in-frames", "19"],
    }[clip.codec]
    group = clip.rng.choice(("16", "200"))
    clip.finish(clip.encode("hidden", coding=[*coding, "-b:v", "200k", "-g", group, "-pix_fmt", "yuv420p"]))


@kind("pixels that are not square")
def _anamorphic(clip: Clip) -> None:
    clip.choose(("h264", "hevc", "mpeg2", "mpeg4", "vp9", "dv"))
    aspect = clip.rng.choice(("4/3", "3/4", "16/15", "64/45", "1/2"))
    clip.kinds.append(aspect)
    clip.finish(clip.maybe_turned(clip.encode("aspect", filters=f"setsar={aspect}")))


@kind("one to three frames")
def _short(clip: Clip) -> None:
    clip.choose(tuple(CODECS))
    clip.count = clip.rng.randint(1, 3)
    clip.finish(clip.encode("short", **clip.maybe_sound()))


@kind("streamed: no index, no length")
def _streamed(clip: Clip) -> None:
    """What is written while it is sent: by a browser's recorder, or a live stream."""
    clip.choose(("h264", "h264", "vp8", "vp9", "flv1"), ("mkv", "webm", "flv"))
    more = clip.maybe_sound()
    live = ["-flvflags", "no_duration_filesize"] if clip.container == "flv" else ["-live", "1"]
    filters = _jittering(clip) if clip.codec != "flv1" and clip.rng.random() < 0.5 else ""
    output = [*more.pop("output", []), *live, *(_OWN_TIMES if filters else ())]
    clip.finish(clip.encode("streamed", filters=filters, output=output, **more))


@kind("cover, subtitles and time code beside it")
def _beside(clip: Clip) -> None:
    clip.choose(USUAL, ("mp4", "mov"))
    name = clip.maybe_turned(clip.encode("film"))
    (clip.folder / "words.srt").write_text("1\n00:00:00,100 --> 00:00:09,000\nla la\n")
    clip.note("words.srt: one line from 0.1 to 9 s")
    inputs = ["-i", name, "-f", "lavfi", "-i", "testsrc2=s=320x180:d=1:r=1", "-i", "@words.srt"]
    inputs += clip.sound(clip.seconds)
    order = [["-map", "2:s"], ["-map", "3:a"], ["-map", "0:v", "-map", "1:v"]]
    clip.rng.shuffle(order)
    output = [*(word for words in order for word in words), "-c:a", "aac", "-c:s", "mov_text", "-c:v:0", "copy"]
    output += ["-c:v:1", "mjpeg", "-frames:v:1", "1", "-disposition:v:1", "attached_pic"]
    output += ["-timecode", "00:00:10:00"] if clip.container == "mov" else []
    to = clip.name("beside")
    clip.run(*inputs, *output, *EXACT, to)
    clip.finish(to)


def _mixed(clip: Clip) -> dict[str, Any]:
    """Arguments of `encode` for odd times, odd groups, pixels that are not square and sound, each now and then."""
    rng = clip.rng
    way = rng.choice((None, _paused, _jittering, _nearly_equal))
    filters = [way(clip)] if way else []
    filters += [f"setsar={rng.choice(('4/3', '3/4'))}"] if rng.random() < 0.3 else []
    closed, group = "open-gop=0:scenecut=0", rng.choice((5, 12, 24))
    params = rng.choice((closed, closed, f"open-gop=1:scenecut=0:min-keyint={group}"))
    clip.kinds += ["open groups"] if "open-gop=1" in params and clip.b_frames else []
    more = clip.maybe_sound()
    times = _OWN_TIMES if way else ()
    coding = clip.coding(group=group, params=params)
    return {"filters": ",".join(filters), "coding": coding, **more, "output": [*more.get("output", []), *times]}


@kind("several oddities (MP4)")
def _mixed_mp4(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc", "vp9", "av1"), ("mp4", "mov"))
    clip.lengthen()
    more = _mixed(clip)
    more["output"] += clip.clock()
    movie = clip.movie(clip.maybe_turned(clip.encode("whole", **more)))
    if clip.b_frames == 0 and clip.rng.random() < 0.5:
        _equalise(clip, movie, sorted(clip.rng.sample(range(1, len(movie.samples) - 1), 2)))
    if clip.rng.random() < 0.4:
        _empty_out(clip, movie)
    if clip.b_frames == 0 and clip.rng.random() < 0.4:
        _hold(clip, movie)
    if clip.rng.random() < 0.6 and not any("open groups" in kind for kind in clip.kinds):
        clip.held_s = None
        start, length = min(movie.starts_s), max(movie.starts_s) - min(movie.starts_s)
        late, early = clip.rng.choice(((0.4, 0.0), (0.0, 0.5), (0.3, 0.3))) if clip.rng.random() < 0.7 else (0.0, 0.0)
        delay = [(clip.rng.choice((0.1, 1.5)), None)] if clip.rng.random() < 0.4 else []
        _edit(clip, movie, [*delay, (length * (1 - late - early), start + length * late)])
    else:
        _write(clip, movie, "mixed")


@kind("several oddities (TS)")
def _mixed_ts(clip: Clip) -> None:
    clip.choose(("h264", "h264", "hevc"), ("ts", "m2ts"))
    clip.lengthen()
    more = _mixed(clip)
    wrap = f"{2**33 / 90000 - 1.4 - clip.rng.uniform(0.1, 0.9) * clip.seconds:.3f}"
    more["output"] += clip.rng.choice(([], ["-muxdelay", "0", "-muxpreload", "0"], ["-output_ts_offset", wrap]))
    names = [clip.encode("first", **more)]
    if clip.rng.random() < 0.5 and not (clip.b_frames and more["filters"]):  # there ffmpeg's own times go back
        names.append(clip.encode("second", **more, first=clip.count, count=clip.rng.choice((10, clip.count))))
    _join(clip, names)


@kind("several oddities (Matroska)")
def _mixed_mkv(clip: Clip) -> None:
    clip.choose(("h264", "hevc", "vp8", "vp9", "av1"), ("mkv", "webm"))
    clip.lengthen()
    more = _mixed(clip)
    offset = ["-output_ts_offset", clip.rng.choice(("0.7", "600"))]
    more["output"] += clip.rng.choice(([], offset, ["-live", "1"] if clip.codec != "av1" else []))
    name = clip.encode("mixed", **more)
    clip.finish(clip.maybe_turned(name) if "-live" not in more["output"] else name)


def _join(clip: Clip, names: Sequence[str]) -> None:
    clip.note("cat " + " ".join(name[1:] for name in names))
    clip.finish(clip.name("joined"))
    clip.path.write_bytes(b"".join((clip.folder / name[1:]).read_bytes() for name in names))


def _write(clip: Clip, movie: Movie, stem: str) -> None:
    clip.finish(clip.name(stem))
    movie.write(clip.path)


def _equalise(clip: Clip, movie: Movie, twice: Sequence[int]) -> None:
    """Samples without a duration: the next one has the same time."""
    for n in twice:
        if n + 1 not in twice:
            movie.samples[n].duration, movie.samples[n + 1].duration = 0, movie.samples[n].duration * 2
    clip.note(f"stts: samples {[*twice]} last 0, the next ones twice as long")


def _empty_out(clip: Clip, movie: Movie) -> None:
    """Samples without data, where frames were dropped."""
    places = sorted(clip.rng.sample(range(2, len(movie.samples) - 1), clip.rng.randint(1, 3)), reverse=True)
    for place in places:
        before = movie.samples[place - 1]
        half = before.duration // 2
        movie.samples.insert(place, Sample(0, before.offset, before.duration - half, before.shift, sync=False))
        before.duration = half
    clip.note(f"stsz: an empty sample before each of {places}, which takes half of the time of the one before it")


def _hold(clip: Clip, movie: Movie) -> None:
    clip.held_s = clip.rng.choice((0.5, 3.0))
    movie.hold(clip.held_s)
    clip.note(f"stts, elst: the last sample lasts {clip.held_s} s")


def _edited(clip: Clip, b_frames: int | None = None) -> tuple[Movie, list[float], float]:
    """A film of several groups to put an edit list into: its tables, its samples' times, and the first one's time."""
    clip.choose(("h264", "h264", "h264", "hevc", "av1", "mpeg4"), ("mp4", "mov"))
    clip.lengthen()
    # An edit in open groups would show what cannot be decoded.
    coding = clip.coding(group=clip.rng.choice((8, 12)), params="open-gop=0", b_frames=b_frames)
    movie = clip.movie(clip.maybe_turned(clip.encode("whole", coding=coding)))
    return movie, movie.starts_s, min(movie.starts_s)


def _edit(clip: Clip, movie: Movie, edits: list[tuple[float, float | None]]) -> None:
    movie.edits = edits
    clip.note(
        "elst: " + ", ".join(f"{d:.4f} s " + ("of nothing" if at is None else f"from {at:.4f} s") for d, at in edits)
    )
    _write(clip, movie, "edited")


def _repeated(data: bytes) -> bytes:
    """MPEG-2 pictures, every second of them shown for three fields."""
    changed, place, number = bytearray(data), data.find(b"\0\0\1\xb5\x8f"), 0
    while place >= 0:
        if number % 2:
            changed[place + 7] |= 0b10  # repeat_first_field
        number += 1
        place = data.find(b"\0\0\1\xb5\x8f", place + 5)
    return bytes(changed)


def make(number: int, folder: Path) -> Clip:
    """Make file `number` in an empty folder. Raises Unmade where ffmpeg fails."""
    names = list(KINDS)
    clip = Clip(number, folder, random.Random(str(number)), [names[number % len(names)]])
    try:
        KINDS[clip.family](clip)
    except (subprocess.CalledProcessError, ValueError, KeyError, IndexError, struct.error) as error:
        raise Unmade(f"file {number} {clip.kinds}: {error!r}\n" + "\n".join(clip.recipe)) from error
    clip.kinds += [clip.codec, clip.container]
    return clip


def run(number: int, folder: Path) -> Result:
    """Make a file, and say what becomes of it; nothing is left in the folder."""
    from tests.support.comparison import examine

    folder.mkdir()
    try:
        clip = make(number, folder)
        outcome = examine(clip.path, folder, number, clip.held_s)
    finally:
        shutil.rmtree(folder)
    return {"number": number, "kinds": clip.kinds, "recipe": clip.recipe, **asdict(outcome)}


def report(result: Result) -> str:
    """What a person needs who looks into a file."""
    made = "\n  ".join(result["recipe"])
    return (
        f"file {result['number']} ({', '.join(result['kinds'])}): {fate(result)}\n{result['detail']}\nmade by\n  {made}"
    )


def fate(result: Result) -> str:
    """What became of a file, in a few words."""
    if result["aspects"] and set(result["aspects"]) <= set(result["of_the_library"]):
        return "taken as PyAV reads it, which is not as ffmpeg does: " + ", ".join(result["aspects"])
    if result["state"] == "differs":
        return "read wrongly: " + ", ".join(result["aspects"])
    return result["state"] if result["state"] == "taken" else f"{result['state']} ({result['detail']})"


def by_family(results: Iterable[Result]) -> dict[str, list[Result]]:
    families: dict[str, list[Result]] = {name: [] for name in KINDS}
    for result in results:
        families[result["kinds"][0]].append(result)
    return {name: found for name, found in families.items() if found}


def summary(results: Sequence[Result]) -> str:
    """Each fate with its share, the same sentence with other numbers being the same: '7 of 9 taken; 2 of 9 refused'."""
    groups: dict[str, list[str]] = {}
    for result in results:
        words = fate(result)
        groups.setdefault(re.sub(r"\d[\d.]*", "N", words), []).append(words)
    if len(groups) == 1 and len(results) > 1:
        return f"all {len(results)} {next(iter(groups.values()))[0]}"
    ordered = sorted(groups.values(), key=lambda words: (words[0] != "taken", -len(words)))
    return "; ".join(f"{len(words)} of {len(results)} {words[0]}" for words in ordered)


def table(old: Sequence[Result], new: Sequence[Result]) -> str:
    """Markdown: by kind of file, what became of it before and becomes of it now, where that is not the same."""
    now = by_family(new)
    rows = ["| kind of file | before | now |", "|---|---|---|"]
    for name, results in by_family(old).items():
        before, after = summary(results), summary(now.get(name, []))
        if [fate(result) for result in results] != [fate(result) for result in now.get(name, [])]:
            rows.append(f"| {name} | {before} | {after} |".replace("CORRUPT: ", ""))
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--table"] and len(arguments) in (3, 4):
        rows = table(*(json.loads(Path(name).read_text())["files"] for name in arguments[1:3]))
        if len(arguments) == 3:
            print(rows)
        else:
            page = Path(arguments[3])
            before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
            page.write_text(f"{before}{BEGIN}\n{rows}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return 0
    if arguments[:1] == ["--make"] and len(arguments) == 3:
        clip = make(int(arguments[1]), Path(arguments[2]))
        print("\n".join([", ".join(clip.kinds), *clip.recipe, str(clip.path)]))
        return 0
    if not arguments or arguments[0].startswith("-") or len(arguments) > 2:
        print(__doc__)
        return 2
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(int(arguments[1]) if len(arguments) > 1 else COUNT):
            try:
                results.append(run(number, Path(folder) / str(number)))
            except Unmade as error:
                print(error, file=sys.stderr)
    from tests.support.comparison import versions

    Path(arguments[0]).write_text(json.dumps({"versions": versions(), "files": results}, indent=1))
    for name, found in by_family(results).items():
        print(f"{name}: {summary(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
