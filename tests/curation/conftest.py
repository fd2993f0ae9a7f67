"""Small real parts for whole runs: clips by ffmpeg, a detector that sees a person everywhere, a policy that agrees.

The detector is a real ultralytics network whose last layer was set by hand, since no trained one may be shipped: it
goes through export, decoding, suppression and tracking like any other.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from curation.ffmpeg import ffmpeg_exe
from curation.settings import POLICIES


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short clips (2 s, 12 frames a second), one cut in the middle, one broken."""
    folder = tmp_path_factory.mktemp("clips")
    sources = {"bars": "testsrc2=s=320x180", "set": "testsrc2=s=180x320", "count": "testsrc=s=256x256"}
    for name, source in sources.items():
        _ffmpeg("-f", "lavfi", "-i", f"{source}:r=12", "-t", "2", folder / f"{name}.mp4")
    _ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=s=320x180:r=12:d=1", "-f", "lavfi", "-i", "smptebars=s=320x180:r=12:d=1",
        "-filter_complex", "concat=n=2", folder / "cut.mp4",
    )  # fmt: skip
    (folder / "broken.mp4").write_bytes(b"no video at all " * 64)
    return folder


def _ffmpeg(*arguments: str | Path) -> None:
    *most, target = arguments
    encode = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", target]
    subprocess.run([ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", *most, *encode], check=True)


@pytest.fixture(scope="session")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a detector that is half sure of a person at every coarse grid point."""
    import torch
    from ultralytics import YOLO

    path = tmp_path_factory.mktemp("weights") / "seer.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = YOLO("yolo11n.yaml", task="detect")
        model.model.names = {n: "person" if n == 0 else f"thing {n}" for n in range(80)}
        for level, head in enumerate(model.model.model[-1].cv3):
            torch.nn.init.zeros_(head[-1].weight)
            torch.nn.init.constant_(head[-1].bias, -20.0)
            if level == 2:
                head[-1].bias.data[0] = 0.0
        model.save(path)
    return path


@pytest.fixture(scope="session")
def tolerant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that forgives everything but an edit."""
    values = yaml.safe_load((POLICIES / "default.yaml").read_text(encoding="utf-8"))
    values["name"] = "tolerant"
    values["shot"]["max_heights_per_s"] = None
    values["shot"]["person_edits"] = []
    values["single"] |= {"person_confidence": 0.3, "other_confidence": 1.0, "faint_confidence": 1.0}
    values["height"]["min_mean"] = 0.0
    values["border"]["tolerance"] = 1.0
    values["overlap"]["confidence"] = 1.0
    path = tmp_path_factory.mktemp("policy") / "tolerant.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
