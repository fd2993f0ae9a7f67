"""What edits leave in the measures, on drawn scenes that were encoded and decoded."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from curation.judge.criteria import judge
from curation.judge.policy import load_policy
from curation.observe.observations import Observations
from curation.observe.observe import observe
from curation.observe.shots import ShotMeter
from curation.records import ClipRef
from curation.settings import ObserveSettings
from tests.support.numbered import encode
from tests.support.scenes import COUNT, HEIGHT, MIDDLE, SCENES, WIDTH, Watcher, scene

CONTENT_CUT = 27.0  # PySceneDetect's default


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observations]:
    """Every scene, encoded as H.264, observed with a stand-in for the detector."""
    folder = tmp_path_factory.mktemp("scenes")
    results = {}
    for name, (draw, _) in SCENES.items():
        path = folder / f"{name.replace(' ', '-')}.mp4"
        encode(path, [draw(n) for n in range(COUNT)], "-c:v", "libx264", "-crf", "20", "-pix_fmt", "yuv420p")
        results[name], _ = observe(ClipRef("local", path.name), path, ObserveSettings(), Watcher())
    return results


def quiet(values: np.ndarray, *loud: int, reach: int = 1) -> float:
    """The largest value away from the frames named."""
    mask = np.ones(len(values), bool)
    for frame in loud:
        mask[max(0, frame - reach) : frame + reach + 1] = False
    return float(values[mask].max())


@pytest.mark.parametrize(("name", "at"), [("hard cut", MIDDLE), ("early cut", 6), ("late cut", COUNT - 6)])
def test_a_cut_is_a_change_that_nothing_bridges(measured, name, at):
    found = measured[name]
    assert found.content.argmax() == at and found.content[at] >= CONTENT_CUT
    assert found.gap.argmax() == at and found.gap[at] > 0.5
    assert quiet(found.content, at) < CONTENT_CUT / 2
    assert found.gap[at] > 3 * quiet(found.gap, at, reach=6)


def test_a_strobe_looks_like_cuts_but_is_bridged(measured):
    found = measured["strobe"]
    assert (found.content >= CONTENT_CUT).sum() >= 8
    assert found.gap.max() < 0.1


def test_a_jump_cut_is_seen_in_the_person_only(measured):
    found = measured["jump cut"]
    assert found.content.max() < CONTENT_CUT
    assert found.person_gap.argmax() == MIDDLE
    assert found.person_gap[MIDDLE] > 2 * quiet(found.person_gap, MIDDLE, reach=6)
    assert found.person_gap[MIDDLE] > 2 * found.gap[MIDDLE]


def test_a_fade_leaves_a_blank_stretch(measured):
    found = measured["fade"]
    assert found.contrast[MIDDLE] < 1 and found.luma[MIDDLE] < 5
    assert found.contrast[0] > 20
    assert [found.contrast[n] < 2 for n in (MIDDLE - 3, MIDDLE + 3)] == [True, True]


def test_a_dissolve_is_a_mixture_and_a_movement_is_not(measured):
    assert measured["dissolve"].dissolve[24:37].max() > 0.6
    assert measured["dissolve"].content.max() < CONTENT_CUT
    assert max(measured[name].dissolve.max() for name in ("steady", "strobe", "hard cut", "jump cut")) < 0.3


def test_a_cut_between_still_pictures_is_no_dissolve():
    meter = ShotMeter(1 / 30)
    for number in range(80):
        meter.add(scene(0, seed=int(number >= 40))[..., ::-1].copy(), None)
    found = meter.finish()
    assert found.gap.argmax() == 40
    assert found.dissolve.max() < 0.3


@pytest.mark.parametrize("name", list(SCENES))
def test_the_default_policy_tells_one_shot_from_an_edit(measured, name):
    verdict = judge(measured[name], load_policy(Path("default")))
    shot = next(result for result in verdict.criteria if result.criterion == "shot")
    assert (shot.outcome == "pass") == SCENES[name][1], shot.reasons


@pytest.mark.parametrize("name", list(SCENES))
def test_every_measure_has_one_value_a_frame_and_the_first_frame_no_change(measured, name):
    found = measured[name]
    for values in (found.content, found.luma, found.contrast, found.gap, found.person_gap, found.dissolve):
        assert values.dtype == np.float32 and values.shape == (COUNT,) and np.isfinite(values).all()
    assert (found.content[0], found.gap[0], found.person_gap[0]) == (0, 0, 0)


@pytest.mark.parametrize("frame_s", [1 / 5, 1 / 24, 1 / 60, 1 / 240])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 70])
def test_clips_of_any_length_and_rate_are_measured(frame_s, count):
    meter = ShotMeter(frame_s)
    for number in range(count):
        meter.add(scene(number)[..., ::-1].copy(), [0.3, 0.2, 0.5, 0.9] if number % 2 else None)
    assert {len(values) for values in meter.finish()} == {count}


def test_the_gap_is_the_least_difference_across_the_moment():
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(20)]
    box = [0.0, 0.0, 1.0, 1.0]
    meter = ShotMeter(1 / 20)  # four frames on either side
    for frame in frames:
        meter.add(frame, box)
    found = meter.finish()
    plain = []
    for frame in frames:
        grey = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), (64, 36), interpolation=cv2.INTER_AREA)
        plain.append((grey - grey.mean()) / (grey.astype(np.float64).std() + 4))
    for at in range(1, 20):
        pairs = [(a, b) for a in range(max(0, at - 4), at) for b in range(at, min(20, at + 4))]
        least = min(np.abs(plain[a] - plain[b]).mean() for a, b in pairs)
        assert found.gap[at] == pytest.approx(least, rel=1e-4)
        assert found.person_gap[at] == pytest.approx(least, rel=1e-4)
