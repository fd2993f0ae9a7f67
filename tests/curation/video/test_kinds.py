"""Kinds of files that are ordinary and were taken for damaged, or shown wrongly; and kinds that are refused by name."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.failures import ClipFailure, FailureCode
from curation.video.container import container_format
from curation.video.decode import decode, frames_at, resize, to_rgb
from curation.video.index import VideoIndex, index_video, with_index
from curation.video.intake import strip, verify
from curation.video.packets import _vp9_frames, steady_rate
from tests.support.numbered import encode, ffmpeg, number_of, picture, shown_by_ffmpeg

H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-g", "12", "-bf", "2")


def frames(count: int) -> list[np.ndarray]:
    return [picture(number) for number in range(count)]


def shown(path: Path) -> tuple[VideoIndex, list[np.ndarray]]:
    """The index after a whole pass, and every frame of it, upright."""

    def read(index: VideoIndex) -> tuple[VideoIndex, list[np.ndarray]]:
        pictures = [resize(to_rgb(f), index, index.width, index.height) for _, f in decode(index, 0, 10**6)]
        return index, pictures

    return with_index(path, read)


def agrees_with_ffmpeg(path: Path) -> VideoIndex:
    """Same frames, same times, whatever the product's index was made of; also in the copy that is kept."""
    index, pictures = shown(path)
    reference = shown_by_ffmpeg(path)
    assert [number_of(p) for p in pictures] == reference.numbers
    assert index.times_s == pytest.approx(reference.times_s, abs=1.1e-3)
    verify(path)
    copy, copied = shown(strip(index, container_format(path), path.with_name("clean")))
    assert [number_of(p) for p in copied] == reference.numbers
    assert copy.times_s == pytest.approx(index.times_s, abs=1.1e-3)
    return index


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("film") / "film.mp4", frames(48), *H264)


def turned(source: Path, target: Path, matrix: list[int]) -> Path:
    """A copy of an MP4 with these a, b, c, d in its track's display matrix."""
    data = bytearray(source.read_bytes())
    track = data.index(b"tkhd") + 4
    a, b, c, d = (value << 16 for value in matrix)
    values = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data[track + 40 : track + 76] = values  # version 0 of the box
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    "matrix",
    [
        m
        for m in itertools.product((1, 0, -1), repeat=4)
        if abs(m[0] * m[3] - m[1] * m[2]) == 1 and 0 in m[:2] and 0 in m[2:]
    ],
)
def test_every_display_matrix_of_quarters_and_mirrors_is_applied_as_ffmpeg_does(film, tmp_path, matrix):
    path = turned(film, tmp_path / "turned.mp4", list(matrix))
    index, pictures = shown(path)
    reference = shown_by_ffmpeg(path)
    assert (index.height, index.width) == reference.frames.shape[1:3]
    for mine, theirs in zip(pictures, reference.frames, strict=True):
        assert np.abs(mine.astype(int) - theirs).mean() < 1.5


def test_a_picture_that_is_to_be_shown_at_an_angle_is_refused(film, tmp_path):
    path = turned(film, tmp_path / "tilted.mp4", [1, 1, -1, 1])
    with pytest.raises(ClipFailure, match="angle") as caught:
        index_video(path)
    assert caught.value.code is FailureCode.WRONG_KIND


def test_colours_that_nothing_here_converts_are_refused(tmp_path):
    path = tmp_path / "ictcp.mp4"
    encode(path, frames(3), "-c:v", "libx264", "-pix_fmt", "yuv420p", "-bsf:v", "h264_metadata=matrix_coefficients=14")
    with pytest.raises(ClipFailure, match="colour format") as caught:
        index_video(path)
    assert caught.value.code is FailureCode.WRONG_KIND


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.jpg", "a.bmp", "a.tiff", "a.avif"])
def test_a_picture_is_called_a_picture_and_not_damaged(film, tmp_path, name):
    path = tmp_path / name
    count = [] if name in ("a.gif", "a.webp", "a.avif") else ["-frames:v", "1", "-update", "1"]
    ffmpeg("-i", film, "-t", "0.2", *count, path)
    for act in (index_video, container_format):
        with pytest.raises(ClipFailure, match="convert it to MP4") as caught:
            act(path)
        assert caught.value.code is FailureCode.WRONG_KIND


