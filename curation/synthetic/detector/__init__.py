"""The demo detector that the project carries: synthetic people only, useless on real video (see MODEL_CARD.md)."""

from pathlib import Path

_HERE = Path(__file__).parent
WEIGHTS = _HERE / "demo.pt"  # loaded through the same code path as any ultralytics weights
LAYOUT = _HERE / "yolo11-demo.yaml"
POLICY = _HERE / "policy.yaml"  # the default policy at the demo detector's confidence
LONG_SIDE = 320  # what it was trained at, for ObserveSettings.detector_long_side
