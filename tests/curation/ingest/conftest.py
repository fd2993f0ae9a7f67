"""Small real videos, made once per session, and a way to compare them frame by frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_clips import make_clips


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
