"""The detector that is shipped: small, in YOLO11's layout, and good enough for the embedded world."""

import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from curation.judge.policy import load_policy
from curation.synthetic.clips import ClipPlan, shoot
from curation.synthetic.detector import LONG_SIDE, POLICY, WEIGHTS
from curation.synthetic.detector.data import labels, write_clip_pictures
from curation.synthetic.world.scene import CLASSES


@pytest.fixture(scope="module")
def model():
    ultralytics = pytest.importorskip("ultralytics")
    return ultralytics.YOLO(str(WEIGHTS))


def test_it_is_small_and_knows_its_classes(model):
    assert WEIGHTS.stat().st_size <= 2_000_000
    assert sum(p.numel() for p in model.model.parameters()) <= 1_000_000
    assert tuple(model.names.values()) == CLASSES
    assert type(model.model.model[-1]).__name__ == "Detect" and len(model.model.model) == 24  # YOLO11's layout


def test_the_pipeline_finds_the_dancer_with_it_from_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a machine that never ran it: exported from the shipped file, then asked as a run asks it."""
    from curation.people.detector import Detector

    monkeypatch.setenv("UNISH_CACHE", str(tmp_path))
    detector = Detector(WEIGHTS, device="cpu", long_side=LONG_SIDE, confidence=0.25)
    frame = shoot(ClipPlan("x", "good", 21, (480, 270), 12, 1.0)).frame(0)
    found = detector([frame.rendered.rgb])[0]
    assert (found.klass == detector.person).sum() == 1
    assert list((tmp_path / "openvino").iterdir())


def test_its_policy_is_a_policy():
    policy = load_policy(POLICY)
    assert policy.single.person_confidence == policy.overlap.confidence == 0.25


@pytest.mark.slow
def test_it_finds_the_dancer(model):
    found = []
    for seed, case in ((21, "good"), (23, "truncated_left"), (24, "two_people")):
        footage = shoot(ClipPlan("x", case, seed, (480, 270), 12, 1.0))
        for frame in map(footage.frame, (0, 4, 8)):
            truth = [row for row in labels(frame) if row[0] == 0]
            result = model.predict(frame.rendered.rgb[..., ::-1], imgsz=LONG_SIDE, conf=0.25, verbose=False)[0]
            boxes = result.boxes.xyxyn.numpy()[result.boxes.cls.numpy() == 0]
            for _, x, y, w, h in truth:
                low = np.maximum(boxes[:, :2], (x - w / 2, y - h / 2))
                high = np.minimum(boxes[:, 2:], (x + w / 2, y + h / 2))
                shared = np.prod(np.maximum(high - low, 0), axis=1)
                union = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + w * h - shared
                found.append(bool((shared / union > 0.5).any()))
    assert np.mean(found) >= 0.8, found


@pytest.mark.slow
def test_calibration_moves_the_best_cut_off_to_a_quarter(tmp_path: Path):
    pytest.importorskip("ultralytics")
    from curation.synthetic.detector.train import CUT_OFF, calibrate

    write_clip_pictures(tmp_path, 3, 990_000, workers=1)
    pictures, labelled = sorted((tmp_path / "images").iterdir()), sorted((tmp_path / "labels").iterdir())
    assert [path.stem for path in pictures] == [path.stem for path in labelled] and 6 <= len(pictures) <= 18
    weights = tmp_path / "demo.pt"
    shutil.copyfile(WEIGHTS, weights)
    before = calibrate(weights, tmp_path)["person"]
    assert before != pytest.approx(CUT_OFF, abs=0.01)
    assert calibrate(weights, tmp_path)["person"] == pytest.approx(CUT_OFF, abs=0.005)


def test_a_truth_is_found_once():
    from curation.synthetic.detector.train import _matched

    truth = np.array([[0, 0.5, 0.5, 0.4, 0.8]])
    found = np.array(
        [
            [0, 0.6, 0.5, 0.5, 0.4, 0.8],
            [0, 0.9, 0.52, 0.5, 0.4, 0.8],
            [1, 0.8, 0.5, 0.5, 0.4, 0.8],
            [0, 0.3, 0.1, 0.1, 0.1, 0.1],
        ]
    )
    assert _matched(found, truth) == [(0, 0.9, True), (1, 0.8, False), (0, 0.6, False), (0, 0.3, False)]
    assert _matched(found[:1], truth[:0]) == [(0, 0.6, False)]


def test_the_shipped_weights_tell_nothing_of_the_machine_they_were_made_on():
    with zipfile.ZipFile(WEIGHTS) as archive:
        (described,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        words = re.findall(rb"[ -~]{4,}", archive.read(described))
    places = [word for word in words if re.search(rb"^/|[/\\](home|tmp|work|root|Users)\b|\.yaml$", word)]
    assert not places
