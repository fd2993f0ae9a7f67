"""A real Prefect server and worker for the whole session, on a free port and with a home of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.video.ffmpeg import ffmpeg_exe
from tests.support.prefect_place import Place, free_port


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A home and a port, in the environment of this process too; whatever was started there is stopped at the end."""
    place = Place(tmp_path_factory.mktemp("prefect"), f"http://127.0.0.1:{free_port()}/api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(place.home))
        patch.setenv("PREFECT_API_URL", place.api_url)
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("UNISH_CACHE", str(tmp_path_factory.mktemp("cache")))
        from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

        with temporary_settings({PREFECT_API_URL: place.api_url, PREFECT_HOME: place.home}):
            yield place
            assert place.service("stop").returncode == 0


@pytest.fixture
def service(place: Place) -> Iterator[Place]:
    """The service, running."""
    if not place.running():
        started = place.service("start")
        assert started.returncode == 0, started.stderr
    with place.known():
        yield place


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short real clips without a person, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for name, source in (("bars", "testsrc2"), ("noise", "mandelbrot")):
        made = ["-f", "lavfi", "-i", f"{source}=s=320x180:r=12:d=2" if name == "bars" else f"{source}=s=320x180:r=12"]
        made += ["-t", "2", "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", folder / f"{name}.mp4"]
        subprocess.run([ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", *made], check=True)
    (folder / "broken.mp4").write_bytes(b"no video at all " * 64)
    return folder


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a real detector that has learned nothing: the pipeline runs in full and finds no one."""
    import torch
    from ultralytics import YOLO

    path = tmp_path_factory.mktemp("weights") / "untrained.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = YOLO("yolo11n.yaml", task="detect")
    model.model.names[0] = "person"
    model.save(path)
    return path
