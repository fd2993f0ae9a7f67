"""The detector that is shipped: small, in YOLO11's layout, and good enough for the embedded world."""

import numpy as np
import pytest

from curation.policy import load_policy
from curation.synthetic.clips import ClipPlan, shoot
from curation.synthetic.detector import LONG_SIDE, POLICY, WEIGHTS
from curation.synthetic.detector_data import labels
from curation.synthetic.scene import CLASSES


@pytest.fixture(scope="module")
def model():
    ultralytics = pytest.importorskip("ultralytics")
    return ultralytics.YOLO(str(WEIGHTS))


def test_it_is_small_and_knows_its_classes(model):
    assert WEIGHTS.stat().st_size <= 2_000_000
    assert sum(p.numel() for p in model.model.parameters()) <= 1_000_000
    assert tuple(model.names.values()) == CLASSES
    assert type(model.model.model[-1]).__name__ == "Detect" and len(model.model.model) == 24  # YOLO11's layout


def test_its_policy_is_a_policy():
    policy = load_policy(POLICY)
    assert policy.single.person_confidence == 0.25 and policy.overlap.confidence <= 0.30


def test_it_finds_the_dancer(model):
    found = []
    for seed, case in ((21, "good"), (23, "truncated_left"), (24, "two_people")):
        frame = shoot(ClipPlan("x", case, seed, (480, 270), 12, 1.0)).frame(4)
        truth = [row for row in labels(frame) if row[0] == 0]
        result = model.predict(frame.rendered.rgb[..., ::-1], imgsz=LONG_SIDE, conf=0.25, verbose=False)[0]
        boxes = result.boxes.xyxyn.numpy()[result.boxes.cls.numpy() == 0]
        for _, x, y, w, h in truth:
            low = np.maximum(boxes[:, :2], (x - w / 2, y - h / 2))
            high = np.minimum(boxes[:, 2:], (x + w / 2, y + h / 2))
            shared = np.prod(np.maximum(high - low, 0), axis=1)
            union = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + w * h - shared
            found.append(bool((shared / union > 0.5).any()))
    assert np.mean(found) >= 0.8
