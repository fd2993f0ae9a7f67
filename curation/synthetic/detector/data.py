"""Labelled pictures of the synthetic world for the demo detector: YOLO's folder layout, deterministic per seed.

Framings are those of clips: mostly one large dancer, often cut by a border, small, hidden, or not alone. Frames of
clips are added. Labels are boxes of visible pixels. A picture in which something is tiny or nearly hidden is
discarded, so that everything visible is labelled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.files import atomic_path
from curation.pool import run_all
from curation.render.body import load_body
from curation.synthetic.clips import CASES, ClipPlan, shoot
from curation.synthetic.world.camera import MOVES, Shot, film
from curation.synthetic.world.motion import Place, dance
from curation.synthetic.world.scene import CLASSES, KINDS, Builder, build_scene
from curation.synthetic.world.take import Dancer, Frame, Take, held_ball
from curation.synthetic.world.wardrobe import Dressed, Outfit, dress

PER_SCENE = 12
MIN_SHOWN, MIN_SIDE = 0.30, 0.02
_UNFIT = ("too_short", "corrupt", "letterboxed", "letterbox_truncated")  # few frames, or labels offset from the picture
_BLACK = 12.0  # mean level below which a faded frame shows nothing


def write_pictures(folder: Path, scenes: int, seed: int, workers: int | None = None) -> None:
    """Write scenes * 12 pictures and labels below folder/images and folder/labels."""
    _write(_write_scene, folder, range(seed, seed + scenes), workers)


def write_clip_pictures(folder: Path, clips: int, seed: int, workers: int | None = None) -> None:
    """Write up to 6 frames of each of `clips` clips, as shown, and their labels, into the same folders."""
    _write(_write_clip, folder, range(seed, seed + clips), workers)


def _write(function: Callable[..., None], folder: Path, seeds: range, workers: int | None) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    for _, result in run_all(partial(function, folder=folder), seeds, workers):
        if isinstance(result, BaseException):
            raise result


def _write_scene(seed: int, folder: Path) -> None:
    if (folder / "labels" / f"{seed:06d}_{PER_SCENE - 1:02d}.txt").exists():
        return
    rng = np.random.default_rng(seed)
    people = [dress(Outfit.draw(rng)) for _ in range(6)]
    for index in range(PER_SCENE):
        if index % 6 == 0:
            scene_seed, kind = int(rng.integers(2**31)), str(rng.choice(list(KINDS)))
        frame = _picture(rng, kind, scene_seed, people)
        while not _all_labelled(frame):
            frame = _picture(rng, kind, scene_seed, people)
        _keep(folder, f"{seed:06d}_{index:02d}", _degrade(frame.rendered.rgb, rng), frame, rng)


def _write_clip(seed: int, folder: Path) -> None:
    if any((folder / "labels").glob(f"{seed:06d}_*.txt")):
        return
    rng = np.random.default_rng(seed)
    case = str(rng.choice([case for case in CASES if case not in _UNFIT]))
    upright = case == "rotated" or (case == "good" and rng.random() < 0.3)
    size = (360, 640) if upright else (640, 360)
    footage = shoot(ClipPlan(str(seed), case, int(rng.integers(2**31)), size, 12, 3.0))
    for index in np.linspace(0, len(footage.parts) - 1, 6).round().astype(int).tolist():
        frame = footage.frame(index)
        image = footage.finish(frame.rendered.rgb, index)
        if _all_labelled(frame) and image.mean() > _BLACK:
            image = _degrade(image, rng) if rng.random() < 0.6 else image
            _keep(folder, f"{seed:06d}_{index:02d}", image, frame, rng)


def _keep(folder: Path, name: str, image: NDArray[np.uint8], frame: Frame, rng: np.random.Generator) -> None:
    with atomic_path(folder / "images" / f"{name}.jpg") as temporary:
        quality = int(rng.integers(45, 92))
        cv2.imwrite(str(temporary), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    with atomic_path(folder / "labels" / f"{name}.txt") as temporary:
        temporary.write_text("".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in labels(frame)))


def _all_labelled(frame: Frame) -> bool:
    return len(labels(frame)) == sum(seen.visible is not None for seen in frame.seen)


def labels(frame: Frame) -> list[tuple[int, float, float, float, float]]:
    """(class, centre x, centre y, width, height), as fractions, of everything that a detector should find."""
    width, height = frame.camera.size
    rows = []
    for seen in frame.seen:
        if seen.visible is None or seen.shown < MIN_SHOWN:
            continue
        x0, y0, x1, y1 = seen.visible
        if max((x1 - x0) / width, (y1 - y0) / height) < MIN_SIDE * 2 or min(x1 - x0, y1 - y0) < 4:
            continue
        if seen.name == "person":
            whole = (seen.box[2] - seen.box[0]) * (seen.box[3] - seen.box[1])
            if (x1 - x0) * (y1 - y0) < 0.04 * whole:
                continue
        x, y, w, h = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
        rows.append((CLASSES.index(seen.name), float(x), float(y), float(w), float(h)))
    return rows


def _picture(rng: np.random.Generator, kind: str, scene_seed: int, wearers: list[Dressed]) -> Frame:
    size = (640, 360) if rng.random() < 0.7 else ((360, 640) if rng.random() < 0.6 else (480, 480))
    people = int(rng.choice([0, 1, 2, 3], p=[0.04, 0.70, 0.21, 0.05]))
    yaw = rng.uniform(-0.6, 0.6)
    toward = np.array([np.sin(yaw), np.cos(yaw)])
    across = np.array([toward[1], -toward[0]])

    def furnish(builder: Builder) -> None:
        for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.35, 0.3, 0.25, 0.1]))):
            spot = across * rng.uniform(-2.4, 2.4) + toward * rng.uniform(-1.6, 1.5)
            if np.hypot(*spot) < 0.7:
                spot *= 1.0 / max(np.hypot(*spot), 0.1)
            what = rng.integers(3)
            if what == 0:
                builder.chair(spot[0], spot[1], rng.uniform(-np.pi, np.pi), rng.uniform(0.9, 1.25))
            elif what == 1:
                builder.plant(spot[0], spot[1], rng.uniform(0.9, 1.8))
            else:
                radius = rng.uniform(0.11, 0.22)
                builder.toy_ball(spot[0], radius + rng.choice([0.0, 0.0, 0.8, 1.3]), spot[1], radius)

    scene = build_scene(kind, scene_seed, furnish)
    times = np.array([0.0, 0.1]) + rng.uniform(0, 4)
    dancers = []
    for index in range(max(people, 1)):
        spot = (
            np.zeros(2)
            if index == 0
            else across * rng.choice([-1, 1]) * rng.uniform(0.7, 2) + toward * rng.uniform(-1.6, 0.4)
        )
        place = Place(float(spot[0]), float(spot[1]), yaw + rng.normal(0, 0.8), 0.2)
        motion = dance(load_body(), rng.normal(0, 0.9, 10), times, int(rng.integers(2**31)), place)
        dancers.append(Dancer(wearers[int(rng.integers(len(wearers)))], motion))
    height = rng.choice([rng.uniform(0.45, 0.9), rng.uniform(0.2, 0.45), rng.uniform(0.9, 1.5)], p=[0.74, 0.14, 0.12])
    loose = 0.32 if rng.random() < 0.35 else 0.08
    shot = Shot(
        float(height),
        str(rng.choice(MOVES)),
        yaw,
        float(rng.uniform(0.7, 1.8)),
        float(rng.uniform(32, 62)),
        (float(rng.normal(0, loose)), float(rng.normal(0, loose / 2))),
        int(rng.integers(2**31)),
    )
    first = dancers[0]
    body = first.dressed.pose(first.motion.betas, first.motion.pose[0], first.motion.transl[0])
    cameras = tuple(film(np.repeat(body.vertices[None, ::20], 2, 0), times, times, size, shot))
    held = None
    if people and rng.random() < 0.15:
        held = held_ball(int(rng.integers(2**31)), int(rng.integers(2)))
    return Take(scene, tuple(dancers[:people]), cameras, times, held).frame(0)


def _degrade(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """What cameras, fades and flashes do to a picture."""
    value = image.astype(np.float32) * rng.uniform(0.75, 1.15)
    if rng.random() < 0.10:
        value *= rng.uniform(0.25, 0.7)
    elif rng.random() < 0.08:
        value = value * 0.5 + 255 * rng.uniform(0.3, 0.5)
    if rng.random() < 0.25:
        value = np.asarray(cv2.GaussianBlur(value, (0, 0), rng.uniform(0.5, 1.4)), np.float32)
    if rng.random() < 0.4:
        value = value + rng.normal(0, rng.uniform(2, 7), value.shape)
    value = np.clip(value, 0, 255)
    if rng.random() < 0.08:
        bar = int(image.shape[0] * rng.uniform(0.05, 0.12))
        value[:bar], value[-bar:] = 0, 0
    return value.astype(np.uint8)
