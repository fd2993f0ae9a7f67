"""Pictures of the synthetic world with exact depth for the small teacher; one file per scene, deterministic per seed.

Each scene is the footage of one clip. Its pictures are rendered at twice their size and averaged, as a teacher's
input is averaged down to its tokens. Depth is not averaged: a mean over an edge lies on no surface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curation.files import atomic_path
from curation.pool import run_all
from curation.synthetic.clips import ClipPlan, shoot

SIZES = ((224, 126), (126, 224))  # 16 x 9 patches of 14 pixels
PER_SCENE = 6
_CASES = ("good",) * 5 + ("occluded", "held_object", "truncated_bottom", "small", "two_people", "no_person")
_UPRIGHT = 0.25  # share of good clips


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one size (width, height).

    rgb (N, H, W, 3) uint8; depth_m (N, H, W) float16 metres along the optical axis, 0 where nothing is hit;
    intrinsics (N, 3, 3) float32, pixels.
    """

    rgb: NDArray[np.uint8]
    depth_m: NDArray[np.float16]
    intrinsics: NDArray[np.float32]


def write_scenes(
    folder: Path,
    scenes: int,
    seed: int,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Render the missing ones of scenes seed to seed + scenes - 1. Returns all files in the order of their seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}.npz" for number in range(seed, seed + scenes)]
    missing = [path for path in paths if not path.exists()]
    for done, (_, result) in enumerate(run_all(partial(_write_scene), missing, workers), 1):
        if isinstance(result, BaseException):
            raise result
        if progress:
            progress(done, len(missing))
    return paths


def read_scenes(paths: list[Path]) -> dict[tuple[int, int], Pictures]:
    """All pictures grouped by size, in the order of the files."""
    loaded = [_read(path) for path in paths]
    return {
        size: Pictures(
            *(np.concatenate([getattr(one, name) for one in mine]) for name in ("rgb", "depth_m", "intrinsics"))
        )
        for size in SIZES
        if (mine := [one for one in loaded if one.rgb.shape[2:0:-1] == size])
    }


def scene(seed: int) -> Pictures:
    """PER_SCENE pictures of one clip's footage."""
    rng = np.random.default_rng(seed)
    case = _CASES[int(rng.integers(len(_CASES)))]
    width, height = SIZES[int(case == "good" and rng.random() < _UPRIGHT)]
    footage = shoot(ClipPlan(str(seed), case, int(rng.integers(2**31)), (2 * width, 2 * height), 2, PER_SCENE / 2))
    rgb, depth, intrinsics = [], [], []
    for index in range(len(footage.parts)):
        frame = footage.frame(index, measure=False)
        fine = frame.rendered.rgb.reshape(height, 2, width, 2, 3)
        rgb.append(np.rint(fine.mean((1, 3), dtype=np.float32)).astype(np.uint8))
        depth.append(frame.rendered.depth_m[1::2, 1::2].astype(np.float16))
        intrinsics.append(frame.camera.intrinsics * np.array([0.5, 0.5, 1.0])[:, None])
    return Pictures(np.stack(rgb), np.stack(depth), np.stack(intrinsics).astype(np.float32))


def _write_scene(path: Path) -> None:
    made = scene(int(path.stem))
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, rgb=made.rgb, depth_m=made.depth_m, intrinsics=made.intrinsics)


def _read(path: Path) -> Pictures:
    with np.load(path, allow_pickle=False) as arrays:
        return Pictures(arrays["rgb"], arrays["depth_m"], arrays["intrinsics"])
