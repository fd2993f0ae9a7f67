"""Which frames are sampled: the nearest to each tick, the same from every container, at any rate and length."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.observe.frames import sample_frames
from curation.observe.sampling import TIE_S, sample_indices
from curation.records import ClipRef
from curation.settings import ObserveSettings
from tests.support.numbered import encode, ffmpeg, number_of, picture

RATES = [Fraction(rate) for rate in ("12", "15", "24000/1001", "25", "30000/1001", "30", "45", "60")]
WHOLE = [rate for rate in RATES if rate.denominator == 1]
NAMES = [f"{float(rate):.5g}" for rate in RATES]
STEPS = st.lists(st.sampled_from([1 / 60, 1 / 30, 1001 / 30000, 1 / 24, 0.001, 0.2, 1.5]), max_size=80)


def exact(rate: Fraction, count: int) -> np.ndarray:
    return np.arange(count) * rate.denominator / rate.numerator


@given(steps=STEPS, start=st.floats(0, 1e4), fps=st.sampled_from([1.0, 6.0, 25.0]))
def test_every_tick_has_the_frame_nearest_to_it(steps, start, fps):
    times = start + np.concatenate([[0.0], np.cumsum(steps)])
    chosen = sample_indices(times, fps)
    assert chosen[0] == 0 and chosen[-1] < len(times)
    assert (np.diff(chosen) > 0).all()
    ticks = times[0] + np.arange(int((times[-1] - times[0]) * fps) + 1) / fps
    apart = np.abs(times[chosen][:, None] - ticks)
    nearest = np.abs(times[:, None] - ticks).min(0)
    assert (apart.min(0) <= nearest + TIE_S + 1e-9).all()
    # and no other frame is taken: each has a tick of its own, the one that would come next included
    further = np.append(ticks, ticks[-1] + 1 / fps)
    owned = np.abs(times[chosen][:, None] - further) <= np.abs(times[:, None] - further).min(0) + TIE_S + 1e-9
    assert owned.any(1).all()


def test_equally_near_frames_give_the_earlier():
    for late in (-0.7e-3, 0.0, 0.7e-3):  # the second frame is nearer, or farther, by less than 1.5 ms
        assert sample_indices(np.array([0.0, 1 / 6 - 0.02, 1 / 6 + 0.02 + late, 1.0]), 6.0).tolist()[:2] == [0, 1]
    assert sample_indices(np.array([0.0, 1 / 6 - 0.02, 1 / 6 + 0.018, 1.0]), 6.0).tolist()[:2] == [0, 2]


def test_a_frame_held_for_long_is_taken_once():
    times = np.array([0.0, 1 / 30, 2 / 30, 10.0, 10.0 + 1 / 30])
    assert sample_indices(times, 6.0).tolist() == [0, 2, 3]
    assert sample_indices(np.array([0.0, 1e12]), 6.0).tolist() == [0, 1]


def test_one_frame_is_one_sample_and_none_is_none():
    assert sample_indices(np.array([12.5]), 6.0).tolist() == [0]
    assert sample_indices(np.zeros(0), 6.0).tolist() == []


@given(rate=st.sampled_from(RATES), count=st.integers(1, 400), more=st.integers(0, 60))
def test_a_clip_has_the_samples_that_its_frames_have_in_a_longer_one(rate, count, more):
    whole = sample_indices(exact(rate, count + more), 6.0)
    assert sample_indices(exact(rate, count + more)[:count], 6.0).tolist() == whole[whole < count].tolist()


@pytest.mark.parametrize("rate", RATES, ids=NAMES)
@pytest.mark.parametrize("first", [0, 1, 7, 1000])
def test_ten_minutes_give_the_same_frames_however_their_times_are_computed(rate, first):
    """Sums, products and quotients differ in the last bits; stamps of 1/90000 s differ by more, if rate and they do."""
    count = round(600 * rate)
    numbers = np.arange(count)
    chosen = sample_indices(exact(rate, count)[first:], 6.0)
    assert len(chosen) == pytest.approx(6 * (600 - first / float(rate)), abs=1)
    computed = [numbers / float(rate), numbers * (1 / float(rate)), numbers * rate.denominator * (1 / rate.numerator)]
    if rate.denominator == 1 and 90000 % rate == 0:
        computed.append(numbers * (90000 // rate.numerator) * (1 / 90000))
    for times in computed:
        assert np.array_equal(sample_indices(times[first:], 6.0), chosen)


@pytest.mark.parametrize("rate", RATES, ids=NAMES)
@pytest.mark.parametrize("first", [0, 1, 7, 1000])
def test_times_rounded_to_milliseconds_give_the_same_frames_or_their_neighbours(rate, first):
    """At whole rates a tick is nowhere near the edge of a tie. At the others some are, and take the frame beside."""
    times = exact(rate, round(600 * rate))[first:]
    chosen, rounded = sample_indices(times, 6.0), sample_indices(np.round(times, 3), 6.0)
    assert len(rounded) == len(chosen)
    assert np.abs(rounded - chosen).max() <= 1
    assert (rounded != chosen).mean() <= (0.0 if rate in WHOLE else 0.03)


@pytest.mark.parametrize("rate", RATES, ids=NAMES)
def test_one_stream_in_two_containers_gives_the_same_pictures(tmp_path: Path, rate: Fraction):
    count = round(3 * rate)
    options = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-bf", "2", "-g", "30")
    mp4 = encode(tmp_path / "clip.mp4", (picture(number) for number in range(count)), *options, rate=rate)
    mkv = tmp_path / "clip.mkv"
    ffmpeg("-i", mp4, "-c", "copy", mkv)
    settings = ObserveSettings(frame_long_side=98)
    for start_s in (None, 1.0):
        ref = ClipRef("local", "clip", None if start_s is None else round(start_s * 1e6), None)
        ours, other = sample_frames(ref, mp4, settings), sample_frames(ref, mkv, settings)
        assert ours.jpeg == other.jpeg
        first = 0 if start_s is None else int(np.ceil(start_s * rate - Fraction(1, 10)))
        expected = first + sample_indices(exact(rate, count)[first:], 6.0)
        decoded = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for jpeg in ours.jpeg]
        assert [number_of(rgb) for rgb in decoded] == expected.tolist()
