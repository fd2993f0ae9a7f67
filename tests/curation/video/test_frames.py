"""Which frames a video shows when: both decoders against ffmpeg's own, for every kind of file."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.failures import ClipFailure, FailureCode
from curation.video import decode as module
from curation.video.decode import decode, decode_key_frames, frames_at, halved, resize, thumbnail, to_rgb
from curation.video.index import index_video
from curation.video.intake import verify
from tests.support.examples import examples
from tests.support.numbered import number_of
from tests.support.videos import BY_DECORD, VIDEOS, geometry

NAMES = list(VIDEOS)


def upright(frame, index):
    return resize(to_rgb(frame), index, index.width, index.height)


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_gives_every_frame_that_ffmpeg_shows_at_its_time(video, name):
    made = video(name)
    index = index_video(made.path)
    assert made.shown.numbers == made.numbers
    assert index.times_s == pytest.approx(made.shown.times_s, abs=1e-3)
    frames = list(decode(index, 0, len(index.times_s)))
    assert [number for number, _ in frames] == list(range(len(made.numbers)))
    assert [number_of(upright(frame, index)) for _, frame in frames] == made.numbers


@pytest.mark.parametrize("name", NAMES)
def test_random_access_gives_the_frame_that_ffmpeg_has_on_screen(video, name):
    made = video(name)
    index = index_video(made.path)
    rng = np.random.default_rng(1)
    between = rng.uniform(0, index.end_s, 12)
    between = between[np.abs(between[:, None] - index.times_s).min(1) > 1e-3]  # where rounding of times cannot matter
    numbers = [*rng.choice(len(index.times_s), 6), len(index.times_s) - 1, 0]
    times = [*between, *index.times_s[numbers]]
    asked = [made.shown.at(time) for time in between] + [made.shown.frames[number] for number in numbers]
    pictures = frames_at(index, times, index.width, index.height)
    assert [number_of(picture) for picture in pictures] == [number_of(frame) for frame in asked]
    for picture, frame in zip(pictures, asked, strict=True):
        same_size = cv2.resize(frame, (index.width, index.height))
        assert np.abs(picture.astype(int) - same_size).mean() < 3


@pytest.mark.parametrize("name", NAMES)
def test_decord_and_pyav_give_the_same_pixels(video, name, monkeypatch):
    index = index_video(video(name).path)
    numbers = list(range(0, len(index.times_s), 7))
    by_decord = module._by_decord(index, numbers, 70, 42)
    assert (by_decord is not None) == (name in BY_DECORD)
    if by_decord is not None:
        by_pyav = module._by_pyav(index, numbers, 70, 42)
        assert list(by_decord) == list(by_pyav) == numbers
        assert all(np.array_equal(by_decord[number], by_pyav[number]) for number in numbers)


@pytest.mark.parametrize("name", ["plain.mp4", "edited.mp4", "rotated.mp4", "anamorphic.mp4", "odd.mp4", "av1.mp4"])
def test_random_access_and_the_pass_give_the_same_pixels(video, name):
    index = index_video(video(name).path)
    size = index.width // 2 + 5, index.height // 2 + 5
    in_pass = [resize(to_rgb(frame), index, *size) for _, frame in decode(index, 0, len(index.times_s))]
    for picture, expected in zip(frames_at(index, index.times_s.tolist(), *size), in_pass, strict=True):
        assert np.array_equal(picture, expected)


@pytest.mark.parametrize(
    ("name", "stored", "rotation", "displayed"),
    [
        ("rotated.mp4", (64, 96), 90, (96, 64)),
        ("rotated.mkv", (64, 96), 270, (96, 64)),
        ("upside-down.mp4", (96, 64), 180, (96, 64)),
        ("anamorphic.mp4", (64, 64), 0, (96, 64)),
        ("tall-pixels.mp4", (96, 32), 0, (96, 64)),
        ("odd.mp4", (97, 65), 0, (97, 65)),
    ],
)
def test_the_picture_is_as_displayed(video, name, stored, rotation, displayed):
    index = index_video(video(name).path)
    assert (index.coded_width, index.coded_height) == stored
    assert index.rotation == rotation
    assert (index.width, index.height) == displayed


def test_the_files_hold_what_they_are_made_to_test(video):
    assert np.diff(index_video(video("variable.mp4").path).times_s).max() > 0.4
    assert index_video(video("edited.mp4").path).edited
    assert index_video(video("late.mkv").path).origin > 4000
    groups = index_video(video("many-groups.mp4").path)
    assert groups.key.sum() > 10
    assert index_video(video("refreshed.mp4").path).key.tolist() == [True] + 149 * [False]
    assert index_video(video("ten-bit.mp4").path).codec == "hevc"
    assert index_video(video("av1.webm").path).codec in ("av1", "libdav1d")


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_may_begin_and_end_anywhere(video, name):
    made = video(name)
    index = index_video(made.path)
    count = len(index.times_s)
    whole = [upright(frame, index) for _, frame in decode(index, 0, count)]
    rng = np.random.default_rng(2)
    for first in {0, count - 1, *rng.integers(0, count, 4).tolist()} | ({23, 24, 25, 210} & set(range(count))):
        last = min(count, first + int(rng.integers(1, 40)))
        frames = list(decode(index, first, last))
        assert [number for number, _ in frames] == list(range(first, last))
        pictures = [upright(frame, index) for _, frame in frames]
        assert [number_of(picture) for picture in pictures] == made.numbers[first:last]
        assert all(np.array_equal(picture, whole[number]) for number, picture in enumerate(pictures, first))


def test_a_pass_gives_only_the_frames_asked_for(video):
    index = index_video(video("many-groups.mp4").path)
    assert [number_of(upright(frame, index)) for _, frame in decode(index, 30, 90, only=[31, 60, 89])] == [31, 60, 89]


@pytest.mark.parametrize("name", NAMES)
def test_key_frames_alone_are_the_frames_they_say(video, name):
    made = video(name)
    index = index_video(made.path)
    keys = np.flatnonzero(index.key)
    found = [(number, number_of(upright(frame, index))) for number, frame in decode_key_frames(index, keys, limit=99)]
    assert [number for number, _ in found] == keys.tolist()
    assert [shown for _, shown in found] == [made.numbers[number] for number in keys]
    assert [number for number, _ in decode_key_frames(index, keys[-2:], limit=99)] == keys[-2:].tolist()
    assert len(list(decode_key_frames(index, keys, limit=1))) == 1


@pytest.mark.parametrize("name", ["plain.mp4", "rotated.mp4", "anamorphic.mp4"])
def test_the_thumbnail_is_the_small_picture(video, name):
    index = index_video(video(name).path)
    for _, frame in decode(index, 0, 5):
        small = thumbnail(frame, index, index.width // 2, index.height // 2)[..., ::-1]
        expected = resize(to_rgb(frame), index, index.width // 2, index.height // 2)
        assert small.shape == expected.shape
        assert np.abs(small.astype(int) - expected).mean() < 4


@settings(max_examples=examples(60))
@given(
    stored=st.tuples(st.integers(2, 300), st.integers(2, 300)),
    sizes=st.tuples(*[st.integers(1, 120)] * 4),
    rotation=st.sampled_from([0, 90, 180, 270]),
)
def test_halving_first_changes_no_pixel(stored, sizes, rotation):
    index = geometry(rotation)
    image = np.random.default_rng(0).integers(0, 256, (*stored, 3), dtype=np.uint8)
    (w1, h1), (w2, h2) = sizes[:2], sizes[2:]
    shared = halved(image, index, max(w1, w2), max(h1, h2))
    for width, height in ((w1, h1), (w2, h2)):
        assert np.array_equal(resize(image, index, width, height), resize(shared, index, width, height))
        assert resize(image, index, width, height).shape == (height, width, 3)


def test_a_span_is_half_open_and_by_presentation_time(video):
    index = index_video(video("variable.mp4").path)
    times = index.times_s
    first, last = index.span(float(times[5]), float(times[9]))
    assert (first, last) == (5, 9)
    assert index.span(0.0, None) == (0, len(times))
    pause = int(np.argmax(np.diff(times)))
    assert index.span(float(times[pause]) + 0.01, float(times[pause + 1]) + 0.01) == (pause + 1, pause + 2)


@given(
    steps=st.lists(st.integers(3, 500), min_size=1, max_size=40),
    ends=st.tuples(st.floats(0, 12), st.floats(0, 12)),
)
def test_a_span_holds_exactly_the_frames_between_its_ends(steps, ends):
    start, end = sorted(ends)
    index = geometry(0, np.concatenate([[0.0], np.cumsum(steps) / 1000]))
    inside = [n for n, time in enumerate(index.times_s) if start - 1e-3 <= time < end - 1e-3]
    try:
        first, last = index.span(start, end)
        assert list(range(first, last)) == inside
    except ClipFailure as error:
        assert error.code is FailureCode.SPAN_OUT_OF_RANGE
        assert not inside or end > index.end_s + 0.1


@pytest.mark.parametrize("ends", [(0.0, 3.2), (3.0, 3.05), (7.0, None), (7.0, 8.0), (0.51, 0.52)])
def test_a_span_outside_the_video_or_without_a_frame_is_refused(video, ends):
    index = index_video(video("plain.mp4").path)
    assert index.end_s == pytest.approx(3.0)
    with pytest.raises(ClipFailure) as caught:
        index.span(*ends)
    assert caught.value.code is FailureCode.SPAN_OUT_OF_RANGE


def test_what_a_download_is_checked_for(video):
    made = video("plain.mp4")
    file = verify(made.path)
    assert (file.codec, file.width, file.height, file.frames) == ("h264", 96, 64, 90)
    assert file.duration_s == pytest.approx(3.0)
    assert file.size_bytes == made.path.stat().st_size
