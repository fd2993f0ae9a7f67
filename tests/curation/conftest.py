"""A small run, for the tests of the stages and of what they leave; and real videos, made when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings
from tests.support.videos import VIDEOS, Video


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


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Video]:
    """A video of VIDEOS by name, made once."""
    folder = tmp_path_factory.mktemp("videos")
    made: dict[str, Video] = {}

    def get(name: str) -> Video:
        if name not in made:
            path = folder / Path(name).stem / name
            path.parent.mkdir(exist_ok=True)
            made[name] = Video.of(path, VIDEOS[name](path))
        return made[name]

    return get
