"""Real videos, made by ffmpeg when a test first asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from numbered import Shown, shown_by_ffmpeg
from videos import VIDEOS


@dataclass(frozen=True)
class Video:
    """A file, the numbers of the frames it was made to show, and what ffmpeg shows of it."""

    path: Path
    numbers: list[int]
    shown: Shown


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Video]:
    """A video of VIDEOS by name, made once."""
    folder = tmp_path_factory.mktemp("videos")
    made: dict[str, Video] = {}

    def get(name: str) -> Video:
        if name not in made:
            path = folder / Path(name).stem / name
            path.parent.mkdir(exist_ok=True)
            numbers = VIDEOS[name](path)
            made[name] = Video(path, numbers, shown_by_ffmpeg(path))
        return made[name]

    return get
