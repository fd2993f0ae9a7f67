"""Pictures over a blurred copy of themselves, made by ffmpeg as people do it, and what only looks like that."""

from __future__ import annotations

import subprocess

import cv2
import numpy as np
import pytest

from curation.observe.surround import SurroundFinder
from curation.video.ffmpeg import ffmpeg_exe
from tests.support.numbered import encode
from tests.support.scenes import scene

RNG = np.random.default_rng(5)


def thumbnails(path) -> list[np.ndarray]:
    """A video's frames as the finder gets them: BGR, 256 pixels on the longer side."""
    video = cv2.VideoCapture(str(path))
    frames = []
    while (read := video.read())[0]:
        scale = 256 / max(read[1].shape[:2])
        frames.append(cv2.resize(read[1], None, fx=scale, fy=scale))
    return frames


def inner(frames):
    finder = SurroundFinder()
    for frame in frames:
        finder.add(frame)
    return finder.inner()


@pytest.fixture(scope="module")
def portrait(tmp_path_factory):
    """A moving picture, 202x360."""
    frames = [cv2.resize(scene(n, pan=n % 7), (640, 360))[:, 219:421] for n in range(0, 60, 5)]
    folder = tmp_path_factory.mktemp("portrait")
    return encode(folder / "portrait.mp4", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18")


def filtered(source, folder, graph: str):
    path = folder / "made.mp4"
    options = ["-filter_complex", graph, "-c:v", "libx264", "-pix_fmt", "yuv420p"]
    subprocess.run([ffmpeg_exe(), "-v", "error", "-y", "-i", source, *options, path], check=True)
    return thumbnails(path)


FILL = "scale=640:-2,crop=640:360"
COPIES = {
    "boxblur": f"{FILL},boxblur=12:2",
    "strong blur": f"{FILL},gblur=sigma=30",
    "dimmed": f"{FILL},boxblur=16,eq=brightness=-0.2:saturation=0.6",
    "mirrored": f"{FILL},hflip,boxblur=12:2",
    "stretched": "scale=640:360,boxblur=12:2",
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("upright", [False, True])
def test_a_blurred_copy_around_the_picture_is_found(portrait, tmp_path, name, upright):
    graph = f"split[a][b];[a]{COPIES[name]}[back];[back][b]overlay=219:0"
    frames = filtered(portrait, tmp_path, graph)
    expected = np.array([219 / 640, 0, 421 / 640, 1])
    if upright:  # a landscape picture in a portrait frame
        frames, expected = [frame.swapaxes(0, 1).copy() for frame in frames], expected[[1, 0, 3, 2]]
    assert inner(frames) == pytest.approx(tuple(expected), abs=1.5 / 256)


NO_COPIES = {
    "the picture alone": "scale=640:360",
    "bars of one colour": "pad=640:360:219:0:gray",
    "bars of a pattern": "[0]null[b];testsrc2=s=640x360:r=30,boxblur=8[back];[back][b]overlay=219:0:shortest=1",
}


@pytest.mark.parametrize("name", NO_COPIES)
def test_other_surrounds_and_none_are_no_copies(portrait, tmp_path, name):
    assert inner(filtered(portrait, tmp_path, NO_COPIES[name])) is None


def wide(n: int) -> np.ndarray:
    return cv2.resize(scene(n), (256, 144))


def stage(n: int) -> np.ndarray:
    """Dark sides that begin at a hard edge."""
    picture = wide(n)
    picture[:, :70] //= 6
    picture[:, -70:] //= 6
    return picture


def curtain(n: int) -> np.ndarray:
    """Folds on both sides, alike and still."""
    picture = wide(n)
    folds = (90 + 40 * np.sin(np.arange(60) / 4)).astype(np.uint8)
    picture[:, :60] = folds[None, :, None]
    picture[:, -60:] = folds[None, ::-1, None]
    return picture


def shallow(n: int) -> np.ndarray:
    """The middle in focus, the background more and more blurred towards the sides."""
    picture = wide(n)
    blurred = cv2.GaussianBlur(picture, (0, 0), 6)
    weight = np.clip((np.abs(np.arange(256) - 128) - 40) / 20, 0, 1)[None, :, None]
    return (picture * (1 - weight) + blurred * weight).astype(np.uint8)


def behind_posts(n: int) -> np.ndarray:
    """Blurred outside two straight posts, as a doorway with frosted panes at its sides."""
    picture = wide(n)
    for part in (slice(0, 80), slice(-80, None)):
        picture[:, part] = cv2.GaussianBlur(picture[:, part], (0, 0), 8)
    picture[:, 78:82] = picture[:, -82:-78] = 20
    return picture


def backdrop(n: int) -> np.ndarray:
    picture = np.full((144, 256, 3), 60, np.uint8)
    cv2.rectangle(picture, (110 + n % 9, 30), (140 + n % 9, 130), (30, 40, 220), -1)
    return picture


def sky(n: int) -> np.ndarray:
    """Bright above, dark below: enlarged, it looks the same."""
    picture = np.repeat(np.linspace(230, 40, 144, dtype=np.uint8)[:, None], 256, 1)[..., None].repeat(3, 2)
    cv2.rectangle(picture, (110 + n % 9, 30), (140 + n % 9, 130), (30, 40, 220), -1)
    return picture


@pytest.mark.parametrize("picture", [wide, stage, curtain, shallow, behind_posts, backdrop, sky])
@pytest.mark.parametrize("upright", [False, True])
def test_what_only_looks_a_little_like_it_is_no_copy(picture, upright):
    frames = [picture(n) for n in range(0, 60, 3)]
    assert inner([frame.swapaxes(0, 1).copy() for frame in frames] if upright else frames) is None


def test_nothing_and_noise_and_small_pictures_have_no_surround():
    assert inner([]) is None
    for shape in ((144, 256, 3), (2, 256, 3), (10, 10, 3)):
        assert inner([np.zeros(shape, np.uint8)] * 3) is None
        assert inner([RNG.integers(0, 255, shape, np.uint8) for _ in range(70)]) is None
