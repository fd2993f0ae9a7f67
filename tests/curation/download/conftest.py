"""Small real videos, made once per session, a way to compare them frame by frame, and a place to fetch them to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.download.fetch import download
from curation.download.resume import PART
from curation.failures import ClipFailure
from curation.records import ClipRef, VideoFile
from curation.settings import DownloadSettings
from tests.support.made_clips import make_clips
from tests.support.servers import FileServer, serve


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of clips; see made_clips."""
    folder = tmp_path_factory.mktemp("clips")
    make_clips(folder)
    return folder


@pytest.fixture(scope="session")
def frames_of() -> Callable[[Path], list[tuple[float, str, int]]]:
    """Every shown frame of a file, decoded by PyAV: (seconds after the first, digest of the pixels, rotation)."""
    import hashlib

    import av

    def read(path: Path) -> list[tuple[float, str, int]]:
        with av.open(str(path)) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            frames = [
                (float(frame.time), hashlib.sha1(frame.to_ndarray().tobytes()).hexdigest(), frame.rotation)
                for frame in container.decode(streams[0])
            ]
        return [(time - frames[0][0], digest, rotation) for time, digest, rotation in frames]

    return read


@pytest.fixture
def place(tmp_path: Path, clips: Path) -> Iterator[Place]:
    """A server of its own with a video of some size, and a folder to fetch to."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("prores.mov", "header-first.mp4", "base.mp4"):
        (site / name).hardlink_to(clips / name)
    with serve(site, validators=True) as server:
        yield Place(server, tmp_path / "videos")


class Place:
    """Downloads from one server into one folder, with the waits noted instead of waited."""

    def __init__(self, server: FileServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.waits: list[float] = []
        self.settings = DownloadSettings(
            http_hosts=(server.host,), allow_loopback=True, retries=2, timeout_s=5, min_free_mb=0
        )

    def ref(self, path: str) -> ClipRef:
        return ClipRef("http", self.server.url(path))

    def fetch(self, path: str | ClipRef, **changes: Any) -> VideoFile:
        self.waits.clear()
        ref = self.ref(path) if isinstance(path, str) else path
        return download(ref, self.folder, self.settings.model_copy(update=changes), sleep=self.waits.append)

    def failure(self, path: str | ClipRef, **changes: Any) -> ClipFailure:
        """The error of a download that fails; it must say nothing of its own and carry no error along."""
        with pytest.raises(ClipFailure) as caught:
            self.fetch(path, **changes)
        error = caught.value
        assert error.__cause__ is None
        assert error.__context__ is None
        assert "http" not in error.message
        return error

    def ranges(self) -> list[str | None]:
        """The Range of each request."""
        return [wanted for _, _, wanted in self.server.requests]

    def left(self) -> list[str]:
        """The names of the files in the folder, without the folders made up by chance."""
        return sorted(
            f"{path.parent.name if path.name.startswith('video.') else 'part'}/{path.name}"
            for path in self.folder.rglob("*")
            if path.is_file() and path.name != "lock"
        )

    def part(self) -> Path:
        """The one part that is kept."""
        (found,) = self.folder.rglob(PART)
        return found