def test_frames_at_the_same_time_or_nearly_are_two_frames(tmp_path):
    path = tmp_path / "close.mp4"
    stamps = "setts=time_base=1/90000:ts='if(eq(mod(N,9),4),TS+2980,if(eq(N,20),TS+3000,TS))'"
    encode(path, frames(40), *H264[:-2], "-bf", "0", "-video_track_timescale", "90000", "-bsf:v", stamps)
    index = agrees_with_ffmpeg(path)
    gaps = np.diff(index.times_s)
    assert len(index.times_s) == 40 and (gaps < 1e-3).sum() >= 4


def test_an_avi_with_dropped_frames_or_b_frames_shows_what_is_in_it(tmp_path):
    dropped = tmp_path / "dropped.avi"
    gaps = ("-vf", "select='mod(n,5)'", "-fps_mode", "vfr")
    encode(dropped, frames(40), *gaps, "-c:v", "mpeg4", "-q:v", "3", "-g", "12")
    assert np.diff(agrees_with_ffmpeg(dropped).times_s).max() > 1.5 / 30
    (tmp_path / "b").mkdir()
    ordered = tmp_path / "b" / "bframes.avi"
    encode(ordered, frames(40), *H264[:-1], "3")
    assert agrees_with_ffmpeg(ordered).times_s == pytest.approx(np.arange(40) / 30)


def test_reference_frames_of_vp8_and_vp9_are_no_frames(tmp_path):
    source = encode(tmp_path / "source.mkv", frames(60), "-c:v", "ffv1")
    for codec in ("libvpx", "libvpx-vp9"):
        path = tmp_path / f"{codec}.webm"
        for turn in ("1", "2"):  # only the second of two passes makes alternate reference frames
            options = ("-auto-alt-ref", "1", "-lag-in-frames", "16", "-cpu-used", "4", "-b:v", "150k", "-pass", turn)
            ffmpeg("-i", source, "-c:v", codec, "-pix_fmt", "yuv420p", *options, "-passlogfile", tmp_path / codec, path)
        index = agrees_with_ffmpeg(path)
        assert len(index.times_s) == 60 and not index.decoded
        hidden = (index.numbers < 0).sum()
        assert hidden > 0 if codec == "libvpx" else hidden == 0  # VP9 packs them together with a shown one


def test_a_superframe_is_taken_apart_by_its_index():
    frame_a, frame_b = bytes([0x80, 1, 2]), bytes([0x82, 3])
    index = bytes([0b11000001, 3, 2, 0b11000001])
    assert _vp9_frames(memoryview(frame_a + frame_b + index)) == [0, 3]
    assert _vp9_frames(memoryview(frame_b)) == [0]


@pytest.mark.parametrize("offset", [0.0, 95443.0])
def test_a_clock_that_wraps_or_starts_anew_runs_on(tmp_path, offset):
    """A transport stream's clock has 33 bits at 90 kHz; joined streams each have their own."""
    parts = []
    for name, numbers in (("a", range(0, 40)), ("b", range(40, 75))):
        part = tmp_path / f"{name}.ts"
        parts.append(encode(part, [picture(n) for n in numbers], *H264, "-output_ts_offset", str(offset)))
    (tmp_path / "wrap").mkdir()
    (tmp_path / "joined").mkdir()
    wrapped, joined = tmp_path / "wrap" / "wrap.ts", tmp_path / "joined" / "joined.ts"
    wrapped.write_bytes(parts[0].read_bytes())
    assert agrees_with_ffmpeg(wrapped).end_s == pytest.approx(40 / 30)
    joined.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    index = agrees_with_ffmpeg(joined)
    assert index.end_s == pytest.approx(75 / 30, abs=0.04)


