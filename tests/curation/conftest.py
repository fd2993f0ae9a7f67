"""A small run, for the tests of the stages and of what they leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings


@pytest.fixture
def settings(tmp_path: Path, clips: Path, seer: Path, tolerant: Path) -> Settings:
    """Of short local clips, a tiny detector, and no teacher; in `out` of the test's folder."""
    return Settings(
        out=tmp_path / "out",
        policy=tolerant,
        download=DownloadSettings(local_root=clips),
        observe=ObserveSettings(detector=str(seer), detector_long_side=192, frame_long_side=126),
        teacher=TeacherSettings(kind="none"),
        batch_clips=4,
        workers=1,
    )
