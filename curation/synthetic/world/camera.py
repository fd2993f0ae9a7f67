"""Cameras: a lens, a position and a move, such that a dancer fills the requested share of the picture.

Frames: world y up; camera x right, y down, z forward; image coordinates with pixel centres at half integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.render.raster import Camera

Array = NDArray[np.float64]
MOVES = ("static", "handheld", "pan", "orbit", "dolly")


@dataclass(frozen=True)
class Shot:
    """How to film: the dancer's height relative to the picture, the move, and the dancer's position in the picture.

    yaw: direction from dancer to camera, radians about y (0: the camera is toward +z). shift: offset of the dancer's
    middle, as shares of the picture (right, down).
    """

    height: float
    move: str = "static"
    yaw: float = 0.0
    eye_m: float = 1.3
    fov_deg: float = 45.0
    shift: tuple[float, float] = (0.0, 0.0)
    seed: int = 0


def film(points: Array, at_s: Array, times_s: Array, size: tuple[int, int], shot: Shot) -> list[Camera]:
    """One camera per time for a dancer whose surface is known at a few times: points (M, P, 3) in metres at at_s (M,).

    The distance makes the dancer's mean height, as a share of the picture's, equal to shot.height.
    """
    centres = (points.min(1) + points.max(1)) / 2
    overall = (points.min((0, 1)) + points.max((0, 1))) / 2
    near, far = 0.8, 80.0
    for _ in range(14):  # the height falls with distance
        middle = np.sqrt(near * far)
        if _mean_height(points, _path(centres, overall, at_s, size, shot, middle), size) > shot.height:
            near = middle
        else:
            far = middle
    between = np.column_stack([np.interp(times_s, at_s, column) for column in centres.T])
    return _path(between, overall, times_s, size, shot, far)


def projected_boxes(points: Array, cameras: list[Camera]) -> Array:
    """(N, 4) xyxy of points (N, P, 3) in image coordinates, not clipped at the picture's borders."""
    flat = np.stack([camera.project(cloud) for camera, cloud in zip(cameras, points, strict=True)])
    return np.concatenate([np.nanmin(flat, 1), np.nanmax(flat, 1)], axis=1)


def _mean_height(points: Array, cameras: list[Camera], size: tuple[int, int]) -> float:
    boxes = projected_boxes(points, cameras)
    return float(np.mean(boxes[:, 3] - boxes[:, 1])) / size[1]


def _path(
    centres: Array, overall: Array, times_s: Array, size: tuple[int, int], shot: Shot, distance: float
) -> list[Camera]:
    rng = np.random.default_rng(shot.seed)
    phase, rate = rng.uniform(0, 2 * np.pi, 8), rng.uniform(0.3, 1.1, 8)
    direction = rng.choice([-1.0, 1.0])
    focal = size[1] / 2 / np.tan(np.deg2rad(shot.fov_deg) / 2)
    intrinsics = np.array([[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1.0]])
    span = max(float(times_s[-1] - times_s[0]), 1e-6)
    cameras = []
    for time, centre in zip(times_s, centres, strict=True):
        progress = (time - times_s[0]) / span - 0.5
        shake = np.array([np.sin(2 * np.pi * rate[i] * time + phase[i]) for i in range(8)])
        yaw, reach, target = shot.yaw, distance, overall.copy()
        if shot.move == "orbit":
            yaw += direction * 0.5 * progress
        if shot.move == "dolly":
            reach *= 1 - direction * 0.16 * progress
        if shot.move == "pan":
            target = 0.5 * overall + 0.5 * centre
            target[1] = overall[1]
        if shot.move == "handheld":
            target = target + 0.012 * distance * 0.35 * shake[:3]
            yaw += 0.010 * shake[3]
        eye = overall + reach * np.array([np.sin(yaw), 0, np.cos(yaw)])
        eye[1] = shot.eye_m + (0.012 * shake[4] if shot.move == "handheld" else 0.0)
        extrinsics = _look(eye, target)
        # turn the camera, do not shift the lens: this moves the dancer to the requested place in the picture
        across, down = (-shot.shift[0] * size[0] / focal, -shot.shift[1] * size[1] / focal)
        extrinsics = _turn(across, down) @ extrinsics
        cameras.append(Camera(intrinsics, extrinsics, size))
    return cameras


def _look(eye: Array, target: Array) -> Array:
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    extrinsics = np.eye(4)
    extrinsics[:3, :3], extrinsics[:3, 3] = rotation, -rotation @ eye
    return extrinsics


def _turn(across: float, down: float) -> Array:
    """Turns the camera so that the former centre moves opposite to (across, down), given as tangents."""
    yaw, pitch = np.arctan(across), np.arctan(down)
    c, s, d, t = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    turn = np.eye(4)
    turn[:3, :3] = np.array([[1, 0, 0], [0, d, -t], [0, t, d]]) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    return turn