@pytest.mark.parametrize("name", ["held.mp4", "held.mkv", "held.mov"])
def test_a_last_frame_that_is_held_counts_for_as_long(tmp_path, name):
    path = tmp_path / name
    encode(
        path,
        frames(25),
        *H264[:-2],
        "-bf",
        "0",
        "-bsf:v",
        "setts=duration='if(eq(N,24),90,DURATION)'",
    )
    index, _ = shown(path)
    assert len(index.times_s) == 25
    assert index.end_s == pytest.approx(24 / 30 + 3, abs=0.05)
    assert index.span(0.5, 3.5) == (15, 25)


def test_passes_that_were_left_unfinished_do_not_disturb_another(film):
    index = index_video(film)
    left = [decode(index, 0, 48) for _ in range(4)]
    for number in range(10):
        for generator in left:
            next(generator)
        if number % 3 == 2:
            left.pop().close()
    assert [number for number, _ in decode(index, 0, 48)] == list(range(48))
    assert [number for number, _ in left[0]] == list(range(10, 48))


def two_streams(target: Path, first: Path, second: Path, *options: str) -> Path:
    ffmpeg("-i", first, "-i", second, "-map", "0:v", "-map", "1:v", "-c", "copy", *options, target)
    return target


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_film_is_not_a_cover_a_preview_or_another_track(film, tmp_path, suffix):
    cover, preview = tmp_path / "cover.mkv", tmp_path / "preview.mkv"
    encode(cover, [picture(7, 640, 480)], "-c:v", "mjpeg", "-pix_fmt", "yuvj420p")
    encode(preview, [picture(n, 192, 128) for n in range(2)], *H264, rate=1)
    larger = tmp_path / "larger.mp4"
    encode(larger, [picture(n, 192, 128) for n in range(48)], *H264)
    for other in (cover, preview):
        for number, pair in enumerate(((film, other), (other, film))):
            path = two_streams(tmp_path / f"{other.stem}{number}{suffix}", *pair)
            assert index_video(path).stream == number
    # a second angle or language that is not the default
    path = two_streams(
        tmp_path / f"angle{suffix}", film, larger, "-disposition:v:0", "default", "-disposition:v:1", "0"
    )
    assert index_video(path).stream == 0
    path = two_streams(
        tmp_path / f"other{suffix}", film, larger, "-disposition:v:0", "0", "-disposition:v:1", "default"
    )
    assert index_video(path).stream == 1


