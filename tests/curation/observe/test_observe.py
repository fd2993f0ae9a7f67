"""One pass over a clip: what is measured on which frames, and training frames that do not depend on the way to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.failures import ClipFailure, FailureCode
from curation.judge.criteria import judge
from curation.judge.policy import load_policy
from curation.observe.frames import read_frames, sample_frames, training_grid, write_frames
from curation.observe.observe import observe, prescreen
from curation.records import ClipRef
from curation.settings import ObserveSettings
from curation.video.decode import pictures
from curation.video.index import index_video
from tests.support.numbered import encode, number_of, picture
from tests.support.scenes import COUNT, Watcher, scene
from tests.support.videos import geometry

SETTINGS = ObserveSettings()
DEFAULT, PAPER = load_policy(Path("default")), load_policy(Path("paper"))


def ref(start_s: float | None = None, end_s: float | None = None) -> ClipRef:
    return ClipRef("local", "clip", *(None if time is None else round(time * 1e6) for time in (start_s, end_s)))


def decoded(jpeg: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def same(first, second) -> bool:
    values = (getattr(first, field.name) for field in dataclasses.fields(first))
    others = (getattr(second, field.name) for field in dataclasses.fields(second))
    return all(np.array_equal(a, b) for a, b in zip(values, others, strict=True))


@pytest.fixture(scope="module")
def dance(tmp_path_factory):
    path = tmp_path_factory.mktemp("dance") / "dance.mp4"
    options = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "6", "-bf", "2")
    return encode(path, [scene(n) for n in range(COUNT)], *options)


@pytest.mark.parametrize(
    "name", ["plain.mp4", "many-groups.mp4", "variable.mp4", "edited.mp4", "rotated.mp4", "av1.mp4"]
)
def test_training_frames_are_the_same_bytes_however_they_are_read(video, name):
    made = video(name)
    for span in ((None, None), (0.7, 1.55)):
        observations, frames = observe(ref(*span), made.path, SETTINGS, Watcher())
        again = sample_frames(ref(*span), made.path, SETTINGS)
        assert len(frames.jpeg) >= 5
        assert again.jpeg == frames.jpeg
        assert np.array_equal(again.times_s, frames.times_s)
        assert np.array_equal(observations.sample_times_s, frames.times_s)
        assert (again.width, again.height) == (frames.width, frames.height)


@pytest.mark.parametrize("name", ["plain.mp4", "variable.mp4", "edited.mp4", "rotated.mp4", "anamorphic.mp4"])
def test_training_frames_show_what_was_nearest(video, name):
    made = video(name)
    frames = sample_frames(ref(), made.path, SETTINGS)
    shown = made.shown.times_s
    ticks = np.arange(0, shown[-1] + np.median(np.diff(shown)) / 2, 1 / 6)
    nearest = [int(np.argmin(np.abs(shown - tick))) for tick in ticks]
    expected = [made.shown.numbers[n] for n in dict.fromkeys(nearest)]
    pictures = [decoded(jpeg) for jpeg in frames.jpeg]
    assert [number_of(picture) for picture in pictures] == expected
    assert {picture.shape for picture in pictures} == {(frames.height, frames.width, 3)}
    assert max(frames.width, frames.height) == 518


def test_a_clip_holds_the_frames_of_its_span(video):
    made = video("many-groups.mp4")
    observations, frames = observe(ref(2.5, 4.0), made.path, SETTINGS, Watcher())
    assert observations.times_s == pytest.approx(np.arange(75, 120) / 30)
    assert [number_of(decoded(jpeg)) for jpeg in frames.jpeg] == [75, 80, 85, 90, 95, 100, 105, 110, 115]
    assert (observations.start_s, observations.end_s, observations.duration_s) == pytest.approx((2.5, 4.0, 1.5))


def test_the_size_of_the_batch_changes_nothing(dance):
    alone, frames = observe(ref(), dance, SETTINGS, Watcher(1))
    assert alone.person_gap.max() > 0 and len(alone.box_sample) == 12 == len(alone.sample_times_s)
    assert set(alone.box_track.tolist()) == {1}
    for batch in (5, 32):
        batched, the_same_frames = observe(ref(), dance, SETTINGS, Watcher(batch))
        assert the_same_frames.jpeg == frames.jpeg
        assert same(batched, dataclasses.replace(alone, provenance=batched.provenance))


def test_a_person_is_measured_from_the_first_sample_that_shows_one(tmp_path):
    """The camera moves all the time; the dancer is there from frame 30, which is a sample, on."""
    frames = [scene(n, pan=n) if n >= 30 else scene(n, pan=n, shift=400) for n in range(COUNT)]
    path = encode(tmp_path / "late.mp4", frames, "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p")
    for batch in (1, 5):
        found, _ = observe(ref(), path, SETTINGS, Watcher(batch))
        assert found.box_sample.tolist() == list(range(6, 12))
        assert found.person_gap[:30].max() == 0 and found.person_gap[30:].min() > 0


def test_progress_counts_every_frame(dance):
    seen = []
    observe(ref(), dance, SETTINGS, Watcher(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, COUNT) for n in range(1, COUNT + 1)]


def test_one_frame_is_a_clip_too(video):
    observations, frames = observe(ref(), video("one-frame.mp4").path, SETTINGS, Watcher())
    assert len(observations.times_s) == len(frames.jpeg) == len(observations.content) == 1
    assert observations.duration_s == pytest.approx(1 / 30, abs=0.01)


def test_a_damaged_clip_gives_no_measurements(video, tmp_path):
    data = bytearray(video("plain.mp4").path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path = tmp_path / "hole.mp4"
    path.write_bytes(data)
    with pytest.raises(ClipFailure) as caught:
        observe(ref(), path, SETTINGS, Watcher())
    assert caught.value.code is FailureCode.CORRUPT


def bars(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return cv2.copyMakeBorder(image, rows, rows, columns, columns, cv2.BORDER_CONSTANT, value=(6, 6, 6))


@pytest.mark.parametrize(("rows", "columns"), [(16, 0), (0, 40), (0, 0)])
def test_the_active_picture_is_what_the_bars_leave(tmp_path, rows, columns):
    frames = [bars(picture(number, 192, 108), rows, columns) for number in range(30)]
    height, width = frames[0].shape[:2]
    path = encode(tmp_path / "bars.mp4", frames, "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p")
    observations, _ = observe(ref(), path, SETTINGS, Watcher())
    expected = columns / width, rows / height, 1 - columns / width, 1 - rows / height
    assert observations.active == pytest.approx(expected, abs=0.01)
    assert observations.surround == ("none" if observations.active == (0.0, 0.0, 1.0, 1.0) else "bars")


def test_a_dark_backdrop_is_no_bar(tmp_path):
    frames = []
    for number in range(30):
        image = np.full((108, 192, 3), 5, np.uint8)
        image[30:78, 60 + number : 90 + number] = (220, 30, 40)
        frames.append(image)
    path = encode(tmp_path / "dark.mp4", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p")
    assert observe(ref(), path, SETTINGS, Watcher())[0].active == (0.0, 0.0, 1.0, 1.0)


def test_a_person_cut_off_is_cut_off_within_a_blurred_copy_too(tmp_path):
    """A portrait picture through whose right border the dancer reaches, re-posted in landscape."""
    frames = []
    for number in range(COUNT):
        inner = scene(number)[:, 50 : 50 + 60]
        back = cv2.GaussianBlur(cv2.resize(inner, (192, 346))[119:227], (0, 0), 6)
        back[:, 66:126] = inner
        frames.append(back)
    path = encode(tmp_path / "reposted.mp4", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18")
    measured = observe(ref(), path, SETTINGS, Watcher())[0]
    assert measured.surround == "copy"
    assert measured.active == pytest.approx((66 / 192, 0, 126 / 192, 1), abs=2 / 192)
    border = next(result for result in judge(measured, DEFAULT).criteria if result.criterion == "border")
    assert border.outcome == "fail" and "copy of itself" in border.reasons[0]
    plain = encode(tmp_path / "plain.mp4", [scene(n) for n in range(COUNT)], "-c:v", "libx264", "-pix_fmt", "yuv420p")
    assert observe(ref(), plain, SETTINGS, Watcher())[0].surround == "none"


def test_the_prescreen_sees_key_frames_only_that_the_full_pass_samples_too(dance):
    """A group of 6 frames, a sample every 5: what key frames between the samples show is not looked at."""
    settings = SETTINGS.model_copy(update={"prescreen_key_frames": 2})
    found = prescreen(ref(), dance, settings, Watcher())
    index = index_video(dance)
    full, _ = observe(ref(), dance, settings, Watcher())
    both = np.intersect1d(full.sample_times_s, index.times_s[index.key])
    assert found is not None and found.kind == "keyframes"
    assert np.count_nonzero(index.key) == 10 and len(full.sample_times_s) == 12
    assert np.array_equal(found.sample_times_s, both) and len(both) == 2
    assert len(found.times_s) == len(found.content) == 0
    at = np.isin(full.sample_times_s[full.box_sample], both)
    assert np.array_equal(found.box_xyxy, full.box_xyxy[at])  # to the bit: these are the same pictures
    assert prescreen(ref(), dance, settings, Watcher(), share=0.16) is not None
    assert prescreen(ref(), dance, settings, Watcher(), share=2 / 12) is None
    assert prescreen(ref(), dance, SETTINGS, Watcher()) is None


def test_what_the_prescreen_rejects_is_rejected_by_the_full_pass(tmp_path):
    """With a key frame at every sample, nobody in nearly all of them is enough."""
    for seen in (5, 54, 60):
        frames = [scene(n) if n < seen else np.full((108, 192, 3), 90, np.uint8) for n in range(COUNT)]
        path = encode(tmp_path / f"{seen}.mp4", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "5", "-bf", "0")
        found = prescreen(ref(), path, SETTINGS, Watcher(), DEFAULT.prescreen_share)
        assert found is not None
        full = observe(ref(), path, SETTINGS, Watcher())[0] if seen < 60 else None
        for policy, enough in ((DEFAULT, 54), (PAPER, 60)):
            single = next(result for result in judge(found, policy).criteria if result.criterion == "single")
            assert (single.outcome == "fail") is (seen < enough)
            assert single.outcome == "unknown" or judge(full, policy).decision == "reject"


def test_few_key_frames_say_nothing(video, dance):
    assert prescreen(ref(), video("one-frame.mp4").path, SETTINGS, Watcher()) is None
    assert prescreen(ref(0.0, 1.0), dance, SETTINGS, Watcher()) is None


@given(width=st.integers(2, 5000), height=st.integers(2, 5000), long_side=st.sampled_from([14, 518, 1036]))
def test_the_training_grid_is_whole_patches_with_the_longer_side_given(width, height, long_side):
    index = geometry(width=width, height=height)
    grid = training_grid(index, long_side)
    assert max(grid) == long_side
    assert all(side % 14 == 0 and side > 0 for side in grid)
    scale = long_side / max(width, height)
    assert all(abs(side - given_side * scale) <= 14 for side, given_side in zip(grid, (width, height), strict=True))


@pytest.mark.parametrize("name", ["plain.mp4", "rotated.mp4", "anamorphic.mp4"])
def test_frames_say_how_far_they_are_stretched(video, name):
    """Against 96 x 64 as displayed, also where that is stored on its side, or as 64 x 64 pixels of 3:2."""
    made = video(name)
    expected = pytest.approx((518 / 96) / (350 / 64))
    assert observe(ref(), made.path, SETTINGS, Watcher())[1].stretch == expected
    assert sample_frames(ref(), made.path, SETTINGS).stretch == expected


@pytest.mark.parametrize("name", ["plain.mp4", "rotated.mp4", "anamorphic.mp4"])
def test_frames_of_a_part_are_that_part_of_the_frames(video, name):
    """Half of 96 x 64 as displayed."""
    path, part = video(name).path, (0.25, 0.0, 0.75, 1.0)
    index = index_video(path)
    (whole,), (half,) = pictures(index, [3], 96, 64), pictures(index, [3], 48, 64, part)
    inside = slice(1, -1)  # beyond the outermost column, whose neighbour is left out, all is the same
    np.testing.assert_allclose(half[:, inside].astype(int), whole[:, 24:72][:, inside], atol=1)
    frames = sample_frames(ref(), path, SETTINGS, part)
    assert (frames.width, frames.height) == (392, 518)
    assert frames.stretch == pytest.approx((392 / 48) / (518 / 64))


def test_frames_are_kept_until_the_shard_is_written(dance, tmp_path):
    _, frames = observe(ref(), dance, SETTINGS, Watcher())
    path = tmp_path / "frames.parquet"
    write_frames(frames, path)
    kept = read_frames(path)
    assert kept is not None and kept.jpeg == frames.jpeg
    assert np.array_equal(kept.times_s, frames.times_s)
    assert (kept.width, kept.height) == (frames.width, frames.height)
    assert kept.stretch == frames.stretch != 1
    path.write_bytes(path.read_bytes()[:-100])
    assert read_frames(path) is None
    assert read_frames(tmp_path / "none.parquet") is None
