"""A contact sheet: a few frames of every clip in a folder, with its true verdict."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.files import atomic_path

TILE = (184, 116)
PER_CLIP, COLUMNS = 3, 3
_COLOURS = {"accept": (96, 200, 110), "reject": (90, 120, 235), "error": (180, 180, 180)}  # BGR


def contact_sheet(folder: Path, target: Path, count: int | None = None, quality: int = 82) -> None:
    """Write a JPEG of the first `count` clips of folder/cases.csv: three frames each, and the true verdict."""
    with (folder / "cases.csv").open(newline="") as stream:
        cases = list(csv.DictReader(stream))[:count]
    strips = [_strip(folder / case["file"], case) for case in cases]
    strips += [np.full_like(strips[0], 255)] * (-len(strips) % COLUMNS)
    rows = [np.hstack(strips[start : start + COLUMNS]) for start in range(0, len(strips), COLUMNS)]
    with atomic_path(target) as temporary:
        cv2.imwrite(str(temporary), np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, quality])


def _strip(path: Path, case: dict[str, str]) -> NDArray[np.uint8]:
    frames = _frames(path)
    picked = [frames[int((i + 0.5) * len(frames) / PER_CLIP)] for i in range(PER_CLIP)] if frames else [None] * PER_CLIP
    strip = np.hstack([_tile(frame) for frame in picked])
    head = np.full((20, strip.shape[1], 3), 38, np.uint8)
    reason = f": {case['first_reason']}" if case["first_reason"] else ""
    text = f"{case['note'].replace('_', ' ')}  -  {case['expected']}{reason}"
    cv2.putText(head, text, (6, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, _COLOURS[case["expected"]], 1, cv2.LINE_AA)
    framed = cv2.copyMakeBorder(np.vstack([head, strip]), 0, 6, 0, 6, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return np.asarray(framed, np.uint8)


def _frames(path: Path) -> list[NDArray[np.uint8]]:
    """All frames as displayed; an empty list for a file that cannot be decoded."""
    capture = cv2.VideoCapture(str(path))
    frames: list[NDArray[np.uint8]] = []
    while True:
        ok, frame = capture.read()
        if not ok:
            return frames
        frames.append(np.asarray(frame, np.uint8))


def _tile(frame: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    tile = np.full((TILE[1], TILE[0], 3), 70, np.uint8)
    if frame is None:
        cv2.putText(tile, "not decodable", (44, 62), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (200, 200, 200), 1, cv2.LINE_AA)
        return tile
    scale = min(TILE[0] / frame.shape[1], TILE[1] / frame.shape[0])
    small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    top, left = (TILE[1] - small.shape[0]) // 2, (TILE[0] - small.shape[1]) // 2
    tile[top : top + small.shape[0], left : left + small.shape[1]] = small
    return tile