def test_an_edit_that_shows_a_part_is_a_whole_file(film, tmp_path):
    """As a telephone trims without coding anew: the edit list leaves out whole groups at both ends."""
    long = encode(tmp_path / "long.mp4", frames(90), *H264[:-2], "-bf", "0")
    data = bytearray(long.read_bytes())
    place = data.index(b"elst") + 4
    scale = int.from_bytes(data[data.index(b"mvhd") + 16 :][:4], "big")
    media = int.from_bytes(data[data.index(b"mdhd") + 16 :][:4], "big")
    data[place + 8 : place + 12] = int(1.2 * scale).to_bytes(4, "big")
    data[place + 12 : place + 16] = (media * 26 // 30).to_bytes(4, "big")
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(data)
    index = agrees_with_ffmpeg(path)
    assert len(index.times_s) == 36
    assert index.end_s == pytest.approx(1.2, abs=0.01)


def test_a_recording_that_was_never_finished_is_taken_and_a_cut_file_is_not(tmp_path):
    live = tmp_path / "live.mkv"
    encode(live, frames(48), *H264, "-live", "1", "-cluster_time_limit", "400")
    data = live.read_bytes()
    live.write_bytes(data[: len(data) * 2 // 3])
    _, pictures = shown(live)
    assert 12 < len(pictures) < 48
    for name in ("cut.mkv", "cut.avi", "cut.mp4"):
        path = tmp_path / name
        encode(
            path,
            frames(48),
            *(H264 if name != "cut.avi" else ("-c:v", "mpeg4")),
            *(("-movflags", "+faststart") if name == "cut.mp4" else ()),
        )
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 3 // 4])
        with pytest.raises(ClipFailure) as caught:
            index_video(path)
        assert caught.value.code is FailureCode.CORRUPT


RATES = [Fraction(n) for n in (12, 15, 25, 30, 45, 60)] + [Fraction(24000, 1001), Fraction(30000, 1001)]


@given(rate=st.sampled_from(RATES), count=st.integers(3, 4000), late=st.integers(0, 999), down=st.booleans())
def test_a_constant_rate_is_known_through_the_rounding_to_milliseconds(rate, count, late, down):
    exact = [Fraction(late, 1000) / 7 + n / rate for n in range(count)]
    stamps = np.array([int(t * 1000) if down else round(t * 1000) for t in exact], np.int64)
    found = steady_rate(stamps, Fraction(1, 1000), (None, rate))
    assert found == rate
    other = stamps.copy()
    other[count // 2] += 3
    assert steady_rate(other, Fraction(1, 1000), (rate,)) != rate


def test_a_stream_that_shows_up_late_ends_nothing(tmp_path):
    """Sound begins after what was looked at when the file was opened: PyAV alone fails at the end of such a file."""
    path = tmp_path / "late.flv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=640x360:r=30:d=1,noise=alls=90:allf=t", *H264, "-crf", "4", path)
    assert path.stat().st_size > 6e6  # libavformat looks at five million bytes
    sound = bytes([0xAF, 1, *range(16)])
    head = bytes([8]) + len(sound).to_bytes(3, "big") + bytes([0, 3, 0xE8, 0, 0, 0, 0])
    path.write_bytes(path.read_bytes() + head + sound + (len(head) + len(sound)).to_bytes(4, "big"))
    with av.open(str(path)) as container, pytest.raises(IndexError):
        for _ in container.demux(container.streams.video[0]):
            pass
    assert len(index_video(path).times_s) == 30
    assert len(shown(path)[1]) == 30


@pytest.mark.parametrize("name", ["hole.mp4", "hole.avi", "hole.flv"])
def test_a_hole_that_demuxers_pass_over_is_found(tmp_path, name):
    path = tmp_path / name
    fragmented = ("-movflags", "frag_keyframe+empty_moov") if name.endswith("mp4") else ()
    encode(path, frames(60), *H264[:-4], "-g", "10", "-bf", "0", *fragmented)
    data = bytearray(path.read_bytes())
    assert len(index_video(path).times_s) == 60
    start = data.index(b"moof", len(data) // 2) - 4 if fragmented else len(data) // 2
    data[start:-40] = bytes(len(data) - 40 - start)
    path.write_bytes(data)
    with pytest.raises(ClipFailure, match=r"damaged at byte|cannot be decoded") as caught:
        index_video(path)
    assert caught.value.code is FailureCode.CORRUPT


def test_a_cropped_picture_begins_where_the_stream_says(tmp_path):
    path = tmp_path / "cropped.mp4"
    crop = "h264_metadata=crop_left=20:crop_top=10:crop_right=4:crop_bottom=8"
    encode(path, [picture(n, 320, 256) for n in range(12)], *H264, "-bsf:v", crop)
    index, pictures_ = shown(path)
    reference = shown_by_ffmpeg(path)
    assert (index.height, index.width) == reference.frames.shape[1:3]
    by_time = frames_at(index, index.times_s.tolist(), index.width, index.height)
    for mine, sought, theirs in zip(pictures_, by_time, reference.frames, strict=True):
        assert np.abs(mine.astype(int) - theirs).mean() < 1.5
        assert np.array_equal(mine, sought)
